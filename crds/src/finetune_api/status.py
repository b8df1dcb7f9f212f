"""``status`` of a FineTuneJob: what a user reads back. Numbers with a fraction are strings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import Model
from finetune_api.names import FailureClass, Phase

Time = Annotated[
    str, StringConstraints(max_length=32), Field(json_schema_extra={"format": "date-time"})
]
Word = Annotated[str, StringConstraints(max_length=256)]
Message = Annotated[str, StringConstraints(max_length=4096)]
Uri = Annotated[str, StringConstraints(max_length=2048)]
Number = Annotated[str, StringConstraints(max_length=32)]


class Condition(Model):
    """One observation, by Kubernetes' conventions."""

    type: Word
    """What is observed."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    observed_generation: int | None = None
    """Generation of the spec that it was observed for."""
    last_transition_time: Time
    """When status last changed."""
    reason: Word
    """CamelCase word for scripts."""
    message: Message
    """For people."""


class RunBase(Model):
    """The model of another job that a run started from."""

    job: Word
    """Job that spec.model.fineTuneJobRef named."""
    run: Word
    """Its run."""
    uri: Uri
    """Address of what that run has published."""
    digest: Word | None = None
    """sha256 of its manifest.json."""


class Run(Model):
    """One run of the job."""

    id: Word
    """`<number>-<five characters of the job's uid>`."""
    number: int
    """Number of the run, from 1."""
    revision: int = 1
    """Gang of the run: raised when compute, scheduling or image change while it runs."""
    attempt: int = 0
    """Attempt of the gang, counted in storage."""
    start_time: Time | None = None
    """When the run began. Absent: it waits for the model of another job."""
    completion_time: Time | None = None
    """When it ended."""
    rerun_token: Word | None = None
    """spec.rerunToken that it began with."""
    base: RunBase | None = None
    """What spec.model.fineTuneJobRef stood for when it began."""
    outcome: Literal["Complete", "Failed", "Superseded"] | None = None
    """How it ended."""
    output: Uri | None = None
    """Address of its model, where one was published."""


class Prepared(Model):
    """What prepare found."""

    uri: Uri
    """Where the prepared data is (tokenized records of yours: see the retention in the docs)."""
    digest: Word
    """Content digest."""
    train_samples: int
    """Samples to train on."""
    validation_samples: int
    """Samples held out for validation."""
    test_samples: int
    """Samples held out for the test."""
    train_tokens: int
    """Tokens of the training samples."""
    reused: bool
    """Whether the data was prepared already."""


class DataSetLoss(Model):
    """Training loss of one training set."""

    name: Word
    """Name of the set."""
    loss: Number
    """Per supervised token, in nats."""


class ProgressStatus(Model):
    """Where the training stands."""

    stage: Word
    """What the gang is doing."""
    step: int
    """Optimizer steps done."""
    total_steps: int
    """Optimizer steps of the run."""
    percent: int
    """Share of the steps done."""
    epoch: Number
    """Passes over the data done."""
    loss: Number | None = None
    """Training loss per supervised token, in nats."""
    data_set_losses: Annotated[list[DataSetLoss], Field(max_length=64)] = []
    """The same by training set, where there are several."""
    learning_rate: Number | None = None
    """Learning rate of the last step."""
    tokens_per_second: Number | None = None
    """Real tokens trained per second."""
    mfu: Number | None = None
    """Model FLOPs utilization: share of the GPUs' peak that the arithmetic on real tokens makes."""
    remaining: Word | None = None
    """Expected time to the end of training, e.g. `2m10s`."""
    estimated_completion_time: Time | None = None
    """When training is expected to end."""
    last_update_time: Time
    """When this was read from the gang."""


class Checkpoints(Model):
    """Checkpoints of the run."""

    latest: Uri | None = None
    """Newest commit."""
    best: Uri | None = None
    """Best commit by spec.checkpoint.metric."""


class ParameterStatus(Model):
    """Sizes of the model."""

    trainable: int
    """Parameters that were trained."""
    total: int
    """Parameters of the model, what the method added included."""


class MetricValue(Model):
    """One metric of one data set."""

    data_set: Word
    """Name of the data set."""
    metric: Word
    """Name of the metric."""
    base: Number | None = None
    """Of the model as it was."""
    tuned: Number | None = None
    """Of the tuned model."""
    gain: Number | None = None
    """tuned - untuned."""


class OutputStatus(Model):
    """What was published."""

    uri: Uri
    """Address of the model."""
    digest: Word
    """sha256 of its manifest.json."""
    formats: Annotated[list[Word], Field(max_length=8)] = []
    """adapter, merged."""
    bytes: int = 0
    """Size of all published files."""
    full_copy_bytes: int = 0
    """What the weights of a whole model take in the dtype of the base."""


class Usage(Model):
    """What the run cost."""

    gpu_seconds: int = 0
    """GPUs times seconds that gangs held them."""
    wasted_gpu_seconds: int = 0
    """Of them, spent on work that was lost with an attempt."""
    queued_seconds: int = 0
    """Seconds between the gang's Job and the first second in which all its pods ran."""


class StartupStatus(Model):
    """How long the run took to its first optimizer step, in seconds, and what with. Of a gang the
    last pod counts. A part is absent where it is not known, or there is none."""

    total_seconds: int
    """From the run's start (startTime) to the end of the first step, by the clocks of cluster and
    node."""
    prepare_seconds: int | None = None
    """From the run's start to the gang's Job: prepare, and what it waited for."""
    queue_seconds: int | None = None
    """From the Job to its last pod: the queue, and pods that had to be replaced."""
    schedule_seconds: int | None = None
    """Until that pod had a node."""
    pull_seconds: int | None = None
    """Until its container started: volumes, network and the image."""
    launch_seconds: int | None = None
    """Until the training processes were started: torchrun, and nodes that find each other. From
    here on, as the first process of the attempt that took the step saw it."""
    import_seconds: int | None = None
    """Libraries."""
    rendezvous_seconds: int | None = None
    """Processes form a gang, and take the run."""
    data_seconds: int | None = None
    """Prepared data is opened, and the steps are planned."""
    model_seconds: int | None = None
    """The model is fetched, estimated, loaded, tuned by the method and sharded."""
    restore_seconds: int | None = None
    """Looking for a commit to go on from."""
    baseline_seconds: int | None = None
    """The untuned model is measured."""
    compile_seconds: int | None = None
    """Blocks are compiled, with spec.training.compile."""
    step_seconds: int | None = None
    """The rest of the first step, the wait for its data included."""


class FailureStatus(Model):
    """Why the run failed, and what to do."""

    failure_class: FailureClass = Field(alias="class")
    """Kind of the cause."""
    reason: Word
    """CamelCase word for scripts."""
    message: Message
    """What happened, where, and what to do."""
    pod: Word | None = None
    """Pod that told it."""
    node: Word | None = None
    """Node of that pod."""
    exit_code: int | None = None
    """Exit code of its container."""
    attempt: int | None = None
    """Attempt that it ended."""


class FineTuneJobStatus(Model):
    """What a user reads back."""

    observed_generation: int | None = None
    """Generation of the spec that this status speaks of."""
    phase: Phase | None = None
    """Summary for printing; scripts read conditions."""
    conditions: Annotated[
        list[Condition],
        Field(
            max_length=32,
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
            },
        ),
    ] = []
    """Observations by type: Prepared, Running, Evaluated, Published, Suspended, Complete, Failed;
    and for kstatus (Flux, Argo CD): Ready, Reconciling, Stalled."""
    run: Run | None = None
    """The current run."""
    history: Annotated[list[Run], Field(max_length=10)] = []
    """Earlier runs, newest first; the last ten."""
    prepared: Prepared | None = None
    """What prepare found."""
    progress: ProgressStatus | None = None
    """Where the training stands."""
    checkpoints: Checkpoints | None = None
    """Checkpoints of the run."""
    evaluation: Annotated[list[MetricValue], Field(max_length=256)] = []
    """Test metrics, untuned and tuned."""
    parameters: ParameterStatus | None = None
    """How much of the model was trained."""
    output: OutputStatus | None = None
    """What was published."""
    restarts: int = 0
    """Incidents of the gang in this run."""
    usage: Usage | None = None
    """What the run cost."""
    startup: StartupStatus | None = None
    """How long the run took to its first optimizer step; told once it is done."""
    failure: FailureStatus | None = None
    """Why the run failed, and what to do."""
