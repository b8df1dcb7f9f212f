"""Which FineTuneJob an object belongs to, and which version of two is newer.

Labels are not trusted: a child belongs to a job only in the job's namespace, and only if the job is
its controller (for a pod: if a Job is). Otherwise an object in any namespace could pose as the run
spec or the progress of another team's job.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from finetune_api import names
from finetune_operator.world.objects import Object


def version_of(obj: Object) -> int:
    """resourceVersion as a number, comparable within one kind (KEP-5504); 0 if it is not a
    number."""
    text = str(obj["metadata"].get("resourceVersion", ""))
    return int(text) if text.isdigit() else 0


class Owner(NamedTuple):
    """A FineTuneJob as the owner of children."""

    namespace: str
    uid: str


def as_owner(job: Object) -> Owner:
    return Owner(job["metadata"]["namespace"], job["metadata"]["uid"])


def owner_of(kind: str, obj: Object) -> Owner | None:
    """The FineTuneJob that an object belongs to (itself, if it is one); None for an object that
    claims a job by its label, without being controlled by the job."""
    if kind == names.KIND:
        return as_owner(obj)
    meta = obj["metadata"]
    uid = (meta.get("labels") or {}).get(names.LABEL_JOB_UID)
    owners = meta.get("ownerReferences") or []
    controller = next((o for o in owners if o.get("controller")), None)
    if uid is None or controller is None:
        return None
    if kind == "Pod":
        is_child = (controller.get("apiVersion"), controller.get("kind")) == ("batch/v1", "Job")
    else:
        group = str(controller.get("apiVersion")).partition("/")[0]
        is_child = (group, controller.get("kind"), controller.get("uid")) == (
            names.GROUP, names.KIND, uid,
        )  # fmt: skip
    return Owner(meta["namespace"], uid) if is_child else None


def manager_of(job: Object) -> str:
    """Name of the operator that a FineTuneJob names; empty: the one without a name."""
    spec = job.get("spec")
    found = spec.get("managedBy") if isinstance(spec, Mapping) else None
    return found if isinstance(found, str) else ""
