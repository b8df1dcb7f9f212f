"""What the words of status mean, for the reference: conditions, phases, failures, exit codes.

The words themselves are in ``names``; a test proves that none is without a meaning here.
"""

from __future__ import annotations

from typing import Final

from finetune_api.names import Condition, ExitCode, FailureClass, Phase

CONDITIONS: Final[dict[Condition, str]] = {
    "Prepared": "The data of the current run is prepared.",
    "Running": "The gang is training: all its pods run.",
    "Evaluated": "The test metrics of the untuned and the tuned model are known.",
    "Published": "The model is in object storage, complete.",
    "Suspended": "The job holds no nodes because spec.suspend is true.",
    "Complete": "The current run has ended well.",
    "Failed": "The current run has ended badly; status.failure says why. Final unless the spec is"
    " changed.",
    "Ready": "For kstatus (Flux, Argo CD): as Complete.",
    "Reconciling": "For kstatus: the run is under way.",
    "Stalled": "For kstatus: as Failed; also where the spec as it stands is refused, or the model"
    " that it refers to will not come by itself.",
}

REASONS: Final[dict[str, str]] = {
    "Progressing": "Nothing is wrong.",
    "Pending": "The stage's Job is being made, or waits for pods of an earlier one to end.",
    "WaitingForModel": "The job that spec.model.fineTuneJobRef names is missing or under way.",
    "ModelFailed": "The job that spec.model.fineTuneJobRef names has failed, or its spec is"
    " refused: it must be mended.",
    "ReferenceCycle": "The jobs wait for each other's models.",
    "Preparing": "The data is being prepared.",
    "Queued": "The gang waits in spec.scheduling.queueName, or another than the operator has"
    " suspended its Job.",
    "Starting": "Not all pods of the gang run yet.",
    "GangRunning": "All pods of the gang run.",
    "Publishing": "The model is being written.",
    "NotTraining": "The run is at a stage on a CPU.",
    "NotSuspended": "spec.suspend is false.",
    "Suspended": "spec.suspend is true.",
    "DataReady": "The prepared data is in storage.",
    "MayNotFit": "The prepared data is in storage; by the estimate, the training takes more memory"
    " than a process has. It is tried all the same.",
    "Evaluated": "The gang has measured the test sets.",
    "Published": "The model is at its address.",
    "Finished": "The run has ended.",
    "Complete": "The run has ended well.",
    "Failed": "The run has ended badly.",
    "Resumed": "The spec was changed after a failure, and the run goes on.",
    "InvalidSpec": "The spec as it stands is refused; a run that has begun goes on without it.",
    "OperatorDefect": "The operator has met a defect of its own, and tries again; see its log.",
    "ChildRefused": "The API server refuses an object of the run; the message is its own.",
    "PodsNotCreated": "The Job has no pods: a quota or an admission policy refuses them.",
    "Unschedulable": "The scheduler finds no node.",
    "ImagePull": "The image cannot be pulled.",
    "MissingSecret": "The Secret, or a key of it, does not exist.",
    "ContainerConfig": "The container cannot be made.",
}
"""Reasons of conditions. Failed, and Ready and Stalled with it, have the reason of
status.failure."""

PHASES: Final[dict[Phase, str]] = {
    "Pending": "The operator has seen the job, and nothing has been made yet.",
    "Waiting": "The model that spec.model.fineTuneJobRef names is not published yet.",
    "Preparing": "Data is checked, rendered and tokenized on a CPU.",
    "Queued": "The gang waits in its queue.",
    "Starting": "The gang waits for nodes, images or its peers.",
    "Training": "The gang trains and evaluates.",
    "Publishing": "The model is written to the destination, on a CPU.",
    "Suspended": "Stopped by spec.suspend; the state is saved.",
    "Complete": "The model is published.",
    "Failed": "The run has failed; status.failure says why.",
}

FAILURES: Final[dict[FailureClass, tuple[str, str]]] = {
    "UserError": (
        "The manifest asks for what cannot be.",
        "Change the field that the message names.",
    ),
    "DataError": (
        "A record, or the data as a whole, cannot be used.",
        "Mend the object, line and field that the message names; a new spec.rerunToken runs again.",
    ),
    "OutOfMemory": (
        "A GPU's or a pod's memory does not suffice.",
        "Lower training.microBatchTokens or training.maxLength, set"
        " training.gradientCheckpointing: Always, or raise compute.resources; with"
        " compute.gpuMemory given, prepare says what fits.",
    ),
    "Diverged": (
        "More steps in a row than training.guard allows had a loss or gradient that was no finite"
        " number (reason LossNotFinite), or, where training.guard.spikeDeviations is set, a loss"
        " that leapt (LossSpike), and going back to an earlier checkpoint did not help.",
        "Lower training.learningRate, raise training.warmupRatio, or look at the samples that the"
        " message names; after LossSpike, a higher training.guard.spikeDeviations lets more pass.",
    ),
    "NodeFailure": (
        "A node, a device or a process of the gang was lost more often than"
        " failurePolicy.maxRestarts, or no node was found in scheduling.startDeadlineSeconds.",
        "Look at the node that status names, or ask for less; the run goes on from its"
        " last checkpoint when a field of class Resume is changed (of compute, scheduling or"
        " checkpoint, say), and begins anew with another rerunToken.",
    ),
    "Preempted": (
        "The gang was put off its nodes, more often than failurePolicy.maxRestarts.",
        "Use a higher priority class or a queue in spec.scheduling: the run goes on from its last"
        " commit.",
    ),
    "ImagePull": (
        "The trainer image cannot be pulled.",
        "Mend compute.image, or the pull secrets in compute.podTemplate.",
    ),
    "Storage": (
        "Object storage refuses, or cannot be reached.",
        "Look at spec.storage, the Secret's keys and their permissions, and the address that the"
        " message names.",
    ),
    "Internal": (
        "A defect of this software.",
        "Report it, with the message and the logs of the pod that status names.",
    ),
}

EXIT_CODES: Final[dict[ExitCode, str]] = {
    ExitCode.OK: "The stage is done.",
    ExitCode.USER_ERROR: "UserError",
    ExitCode.DATA_ERROR: "DataError",
    ExitCode.STORAGE_DENIED: "Storage: credentials, bucket or permissions.",
    ExitCode.DIVERGED: "Diverged",
    ExitCode.OUT_OF_MEMORY: "OutOfMemory",
    ExitCode.INTERNAL: "Internal",
    ExitCode.FENCED: "A newer attempt has taken the run; this one stopped.",
    ExitCode.NODE_FAILURE: "NodeFailure",
    ExitCode.STORAGE_UNAVAILABLE: "Storage: not reachable, or overloaded.",
    ExitCode.INTERRUPTED: "Stopped by SIGTERM after the state was saved.",
}

STORAGE_LAYOUT: Final[tuple[tuple[str, tuple[tuple[str, str], ...]], ...]] = (
    (
        "data",
        (
            ("shards/", "samples: token ids and loss masks (Arrow IPC)"),
            ("index-<split>.arrow", "one row a sample: set, length, supervised, shard, row"),
            ("report.json, report.html", "what was found in the data"),
            ("manifest.json", "written last: names, sizes and sha256 of the files above"),
        ),
    ),
    (
        "run",
        (
            (
                "splits/",
                "what map leaves of each input split for the reduce; removed when all is prepared",
            ),
            ("prepared.json", "which prepared data the run uses"),
            ("memory-profiles.json", "what memory the model takes, as prepare counted it"),
            ("HEAD.json", "the attempt that owns the run, its checkpoints, and when it went back"),
            ("seen.json", "when the attempt last showed that it lives: what it cost, if it dies"),
            ("attempt-<n>/step-<8 digits>/", "a checkpoint: the training state"),
            ("baseline.json", "test metrics of the untuned model"),
            ("result.json", "what publish reads: summary and learning curve"),
        ),
    ),
    (
        "output",
        (
            ("adapter/", "the adapter, for peft"),
            ("merged/", "the whole model, for transformers"),
            ("metrics.json", "test metrics, untuned and tuned"),
            ("report.html", "the run for people: metrics and learning curve"),
            ("README.md", "the model card"),
            ("manifest.json", "written last: a folder without it is not a model"),
        ),
    ),
)
"""Files below the prefixes that ``identity`` computes (data_uri, run_uri, output_uri)."""
