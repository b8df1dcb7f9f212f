"""Labels and metadata of children: one label set, one owner."""

from __future__ import annotations

from typing import Any

from finetune_api import names
from finetune_api.identity import label_value
from finetune_api.names import Role
from finetune_operator.decision.plan import CurrentRun, Subject

Json = dict[str, Any]


def labels_of(subject: Subject, run: CurrentRun, role: Role | None) -> dict[str, str]:
    """Labels of a child; ``role`` is None for a child that serves all stages."""
    labels = {
        names.LABEL_MANAGED_BY: names.MANAGED_BY,
        names.LABEL_NAME: names.APP_NAME,
        names.LABEL_JOB_UID: subject.uid,
        names.LABEL_JOB_NAME: label_value(subject.name),
        names.LABEL_RUN: run.id,
        names.LABEL_REVISION: str(run.revision),
    }
    return labels | ({names.LABEL_ROLE: role} if role else {})


def selector_of(labels: dict[str, str]) -> dict[str, str]:
    """Those labels of a stage that select its pods, of one revision of a run."""
    keys = (names.LABEL_JOB_UID, names.LABEL_RUN, names.LABEL_REVISION, names.LABEL_ROLE)
    return {key: labels[key] for key in keys}


def metadata(subject: Subject, name: str, labels: dict[str, str]) -> Json:
    """Metadata of a child. The owner reference deletes the child with its FineTuneJob."""
    return {
        "name": name,
        "namespace": subject.namespace,
        "labels": labels,
        "ownerReferences": [
            {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "name": subject.name,
                "uid": subject.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }
