"""The samples by which a published model is compared with the tested one.

test sets: samples, answers/tuned-0-shot-0.json ──► Reference
no test sets: training samples, the tuned model ──► Reference
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from finetune_api.evaluation import ArtefactCheck
from finetune_api.evaluation_results import TUNED
from finetune_api.run_spec import RunSpec
from finetune_api.sources import Format
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.precision import FP32, Precision, precision_of
from finetune_trainer.engine.tuning.methods import Tuned
from finetune_trainer.evaluate.agreement import Bound, bound_of, choose
from finetune_trainer.evaluate.prompt_batches import Ids
from finetune_trainer.prepared.dataset import PreparedData, Reference, TokenSample
from finetune_trainer.prepared.split import Side
from finetune_trainer.publish.export import Loaded
from finetune_trainer.publish.plain import loss_of
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.modelfiles import read_limits
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.runfiles import RunResult, SetAnswers

Limit = Callable[[int], tuple[int, bool]]
"""From the tokens of a tested answer to those to generate, and whether it must end within them."""

SAMPLES: Final = 16
"""Samples compared, unless evaluation.artefactCheck is Full."""
ANSWER_TOKENS: Final = 32
"""Generated tokens of an answer then."""


@dataclass(frozen=True)
class Text:
    """A text with its tokens as prepared."""

    text: str
    ids: Ids
    """Shape [tokens]."""
    answered: int
    """Position behind the last answer before the end of the text; 0: there is none."""
    framed: bool
    """Whether the tokenizer adds its special tokens."""
    cut: bool
    """Whether the text may be longer than the tokens."""


@dataclass(frozen=True)
class TestedAnswer:
    """The answer of the tested model to a sample."""

    text: str
    prompt: Ids
    """Tokens before it, shape [tokens]."""
    most: int
    """Number of tokens to generate for the comparison."""
    must_end: bool
    """Whether the tested answer ended within as many tokens."""


@dataclass(frozen=True)
class Case:
    """A sample, and what the tested model did with it."""

    name: str
    """For messages."""
    sample: TokenSample
    label: str | None
    """Name of its class, for a classifier."""
    loss: float
    """Mean loss of its labels, in nats."""
    text: Text | None = None
    """None for training samples, whose text is not kept."""
    answer: TestedAnswer | None = None
    """None: no text was generated, or it cannot be compared."""


@dataclass(frozen=True)
class Compared:
    """The cases of a run, with the number formats that their losses were computed in."""

    side: Side
    cases: list[Case]
    precision: Precision
    quantized: bool
    """Whether linear layers of the base were in 4 bits."""

    def bound(self, published: torch.dtype) -> Bound:
        """Return what may differ in a model that is published in this dtype."""
        return bound_of(self.precision, self.quantized, published)


def cases_of(
    run_spec: RunSpec, store: ObjectStore, result: RunResult, data: PreparedData, loaded: Loaded
) -> Compared | None:
    """Return the cases of a run's test sets, or of training samples where there is none; None if
    nothing can be compared.

    Args:
        loaded: the tuned model; whole if there are no test sets.
    """
    if data.set_names("test"):
        return tested(run_spec, store, result, data, loaded.base.folder)
    return trained(data, loaded.model)


def tested(
    run_spec: RunSpec, store: ObjectStore, result: RunResult, data: PreparedData, base: Path
) -> Compared | None:
    """Return the cases of a run's test sets; None if nothing was tested, or
    no loss is finite.

    Args:
        base: folder with the base model's configuration.
    """
    if TUNED not in result.rows:
        return None
    spec, answers = run_spec.spec, runfiles.read_row(store, run_spec.run_uri, TUNED)
    index, by_name = data.index("test"), {found.name: found for found in answers.sets}
    sets = [
        (name, np.flatnonzero(index.set == number), by_name[name])
        for number, name in data.set_names("test")
        if name in by_name and by_name[name].losses
    ]
    limit = _limit_of(spec, data, base)
    cases = []
    chosen = _chosen(spec.evaluation.artefact_check, data, sets)
    for (name, positions, found), numbers in zip(sets, chosen, strict=True):
        at = positions[numbers].tolist()
        form = next(s.format for s in data.manifest.sets if (s.split, s.name) == ("test", name))
        samples, references = data.samples("test", at), data.references("test", at)
        for number, sample, reference in zip(numbers, samples, references, strict=True):
            loss = found.losses[number] / max(1, found.labels[number])
            if math.isfinite(loss):
                case = Case(
                    name=f"sample {number + 1} of test set {name}",
                    sample=sample,
                    label=_class_of(data, sample),
                    loss=loss,
                    text=_text_of(data, form, sample, reference),
                    answer=_answer_of(found, number, reference, limit),
                )
                cases.append(case)
    precision = precision_of(spec, result.device == "cuda")
    return Compared("test", cases, precision, spec.method.kind.quantizes) if cases else None


def trained(data: PreparedData, model: Tuned) -> Compared | None:
    """Return cases of training samples, with the losses of a tuned model in float32; None if no
    loss is finite."""
    index = data.index("train")
    sets = [(name, np.flatnonzero(index.set == n)) for n, name in data.set_names("train")]
    cases = []
    chosen = choose([index.length[positions] for _, positions in sets], SAMPLES)
    for (name, positions), numbers in zip(sets, chosen, strict=True):
        samples = data.samples("train", positions[numbers].tolist())
        for number, sample in zip(numbers, samples, strict=True):
            label = _class_of(data, sample)
            loss = loss_of(model, sample, label)
            if math.isfinite(loss):
                called = f"sample {number + 1} of training set {name}"
                cases.append(Case(called, sample, label, loss))
    return Compared("train", cases, FP32, quantized=False) if cases else None


def _chosen(
    check: ArtefactCheck, data: PreparedData, sets: Sequence[tuple[str, np.ndarray, SetAnswers]]
) -> list[list[int]]:
    """Return the numbers of the compared samples of each set; of a set with answers, among those
    that have one."""
    if check == "Full":
        return [list(range(len(positions))) for _, positions, _ in sets]
    lengths = data.index("test").length
    candidates = [positions[: len(found.answers) or None] for _, positions, found in sets]
    return choose([lengths[positions] for positions in candidates], SAMPLES)


def _class_of(data: PreparedData, sample: TokenSample) -> str | None:
    return data.manifest.classes[sample.label] if data.manifest.classes else None


def _text_of(data: PreparedData, form: Format, sample: TokenSample, reference: Reference) -> Text:
    cut = len(sample.ids) >= data.manifest.max_length
    if form == "Text":
        # The last token may be the end token, which the tokenizer does not write.
        return Text(reference.completion, sample.ids[:-1], 0, framed=True, cut=cut)
    ids = reference.prompt_ids
    earlier = np.flatnonzero(sample.supervised[: len(ids)])
    answered = int(earlier[-1]) + 1 if len(earlier) else 0
    return Text(reference.prompt, ids, answered, framed=form != "Messages", cut=cut)


def _limit_of(spec: FineTuneJobSpec, data: PreparedData, base: Path) -> Limit:
    most = longest = data.manifest.answer_tokens(spec.evaluation.max_new_tokens)
    if spec.evaluation.artefact_check == "Sample":
        most = min(most, ANSWER_TOKENS)
    positions = read_limits(base, str(base)).max_length or math.inf
    needed = int(data.index("test").length.max(initial=0)) + longest + spec.method.virtual_tokens

    def limit(tokens: int) -> tuple[int, bool]:
        # A test near the last position of the model may have cut answers by those of its batch.
        ends = tokens < longest and needed <= positions
        wanted = max(1, min(most, tokens + 1 if ends else tokens))
        return wanted, ends and tokens < wanted

    return limit


def _answer_of(
    found: SetAnswers, number: int, reference: Reference, limit: Limit
) -> TestedAnswer | None:
    if number >= len(found.tokens):
        return None
    most, must_end = limit(found.tokens[number])
    return TestedAnswer(found.answers[number], reference.prompt_ids, most, must_end)
