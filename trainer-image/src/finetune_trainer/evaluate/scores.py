"""Metrics of generated text against references, computed by the packages that papers cite.

All functions are pure. Leading and trailing white space is ignored.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from finetune_api.evaluation_results import Metrics
from finetune_api.tasks import METRICS, Metric, metrics_from
from finetune_trainer.evaluate import extraction, label_scores
from finetune_trainer.instructions.checks import follows, has_instructions
from finetune_trainer.prepared.dataset import Reference
from finetune_trainer.storage.runfiles import LabelScores

OF_LOSS: Final = frozenset(metrics_from("Loss"))
Scores = Mapping[str, Sequence[float | None]]
"""Scores that something outside of the trainer has given to some answers, by metric, one for each
answer; None: not given."""


def need_answers(metrics: Iterable[str]) -> bool:
    """Whether one of the metrics needs generated text, or the likelihoods of labels beside it, of a
    task that generates."""
    return any(metric not in OF_LOSS for metric in metrics)


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
    prompts: Sequence[str] = ()
    """Prompt of each sample; empty: not known."""
    label_scores: LabelScores | None = None
    """Log-likelihoods of the labels after the prompt of each sample; None: not known."""
    scores: Scores = field(default_factory=dict)
    """Scores of the answers, by metric."""

    def allow(self, metric: str) -> bool:
        """Whether a metric of generated text is defined for these samples."""
        if metric not in METRICS:
            return metric in self.scores
        source = METRICS[metric].source
        if source == "Labels":
            return self.labels is not None
        if source == "LabelScores":
            return self.labels is not None and self.label_scores is not None
        if source == "Instructions":
            return bool(self.prompts) and all(map(has_instructions, self.prompts))
        return True


def answers_to(
    references: Sequence[Reference],
    predictions: Sequence[str],
    label_scores: LabelScores | None = None,
    scores: Scores | None = None,
) -> Answers:
    """Answers to prompts, with their references."""
    labels = [r.label for r in references]
    return Answers(
        predictions,
        [r.completion for r in references],
        [x or "" for x in labels] if all(x is not None for x in labels) else None,
        [r.prompt for r in references],
        label_scores,
        scores or {},
    )


def text_metrics(answers: Answers, wanted: Sequence[str]) -> Metrics:
    """Return the requested metrics of generated text, as far as the trainer computes them.

    - ExactMatch: fraction of answers equal to the reference.
    - Accuracy: fraction of answers equal to the label.
    - Precision, Recall, F1: scikit-learn, macro average over the labels that occur in the
      references; an answer that is none of these labels is wrong for every label.
    - Bleu: sacrebleu corpus BLEU, 0 to 100 (Post 2018). ChrF: its chrF2 (Popović 2015).
    - Rouge, Rouge1, Rouge2: mean F1 of ROUGE-L, -1 and -2 with stemming, 0 to 1 (Lin 2004).
    - NormalizedExactMatch, TokenF1: without case, punctuation and articles, as in SQuAD (Rajpurkar
      et al. 2016).
    - ValidJson: fraction of answers that are one JSON value.
    - InstructionFollowing: fraction of answers that follow every verifiable instruction of their
      prompt (prompt-level accuracy of IFEval; Zhou et al. 2023).
    - LabelAccuracy, LabelAccuracyPerToken, LabelAccuracyPerCharacter, CalibrationError: see
      ``label_scores``.
    - NumberMatch, StrictNumberMatch, ChoiceMatch, JsonMatch, JsonFieldF1: see ``extraction``.
    """
    found = {}
    for metric in wanted:
        if not answers.allow(metric):
            continue
        if metric in BY_SAMPLE:
            found[metric] = _mean(BY_SAMPLE[metric](answers))
        elif metric in _OF_SET:
            found[metric] = _OF_SET[metric](answers)
    return found


def _as_labels(answers: Answers) -> list[str]:
    known = set(answers.labels or ())
    said = [p.strip() for p in answers.predictions]
    return [s if s in known else "(none of the labels)" for s in said]


def _by_pair(score: Callable[[str, str], float]) -> Callable[[Answers], list[float]]:
    def scores(answers: Answers) -> list[float]:
        pairs = zip(answers.predictions, answers.references, strict=True)
        return [float(score(p, r)) for p, r in pairs]

    return scores


def _exact_match(said: str, wanted: str) -> bool:
    return said.strip() == wanted.strip()


def bleu_statistics(answers: Answers) -> list[list[int]]:
    """Return sacrebleu's counts of each answer, whose sums give the corpus BLEU: matching n-grams
    for n = 1 to 4, n-grams of the answer, length of the answer and of the reference."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)  # without it a single sentence logs a warning
    found = (
        bleu.sentence_score(p.strip(), [r.strip()])
        for p, r in zip(answers.predictions, answers.references, strict=True)
    )
    return [[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in found]


def bleu_of(sums: Sequence[float]) -> float:
    """Return the corpus BLEU, 0 to 100, of the sums of ``bleu_statistics``."""
    from sacrebleu.metrics.bleu import BLEU

    counts = [round(x) for x in sums]
    matching, total, (said, wanted) = counts[:4], counts[4:8], counts[8:]
    return float(BLEU.compute_bleu(matching, total, said, wanted, smooth_method="exp").score)


def chrf_statistics(answers: Answers) -> list[list[int]]:
    """Return sacrebleu's counts of each answer, whose sums give the corpus chrF2."""
    predictions = [p.strip() for p in answers.predictions]
    references = [r.strip() for r in answers.references]
    # sacrebleu's own significance tests call the same two methods; there are no public ones.
    found: list[list[int]] = _chrf()._extract_corpus_statistics(predictions, [references])
    return found


def chrf_of(sums: Sequence[float]) -> float:
    """Return the corpus chrF2, 0 to 100, of the sums of ``chrf_statistics``."""
    return float(_chrf()._compute_score_from_stats([round(x) for x in sums]).score)


@lru_cache(maxsize=1)
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def _of_corpus(metric: str) -> Callable[[Answers], float]:
    def score(answers: Answers) -> float:
        import sacrebleu

        predictions = [p.strip() for p in answers.predictions]
        references = [r.strip() for r in answers.references]
        return float(getattr(sacrebleu, f"corpus_{metric}")(predictions, [references]).score)

    return score


def _rouge(kind: str) -> Callable[[Answers], list[float]]:
    def scores(answers: Answers) -> list[float]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=True)
        pairs = zip(answers.references, answers.predictions, strict=True)
        return [float(scorer.score(r.strip(), p.strip())[kind].fmeasure) for r, p in pairs]

    return scores


def _normalized(text: str) -> list[str]:
    """The words of a text without case, punctuation and English articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _normalized_exact_match(said: str, wanted: str) -> bool:
    return _normalized(said) == _normalized(wanted)


def _token_f1(said: str, wanted: str) -> float:
    return _f1_of_words(_normalized(said), _normalized(wanted))


def _f1_of_words(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def _valid_json(answers: Answers) -> list[float]:
    return [float(extraction.is_json(p)) for p in answers.predictions]


def _accuracy(answers: Answers) -> list[float]:
    pairs = zip(answers.labels or (), answers.predictions, strict=True)
    return [float(p.strip() == label) for label, p in pairs]


def _macro(index: int) -> Callable[[Answers], float]:
    def score(answers: Answers) -> float:
        from sklearn.metrics import precision_recall_fscore_support

        labels = answers.labels or ()
        scores = precision_recall_fscore_support(
            labels, _as_labels(answers), labels=sorted(set(labels)), average="macro",
            zero_division=0.0,
        )  # fmt: skip
        return float(scores[index])

    return score


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _instruction_following(answers: Answers) -> list[float]:
    pairs = zip(answers.prompts, answers.predictions, strict=True)
    return [float(bool(follows(prompt, said))) for prompt, said in pairs]


def _label_accuracy(metric: Metric) -> Callable[[Answers], list[float]]:
    def scores(answers: Answers) -> list[float]:
        assert answers.label_scores is not None, "see Answers.allow"
        said = label_scores.chosen(answers.label_scores, metric)
        return [float(s == label) for s, label in zip(said, answers.labels or (), strict=True)]

    return scores


def calibration_statistics(answers: Answers) -> list[list[float]]:
    """See ``label_scores``."""
    assert answers.label_scores is not None, "see Answers.allow"
    return label_scores.calibration_statistics(answers.label_scores, answers.labels or ())


def _calibration_error(answers: Answers) -> float:
    columns = zip(*calibration_statistics(answers), strict=True)
    return label_scores.calibration_error([sum(column) for column in columns])


BY_SAMPLE: Final[dict[str, Callable[[Answers], list[float]]]] = {
    "ExactMatch": _by_pair(_exact_match),
    "Rouge": _rouge("rougeL"),
    "Rouge1": _rouge("rouge1"),
    "Rouge2": _rouge("rouge2"),
    "NormalizedExactMatch": _by_pair(_normalized_exact_match),
    "TokenF1": _by_pair(_token_f1),
    "ValidJson": _valid_json,
    "NumberMatch": _by_pair(extraction.number_match),
    "StrictNumberMatch": _by_pair(extraction.strict_number_match),
    "ChoiceMatch": _by_pair(extraction.choice_match),
    "JsonMatch": _by_pair(extraction.json_match),
    "JsonFieldF1": _by_pair(extraction.json_field_f1),
    "Accuracy": _accuracy,
    "InstructionFollowing": _instruction_following,
    **{metric: _label_accuracy(metric) for metric in label_scores.CHOOSING},
}
"""Metrics that are the mean of a value of each sample, and that value."""
_OF_SET: Final[dict[str, Callable[[Answers], float]]] = {
    "Bleu": _of_corpus("bleu"),
    "ChrF": _of_corpus("chrf"),
    "Precision": _macro(0),
    "Recall": _macro(1),
    "F1": _macro(2),
    "CalibrationError": _calibration_error,
}
