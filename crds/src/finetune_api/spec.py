"""``spec`` of a FineTuneJob: the desired state.

Field docstrings are the descriptions in the CRD and in ``docs/reference.md``. Defaults are defined
only here. If a default depends on other fields (the learning rate of LoRA differs from that of full
tuning), the field is optional and ``effective_*`` of the block gives the value used.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, StringConstraints, ValidationError

from finetune_api.base import (
    Count,
    DnsLabel,
    InvalidSpec,
    Model,
    Rule,
    S3Uri,
    explain,
    is_zero,
)
from finetune_api.cluster import Compute, FailurePolicy, Prepare, Scheduling
from finetune_api.evaluation import Evaluation
from finetune_api.gates import CurrentModel
from finetune_api.methods import METHODS, Method, OutputFormat, methods_for
from finetune_api.optimizers import (
    anchor_rules,
    optimizer_rules,
)
from finetune_api.remedy import remedy_rules
from finetune_api.sources import BaseModelSource, Data, Storage
from finetune_api.taskrules import task_rules
from finetune_api.tasks import TASKS, Metric, TaskKind, TaskName
from finetune_api.training import Training
from finetune_api.untrained import untrained_rules


class Checkpoint(Model):
    """Checkpoints of the training state in object storage."""

    every_steps: Count | None = None
    """Steps between checkpoints."""
    every_seconds: Count | None = None
    """Seconds between checkpoints. If neither everySteps nor everySeconds is given: 600."""
    keep_last: Annotated[int, Field(ge=1, le=100)] = 2
    """Number of newest checkpoints to keep; older ones are removed."""
    keep_best: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of best checkpoints, by `metric`, to keep in addition."""
    metric: Metric = "Loss"
    """Validation metric that selects the best checkpoint, which is published."""
    staging: Literal["Memory", "Disk"] = "Memory"
    """Where the state is copied, so that training continues while the copy is uploaded. The copy
    holds the trained weights and the optimizer state: with AdamW, 12 bytes per trained parameter.
    Memory: the pods' memory. Disk: the nodes' local disks, for nodes with little memory; training
    pauses longer."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.everySteps) && has(self.everySeconds))",
            "everySteps and everySeconds exclude each other: give one of them",
            lambda c: c.every_steps is None or c.every_seconds is None,
            ("everySteps", "everySeconds"),
        ),
    )


class Output(Model):
    """Destination and format of the tuned model."""

    destination: S3Uri
    """Prefix of the published models: a run's model is written to `<destination>/<run>/`, and
    `<destination>/latest.json` names the newest complete run."""
    format: OutputFormat | None = None
    """Adapter: only the weights added to the base model. Merged: a full model. Both: Adapter and
    Merged. Absent: Adapter if the method trains one, else Merged (Full, Partial). PromptTuning and
    PrefixTuning support Adapter only. With method.type None no model is published."""
    current: CurrentModel | None = None
    """Keep `<destination>/CURRENT.json`, which names the model in use: a run that passes its gates
    and is not worse than the model there replaces it. Absent: the run leaves CURRENT.json alone."""


_WHOLE: Final = [name for name, kind in METHODS.items() if not kind.shards]
_KEEPING: Final = [name for name, kind in METHODS.items() if not kind.recomputes]
_SINGLE: Final = [name for name, kind in METHODS.items() if not kind.packs]
_QUANTIZING: Final = [name for name, kind in METHODS.items() if kind.quantizes]


def _format_rule(formats: tuple[OutputFormat, ...], why: str) -> Rule:
    """Rule: output formats that only some methods support."""
    types = methods_for(formats[0])
    return Rule(
        f"!has(self.output.format) || !(self.output.format in {json.dumps(formats)})"
        f" || self.method.type in {json.dumps(types)}",
        f"output.format {' and '.join(formats)} need method.type {', '.join(types)}: {why}",
        lambda s: s.output.format not in formats or s.method.type in types,
        ("output.format", "method.type"),
    )


class FineTuneJobSpec(Model):
    """A fine-tuning job: the model, the data, the training and the output."""

    task: TaskName = "CausalLM"
    """Task to train for. CausalLM: continue a text (prompts with completions, conversations, plain
    text). SequenceClassification: classify a text; an encoder (BERT-like) or a decoder gets a
    classification head, which is trained with every method. The head is initialized with
    `training.seed`, unless the model has one for the same classes. Records have format
    Classification; their text is used unchanged, with the tokenizer's special tokens; the classes
    are the labels of the training records."""
    model: BaseModelSource
    """The base model."""
    data: Data
    """Training, validation and test data."""
    method: Method = Method()
    """Tuning method: which weights are trained, if any."""
    training: Training = Training()
    """Training: steps, optimizer, regularization, precision."""
    evaluation: Evaluation = Evaluation()
    """Evaluation on validation and test sets."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints of the training state in object storage."""
    output: Output
    """Destination and format of the tuned model."""
    compute: Compute = Compute()
    """Pods and processes of the gang that trains."""
    prepare: Prepare = Prepare()
    """Pods of the CPU stages (prepare and publish)."""
    scheduling: Scheduling = Scheduling()
    """Scheduling of the gang."""
    failure_policy: FailurePolicy = FailurePolicy()
    """What is done after failures, and how often."""
    storage: Storage = Storage()
    """Object storage of the job, and the location of its working files."""
    managed_by: DnsLabel | None = None
    """Name of the operator that works on this job, where a cluster has several. Absent: the one
    without a name. Another value hands the job over."""
    suspend: bool = False
    """Save the state, stop, and hold no nodes until this is false again."""
    deletion_protection: bool = False
    """Refuse to delete this object until the run has ended or this is false again, where the
    operator's chart has installed its admission policy. The namespace can still be deleted."""
    rerun_token: Annotated[str, StringConstraints(max_length=128)] | None = None
    """Any new value starts a new run, e.g. when the data at the same address has changed."""
    retry_token: Annotated[str, StringConstraints(max_length=128)] | None = None
    """Any new value continues a failed run from its last checkpoint, or its publishing alone, e.g.
    after a Secret was corrected. Faults are counted anew. It has no effect on other runs."""
    children_ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2_147_483_647)] | None = (
        Field(default=None, alias="childrenTTLSecondsAfterFinished")
    )
    """Seconds after which Jobs, pods and Services of a finished run are removed. The FineTuneJob
    and everything in object storage are kept. Absent: they are kept until the FineTuneJob is
    deleted."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        _format_rule(("Adapter", "Both"), "the others train the model's own weights"),
        _format_rule(("Merged", "Both"), "the others cannot be merged into the weights"),
        *task_rules(),
        Rule(
            f"!(self.method.type in {json.dumps(_KEEPING)})"
            " || self.training.gradientCheckpointing != 'Always'",
            f"training.gradientCheckpointing does not go with method.type {', '.join(_KEEPING)},"
            " whose keys and values it would drop: set it to Never",
            lambda s: s.method.kind.recomputes or s.training.gradient_checkpointing != "Always",
            ("method.type", "training.gradientCheckpointing"),
        ),
        Rule(
            f"!(self.method.type in {json.dumps(_QUANTIZING)}) || self.compute.gpusPerNode > 0",
            f"method.type {', '.join(_QUANTIZING)} needs a GPU: set compute.gpusPerNode, or"
            " method.type: LoRA",
            lambda s: not s.method.kind.quantizes or s.compute.gpus_per_node > 0,
            ("method.type", "compute.gpusPerNode"),
        ),
        Rule(
            f"!(self.method.type in {json.dumps(_WHOLE)})"
            " || self.compute.sharding in ['Auto', 'NoShard']",
            f"method.type {', '.join(_WHOLE)} cannot be sharded: set compute.sharding: NoShard, or"
            " method.type: LoRA",
            lambda s: s.method.kind.shards or s.compute.sharding in ("Auto", "NoShard"),
            ("method.type", "compute.sharding"),
        ),
        *optimizer_rules(),
        Rule(
            "!has(self.evaluation.gates) || has(self.output.current)"
            " || !self.evaluation.gates.exists(g, has(g.row) && g.row == 'Current')",
            "a gate against Current needs the pointer to the current model: give output.current",
            lambda s: (
                s.output.current is not None
                or not any(g.row == "Current" for g in s.evaluation.gates)
            ),
            ("evaluation.gates[].row",),
        ),
        *anchor_rules(),
        *remedy_rules(),
        *untrained_rules(Checkpoint),
        Rule(
            "!self.evaluation.dataCurve || !has(self.data.stages)",
            "evaluation.dataCurve does not go with data.stages, whose stages would end early in a"
            " training on a part of the data",
            lambda s: not s.evaluation.data_curve or s.data.stages is None,
            ("evaluation.dataCurve",),
        ),
        Rule(
            "self.training.precision != 'FP8' || self.method.type == 'Full'",
            "training.precision FP8 goes with method.type Full only, which trains every weight: set"
            " BF16",
            lambda s: s.training.precision != "FP8" or s.method.type == "Full",
            ("method.type",),
        ),
        Rule(
            f"!(self.method.type in {json.dumps(_SINGLE)}) || self.compute.contextParallel == 1",
            f"method.type {', '.join(_SINGLE)} does not support context parallelism: set"
            " compute.contextParallel: 1",
            lambda s: s.method.kind.packs or s.compute.context_parallel == 1,
            ("method.type", "compute.contextParallel"),
        ),
        Rule(
            f"{is_zero('self.training.routerAuxLossCoefficient')}"
            " || self.compute.contextParallel == 1",
            "training.routerAuxLossCoefficient does not support context parallelism: set"
            ' compute.contextParallel: 1, or the coefficient to "0"',
            lambda s: (
                float(s.training.router_aux_loss_coefficient) == 0
                or s.compute.context_parallel == 1
            ),
            ("training.routerAuxLossCoefficient", "compute.contextParallel"),
        ),
        Rule(
            "!has(self.training.earlyStopping) || has(self.data.validation)"
            f" || !{is_zero('self.data.split.validation')}",
            "training.earlyStopping needs a validation set: give data.validation or a"
            " data.split.validation above 0",
            lambda s: (
                s.training.early_stopping is None
                or s.data.validation is not None
                or float(s.data.split.validation) > 0
            ),
            ("data.split.validation",),
        ),
    )

    @property
    def kind(self) -> TaskKind:
        """The task's entry in ``TASKS``."""
        return TASKS[self.task]

    @property
    def effective_learning_rate(self) -> float:
        if self.training.learning_rate is not None:
            return float(self.training.learning_rate)
        return self.method.kind.learning_rate

    @property
    def effective_epochs(self) -> int | None:
        """Passes over the data, or None if ``training.maxSteps`` is given."""
        return None if self.training.max_steps is not None else self.training.epochs or 3

    @property
    def effective_output_format(self) -> OutputFormat | None:
        """Format of the published model; None: the method publishes none."""
        return self.output.format or next(iter(self.method.kind.formats), None)

    @property
    def effective_workspace(self) -> str:
        return (
            self.storage.workspace or f"{self.output.destination.rstrip('/')}/.workspace"
        ).rstrip("/")


SELF_REFERENCE: Final = (
    "spec.model.fineTuneJobRef must name another FineTuneJob: no run can start from its own model"
)
SELF_REFERENCE_CEL: Final = (
    "!has(self.spec.model.fineTuneJobRef) || self.spec.model.fineTuneJobRef.name !="
    " self.metadata.name"
)
"""The same rule for the API server, on the whole object: a spec does not know its job's name."""


def refers_to_itself(name: str, spec: FineTuneJobSpec) -> bool:
    """Whether the spec of the job ``name`` refers to the job itself (SELF_REFERENCE)."""
    reference = spec.model.fine_tune_job_ref
    return reference is not None and reference.name == name


def parse_spec(raw: Any) -> FineTuneJobSpec:
    """Validate the ``spec`` mapping of a manifest.

    Raises:
        InvalidSpec: with one line per problem, each with its path.
    """
    try:
        return FineTuneJobSpec.model_validate(raw)
    except ValidationError as error:
        raise InvalidSpec(explain(error, FineTuneJobSpec)) from None
