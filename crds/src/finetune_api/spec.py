"""``spec`` of a FineTuneJob: what a user asks for.

Field docstrings are the text of the CRD and of ``docs/reference.md``; defaults stand here and
nowhere else. Where a good default depends on other fields (the learning rate of LoRA is not that
of full tuning) the field is optional and ``effective_*`` on the block gives the value used.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, StringConstraints, ValidationError

from finetune_api.base import (
    Count,
    InvalidSpec,
    Model,
    Rule,
    S3Uri,
    explain,
    is_zero,
)
from finetune_api.cluster import Compute, FailurePolicy, Prepare, Scheduling
from finetune_api.methods import METHODS, Method, OutputFormat, methods_for
from finetune_api.optimizers import (
    anchor_rules,
    optimizer_rules,
)
from finetune_api.sources import BaseModelSource, Data, Storage
from finetune_api.taskrules import task_rules
from finetune_api.tasks import TASKS, Metric, TaskKind, TaskName
from finetune_api.training import Training


class Evaluation(Model):
    """What is measured, and when."""

    every_steps: Count | None = None
    """Steps between evaluations on the validation sets. Absent: ten times over the run."""
    metrics: Annotated[list[Metric], Field(min_length=1, max_length=16)] | None = None
    """What the final test reports. Absent: Loss and Perplexity, and Accuracy, Precision, Recall
    and F1 for Classification, ExactMatch, Bleu and Rouge for other prompts with completions. A
    SequenceClassification has Loss, Accuracy, Precision, Recall and F1."""
    max_samples: Count = 1000
    """Most samples of a set for which text is generated; loss is always over the whole set."""
    max_new_tokens: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Longest generated answer, in tokens. Absent: the longest completion of the training set,
    but at most 512."""


class Checkpoint(Model):
    """When the training state is committed to object storage."""

    every_steps: Count | None = None
    """Steps between checkpoints."""
    every_seconds: Count | None = None
    """Seconds between checkpoints. Absent, with everySteps absent too: 600."""
    keep_last: Annotated[int, Field(ge=1, le=100)] = 2
    """Newest checkpoints that are kept; older ones are removed."""
    keep_best: Annotated[int, Field(ge=1, le=100)] = 1
    """Best checkpoints that are kept besides, by metric."""
    metric: Metric = "Loss"
    """Validation metric by which the best checkpoint is chosen; that one is published."""
    staging: Literal["Memory", "Disk"] = "Memory"
    """Where the state is copied to, for training to go on while the copy is uploaded. The copy is
    of the trained weights and the optimizer's state: with AdamW 12 bytes a trained parameter.
    Memory: the pods' memory. Disk: the disk of the nodes, for those with little memory; training
    stands still for longer."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.everySteps) && has(self.everySeconds))",
            "everySteps and everySeconds exclude each other: give one of them",
            lambda c: c.every_steps is None or c.every_seconds is None,
            ("everySteps", "everySeconds"),
        ),
    )


class Output(Model):
    """Where the tuned model goes."""

    destination: S3Uri
    """The model of run N is written to `<destination>/<run>/`; `latest.json` beside names the
    newest complete one."""
    format: OutputFormat | None = None
    """Adapter: what was added to the base model, alone. Merged: a whole model. Absent: Adapter
    where the method makes one, else Merged (Full, Partial). PromptTuning and PrefixTuning are an
    Adapter only."""


_WHOLE: Final = [name for name, kind in METHODS.items() if not kind.shards]
_KEEPING: Final = [name for name, kind in METHODS.items() if not kind.recomputes]
_SINGLE: Final = [name for name, kind in METHODS.items() if not kind.packs]
_QUANTIZING: Final = [name for name, kind in METHODS.items() if kind.quantizes]


def _format_rule(formats: tuple[OutputFormat, ...], why: str) -> Rule:
    """Formats that some methods cannot be published in."""
    types = methods_for(formats[0])
    return Rule(
        f"!has(self.output.format) || !(self.output.format in {json.dumps(formats)})"
        f" || self.method.type in {json.dumps(types)}",
        f"output.format {' and '.join(formats)} need method.type {', '.join(types)}: {why}",
        lambda s: s.output.format not in formats or s.method.type in types,
        ("output.format", "method.type"),
    )


class FineTuneJobSpec(Model):
    """What a user asks for: a model, data, how to train, and where the result goes."""

    task: TaskName = "CausalLM"
    """What the model learns. CausalLM: to go on with a text (prompts with completions,
    conversations, plain text). SequenceClassification: the class of a text; a model of either kind,
    encoder (BERT-like) or decoder, gets a classification head, which is drawn by `training.seed`
    (but where the model has one for the same classes) and trained with every method. It reads
    records of format Classification, with the text as it is and the tokenizer's own marks; the
    classes are the labels of the training records."""
    model: BaseModelSource
    """The model to start from."""
    data: Data
    """What is learned from, and what is measured on."""
    method: Method = Method()
    """Which weights are trained."""
    training: Training = Training()
    """How the weights are trained."""
    evaluation: Evaluation = Evaluation()
    """What is measured, and when."""
    checkpoint: Checkpoint = Checkpoint()
    """When the training state is committed to object storage."""
    output: Output
    """Where the tuned model goes."""
    compute: Compute = Compute()
    """The gang that trains."""
    prepare: Prepare = Prepare()
    """Pods of the CPU stages (prepare and publish)."""
    scheduling: Scheduling = Scheduling()
    """How the gang gets its nodes."""
    failure_policy: FailurePolicy = FailurePolicy()
    """What is done about failures that a new try can mend."""
    storage: Storage = Storage()
    """Object storage of the job, and where its working files live."""
    suspend: bool = False
    """Save, stop and hold no node until it is false again."""
    rerun_token: Annotated[str, StringConstraints(max_length=128)] | None = None
    """Any new string starts a new run: for data that changed behind its address."""
    children_ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2_147_483_647)] | None = (
        Field(default=None, alias="childrenTTLSecondsAfterFinished")
    )
    """Seconds after which Jobs, pods and Services of a finished run are removed. The FineTuneJob
    and all that is in object storage stay. Absent: they stay until the FineTuneJob is deleted."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        _format_rule(("Adapter", "Both"), "the others train the model's own weights"),
        _format_rule(("Merged", "Both"), "no weights hold what the others train"),
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
        *anchor_rules(),
        Rule(
            "self.training.precision != 'FP8' || self.method.type == 'Full'",
            "training.precision FP8 goes with method.type Full, whose weights all change: set BF16",
            lambda s: s.training.precision != "FP8" or s.method.type == "Full",
            ("method.type",),
        ),
        Rule(
            f"!(self.method.type in {json.dumps(_SINGLE)}) || self.compute.contextParallel == 1",
            f"method.type {', '.join(_SINGLE)} needs every sample whole: set"
            " compute.contextParallel: 1",
            lambda s: s.method.kind.packs or s.compute.context_parallel == 1,
            ("method.type", "compute.contextParallel"),
        ),
        Rule(
            f"{is_zero('self.training.routerAuxLossCoefficient')}"
            " || self.compute.contextParallel == 1",
            "training.routerAuxLossCoefficient is for the balance of whole rows: set"
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
        """The task's row of the table."""
        return TASKS[self.task]

    @property
    def effective_learning_rate(self) -> float:
        if self.training.learning_rate is not None:
            return float(self.training.learning_rate)
        return self.method.kind.learning_rate

    @property
    def effective_epochs(self) -> int | None:
        """Passes over the data, or None where ``training.maxSteps`` decides."""
        return None if self.training.max_steps is not None else self.training.epochs or 3

    @property
    def effective_output_format(self) -> OutputFormat:
        return self.output.format or self.method.kind.formats[0]

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
"""The same for the API server, which checks it on the whole object: a spec has no name."""


def refers_to_itself(name: str, spec: FineTuneJobSpec) -> bool:
    """Whether the spec of the job of that name waits for its own model (SELF_REFERENCE)."""
    reference = spec.model.fine_tune_job_ref
    return reference is not None and reference.name == name


def parse_spec(raw: Any) -> FineTuneJobSpec:
    """The validated spec of a manifest's ``spec`` mapping.

    Raises:
        InvalidSpec: with one line per fault, each with its path.
    """
    try:
        return FineTuneJobSpec.model_validate(raw)
    except ValidationError as error:
        raise InvalidSpec(explain(error, FineTuneJobSpec)) from None
