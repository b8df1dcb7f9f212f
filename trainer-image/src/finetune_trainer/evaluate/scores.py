"""Metrics of generated text against references, computed by the packages that papers cite.

All functions are pure. Leading and trailing white space is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from finetune_api.results import Metrics
from finetune_api.tasks import METRICS, Metric, metrics_from

GENERATED: Final[frozenset[Metric]] = frozenset(metrics_from("Labels", "Text"))
"""Metrics that need generated text, of a task that generates."""


def better(metric: Metric, new: float, old: float, min_delta: float = 0.0) -> bool:
    """Whether ``new`` improves on ``old`` by more than ``min_delta``; NaN improves on nothing."""
    if math.isnan(new):
        return False
    if math.isnan(old):
        return True
    return new > old + min_delta if METRICS[metric].higher_is_better else new < old - min_delta


def loss_metrics(loss_sum: float, tokens: float) -> Metrics:
    """Return the loss (nats per supervised token) and the perplexity, its exponential."""
    loss = loss_sum / tokens if tokens else math.nan
    return {"Loss": loss, "Perplexity": math.exp(min(loss, 700.0))}


@dataclass(frozen=True)
class Answers:
    """Generated text of one data set, with its references."""

    predictions: Sequence[str]
    """Generated text of each sample."""
    references: Sequence[str]
    """Completion of each sample."""
    labels: Sequence[str] | None
    """Label of each sample; None if the format is not Classification."""


def text_metrics(answers: Answers, wanted: Sequence[Metric]) -> Metrics:
    """Return the requested metrics of generated text.

    - ExactMatch: fraction of answers equal to the reference.
    - Accuracy, Precision, Recall, F1: scikit-learn, macro average over the labels that occur in
      the references; an answer that is none of these labels is wrong for every label.
    - Bleu: sacrebleu corpus BLEU, 0 to 100 (Post 2018).
    - Rouge: mean F1 of ROUGE-L with stemming, 0 to 1 (Lin 2004).
    """
    found = {}
    for metric in wanted:
        if metric in _TEXT:
            found[metric] = _TEXT[metric](answers)
        elif metric in _LABEL and answers.labels is not None:
            found[metric] = _LABEL[metric](answers.labels, _as_labels(answers))
    return {str(name): value for name, value in found.items()}


def _as_labels(answers: Answers) -> list[str]:
    known = set(answers.labels or ())
    said = [p.strip() for p in answers.predictions]
    return [s if s in known else "(none of the labels)" for s in said]


def _exact_match(answers: Answers) -> float:
    pairs = zip(answers.predictions, answers.references, strict=True)
    return _mean([p.strip() == r.strip() for p, r in pairs])


def _bleu(answers: Answers) -> float:
    import sacrebleu

    predictions = [p.strip() for p in answers.predictions]
    references = [r.strip() for r in answers.references]
    return float(sacrebleu.corpus_bleu(predictions, [references]).score)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Callable[[str, str], float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda reference, prediction: float(
        scorer.score(reference, prediction)["rougeL"].fmeasure
    )


def _rouge(answers: Answers) -> float:
    score = _rouge_scorer()
    pairs = zip(answers.references, answers.predictions, strict=True)
    return _mean([score(r.strip(), p.strip()) for r, p in pairs])


def _accuracy(labels: Sequence[str], predicted: Sequence[str]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predicted))


def _macro(index: int) -> Callable[[Sequence[str], Sequence[str]], float]:
    def score(labels: Sequence[str], predicted: Sequence[str]) -> float:
        from sklearn.metrics import precision_recall_fscore_support

        scores = precision_recall_fscore_support(
            labels, predicted, labels=sorted(set(labels)), average="macro", zero_division=0.0
        )
        return float(scores[index])

    return score


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


_TEXT: Final[dict[Metric, Callable[[Answers], float]]] = {
    "ExactMatch": _exact_match,
    "Bleu": _bleu,
    "Rouge": _rouge,
}
_LABEL: Final[dict[Metric, Callable[[Sequence[str], Sequence[str]], float]]] = {
    "Accuracy": _accuracy,
    "Precision": _macro(0),
    "Recall": _macro(1),
    "F1": _macro(2),
}
