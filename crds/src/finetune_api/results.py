"""Reports of the trainer: ``/progress``, the termination message, and ``metrics.json``.

Numbers are plain JSON numbers here; the operator writes fractions to status as strings.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from finetune_api.base import NonNegativeCount as Count
from finetune_api.base import Record, Uri, Word
from finetune_api.evaluation_results import DataSetScores
from finetune_api.names import Role
from finetune_api.time_use import TimeUse

TERMINATION_LIMIT: Final = 4096
"""Maximum bytes of a termination message in Kubernetes."""


# Bounds of what status can hold: the image of a pod may be the user's own, and report anything.
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]

StartupPart = Literal[
    "launch", "import", "rendezvous", "data", "model", "restore", "baseline", "compile", "step"
]
"""Parts of an attempt until the end of its first optimizer step, in order: torchrun starts and the
nodes find each other; a worker imports its libraries; the processes form the process group and
claim the run; they open the data and plan; fetch the model, estimate its memory, load and shard it;
read the newest checkpoint; evaluate the base model; compile blocks (with training.compile); take
the step."""


class Startup(Record):
    """Startup times of an attempt, as measured by rank 0; waiting for another process counts
    towards the part in which rank 0 waited."""

    seconds: dict[StartupPart, Seconds]
    """Seconds by part. There are no gaps between parts: their sum is the time from the start of the
    node's training processes to the end of the first step."""
    from_step: Count
    """Steps done before: above 0 if the attempt continued from a checkpoint."""
    first_step: Seconds
    """Unix time at the end of the first step."""

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    @property
    def text(self) -> str:
        """Readable form: ``21.4 s (launch 3.1, import 9.0, …)``."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{self.total:.1f} s ({parts})"


class Progress(Record):
    """``GET /progress`` of rank 0."""

    run: str
    """ID of the run; IP addresses are reused, so a reader must compare it."""
    attempt: Count
    """Attempt that claimed the run's HEAD, from 1."""
    restarts: Count
    """Attempts that took over from one that did not end by itself."""
    stage: Literal["Loading", "Baseline", "Training", "Evaluating", "Saving", "Testing", "Done"]
    """Current activity of the gang."""
    nodes: Count | None = None
    """Nodes that train in this attempt; fewer than compute.nodes in an elastic gang that has lost
    some. None: an older trainer."""
    step: Count = 0
    """Optimizer steps done."""
    total_steps: Count = 0
    """Optimizer steps of the run."""
    epoch: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    """Passes over the training data done."""
    data_stage: Word | None = None
    """Name of the stage of data.stages that the last step belongs to, if there are stages."""
    loss: float | None = None
    """Training loss per supervised token (nats), mean since the last log point."""
    by_source: Annotated[dict[Word, float], Field(max_length=64)] = {}
    """The same by training set, if there are several."""
    anchor_kl: float | None = None
    """KL(base || tuned) per supervised token of replay sets (nats), mean since the last log point,
    if training.anchor enables it; not included in ``loss``."""
    base_kl: float | None = None
    """KL(base || tuned) per supervised token of the first validation samples (nats), at the last
    evaluation; None: not measured."""
    router_loss: float | None = None
    """Load-balancing loss of experts, before its coefficient, mean since the last log point, if
    training.routerAuxLossCoefficient enables it; not included in ``loss``."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    tokens_per_second: float | None = None
    """Real (non-padding) tokens trained per second, over all ranks."""
    mfu: float | None = None
    """Model FLOPs utilization: FLOPs on real tokens over the devices' peak, if known."""
    data_wait_share: float | None = None
    """Share of the step time since the last log point in which rank 0 waited for data."""
    remaining_seconds: Seconds | None = None
    """Expected time to the end of training."""
    latest_checkpoint: Uri | None = None
    """URI of the newest checkpoint."""
    best_checkpoint: Uri | None = None
    """URI of the best checkpoint."""
    save_seconds: Seconds = 0.0
    """Longest time of a checkpoint of this attempt, from its begin until HEAD names it."""
    checkpoints_abandoned: Count = 0
    """Checkpoints of this attempt that could not be written; training continued without them."""
    time: TimeUse | None = None
    """How the run's attempts have spent their time so far."""
    startup: Startup | None = None
    """Startup times of the attempt, once its first step is done."""
    updated: Seconds = 0.0
    """Unix time of this state."""


class Failure(Record):
    """Failure of a container."""

    failure_class: Word = Field(alias="class")
    """Failure class, one of ``FailureClass``; a trainer of another release may know more."""
    reason: Word
    """CamelCase word for scripts, e.g. MalformedRecord."""
    message: str
    """What happened, where, and what to do, for users."""
    retryable: bool = False
    """Whether a retry can succeed."""


class MemoryEstimate(Record):
    """Estimated memory of a training process."""

    needed: Count
    """Bytes, sum of all parts."""
    available: Count | None = None
    """Bytes that a process has, if the manifest gives them."""
    sharding: Literal["NoShard", "HybridShard", "FullShard"]
    """How the model will be distributed over the processes."""
    gradient_checkpointing: bool
    """Whether activations will be recomputed."""
    parts: dict[str, int]
    """Bytes by part."""
    warning: str | None = None
    """If the training may not fit: by how much, and which settings would fit."""


class StagePlan(Record):
    """A stage of the training, as planned by prepare."""

    name: str
    """Name in data.stages."""
    steps: Count
    """Optimizer steps of the stage."""
    mixture: dict[str, float]
    """Share of the trained tokens by training set; only sets of the stage."""

    @property
    def mixture_text(self) -> str:
        """Readable form: ``notes 75 %, code 25 %``."""
        return ", ".join(f"{name} {100 * share:.3g} %" for name, share in self.mixture.items())


class PreparedSummary(Record):
    """Summary of prepare."""

    digest: Word
    """Content digest of the prepared data."""
    uri: Uri
    """URI of the prepared data."""
    reused: bool
    """Whether the prepared data existed already."""
    train_samples: Count
    """Samples to train on."""
    validation_samples: Count
    """Samples held out for validation."""
    test_samples: Count
    """Samples held out for the test."""
    retention_samples: Count = 0
    """Samples of the retention sets."""
    train_tokens: Count
    """Tokens of the training samples."""
    supervised_tokens: Count
    """Supervised tokens of the training samples."""
    dropped: dict[str, int] = {}
    """Number of dropped records by cause."""
    total_steps: Count
    """Optimizer steps of the training; 0: nothing is trained."""
    stages: list[StagePlan] = []
    """Stages of the training, if data.stages is given."""
    memory: MemoryEstimate | None = None
    """Memory estimate of the training."""


class TrainSummary(Record):
    """Summary of the training."""

    attempt: Count
    """Attempt that finished."""
    restarts: Count
    """Number of restarts."""
    steps: Count
    """Optimizer steps done."""
    stopped_early: bool = False
    """Whether early stopping ended the training."""
    loss: float | None = None
    """Last training loss."""
    checkpoint: Uri | None = None
    """URI of the checkpoint chosen for publishing."""
    checkpoint_step: Count | None = None
    """Step of that checkpoint."""
    trainable_parameters: Count = 0
    """Number of trained parameters."""
    total_parameters: Count = 0
    """Number of parameters of the model, including those added by the method."""
    scores: list[DataSetScores] = []
    """Test metrics by data set; the first to be cut from a termination message that is too long.
    Publish adds the comparisons."""
    training_seconds: Seconds = 0.0
    """Wall time of all attempts."""
    time: TimeUse | None = None
    """How the attempts have spent their time."""
    tokens: Count = 0
    """Real (non-padding) tokens trained on; divided by training_seconds: the goodput."""
    skipped_steps: Count = 0
    """Steps whose update was skipped (see training.guard)."""
    rollbacks: Count = 0
    """Number of rollbacks to an earlier checkpoint."""
    quarantined_samples: Count = 0
    """Training samples that rollbacks excluded."""
    startup: Startup | None = None
    """Startup times of the attempt that finished; absent if it had no step left to do."""


class Ancestor(Record):
    """A model that a tuned model derives from. A lineage is a list of ancestors that starts with
    the original base model, of which only the URI is known."""

    uri: Uri
    """URI of a model folder or of a run's published model."""
    job: str | None = None
    """Job that published the model."""
    run: str | None = None
    """Run that published the model."""
    digest: Word | None = None
    """sha256 of the model's manifest."""
    method: str | None = None
    """Tuning method of that run (`spec.method.type`)."""
    formats: list[str] = []
    """Published formats: adapter, merged."""


class MainResult(Record):
    """What the tuned model gained on the first test set, by the metric that compares its rows; or
    without training, the value of the base model."""

    data_set: Word
    """Name of the test set."""
    metric: Word
    """Name of the metric."""
    value: Word | None = None
    """Value of the tuned model, or without training of the base model, with its 95 % interval:
    ``52.0 % (45, 59)``. None: an earlier trainer."""
    verdict: Word | None = None
    """``Verdict`` of the comparison with the base model; None: nothing was trained."""
    gain: Word | None = None
    """Gain over the base model with its 95 % interval: ``+47.5 % (20, 60)``; None as verdict."""
    current_gap: float | None = None
    """Value minus that of the model in use before, over the same samples. None: none was compared.
    """


class PublishSummary(Record):
    """Summary of publish."""

    uri: Uri
    """URI of the published model, or of the results of a run that trains nothing."""
    digest: Word
    """sha256 of its manifest."""
    formats: Annotated[list[Word], Field(max_length=8)]
    """Published formats: adapter, merged; empty without a model."""
    bytes: Count
    """Size of all published files."""
    full_copy_bytes: Count = 0
    """Size of a full model's weights in the dtype of the base."""
    scores: list[DataSetScores] = []
    """Test metrics with their comparisons; cut as those of TrainSummary."""
    main_result: MainResult | None = None
    """The main result; None: no test set, or nothing to compare it with."""
    recommendation: Annotated[str, Field(max_length=1024)] | None = None
    """What the test sets recommend, in words."""
    overfitting: Annotated[str, Field(max_length=1024)] | None = None
    """Warning, if the validation loss rose while the training loss fell."""
    remedy: Annotated[str, Field(max_length=1024)] | None = None
    """What evaluation.remedy has chosen, in words. None: it is not given."""
    suspect_labels: Annotated[str, Field(max_length=1024)] | None = None
    """Hint, if labels of training samples stand out as unlikely."""
    held: Annotated[str, Field(max_length=1024)] | None = None
    """Which gates the run missed, or how the current model is better, with figures. None: the run
    is not held."""
    became_current: bool | None = None
    """Whether the run became the current model (CURRENT.json names it). None: output.current is
    not given."""


class Termination(Record):
    """The termination message of a container, at most 4 KiB of JSON."""

    run: str
    """ID of the run."""
    role: Role
    """Stage."""
    failure: Failure | None = None
    """The failure; absent after success."""
    prepared: PreparedSummary | None = None
    """Summary of prepare."""
    trained: TrainSummary | None = None
    """Summary of train."""
    published: PublishSummary | None = None
    """Summary of publish."""
    time: TimeUse | None = None
    """How the attempts have spent their time, if training has failed."""

    def to_text(self) -> str:
        """Return JSON of at most TERMINATION_LIMIT bytes. If it is too long, parts are cut in this
        order: comparisons and scores (kept in metrics.json), causes of dropped records (kept in the
        data report), stages (kept in prepared.json), the middle of the failure message."""
        raw = self.to_json()
        if _fits(raw):
            return _compact(raw)
        stages = [raw.get(stage, {}) for stage in ("trained", "published")]
        for scores in (scores for stage in stages for scores in stage.get("scores", ())):
            scores.pop("comparisons", None)
        if not _fits(raw):
            for stage in stages:
                stage.pop("scores", None)
        if not _fits(raw):
            raw.get("prepared", {}).pop("dropped", None)
        if not _fits(raw):
            raw.get("prepared", {}).pop("stages", None)
        message = raw.get("failure", {}).get("message", "")
        keep = len(message) // 2
        while not _fits(raw) and keep > 0:
            keep = keep * 3 // 4
            raw["failure"]["message"] = f"{message[:keep]} … {message[len(message) - keep :]}"
        return _compact(raw)


def _fits(raw: Any) -> bool:
    return len(_compact(raw).encode()) <= TERMINATION_LIMIT


def _compact(raw: Any) -> str:
    # File names may hold surrogates (invalid UTF-8); they must not break the termination message.
    text = json.dumps(raw, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="replace").decode()
