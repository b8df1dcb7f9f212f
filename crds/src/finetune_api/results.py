"""What the trainer says: ``/progress``, the termination message, and ``metrics.json``.

Figures are plain JSON numbers here; the operator writes them to status as strings.
"""

from __future__ import annotations

import json
from typing import Any, Final, Literal

from pydantic import Field

from finetune_api.base import Record
from finetune_api.names import FailureClass, Role

TERMINATION_LIMIT: Final = 4096
"""Bytes that Kubernetes keeps of a termination message."""


StartupPart = Literal[
    "launch", "import", "rendezvous", "data", "model", "restore", "baseline", "compile", "step"
]
"""What an attempt does before its first optimizer step is done, in order: torchrun starts and the
nodes find each other; a worker imports its libraries; the processes form a gang and take the run;
they open the data, and plan; fetch the model, estimate its memory, load and shard it; read the
newest checkpoint; measure the untuned model; compile blocks (with training.compile); take the
step."""


class Startup(Record):
    """The start of an attempt, as the gang's first process saw it: a wait for another process
    counts for the part in which it was waited."""

    seconds: dict[StartupPart, float]
    """Seconds by part. Parts follow one another without gaps: their sum is the time from the start
    of the node's training processes to the end of the first step."""
    from_step: int
    """Steps done before: above 0 where the attempt went on from a checkpoint."""
    first_step: float
    """Unix time at the end of the first step."""

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    @property
    def text(self) -> str:
        """For people: ``21.4 s (launch 3.1, import 9.0, …)``."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{self.total:.1f} s ({parts})"


class Progress(Record):
    """``GET /progress`` of the gang's first process."""

    run: str
    """Identity of the run; addresses are reused, so a reader must compare it."""
    attempt: int
    """Attempt that took the run's HEAD, from 1."""
    restarts: int
    """Attempts that took over from one that did not end by itself."""
    stage: Literal["Loading", "Baseline", "Training", "Evaluating", "Saving", "Testing", "Done"]
    """What the gang is doing."""
    step: int = 0
    """Optimizer steps done."""
    total_steps: int = 0
    """Optimizer steps of the run."""
    epoch: float = 0.0
    """Passes over the training data done."""
    data_stage: str | None = None
    """Name of the stage of data.stages that the last step belongs to, where there are some."""
    loss: float | None = None
    """Training loss per supervised token (nats), mean since the last log point."""
    by_source: dict[str, float] = {}
    """The same by training set, where there are several."""
    anchor_kl: float | None = None
    """KL(untuned || tuned) per supervised token of replay sets (nats), mean since the last log
    point, where training.anchor asks for it; no part of the loss above."""
    router_loss: float | None = None
    """Loss that spreads tokens over experts, before its coefficient, mean since the last log
    point, where training.routerAuxLossCoefficient asks for it; no part of the loss above."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    tokens_per_second: float | None = None
    """Real tokens trained per second, whole gang."""
    mfu: float | None = None
    """Share of the devices' peak that the arithmetic on real tokens makes, where it is known."""
    data_wait_share: float | None = None
    """Share of the steps' time since the last log point for which the first process waited for its
    data."""
    remaining_seconds: float | None = None
    """Expected time to the end of training."""
    latest_checkpoint: str | None = None
    """Address of the newest checkpoint."""
    best_checkpoint: str | None = None
    """Address of the best checkpoint."""
    checkpoints_abandoned: int = 0
    """Checkpoints of this attempt that storage did not take and the training went on without."""
    training_seconds: float = 0.0
    """Wall time since this attempt began."""
    lost_seconds: float = 0.0
    """Wall time of work that earlier attempts did and lost: from their last commit to their
    end."""
    startup: Startup | None = None
    """How long the attempt took to start, once its first step is done."""
    updated: float = 0.0
    """Unix time of this state."""


class Failure(Record):
    """Why a container ended."""

    failure_class: FailureClass = Field(alias="class")
    """Kind of the cause."""
    reason: str
    """CamelCase word for scripts, e.g. MalformedRecord."""
    message: str
    """What happened, where, and what to do, for a person."""
    retryable: bool = False
    """Whether another try can mend it."""


class MemoryEstimate(Record):
    """What a training process will take of its memory."""

    needed: int
    """Bytes, all parts together."""
    available: int | None = None
    """Bytes that a process has, where the manifest says."""
    sharding: Literal["NoShard", "HybridShard", "FullShard"]
    """How the model is to lie on the processes."""
    gradient_checkpointing: bool
    """Whether activations are to be computed again."""
    parts: dict[str, int]
    """Bytes by part."""
    warning: str | None = None
    """Where the training may not fit: figures, and what would fit."""


class StagePlan(Record):
    """A stage of the training, as prepare has worked it out."""

    name: str
    """As data.stages has it."""
    steps: int
    """Optimizer steps of it."""
    mixture: dict[str, float]
    """Share of the trained tokens by training set, of those that take part."""

    @property
    def mixture_text(self) -> str:
        """For people: ``notes 75 %, code 25 %``."""
        return ", ".join(f"{name} {100 * share:.3g} %" for name, share in self.mixture.items())


class PreparedSummary(Record):
    """What prepare found, in numbers."""

    digest: str
    """Content digest of the prepared data."""
    uri: str
    """Where the prepared data is."""
    reused: bool
    """Whether it was there already."""
    train_samples: int
    """Samples to train on."""
    validation_samples: int
    """Samples held out for validation."""
    test_samples: int
    """Samples held out for the test."""
    train_tokens: int
    """Tokens of the training samples."""
    supervised_tokens: int
    """Tokens of them that are learned."""
    dropped: dict[str, int] = {}
    """Records left out, by cause."""
    total_steps: int
    """Optimizer steps that the training will take."""
    stages: list[StagePlan] = []
    """What is mixed when, where data.stages says."""
    memory: MemoryEstimate | None = None
    """What the training will take of memory."""


Metrics = dict[str, float]
"""Metric name (spec spelling) to value; Bleu and Rouge from 0 to 100 and 0 to 1 as their packages
give them."""


class DataSetScores(Record):
    """Test metrics of one data set."""

    name: str
    """Name of the set."""
    samples: int
    """Samples measured."""
    base: Metrics
    """Of the model as it was."""
    tuned: Metrics
    """Of the tuned model."""


class TrainSummary(Record):
    """What the gang did."""

    attempt: int
    """Attempt that finished."""
    restarts: int
    """Incidents survived."""
    steps: int
    """Optimizer steps done."""
    stopped_early: bool = False
    """Whether early stopping ended it."""
    loss: float | None = None
    """Last training loss."""
    checkpoint: str | None = None
    """Address of the checkpoint chosen for publishing."""
    checkpoint_step: int | None = None
    """Its step."""
    trainable_parameters: int = 0
    """Parameters that were trained."""
    total_parameters: int = 0
    """Parameters of the model, what the method added included."""
    scores: list[DataSetScores] = []
    """Test metrics by data set; cut from the termination message first if it grows too long."""
    training_seconds: float = 0.0
    """Wall time of all attempts."""
    lost_seconds: float = 0.0
    """Wall time of work that was lost with an attempt."""
    tokens: int = 0
    """Real tokens that the model has learned from; by training_seconds, that is the goodput."""
    skipped_steps: int = 0
    """Steps whose update was not made (see training.guard)."""
    rollbacks: int = 0
    """Times that the run went back to an earlier checkpoint."""
    quarantined_samples: int = 0
    """Training samples that were left out then."""
    startup: Startup | None = None
    """How long the attempt that finished took to start; absent where it had no step left to do."""


class Ancestor(Record):
    """One model that a tuned model was made from. A lineage is a list of them, the first base
    model first; that one has an address alone."""

    uri: str
    """Address: of a model folder, or of what a run has published."""
    job: str | None = None
    """Job that published it."""
    run: str | None = None
    """Its run."""
    digest: str | None = None
    """sha256 of its manifest."""
    method: str | None = None
    """Tuning method of that run (`spec.method.type`)."""
    formats: list[str] = []
    """What was published: adapter, merged."""


class PublishSummary(Record):
    """What was published."""

    uri: str
    """Address of the model."""
    digest: str
    """sha256 of its manifest."""
    formats: list[str]
    """adapter, merged."""
    bytes: int
    """Size of all published files."""
    full_copy_bytes: int = 0
    """What the weights of a whole model take in the dtype of the base."""


class Termination(Record):
    """The last word of a container, at most 4 KiB of JSON."""

    run: str
    """Identity of the run."""
    role: Role
    """Stage."""
    failure: Failure | None = None
    """Why it failed; absent after success."""
    prepared: PreparedSummary | None = None
    """Of prepare."""
    trained: TrainSummary | None = None
    """Of train."""
    published: PublishSummary | None = None
    """Of publish."""

    def to_text(self) -> str:
        """JSON of at most TERMINATION_LIMIT bytes. What is too long is left out in this order:
        scores (metrics.json in storage has them), causes of dropped records (the data report has
        them), stages (prepared.json has them), the middle of the failure's message."""
        raw = self.to_json()
        if _fits(raw):
            return _compact(raw)
        raw.get("trained", {}).pop("scores", None)
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
    # Names of files may hold what is no Unicode: a container's last word must not die of it.
    text = json.dumps(raw, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="replace").decode()
