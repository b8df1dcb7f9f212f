"""``status`` of a FineTuneJob: the observed state. Numbers with a fraction are strings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import Model, Uri, Word
from finetune_api.names import Phase

Time = Annotated[
    str, StringConstraints(max_length=32), Field(json_schema_extra={"format": "date-time"})
]
Message = Annotated[str, StringConstraints(max_length=4096)]
Number = Annotated[str, StringConstraints(max_length=32)]


class Condition(Model):
    """A condition, as in the Kubernetes API conventions."""

    type: Word
    """Type of the condition."""
    status: Literal["True", "False", "Unknown"]
    """Status of the condition."""
    observed_generation: int | None = None
    """Generation of the spec for which the condition was observed."""
    last_transition_time: Time
    """Time of the last change of status."""
    reason: Word
    """CamelCase word for scripts."""
    message: Message
    """Explanation for users."""


class RunBase(Model):
    """The model of another job from which a run started."""

    job: Word
    """Job named by spec.model.fineTuneJobRef."""
    run: Word
    """Run of that job."""
    uri: Uri
    """URI of that run's published model."""
    digest: Word | None = None
    """sha256 of that model's manifest.json."""


class Run(Model):
    """One run of the job."""

    id: Word
    """`<number>-<five characters of the job's uid>`."""
    number: int
    """Number of the run, from 1."""
    revision: int = 1
    """Number of the run's gang: incremented when compute, scheduling or image change during the
    run."""
    attempt: int = 0
    """Current attempt, counted in storage."""
    start_time: Time | None = None
    """When the run began. Absent: the run waits for the model of another job."""
    completion_time: Time | None = None
    """When the run ended."""
    rerun_token: Word | None = None
    """spec.rerunToken at the start of the run."""
    spec_digest: Word | None = None
    """Digest of the run's fields of class NewRun."""
    gang_digest: Word | None = None
    """Digest of the run's fields of class Resume. Both tell an edit if the run spec was removed by
    hand."""
    retry_token: Word | None = None
    """spec.retryToken that the run has seen."""
    base: RunBase | None = None
    """Model to which spec.model.fineTuneJobRef referred at the start of the run."""
    outcome: Word | None = None
    """Outcome of the run, once it has ended: Complete, Failed or Superseded."""
    output: Uri | None = None
    """URI of the run's published model, if any."""


class Prepared(Model):
    """Summary of the prepared data."""

    uri: Uri
    """URI of the prepared data (your records, tokenized: see retention in the docs)."""
    digest: Word
    """Content digest of the prepared data."""
    train_samples: int
    """Samples to train on."""
    validation_samples: int
    """Samples held out for validation."""
    test_samples: int
    """Samples held out for the test."""
    train_tokens: int
    """Tokens of the training samples."""
    reused: bool
    """Whether already prepared data was reused."""


class DataSetLoss(Model):
    """Training loss of one training set."""

    name: Word
    """Name of the set."""
    loss: Number
    """Loss per supervised token, in nats."""


class ProgressStatus(Model):
    """Progress of the training."""

    stage: Word
    """Current activity of the gang."""
    data_stage: Word | None = None
    """Stage of spec.data.stages that the last step belongs to, if there are stages."""
    nodes: int | None = None
    """Nodes that train; fewer than spec.compute.nodes while an elastic gang (minNodes) lacks
    some."""
    step: int
    """Optimizer steps done."""
    total_steps: int
    """Optimizer steps of the run."""
    percent: int
    """Steps done, in percent."""
    epoch: Number
    """Passes over the data done."""
    loss: Number | None = None
    """Training loss per supervised token, in nats."""
    data_set_losses: Annotated[list[DataSetLoss], Field(max_length=64)] = []
    """Training loss by training set, if there are several."""
    anchor_kl: Number | None = None
    """KL(base || tuned) per supervised token of replay sets, in nats, with
    spec.training.anchor.klCoefficient."""
    base_kl: Number | None = None
    """KL(base || tuned) per supervised token of the first validation samples, in nats, at the last
    evaluation: a large one is an early warning of forgetting."""
    router_loss: Number | None = None
    """Load-balancing loss of experts, before spec.training.routerAuxLossCoefficient."""
    learning_rate: Number | None = None
    """Learning rate of the last step."""
    tokens_per_second: Number | None = None
    """Real (non-padding) tokens trained per second."""
    mfu: Number | None = None
    """Model FLOPs utilization: FLOPs on real tokens over the GPUs' peak."""
    data_wait_share: Number | None = None
    """Share of the steps' time, since the last log point, that was spent waiting for data."""
    checkpoints_abandoned: int = 0
    """Checkpoints of the current attempt that could not be written; training continued without
    them. A lost node then costs all steps since the last checkpoint."""
    remaining: Word | None = None
    """Expected time to the end of training, e.g. `2m10s`."""
    estimated_completion_time: Time | None = None
    """Expected end of training."""
    last_update_time: Time
    """When this progress was read from the gang."""


class Checkpoints(Model):
    """Checkpoints of the run."""

    latest: Uri | None = None
    """URI of the newest checkpoint."""
    best: Uri | None = None
    """URI of the best checkpoint by spec.checkpoint.metric."""
    save_seconds: int | None = None
    """Longest time to save a checkpoint, in seconds; the grace period of later pods follows from
    it."""


class ParameterStatus(Model):
    """Number of parameters of the model."""

    trainable: int
    """Number of trained parameters."""
    total: int
    """Number of all parameters, including those added by the method."""


class MetricValue(Model):
    """One metric of one data set."""

    data_set: Word
    """Name of the data set."""
    metric: Word
    """Name of the metric."""
    base: Number | None = None
    """Value for the base model."""
    tuned: Number | None = None
    """Value for the tuned model."""
    gain: Number | None = None
    """tuned - base."""
    gain_low: Number | None = None
    """Lower end of the gain's 95 % confidence interval."""
    gain_high: Number | None = None
    """Upper end."""
    verdict: Word | None = None
    """Better, Worse, NotBetter (a gain of spec.evaluation.minEffect is ruled out) or TooFewSamples
    (the test set decides nothing)."""


class MainResultStatus(Model):
    """What the tuned model gained on the first test set, by the metric that compares its rows; or
    with method.type None, the value of the base model."""

    data_set: Word
    """Name of the test set."""
    metric: Word
    """Name of the metric."""
    value: Word | None = None
    """Value of the tuned model, or with method.type None of the base model, with its 95 %
    confidence interval: 52.0 % (45, 59)."""
    verdict: Word | None = None
    """Better, Worse, NotBetter or TooFewSamples, as in status.evaluation. Absent with method.type
    None."""
    gain: Word | None = None
    """Gain over the base model with its 95 % confidence interval: +47.5 % (20, 60). Absent with
    method.type None."""
    current_gap: Number | None = None
    """Value minus that of the model in use before, over the same samples. Absent: no model was in
    use, or it could not be compared."""


class OutputStatus(Model):
    """The published model, or with method.type None the published results."""

    uri: Uri
    """URI of the model or the results."""
    digest: Word
    """sha256 of the manifest.json there."""
    formats: Annotated[list[Word], Field(max_length=8)] = []
    """Published formats: adapter, merged. Empty with method.type None: there is no model."""
    bytes: int = 0
    """Size of all published files."""
    full_copy_bytes: int = 0
    """Size of a full model's weights in the dtype of the base, in bytes."""
    held: Message | None = None
    """Which of spec.evaluation.gates the run missed, or how the current model is better, with the
    figures. Absent: nothing."""
    became_current: bool | None = None
    """Whether the run became the current model: CURRENT.json named it when it was published. Absent
    without spec.output.current."""


class GpuSeconds(Model):
    """GPU time of a run by class, in GPU-seconds: GPUs times seconds. Every GPU-second that a pod
    of the gang holds is in exactly one class. Only `unsettled` may fall."""

    pull: int = 0
    """A pod has a node, and its container does not run yet: image, volumes, network."""
    load: int = 0
    """All pods run, and the attempt's first step has not begun: processes start and find each
    other, the model is read, and after a restart the checkpoint."""
    compile: int = 0
    """Compilation, with spec.training.compile."""
    productive: int = 0
    """Steps that count: a checkpoint has them."""
    evaluation: int = 0
    """Validation during training, the tests of base and tuned model, and the trainings of
    evaluation.dataCurve."""
    checkpoint: int = 0
    """Training waits for a checkpoint: for the copy of the state, or for the upload before."""
    recomputed: int = 0
    """Work since the last checkpoint that was lost with an attempt, and steps done again after a
    rollback."""
    hang: int = 0
    """No progress for 90 seconds or more, until the attempt was ended."""
    idle: int = 0
    """Pods that run and wait for another pod of the gang: for its node, its start, or its
    replacement."""
    teardown: int = 0
    """From the end of the training to the end of the pods."""
    unsettled: int = 0
    """Not in a class yet: steps since the last checkpoint, and time since the last report of the
    gang."""


class Usage(Model):
    """Resources used by the run."""

    gpu_seconds: int = 0
    """GPU-seconds that gangs held: from the time a pod has a node to its end."""
    gpu_seconds_by_class: GpuSeconds = GpuSeconds()
    """The same by class."""
    goodput: Number | None = None
    """Productive share of gpuSeconds, from 0 to 1."""
    queued_seconds: int = 0
    """Seconds in which the gang was to run and held no node: in a queue, or without free nodes."""
    until: Time | None = None
    """Time up to which the GPU time is counted."""


class StartupStatus(Model):
    """Time from the start of the run to the end of its first optimizer step, in seconds, by
    consecutive parts. For pods of a gang the last pod counts. A part that is unknown or did not
    occur is absent."""

    total_seconds: int
    """From the run's start (startTime) to the end of the first step, by the clocks of cluster and
    node."""
    prepare_seconds: int | None = None
    """From the run's start to the creation of the gang's Job: prepare, and its waiting time."""
    queue_seconds: int | None = None
    """From the Job to its last pod: time in the queue, and replacement of pods."""
    schedule_seconds: int | None = None
    """Until the last pod had a node."""
    pull_seconds: int | None = None
    """Until that pod's container started: volumes, network and the image."""
    launch_seconds: int | None = None
    """Until the training processes started: torchrun and its rendezvous of nodes. This and the
    following parts are measured by rank 0 of the attempt that made the step."""
    import_seconds: int | None = None
    """Import of libraries."""
    rendezvous_seconds: int | None = None
    """Initialization of the process group, and claim of the run."""
    data_seconds: int | None = None
    """Opening the prepared data, and planning the steps."""
    model_seconds: int | None = None
    """Fetching the model, estimating its memory, loading it, applying the method and sharding."""
    restore_seconds: int | None = None
    """Looking for a checkpoint to continue from, and reading it."""
    baseline_seconds: int | None = None
    """Evaluation of the base model."""
    compile_seconds: int | None = None
    """Compilation of blocks, with spec.training.compile."""
    step_seconds: int | None = None
    """The rest of the first step, including the wait for its data."""


class FailureStatus(Model):
    """Why the run failed, and what to do."""

    failure_class: Word = Field(alias="class")
    """Failure class: see [failure classes](#failure-classes). Other releases may have more."""
    reason: Word
    """CamelCase word for scripts."""
    message: Message
    """What happened, where, and what to do."""
    pod: Word | None = None
    """Pod that reported the failure."""
    node: Word | None = None
    """Node of that pod."""
    exit_code: int | None = None
    """Exit code of that pod's container."""
    attempt: int | None = None
    """Attempt that the failure ended."""


class QueueStatus(Model):
    """The wait of a gang that has given its nodes back: without a queue, because only some of its
    pods found nodes, or by a rule of spec.failurePolicy with action Wait."""

    since: Time
    """When the gang first waited."""
    reason: Word = "Unschedulable"
    """Why it waits: Unschedulable, or the reason of the failure."""
    tries: int
    """How often it has given its nodes back."""
    next_try_time: Time
    """When it tries again."""
    message: Annotated[str, StringConstraints(max_length=1024)]
    """What the scheduler, or the failed pod, said."""


class AvoidedNode(Model):
    """A node on which the run's gang is not placed."""

    node: Word
    """Name of the node."""
    until: Time
    """Until when gangs that are made avoid it."""
    message: Annotated[str, StringConstraints(max_length=512)]
    """What happened there."""


class Incident(Model):
    """An end of the gang's work from which the run recovers."""

    number: int
    """Number of the incident in the run, from 1."""
    start_time: Time
    """When the first of its pods ended."""
    end_time: Time
    """When the last of its pods ended."""
    attempt: int
    """Attempt that the incident ended; 0: none had begun."""
    fault: bool
    """Whether the incident counts against spec.failurePolicy.maxRestarts. Disruptions by Kubernetes
    (drain, preemption, lost node) do not."""
    failure: FailureStatus
    """Cause: the failure of the pod with the best evidence."""
    action: Word | None = None
    """What was done: Pod, Gang, Elsewhere or Wait. See the [table of failures](#failures)."""
    step: int | None = None
    """Optimizer steps done, as last read before."""
    recovery_seconds: int | None = None
    """Seconds from startTime until the first optimizer step of the next attempt."""
    indexes: Annotated[list[int], Field(max_length=1024)] = []
    """Completion indexes of its pods; of the newest incident only."""
    checkpoint: Uri | None = None
    """Newest checkpoint at that time."""


class FineTuneJobStatus(Model):
    """Observed state of the job."""

    observed_generation: int | None = None
    """Generation of the spec to which this status refers."""
    phase: Phase | None = None
    """Summary for display; scripts should read conditions."""
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
    """Conditions by type: Prepared, Running, Evaluated, Published, Suspended, Complete, Failed; and
    for kstatus (Flux; Argo CD does not read them): Ready, Reconciling, Stalled."""
    run: Run | None = None
    """The current run."""
    history: Annotated[list[Run], Field(max_length=10)] = []
    """The last ten earlier runs, newest first."""
    prepared: Prepared | None = None
    """Summary of the prepared data."""
    progress: ProgressStatus | None = None
    """Progress of the training."""
    checkpoints: Checkpoints | None = None
    """Checkpoints of the run."""
    evaluation: Annotated[list[MetricValue], Field(max_length=256)] = []
    """Test metrics of the base model and the tuned model."""
    main_result: MainResultStatus | None = None
    """The main one of these, once the model is published."""
    parameters: ParameterStatus | None = None
    """Number of parameters of the model."""
    output: OutputStatus | None = None
    """The published model."""
    restarts: int = 0
    """Number of restarts of the gang in this run, for any cause."""
    faults: int = 0
    """Restarts that count against spec.failurePolicy.maxRestarts: faults, since the run last
    trained for half an hour without one and saved a checkpoint."""
    incidents: Annotated[list[Incident], Field(max_length=10)] = []
    """The last ten incidents of this run, newest first."""
    queue: QueueStatus | None = None
    """Wait of a gang that has given its nodes back."""
    avoided_nodes: Annotated[list[AvoidedNode], Field(max_length=8)] = []
    """Nodes that the gang's pods avoid, because the run failed there twice, or by a rule with
    action Elsewhere. Dropped if the gang finds no other nodes."""
    usage: Usage | None = None
    """Resources used by the run."""
    startup: StartupStatus | None = None
    """Time from the start of the run to the end of its first optimizer step; set once that step is
    done."""
    failure: FailureStatus | None = None
    """Why the run failed, and what to do."""
