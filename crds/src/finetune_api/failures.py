"""The table of failures: how each is recognized, what is done, whether it counts, and the remedy.

Operator, trainer, metrics and ``docs/reference.md`` read this table; nothing else says what a
failure means. A row is a group of reasons with the same treatment. Tests check that every reason
that code can report has a row, and that every row is reported by code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from finetune_api.names import ExitCode, FailureClass

Action = Literal["Pod", "Gang", "Elsewhere", "Wait", "End"]

ACTIONS: Final[dict[Action, str]] = {
    "Pod": "The pod is replaced; the other pods of the gang wait in place.",
    "Gang": "All pods of the gang are made anew, as the next revision of the run.",
    "Elsewhere": "The pod is replaced. If it happens again on the same node, the gang is made anew,"
    " and its pods avoid that node for some hours.",
    "Wait": "What is missing is waited for, until scheduling.startDeadlineSeconds are over; then"
    " the run ends.",
    "End": "The run ends.",
}
"""What is done after a failure, in the order of their cost."""

CLASSES: Final[dict[FailureClass, tuple[str, str]]] = {
    "UserError": (
        "The manifest requests something impossible.",
        "Change the field that the message names.",
    ),
    "DataError": (
        "A record, or the data as a whole, cannot be used.",
        "Fix the object, line and field that the message names, then set a new spec.rerunToken.",
    ),
    "OutOfMemory": (
        "The memory of a GPU (reason DeviceOutOfMemory) or of a pod (HostOutOfMemory) was not"
        " sufficient.",
        "Lower training.microBatchTokens or training.maxLength, set"
        " training.gradientCheckpointing: Always, or raise compute.resources; with"
        " compute.gpuMemory given, prepare lists settings that fit.",
    ),
    "Diverged": (
        "More consecutive steps than training.guard allows had a non-finite loss or gradient"
        " (reason LossNotFinite) or, if training.guard.spikeDeviations is set, a loss spike"
        " (LossSpike), and returning to an earlier checkpoint did not help.",
        "Lower training.learningRate, raise training.warmupRatio, or check the samples that the"
        " message names; after LossSpike, a higher training.guard.spikeDeviations tolerates more.",
    ),
    "NodeFailure": (
        "A device, a process or a node of the gang was lost more often than"
        " failurePolicy.maxRestarts, or a pod did not start on its node in"
        " scheduling.startDeadlineSeconds.",
        "Check the node that status names. The run continues from its last checkpoint with another"
        " spec.retryToken, or when a field of class Resume is changed (e.g. in compute, scheduling"
        " or checkpoint).",
    ),
    "Preempted": (
        "A pod was evicted, preempted or stopped; of prepare or publish, more often than its Job"
        " allows.",
        "Set another spec.retryToken; a higher priority class in spec.scheduling is evicted later.",
    ),
    "Stalled": (
        "A training process made no progress for failurePolicy.progressDeadlineSeconds, again and"
        " again.",
        "Read the stacks under the run's stacks/ in object storage: a hung collective points to the"
        " network or a GPU of the node that status names, a blocked read to storage. Raise"
        " failurePolicy.progressDeadlineSeconds if single steps take that long.",
    ),
    "ImagePull": (
        "The trainer image cannot be pulled.",
        "Correct compute.image, or the pull secrets in compute.podTemplate.",
    ),
    "Storage": (
        "Object storage refuses requests, or cannot be reached.",
        "Check spec.storage, the Secret's keys and their permissions, and the address that the"
        " message names.",
    ),
    "Unschedulable": (
        "The scheduler found no node for a pod in scheduling.startDeadlineSeconds.",
        "Request fewer compute.nodes or gpusPerNode, or smaller resources, or add nodes: the"
        " message quotes the scheduler.",
    ),
    "Quota": (
        "A quota or an admission policy refused pods for scheduling.startDeadlineSeconds.",
        "Raise the namespace's quota, or request less: the message quotes Kubernetes.",
    ),
    "Internal": (
        "A defect of this software, or an error of unknown cause.",
        "Report it, with the message and the logs of the pod that status names.",
    ),
}
"""Cause and remedy by class. The message of a failure has the remedy of its reason, if there is a
more specific one."""

RETRIES: Final[dict[FailureClass, tuple[Action, ...]]] = {
    "UserError": (),
    "DataError": (),
    "ImagePull": ("Wait",),
    "Unschedulable": ("Wait",),
    "Quota": ("Wait",),
}
"""Actions besides End that ``failurePolicy.rules`` may give to a class, where they are not Gang,
Elsewhere and Wait: a manifest or data must change first; a pod that does not exist, or has no
image, is no better elsewhere."""


@dataclass(frozen=True)
class FailureRow:
    """Reasons of a class that are recognized and treated alike."""

    failure_class: FailureClass
    told_by: str
    """How it is recognized."""
    action: Action
    """What is done, unless ``failurePolicy.rules`` gives another action."""
    reasons: tuple[str, ...]
    exit_code: ExitCode | None = None
    """Exit code of a trainer's container, whose termination message has the reason; one without a
    message gets the first reason of the code's first row."""
    what: str = ""
    """What happened, for a container that left only its exit code."""
    counts: bool = True
    """Whether a gang that recovers from it counts a fault: its cause is the run or its node, not a
    decision of Kubernetes or of a user."""
    suspects_node: bool = False
    """Whether the node may be the cause, so that it is avoided if it happens there twice."""
    in_place: bool = False
    """Whether the supervisor first restarts the training processes in place, without a new pod."""
    verbatim: bool = False
    """Whether the reasons are words of Kubernetes."""


def _trainer(
    failure_class: FailureClass,
    code: ExitCode,
    action: Action,
    reasons: str,
    what: str = "",
    counts: bool = True,
    suspects_node: bool = False,
    in_place: bool = False,
) -> FailureRow:
    """A failure that the trainer reports."""
    told_by = f"exit code {int(code)} and the termination message"
    words = tuple(reasons.split())
    return FailureRow(
        failure_class, told_by, action, words, code, what, counts, suspects_node, in_place
    )


def _seen(
    failure_class: FailureClass,
    told_by: str,
    action: Action,
    reasons: str,
    counts: bool = True,
    suspects_node: bool = False,
    verbatim: bool = False,
) -> FailureRow:
    """A failure that the operator sees."""
    words = tuple(reasons.split())
    return FailureRow(
        failure_class, told_by, action, words, None, "", counts, suspects_node, False, verbatim
    )


FAILURES: Final[tuple[FailureRow, ...]] = (
    # --- no retry can help ----------------------------------------------------------------------
    _trainer(
        "UserError", ExitCode.USER_ERROR, "End",
        "UserError BadTemplate BaseChanged CheckpointGone DataGone DoesNotFit DuplicateName"
        " EncryptionNotSupported FormatNotForTask GPUMissing ImageUnsuitable IncompleteModel"
        " InvalidAddress InvalidEnvironment InvalidSpec MaxLengthTooLong MetricWithoutData"
        " ModelChanged ModelElsewhere ModelNotFound ModelNotReady NoChatTemplate NoCompiler"
        " NoEndToken NoFP8 NoMatrices NoObjects NoPaddingToken NoRouter NoSuchParameters"
        " NoSumOfAdapters NoTargetModules NotMergeable NotTrained NothingToMix NothingToReplay"
        " ObjectNotFound OutsideClaim PackageMissing RunSpecMissing ScratchFull SharedMemoryFull"
        " StageTooShort StateUnreadable StorageInUse StorageNotInstalled StoreIgnoresConditions"
        " TemplateTooCostly UnknownObjectType UnreadableModel UnsuitableMethod UnsuitableModel"
        " UnsupportedModel UnsupportedTokenizer VocabularyMismatch",
        "the manifest is invalid or cannot be satisfied",
    ),
    _seen(
        "UserError", "compute.podTemplate, or the API server's refusal of a child", "End",
        "InvalidPodTemplate ChildRefused",
    ),
    _seen(
        "UserError", "a container that waits with reason CreateContainerConfigError", "Wait",
        "MissingSecret ContainerConfig",
    ),
    _trainer(
        "DataError", ExitCode.DATA_ERROR, "End",
        "DataError Contaminated EmptyDataSet EmptyPrompt MalformedObject MalformedRecord"
        " MarkMismatch MissingField MostRecordsFaulty NoEndOfTurn NothingSupervised ObjectChanged"
        " Overlength PersonalData PrefixMismatch PreparedDataDamaged PreparedDataMissing"
        " TemplateFailed TooFewClasses TooFewDistractors TooManyDuplicates ToolsNotWritten"
        " UnknownFormat UnknownLabel UnknownPassage UnknownRole WrongType",
        "a record of the data cannot be used",
    ),
    _trainer(
        "Storage", ExitCode.STORAGE_DENIED, "End",
        "StorageDenied AccessDenied BucketNotFound CertificateNotTrusted EncryptionKeyDenied"
        " IncompleteCredentials WrongRegion",
        "object storage refuses access",
    ),
    _trainer(
        "Diverged", ExitCode.DIVERGED, "End", "Diverged LossNotFinite LossSpike",
        "the loss is not finite, or spikes",
    ),
    _trainer(
        "OutOfMemory", ExitCode.OUT_OF_MEMORY, "End", "OutOfMemory DeviceOutOfMemory",
        "the device is out of memory",
    ),
    _trainer(
        "Internal", ExitCode.INTERNAL, "End",
        "Internal BeyondTheEnd CorruptCheckpoint HeadOfAnotherRun KernelFailed NCCLFailed"
        " NCCLMisused NoTerminationMessage PreconditionFailed StorageRefused",
        "the trainer has found a defect of its own",
    ),
    _trainer(
        "Internal", ExitCode.FENCED, "Pod", "Fenced", "a newer attempt has taken over the run",
        counts=False,
    ),
    # --- faults that a retry can mend -----------------------------------------------------------
    _trainer(
        "NodeFailure", ExitCode.NODE_FAILURE, "Pod", "NodeFailure GangNotFormed ProcessLost",
        "another process of the gang, or a device, was lost",
    ),
    _trainer("NodeFailure", ExitCode.NODE_FAILURE, "Pod", "PeerLost", in_place=True),
    _trainer(
        "NodeFailure", ExitCode.NODE_FAILURE, "Elsewhere",
        "DeviceFault DeviceUnavailable DiskFailed ProcessKilled", suspects_node=True,
    ),
    _trainer(
        "Storage", ExitCode.STORAGE_UNAVAILABLE, "Pod",
        "StorageUnavailable CheckpointsDamaged CredentialsExpired HeadContended HubUnreachable"
        " LatestContended StorageNotStarted StorageOverloaded StorageUnreachable UploadGone",
        "object storage could not be reached",
    ),
    _trainer(
        "Storage", ExitCode.STORAGE_UNAVAILABLE, "Elsewhere", "ClockWrong", suspects_node=True
    ),
    _trainer(
        "Internal", ExitCode.UNEXPECTED, "Pod", "Unexpected WorkerExited",
        "the trainer failed with an unexpected error",
    ),
    _trainer(
        "Preempted", ExitCode.INTERRUPTED, "Pod", "Interrupted InterruptedUnsaved",
        "stopped on request, with its state saved", counts=False,
    ),
    _trainer(
        "Stalled", ExitCode.STALLED, "Elsewhere", "Stalled NoProgress",
        "a training process made no progress", in_place=True, suspects_node=True,
    ),
    _trainer(
        "OutOfMemory", ExitCode.HOST_OUT_OF_MEMORY, "Pod", "HostOutOfMemory",
        "the pod is out of memory",
    ),
    _seen("Internal", "another exit code", "Pod", "ContainerFailed"),
    # --- Kubernetes takes a pod away ------------------------------------------------------------
    _seen(
        "NodeFailure", "pod condition DisruptionTarget", "Elsewhere",
        "DeletionByTaintManager DeletionByPodGC", counts=False, suspects_node=True, verbatim=True,
    ),
    _seen(
        "NodeFailure", "status.reason of the pod: its node refused it", "Elsewhere",
        "UnexpectedAdmissionError", suspects_node=True, verbatim=True,
    ),
    _seen(
        "NodeFailure", "another status.reason of the pod, e.g. OutOfcpu", "Elsewhere",
        "PodRejected", suspects_node=True,
    ),
    _seen(
        "Preempted", "pod condition DisruptionTarget", "Pod",
        "EvictionByEvictionAPI PreemptionByScheduler", counts=False, verbatim=True,
    ),
    _seen(
        "Preempted", "status.reason of the pod: its node shuts down, or needs room for a system"
        " pod", "Pod", "Terminated NodeShutdown Preempting", counts=False, verbatim=True,
    ),
    _seen(
        "Preempted", "a deleted pod, or another reason of condition DisruptionTarget", "Pod",
        "PodDeleted Disrupted", counts=False,
    ),
    _seen(
        "Preempted", "status.reason of the pod: its node is short of disk or memory", "Pod",
        "Evicted TerminationByKubelet", verbatim=True,
    ),
    _seen(
        "Internal", "reason of the failed Job, whose pods are gone", "End",
        "BackoffLimitExceeded DeadlineExceeded FailedIndexes MaxFailedIndexesExceeded"
        " PodFailurePolicy", verbatim=True,
    ),
    _seen("Internal", "a failed Job without a reason, whose pods are gone", "End", "PodsGone"),
    # --- pods that do not start -----------------------------------------------------------------
    _seen(
        "ImagePull", "a container that waits with this reason for 30 s (no such image, no access)"
        " or 10 minutes; in a gang that has trained, as Wait", "End",
        "ErrImagePull ImagePullBackOff InvalidImageName ErrImageNeverPull", verbatim=True,
    ),
    _seen(
        "Unschedulable", "pod condition PodScheduled, False", "Wait", "Unschedulable"
    ),
    _seen(
        "Quota", "a Job that lacks pods, and its events", "Wait", "PodsNotCreated"
    ),
    _seen(
        "NodeFailure", "a container that waits for another reason, and the pod's events", "Wait",
        "NotStarted",
    ),
)  # fmt: skip


ROWS: Final[dict[str, FailureRow]] = {reason: row for row in FAILURES for reason in row.reasons}
"""The row of each reason."""

BY_EXIT_CODE: Final[dict[int, FailureRow]] = {
    int(row.exit_code): row for row in reversed(FAILURES) if row.exit_code is not None
}
"""The first row of each exit code."""


def row_of(reason: str, exit_code: int | None = None) -> FailureRow | None:
    """Return the row of a reason; of one that only another release knows, that of the container's
    exit code; None if there is neither."""
    return ROWS.get(reason) or BY_EXIT_CODE.get(exit_code or 0)


def allowed_actions(failure_class: FailureClass) -> tuple[Action, ...]:
    """Return the actions that ``failurePolicy.rules`` may give to a class."""
    return (*RETRIES.get(failure_class, ("Gang", "Elsewhere", "Wait")), "End")


def exit_codes() -> Iterator[tuple[ExitCode, FailureRow]]:
    """Yield every exit code of a failure with its first row, in order."""
    for code in sorted(BY_EXIT_CODE):
        yield ExitCode(code), BY_EXIT_CODE[code]
