"""The small files of a run in object storage, between the stages: see docs/architecture.md.

``prepared.json`` and ``memory-profiles.json`` (prepare → train), ``baseline.json`` (train → train
of a later attempt) and ``result.json`` (train → publish).
"""

from __future__ import annotations

import json

from pydantic import Field

from finetune_api.base import Record
from finetune_api.results import Ancestor, Metrics, PreparedSummary, TrainSummary
from finetune_trainer.storage.objects import ObjectStore


class CurvePoint(Record):
    """One log point of the training."""

    step: int
    """Optimizer steps done."""
    data_stage: str | None = None
    """Name of the stage of ``data.stages`` that the last step belongs to, where there are some."""
    loss: float
    """Training loss per supervised token since the point before, nats."""
    learning_rate: float
    """Learning rate of the last step."""
    gradient_norm: float
    """Norm of the last step's gradient before clipping."""
    by_source: dict[str, float] = Field(default={})
    """Training loss by training set, where there are several."""
    anchor_kl: float | None = None
    """Divergence from the untuned model per supervised token of replay sets, where it is held."""
    router_loss: float | None = None
    """Router loss of a mixture of experts, where it is trained."""


class ValidationPoint(Record):
    """One evaluation on the validation sets."""

    step: int
    """Optimizer steps done."""
    sets: dict[str, Metrics]
    """Metrics by set."""
    overall: Metrics
    """Metrics over all sets: losses by tokens, others by samples."""


class Example(Record):
    """One test sample with what the two models answer."""

    prompt: str
    """What both read."""
    reference: str
    """The right answer."""
    base: str
    """Answer of the model as it was."""
    tuned: str
    """Answer of the tuned model."""


class SampleOrigin(Record):
    """Where a training sample is found."""

    data_set: str
    """Name of its set."""
    number: int
    """Its number in the set, from 1: prepared samples are counted in the order of the data, without
    records that were held out or left out."""
    shard: str
    """File below the address of the prepared data that has its tokens."""
    row: int
    """Row in that file, from 0."""


class SetBaseline(Record):
    """BaseLogits scores of one test set, and its first answers."""

    name: str
    """Name of the set."""
    samples: int
    """Samples measured."""
    metrics: Metrics
    """Scores."""
    answers: list[str]
    """Answers to the first prompts, for the report."""


class Baseline(Record):
    """What the untuned model scores; measured once a run."""

    sets: list[SetBaseline]
    """By test set."""


class RunResult(Record):
    """What the gang leaves for publish."""

    summary: TrainSummary
    """As in the termination message."""
    lineage: list[Ancestor]
    """What the model is made from, the first base model first."""
    curve: list[CurvePoint]
    """Training loss."""
    validation: list[ValidationPoint]
    """Validation on the way."""
    examples: dict[str, list[Example]]
    """Some answers by test set."""
    quarantined: list[SampleOrigin] = Field(default=[])
    """The first of the samples that were left out when the run went back."""
    versions: dict[str, str]
    """Versions of the packages that matter."""
    processes: int
    """Processes of the attempt that finished."""
    device: str
    """What they ran on."""


def read_prepared(store: ObjectStore, run_uri: str) -> PreparedSummary:
    """Which data this run uses.

    Raises:
        ObjectNotFound: where prepare has not ended.
    """
    return PreparedSummary.model_validate_json(store.get(f"{run_uri}/prepared.json"))


def write_prepared(store: ObjectStore, run_uri: str, summary: PreparedSummary) -> None:
    store.put(f"{run_uri}/prepared.json", _text(summary))


def read_memory_profiles(store: ObjectStore, run_uri: str) -> bytes | None:
    """What was measured of the model, as ``engine.rehearsals`` writes it; None where it is not
    there."""
    uri = f"{run_uri}/memory-profiles.json"
    return store.get(uri) if store.head(uri) else None


def write_memory_profiles(store: ObjectStore, run_uri: str, text: bytes) -> None:
    store.put(f"{run_uri}/memory-profiles.json", text)


def read_baseline(store: ObjectStore, run_uri: str) -> Baseline | None:
    """The untuned scores, or None where they were not measured yet."""
    uri = f"{run_uri}/baseline.json"
    return Baseline.model_validate_json(store.get(uri)) if store.head(uri) else None


def write_baseline(store: ObjectStore, run_uri: str, baseline: Baseline) -> None:
    store.put(f"{run_uri}/baseline.json", _text(baseline))


def read_result(store: ObjectStore, run_uri: str) -> RunResult:
    """What train left.

    Raises:
        ObjectNotFound: where train has not ended.
    """
    return RunResult.model_validate_json(store.get(f"{run_uri}/result.json"))


def write_result(store: ObjectStore, run_uri: str, result: RunResult) -> None:
    store.put(f"{run_uri}/result.json", _text(result))


def _text(model: Record) -> bytes:
    return (json.dumps(model.to_json(), ensure_ascii=False, indent=1) + "\n").encode()
