"""Descriptions for the reference: conditions, reasons, phases, files. Those of failures are in
``failures``.

The values are defined in ``names``; a test checks that each has a description here.
"""

from __future__ import annotations

from typing import Final

from finetune_api.names import Condition, Phase

CONDITIONS: Final[dict[Condition, str]] = {
    "Prepared": "The data of the current run is prepared.",
    "Running": "The gang is training or evaluating: all its pods run.",
    "Evaluated": "The test metrics of the base model and the tuned model are known.",
    "Published": "The complete model is in object storage.",
    "Suspended": "The job holds no nodes because spec.suspend is true.",
    "Complete": "The current run has succeeded.",
    "Failed": "The current run has failed; see status.failure. Final unless the spec is changed.",
    "Ready": "For kstatus (Flux, kubectl wait): as Complete.",
    "Reconciling": "For kstatus: the run is in progress.",
    "Stalled": "For kstatus: as Failed; also if the current spec is refused, or if the model that"
    " it refers to will not be published without a change.",
}

REASONS: Final[dict[str, str]] = {
    "Progressing": "Nothing is wrong.",
    "Pending": "The stage's Job is being created, or waits for pods of an earlier Job to end.",
    "WaitingForModel": "The job that spec.model.fineTuneJobRef names is missing or in progress.",
    "ModelFailed": "The job that spec.model.fineTuneJobRef names has failed, or its spec is"
    " refused: fix that job.",
    "NoModelPublished": "The job that spec.model.fineTuneJobRef names has method.type None: it"
    " evaluates a model, and publishes none.",
    "ModelHeld": "The model of the job that spec.model.fineTuneJobRef names missed its gates.",
    "ReferenceCycle": "The jobs wait for each other's models.",
    "Preparing": "The data is being prepared.",
    "Queued": "The gang waits in spec.scheduling.queueName, or something other than the operator"
    " has suspended its Job.",
    "Starting": "Not all pods of the gang run yet.",
    "GangRunning": "All pods of the gang run.",
    "Publishing": "The model is being written.",
    "NotTraining": "The run is at a CPU stage.",
    "NotSuspended": "spec.suspend is false.",
    "Suspended": "spec.suspend is true.",
    "DataReady": "The prepared data is in storage.",
    "MayNotFit": "The prepared data is in storage. By the estimate, the training needs more memory"
    " than a process has; it is tried nevertheless.",
    "Evaluated": "The test sets have been evaluated.",
    "GatesPending": "The test sets have been evaluated; publish decides spec.evaluation.gates, and"
    " compares with the current model.",
    "GatesMissed": "The model missed spec.evaluation.gates, or is worse than the current model; it"
    " is published, marked as held.",
    "Published": "The model is published.",
    "Finished": "The run has ended.",
    "Complete": "The run has succeeded.",
    "Failed": "The run has failed.",
    "Resumed": "The spec or its retryToken was changed after a failure, and the run continues.",
    "InvalidSpec": "The current spec is refused; a run that has begun continues unchanged.",
    "OperatorDefect": "The operator has hit an internal error and retries; see its log.",
    "ChildRefused": "The API server refuses to create, change or delete an object of the run; the"
    " message is the API server's.",
    "PodsNotCreated": "The Job lacks pods: a quota or an admission policy refuses them.",
    "NotStarted": "A pod has a node, but its container does not start: an image that is pulled, a"
    " missing volume, an error of the node.",
    "Unschedulable": "The scheduler finds no node.",
    "ImagePull": "The image cannot be pulled.",
    "MissingSecret": "The Secret, or one of its keys, does not exist.",
    "ContainerConfig": "The container cannot be created.",
}
"""Reasons of conditions. Failed, Ready and Stalled carry the reason of status.failure after a
failure."""

PHASES: Final[dict[Phase, str]] = {
    "Pending": "The operator has seen the job and has created nothing yet.",
    "Waiting": "The model that spec.model.fineTuneJobRef names is not published yet.",
    "Preparing": "Data is checked, rendered and tokenized on a CPU.",
    "Queued": "The gang waits in its queue or, without one, for nodes for all of its pods; or, by a"
    " rule of spec.failurePolicy, to be tried again after a failure.",
    "Starting": "The gang waits for nodes, images or its other pods.",
    "Training": "The gang trains and evaluates.",
    "Evaluating": "The gang evaluates, with method.type None.",
    "Publishing": "The model is written to the destination, on a CPU.",
    "Suspended": "Stopped by spec.suspend; the state is saved.",
    "Complete": "The model is published.",
    "Failed": "The run has failed; see status.failure.",
}

STORAGE_LAYOUT: Final[tuple[tuple[str, tuple[tuple[str, str], ...]], ...]] = (
    (
        "data",
        (
            ("shards/", "samples: token ids and loss masks (Arrow IPC)"),
            (
                "index-<split>.arrow",
                "one row per sample: set, length, supervised, shard, row, group",
            ),
            ("slices.arrow", "values of the fields of evaluation.slices, of test samples"),
            ("report.json, report.html", "the data report"),
            ("manifest.json", "written last: names, sizes and sha256 of the files above"),
        ),
    ),
    (
        "workspace",
        (
            (
                "base-rows/<key>.json",
                "answers and losses of a base model to test sets, which other runs take over",
            ),
        ),
    ),
    (
        "run",
        (
            (
                "splits/",
                "map results of each input split, for the reduce; removed when all is prepared",
            ),
            ("prepared.json", "which prepared data the run uses"),
            ("memory-profiles.json", "memory profiles of the model, measured by prepare"),
            (
                "base-probabilities.safetensors",
                "what the base model predicts for validation samples, for the KL divergence",
            ),
            ("HEAD.json", "the attempt that owns the run, its checkpoints and rollbacks"),
            ("heartbeat.json", "last heartbeat of the attempt: bounds the time lost if it dies"),
            ("attempt-<n>/step-<8 digits>/", "a checkpoint: the training state"),
            (
                "attempt-<n>/point-<8 digits>/",
                "weights that evaluation.remedy has chosen, made from that step's checkpoint",
            ),
            (
                "stacks/attempt-<n>-rank-<r>.txt, stacks/<stage>.txt",
                "stacks of a process that made no progress",
            ),
            (
                "stacks/attempt-<n>-rank-<r>-collectives.json",
                "the last collectives of that rank, by torch's flight recorder",
            ),
            (
                "questions.arrow",
                "test prompts behind examples, instructions of the user, or retrieved passages",
            ),
            ("answers/<row>.json", "answers and losses of base and tuned model, for each prompt"),
            (
                "data-curve/<percent>.json",
                "losses and answers after training on a part of the training samples",
            ),
            ("result.json", "summary and learning curve, which publish reads"),
            ("evaluation.json", "results of all rows and gates; the published model checked"),
        ),
    ),
    (
        "output",
        (
            ("adapter/", "the adapter, for peft"),
            ("merged/", "the merged model, for transformers"),
            ("metrics.json", "test metrics of the base model and the tuned model, gates"),
            ("predictions.jsonl", "what each row answered to each test sample"),
            ("report.html", "report of the run: metrics and learning curve"),
            ("README.md", "the model card"),
            ("manifest.json", "written last: a folder without it is not a complete model"),
        ),
    ),
)
"""Files below the workspace and the prefixes that ``identity`` computes (data_uri, run_uri,
output_uri)."""
