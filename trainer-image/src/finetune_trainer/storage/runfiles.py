"""The small files of a run that stages exchange in object storage: see docs/architecture.md.

``prepared.json``, ``memory-profiles.json`` and ``questions.arrow`` (prepare → train),
``base-probabilities.safetensors`` (train → later attempts), ``answers/`` and ``data-curve/`` (train
→ later attempts, publish), ``result.json`` (train → publish), ``judgements/`` and
``evaluation.json`` (publish → its
later tries).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import Field, ValidationError

from finetune_api.base import Record
from finetune_api.evaluation_results import DataCurvePoint, EvaluationResult, Metrics, Row
from finetune_api.judge import JudgedSet
from finetune_api.remedy import RemedyResult
from finetune_api.results import Ancestor, PreparedSummary, TrainSummary
from finetune_trainer.storage.objects import ObjectStore


class CurvePoint(Record):
    """One logged point of the training curve."""

    step: int
    """Optimizer steps done."""
    data_stage: str | None = None
    """Stage of ``data.stages`` that the last step belongs to, if there are stages."""
    loss: float
    """Training loss since the previous point, nats per supervised token."""
    learning_rate: float
    """Learning rate of the last step."""
    gradient_norm: float
    """Norm of the last step's gradient before clipping."""
    by_source: dict[str, float] = Field(default={})
    """Training loss by training set, if there are several."""
    anchor_kl: float | None = None
    """KL(base || tuned), nats per supervised token of replay sets, with training.anchor."""
    router_loss: float | None = None
    """Router loss of a mixture of experts, if it is trained."""


class ValidationPoint(Record):
    """One evaluation on the validation sets."""

    step: int
    """Optimizer steps done."""
    sets: dict[str, Metrics]
    """Metrics by set."""
    overall: Metrics
    """Metrics over all sets: losses by tokens, others by samples."""
    base_kl: float | None = None
    """KL(base || tuned) on the first samples, nats per supervised token: see ``base_kl``. None: a
    classifier, no validation samples, or an earlier trainer."""


class SampleOrigin(Record):
    """Position of a training sample in the prepared data."""

    data_set: str
    """Name of its set."""
    number: int
    """Number in the set, from 1: prepared samples in the order of the data, without records that
    were held out or dropped."""
    shard: str
    """Shard with its tokens, relative to the address of the prepared data."""
    row: int
    """Row in the shard, from 0."""
    where: str | None = None
    """Object and line of its record; None: the data is of an earlier release."""


class SuspectLabel(SampleOrigin):
    """A training sample whose label the model found less likely than those of similar samples, when
    it saw it first."""

    prompt: str
    """End of the prompt, without personal data."""
    label: str
    """Beginning of the (last) answer, without personal data; the class, for classification."""
    loss: float
    """Loss in nats per label, before the model was trained on the sample."""
    usual_loss: float
    """Median loss of the samples of its set that it was compared with."""
    deviation: float
    """Excess over the usual loss, in standard deviations."""


class SuspectLabels(Record):
    """What the first losses of the training samples say about their labels."""

    measured: int
    """Samples that were compared with others."""
    unlikely: int
    """Samples that stand out."""
    threshold: float
    """Deviation from which a sample stands out."""
    samples: list[SuspectLabel]
    """The most deviating samples, the worst first."""


class Reproduced(Record):
    """Answers that the tuned model reproduces word for word from their prompts."""

    samples: int
    """Answers that were compared."""
    reproduced: int
    """Those whose beginning the model reproduces."""

    @property
    def share(self) -> float:
        return self.reproduced / max(1, self.samples)


class Memorisation(Record):
    """What the tuned model has learned by heart."""

    tokens: int
    """Tokens of the beginning of an answer that were compared; of a canary, all."""
    training: Reproduced
    """Of some training samples."""
    held_out: Reproduced
    """Of some validation and test samples."""
    canaries: Reproduced | None = None
    """Of the sets with ``canaries: true``; None: there are none."""


class LabelScores(Record):
    """Log-likelihoods of all labels of a set after the prompts of some samples."""

    labels: list[str]
    """The labels."""
    tokens: list[int]
    """Number of tokens of each label whose log-likelihoods are summed."""
    values: list[list[float]]
    """Log-likelihoods of the labels in nats, for each sample."""

    def at(self, rows: Sequence[int]) -> LabelScores:
        """Those of some of the samples."""
        return self.model_copy(update={"values": [self.values[row] for row in rows]})


class SetAnswers(Record):
    """What a model did with the samples of one test set, with all that a comparison needs."""

    name: str
    """Name of the set."""
    metrics: Metrics = Field(default={})
    """Metrics, where they were computed with the answers."""
    losses: list[float] = Field(default=[])
    """Loss of each sample of the set, summed over its labels; empty where losses were not
    measured."""
    labels: list[int] = Field(default=[])
    """Number of labels of each sample."""
    positions: list[int] = Field(default=[])
    """Positions of the answered samples in the index of the test split; empty: the first ones of
    the set."""
    answers: list[str]
    """Answers to the samples at ``positions``."""
    tokens: list[int] = Field(default=[])
    """Tokens of each answer, without its end; empty for classes."""
    label_scores: LabelScores | None = None
    """Log-likelihoods of the labels after the prompts of the answers; None: not measured."""


class RowAnswers(Record):
    """Answers of one model to the test sets, put to it in one way: a row of the results."""

    row: Row
    """Which."""
    sets: list[SetAnswers]
    """One entry for each test set; for questions, only of sets that have them."""
    process_seconds: float = 0.0
    """Time that it took, over all processes."""
    measured_by: str | None = None
    """Job and run that have measured it; None: this one."""


class SetJudgements(Record):
    """What ``evaluation.judge`` said about a test set."""

    digest: str
    """Of all that the judge was shown."""
    said: JudgedSet
    """In numbers."""
    scores: list[float | None]
    """Score of the tuned model's answer to each of the first samples; None: no verdict."""
    requests: int
    """Requests that were answered."""
    prompt_tokens: int
    """Tokens that were sent."""
    reply_tokens: int
    """Tokens of the replies."""


class PartTraining(Record):
    """A training on a part of the training samples, for ``evaluation.dataCurve``."""

    tries: int
    """Trainings that were begun."""
    point: DataCurvePoint | None = None
    """None: none has ended."""
    sets: list[SetAnswers] = Field(default=[])
    """What the trained model did with the test sets."""


class RunResult(Record):
    """Result of training, read by publish."""

    summary: TrainSummary
    """As in the termination message."""
    lineage: list[Ancestor]
    """Models that the tuned model is derived from, oldest first."""
    curve: list[CurvePoint]
    """Training curve."""
    validation: list[ValidationPoint]
    """Validation metrics during training."""
    rows: list[Row] = Field(default=[])
    """Rows of the results whose answers are in ``answers/``."""
    remedy: RemedyResult | None = None
    """What ``evaluation.remedy`` has chosen."""
    data_curve: list[DataCurvePoint] = Field(default=[])
    """Trainings on parts of the data whose results are in ``data-curve/``, and the run itself;
    empty without ``evaluation.dataCurve``."""
    quarantined: list[SampleOrigin] = Field(default=[])
    """The first samples that rollbacks left out."""
    suspects: SuspectLabels | None = None
    """None: training with an earlier release."""
    memorisation: Memorisation | None = None
    """None: no training sample has a long answer, or as ``suspects``."""
    versions: dict[str, str]
    """Versions of the relevant packages."""
    processes: int
    """Training processes of the attempt that finished."""
    device: str
    """Device of these processes."""


def read_prepared(store: ObjectStore, run_uri: str) -> PreparedSummary:
    """Return the summary of the prepared data that this run uses.

    Raises:
        ObjectNotFound: prepare has not finished.
    """
    return PreparedSummary.model_validate_json(store.get(f"{run_uri}/prepared.json"))


def write_prepared(store: ObjectStore, run_uri: str, summary: PreparedSummary) -> None:
    store.put(f"{run_uri}/prepared.json", _text(summary))


def read_memory_profiles(store: ObjectStore, run_uri: str) -> bytes | None:
    """Return the memory profiles of the model as ``ProfileCache`` writes them; None if absent."""
    uri = f"{run_uri}/memory-profiles.json"
    return store.get(uri) if store.head(uri) else None


def write_memory_profiles(store: ObjectStore, run_uri: str, text: bytes) -> None:
    store.put(f"{run_uri}/memory-profiles.json", text)


def read_base_probabilities(store: ObjectStore, run_uri: str) -> bytes | None:
    """Return what the base model predicted, as ``base_kl.to_bytes`` writes it; None if absent."""
    uri = f"{run_uri}/base-probabilities.safetensors"
    return store.get(uri) if store.head(uri) else None


def write_base_probabilities(store: ObjectStore, run_uri: str, text: bytes) -> None:
    store.put(f"{run_uri}/base-probabilities.safetensors", text)


def known_rows(store: ObjectStore, run_uri: str) -> set[str]:
    """Return the keys of the rows that are answered."""
    names = (info.uri.rpartition("/")[2] for info in store.list(f"{run_uri}/answers/"))
    return {name.removesuffix(".json") for name in names}


def read_row(store: ObjectStore, run_uri: str, row: Row) -> RowAnswers:
    """Return the answers of a row.

    Raises:
        ObjectNotFound: it is not answered.
    """
    return RowAnswers.model_validate_json(store.get(_row_uri(run_uri, row)))


def write_row(store: ObjectStore, run_uri: str, answers: RowAnswers) -> None:
    store.put(_row_uri(run_uri, answers.row), _text(answers))


def _row_uri(run_uri: str, row: Row) -> str:
    return f"{run_uri}/answers/{row.key}.json"


def read_judgements(store: ObjectStore, run_uri: str, name: str) -> SetJudgements | None:
    """Return what the judge said about a set; None: it was not asked, or by another release."""
    uri = f"{run_uri}/judgements/{name}.json"
    if not store.head(uri):
        return None
    try:
        return SetJudgements.model_validate_json(store.get(uri))
    except ValidationError:
        return None


def write_judgements(store: ObjectStore, run_uri: str, name: str, said: SetJudgements) -> None:
    store.put(f"{run_uri}/judgements/{name}.json", _text(said))


def read_part(store: ObjectStore, run_uri: str, share: float) -> PartTraining:
    """Return what is known of the training on a share of the training samples."""
    uri = _part_uri(run_uri, share)
    if not store.head(uri):
        return PartTraining(tries=0)
    return PartTraining.model_validate_json(store.get(uri))


def write_part(store: ObjectStore, run_uri: str, share: float, part: PartTraining) -> None:
    store.put(_part_uri(run_uri, share), _text(part))


def _part_uri(run_uri: str, share: float) -> str:
    return f"{run_uri}/data-curve/{100 * share:g}.json"


def read_evaluation(store: ObjectStore, run_uri: str) -> EvaluationResult:
    """Return the results on the test sets; none where an earlier trainer has published."""
    uri = f"{run_uri}/evaluation.json"
    if not store.head(uri):
        return EvaluationResult(sets=[])
    return EvaluationResult.model_validate_json(store.get(uri))


def write_evaluation(store: ObjectStore, run_uri: str, result: EvaluationResult) -> None:
    store.put(f"{run_uri}/evaluation.json", _text(result))


def read_result(store: ObjectStore, run_uri: str) -> RunResult:
    """Return the result of training.

    Raises:
        ObjectNotFound: training has not finished.
    """
    return RunResult.model_validate_json(store.get(f"{run_uri}/result.json"))


def write_result(store: ObjectStore, run_uri: str, result: RunResult) -> None:
    store.put(f"{run_uri}/result.json", _text(result))


def _text(model: Record) -> bytes:
    return (json.dumps(model.to_json(), ensure_ascii=False, indent=1) + "\n").encode()
