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
    "Gang": "All pods of the gang are recreated, as the next revision of the run.",
    "Elsewhere": "The pod is replaced. If it happens again on the same node, the gang is recreated,"
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
        "A training process made no progress for failurePolicy.progressDeadlineSeconds, or prepare"
        " or publish for an hour, again and again.",
        "Read the stacks under the run's stacks/ in object storage: a hung collective points to the"
        " network or a GPU of the rank that is behind the others there, a blocked read to storage."
        " Raise failurePolicy.progressDeadlineSeconds if single steps take that long.",
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

RETRIES: Final[dict[str, tuple[Action, ...]]] = {
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
    recognized_by: str
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


def _reported(
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
    recognized_by = f"exit code {int(code)} and the termination message"
    return FailureRow(
        failure_class, recognized_by, action, tuple(reasons.split()), exit_code=code, what=what,
        counts=counts, suspects_node=suspects_node, in_place=in_place,
    )  # fmt: skip


def _observed(
    failure_class: FailureClass,
    recognized_by: str,
    action: Action,
    reasons: str,
    counts: bool = True,
    suspects_node: bool = False,
    verbatim: bool = False,
) -> FailureRow:
    """A failure that the operator sees."""
    return FailureRow(
        failure_class, recognized_by, action, tuple(reasons.split()), counts=counts,
        suspects_node=suspects_node, verbatim=verbatim,
    )  # fmt: skip


FAILURES: Final[tuple[FailureRow, ...]] = (
    # --- no retry can help ----------------------------------------------------------------------
    _reported(
        "UserError", ExitCode.USER_ERROR, "End",
        "UserError BadTemplate BaseChanged CheckpointGone DataCurveNotMeasured DataGone DoesNotFit"
        " DuplicateName EncryptionNotSupported FormatNotForTask GPUMissing GateNotMeasured"
        " ImageUnsuitable IncompleteModel InvalidAddress InvalidEnvironment InvalidSpec JudgeFailed"
        " MaxLengthTooLong MetricFailed MetricNotInstalled MetricWithoutData ModelChanged"
        " ModelElsewhere ModelHeld ModelNotFound ModelNotReady NoChatTemplate NoCompiler"
        " NoEarlierModel NoEndToken NoFP8 NoMatrices NoModelPublished NoObjects NoPaddingToken"
        " NoRouter NoSuchParameters NoSumOfAdapters NoTargetModules"
        " NotACurrentFile NotMergeable NotTrained NothingToAsk NothingToMix NothingToReplay"
        " ObjectNotFound OutsideClaim PackageMissing PublishedFileGone QuestionsDoNotFit"
        " RemedyNotMeasured RunSpecMissing ScratchFull SharedMemoryFull SliceFieldMissing"
        " StageTooShort StateUnreadable StorageInUse StorageNotInstalled StoreIgnoresConditions"
        " TemplateTooCostly UnknownObjectType UnreadableModel UnsuitableMethod UnsuitableModel"
        " UnsupportedModel UnsupportedTokenizer VocabularyMismatch",
        "the manifest is invalid or cannot be satisfied",
    ),
    _observed(
        "UserError", "compute.podTemplate, or the API server's refusal of a child", "End",
        "InvalidPodTemplate ChildRefused",
    ),
    _observed(
        "UserError", "a container that waits with reason CreateContainerConfigError", "Wait",
        "MissingSecret ContainerConfig",
    ),
    _reported(
        "DataError", ExitCode.DATA_ERROR, "End",
        "DataError Contaminated EmptyDataSet EmptyPrompt MalformedObject MalformedRecord"
        " MarkMismatch MissingField MostRecordsFaulty NoEndOfTurn NoPassages NothingSupervised"
        " ObjectChanged"
        " Overlength PersonalData PrefixMismatch PreparedDataDamaged PreparedDataMissing"
        " TemplateFailed TooFewClasses TooFewDistractors TooManyDuplicates TooManyPassages"
        " ToolsNotWritten"
        " UnknownFormat UnknownLabel UnknownPassage UnknownRole WrongType",
        "a record of the data cannot be used",
    ),
    _reported(
        "Storage", ExitCode.STORAGE_DENIED, "End",
        "StorageDenied AccessDenied BucketNotFound CertificateNotTrusted EncryptionKeyDenied"
        " IncompleteCredentials WrongRegion",
        "object storage refuses access",
    ),
    _reported(
        "Diverged", ExitCode.DIVERGED, "End", "Diverged LossNotFinite LossSpike",
        "the loss is not finite, or spikes",
    ),
    _reported(
        "OutOfMemory", ExitCode.OUT_OF_MEMORY, "End", "OutOfMemory DeviceOutOfMemory",
        "the device is out of memory",
    ),
    _reported(
        "Internal", ExitCode.INTERNAL, "End",
        "Internal ArtefactDiffers BeyondTheEnd CorruptCheckpoint HeadOfAnotherRun KernelFailed"
        " NCCLFailed NCCLMisused NoTerminationMessage PreconditionFailed StorageRefused",
        "the trainer has found a defect of its own",
    ),
    _reported(
        "Internal", ExitCode.FENCED, "Pod", "Fenced", "a newer attempt has taken over the run",
        counts=False,
    ),
    # --- faults that a retry can mend -----------------------------------------------------------
    _reported(
        "NodeFailure", ExitCode.NODE_FAILURE, "Pod", "NodeFailure GangNotFormed ProcessLost",
        "another process of the gang, or a device, was lost",
    ),
    _reported("NodeFailure", ExitCode.NODE_FAILURE, "Pod", "PeerLost", in_place=True),
    _reported(
        "NodeFailure", ExitCode.NODE_FAILURE, "Elsewhere",
        "DeviceFault DeviceUnavailable DiskFailed ProcessKilled", suspects_node=True,
    ),
    _reported(
        "Storage", ExitCode.STORAGE_UNAVAILABLE, "Pod",
        "StorageUnavailable CheckpointsDamaged CredentialsExpired CurrentContended HeadContended"
        " HubUnreachable LatestContended StorageNotStarted StorageOverloaded StorageUnreachable"
        " UploadGone",
        "object storage could not be reached",
    ),
    _reported(
        "Storage", ExitCode.STORAGE_UNAVAILABLE, "Elsewhere", "ClockWrong", suspects_node=True
    ),
    _reported(
        "Internal", ExitCode.UNEXPECTED, "Pod", "Unexpected WorkerExited",
        "the trainer failed with an unexpected error",
    ),
    _reported(
        "Preempted", ExitCode.INTERRUPTED, "Pod", "Interrupted InterruptedUnsaved",
        "stopped on request, with its state saved", counts=False,
    ),
    _reported(
        "Stalled", ExitCode.STALLED, "Elsewhere", "Stalled NoProgress",
        "a process made no progress", in_place=True, suspects_node=True,
    ),
    _reported(
        "OutOfMemory", ExitCode.HOST_OUT_OF_MEMORY, "Pod", "HostOutOfMemory",
        "the pod is out of memory",
    ),
    _observed("Internal", "another exit code", "Pod", "ContainerFailed"),
    # --- Kubernetes takes a pod away ------------------------------------------------------------
    _observed(
        "NodeFailure", "pod condition DisruptionTarget", "Elsewhere",
        "DeletionByTaintManager DeletionByPodGC", counts=False, suspects_node=True, verbatim=True,
    ),
    _observed(
        "NodeFailure", "status.reason of the pod: its node refused it", "Elsewhere",
        "UnexpectedAdmissionError", suspects_node=True, verbatim=True,
    ),
    _observed(
        "NodeFailure", "another status.reason of the pod, e.g. OutOfcpu", "Elsewhere",
        "PodRejected", suspects_node=True,
    ),
    _observed(
        "Preempted", "pod condition DisruptionTarget", "Pod",
        "EvictionByEvictionAPI PreemptionByScheduler", counts=False, verbatim=True,
    ),
    _observed(
        "Preempted", "status.reason of the pod: its node shuts down, or needs room for a system"
        " pod", "Pod", "Terminated NodeShutdown Preempting", counts=False, verbatim=True,
    ),
    _observed(
        "Preempted", "a deleted pod, or another reason of condition DisruptionTarget", "Pod",
        "PodDeleted Disrupted", counts=False,
    ),
    _observed(
        "Preempted", "status.reason of the pod: its node is short of disk or memory", "Pod",
        "Evicted TerminationByKubelet", verbatim=True,
    ),
    _observed(
        "Internal", "reason of the failed Job, whose pods are gone", "End",
        "BackoffLimitExceeded DeadlineExceeded FailedIndexes MaxFailedIndexesExceeded"
        " PodFailurePolicy", verbatim=True,
    ),
    _observed("Internal", "a failed Job without a reason, whose pods are gone", "End", "PodsGone"),
    # --- pods that do not start -----------------------------------------------------------------
    _observed(
        "ImagePull", "a container that waits with this reason for 30 s (no such image, no access)"
        " or 10 minutes; in a gang that has trained, as Wait", "End",
        "ErrImagePull ImagePullBackOff InvalidImageName ErrImageNeverPull", verbatim=True,
    ),
    _observed(
        "Unschedulable", "pod condition PodScheduled, False", "Wait", "Unschedulable"
    ),
    _observed(
        "Quota", "a Job that lacks pods, and its events", "Wait", "PodsNotCreated"
    ),
    _observed(
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


def allowed_actions(failure_class: str) -> tuple[Action, ...]:
    """Return the actions that ``failurePolicy.rules`` may give to a class."""
    return (*RETRIES.get(failure_class, ("Gang", "Elsewhere", "Wait")), "End")


def exit_codes() -> Iterator[tuple[ExitCode, FailureRow]]:
    """Yield every exit code of a failure with its first row, in order."""
    for code in sorted(BY_EXIT_CODE):
        yield ExitCode(code), BY_EXIT_CODE[code]
