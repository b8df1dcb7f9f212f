"""Job controller, scheduler, kubelets and trainer in memory, for ``simulated_api``.

The Job controller follows batch/v1 with ``podFailurePolicy``: only pods of phase Failed are
replaced, after a back-off that doubles; a pod on a dead node terminates for ever. Every method is
one step that may come late, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from operator_world import PREPARED, PUBLISHED, TRAINED
from simulated_api import NAMESPACE, Json, SimulatedApi

from finetune_api import names
from finetune_api.names import ExitCode
from finetune_api.results import Termination
from finetune_operator.world.objects import format_time
from finetune_operator.world.pods import INDEX_ANNOTATION

RESULTS: dict[str, dict[str, Any]] = {
    "map": {},
    "prepare": {"prepared": PREPARED},
    "train": {"trained": TRAINED},
    "publish": {"published": PUBLISHED},
}
FIRST_BACKOFF, LONGEST_BACKOFF = 10.0, 600.0


def phase_of(pod: Json) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def ended(pod: Json) -> bool:
    return phase_of(pod) in ("Succeeded", "Failed")


def deleting(obj: Json) -> bool:
    return "deletionTimestamp" in obj["metadata"]


def role_of(obj: Json) -> str:
    return str(obj["metadata"]["labels"].get(names.LABEL_ROLE, ""))


def owner_uid(obj: Json) -> str:
    return str(obj["metadata"]["ownerReferences"][0]["uid"])


class SimulatedCluster:
    """The controllers and nodes of a simulated API server."""

    def __init__(self, api: SimulatedApi) -> None:
        self.api = api
        self.lost: set[str] = set()
        """Nodes without power."""
        self.attempt = 0
        """Attempts of gangs, as HEAD.json counts them."""

    # --- the Job controller ----------------------------------------------------------------------

    def control(self) -> None:
        """One pass of the garbage collector and of the Job controller over all Jobs."""
        self.api.collect_garbage()
        for job in self.api.of("Job"):
            self._sync(job)
        for pod in self.api.of("Pod"):
            if deleting(pod) and ended(pod):
                self.api.remove("Pod", pod["metadata"]["name"])

    def pods_of(self, job: Json) -> list[Json]:
        return [p for p in self.api.of("Pod") if owner_uid(p) == job["metadata"]["uid"]]

    def _sync(self, job: Json) -> None:
        status = job.get("status", {})
        conditions = {c["type"] for c in status.get("conditions", [])}
        if conditions & {"Complete", "Failed"}:
            return
        pods = self.pods_of(job)
        if job["spec"].get("suspend"):
            self._delete(pods)
            return
        job = self._note(job, pods)
        reason = self._failure(job) if "FailureTarget" not in conditions else None
        if reason is not None:
            job = self._condition(job, "FailureTarget", reason)
            conditions.add("FailureTarget")
        if "FailureTarget" in conditions:
            self._delete(pods)
            if all(ended(p) for p in pods):
                first = job["status"]["conditions"][0]
                self._condition(job, "Failed", first["reason"])
        elif len(_indexes(job)) == job["spec"].get("completions", 1):
            self._condition(job, "Complete", "CompletionsReached")
        else:
            self._make_pods(job, pods)

    def _note(self, job: Json, pods: list[Json]) -> Json:
        """Count the ends of pods, as the Job's status does, and its start."""
        status = dict(job.get("status", {}))
        status.setdefault("startTime", format_time(self.api.now))
        counted = dict(status.get("counted", {}))
        for pod in (p for p in pods if ended(p)):
            counted.setdefault(pod["metadata"]["uid"], _end_of(job, pod))
        done = {end["index"] for end in counted.values() if end["succeeded"]}
        status |= {"counted": counted, "completedIndexes": ",".join(map(str, sorted(done)))}
        return self.api.update("Job", job["metadata"]["name"], status=status)

    def _failure(self, job: Json) -> str | None:
        status, spec = job["status"], job["spec"]
        ends = status["counted"].values()
        if spec.get("activeDeadlineSeconds") == 0:
            return "DeadlineExceeded"
        if any(end["action"] == "FailJob" for end in ends):
            return "PodFailurePolicy"
        counted = [end["index"] for end in ends if end["action"] == "Count"]
        if "backoffLimitPerIndex" in spec:
            most = max((counted.count(index) for index in counted), default=0)
            return "FailedIndexes" if most > spec["backoffLimitPerIndex"] else None
        return "BackoffLimitExceeded" if len(counted) > spec["backoffLimit"] else None

    def _make_pods(self, job: Json, pods: list[Json]) -> None:
        done = _indexes(job)
        alive = {_index(p) for p in pods if phase_of(p) != "Failed"}
        failed = [e for e in job["status"]["counted"].values() if not e["succeeded"]]
        if failed:
            wait = min(FIRST_BACKOFF * 2.0 ** min(len(failed) - 1, 10), LONGEST_BACKOFF)
            last = max(datetime.fromisoformat(e["at"]) for e in failed)
            if self.api.now < last + timedelta(seconds=wait):
                return
        for index in range(job["spec"].get("completions", 1)):
            if index not in alive and index not in done:
                self._make_pod(job, index)

    def _make_pod(self, job: Json, index: int) -> None:
        template, name = job["spec"]["template"], job["metadata"]["name"]
        meta = {
            "name": f"{name}-{index}-{self.api.version}",
            "namespace": NAMESPACE,
            "labels": template["metadata"]["labels"],
            "annotations": {INDEX_ANNOTATION: str(index)},
            "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "controller": True}
                | {"name": name, "uid": job["metadata"]["uid"]}
            ],
        }
        self.api.create("Pod", {"metadata": meta, "spec": template["spec"], "status": {}})

    def _condition(self, job: Json, type_: str, reason: str) -> Json:
        now = format_time(self.api.now)
        made = {"type": type_, "status": "True", "reason": reason, "lastTransitionTime": now}
        conditions = [*job.get("status", {}).get("conditions", []), made]
        return self.api.update("Job", job["metadata"]["name"], status={"conditions": conditions})

    def _delete(self, pods: Iterable[Json]) -> None:
        for pod in pods:
            if not ended(pod):
                self.api.delete("Pod", pod["metadata"]["name"])

    # --- scheduler and kubelets ------------------------------------------------------------------

    def kubelets(self) -> None:
        """One step of every pod on a live node: it gets a node, starts, or ends if it is being
        deleted."""
        for pod in self.api.of("Pod"):
            name = pod["metadata"]["name"]
            if ended(pod) or self.on_lost_node(pod):
                continue
            if deleting(pod):
                self.stop(pod)
            elif "nodeName" not in pod["spec"]:
                self._schedule(name)
            elif phase_of(pod) == "Pending":
                state = {"running": {"startedAt": format_time(self.api.now)}}
                self._set(name, "Running", state)

    def on_lost_node(self, pod: Json) -> bool:
        return pod["spec"].get("nodeName") in self.lost

    def running(self) -> list[Json]:
        return [p for p in self.api.of("Pod") if phase_of(p) == "Running"]

    def stop(self, pod: Json) -> None:
        """End a pod as SIGTERM does: a gang's saves its state."""
        code = ExitCode.INTERRUPTED if role_of(pod) == "train" else 143
        self.end(pod, int(code))

    def end(self, pod: Json, code: int, reason: str = "", **said: Any) -> None:
        if phase_of(pod) == "Pending":
            self._set(pod["metadata"]["name"], "Failed", {})
            return
        run = pod["metadata"]["labels"][names.LABEL_RUN]
        terminated = {"exitCode": code, "finishedAt": format_time(self.api.now), "reason": reason}
        terminated["startedAt"] = _state(pod)["running"]["startedAt"]
        if code == 0 or said:
            raw = {"run": run, "role": role_of(pod), **said}
            terminated["message"] = Termination.model_validate(raw).to_text()
        phase = "Failed" if code else "Succeeded"
        self._set(pod["metadata"]["name"], phase, {"terminated": terminated})

    def succeed(self) -> None:
        """End the stages whose pods all run."""
        for job in self.api.of("Job"):
            pods = [p for p in self.pods_of(job) if phase_of(p) == "Running"]
            healthy = [p for p in pods if not deleting(p) and not self.on_lost_node(p)]
            gang = role_of(job) == "train"
            if gang and len(healthy) < job["spec"]["completions"] - len(_indexes(job)):
                continue
            for pod in healthy:
                self.end(pod, 0, **RESULTS[role_of(pod)])

    def disrupt(self, pod: Json, reason: str) -> None:
        """Evict a pod: Kubernetes marks it, then deletes it."""
        now = format_time(self.api.now)
        mark = {"type": "DisruptionTarget", "status": "True", "reason": reason}
        conditions = [*_conditions(pod), mark | {"lastTransitionTime": now}]
        self.api.update("Pod", pod["metadata"]["name"], status={"conditions": conditions})
        self.api.delete("Pod", pod["metadata"]["name"])

    def lose_node(self, node: str) -> None:
        """The node is not reachable: its pods are to be deleted, and nobody ends them."""
        self.lost.add(node)
        for pod in self.api.of("Pod"):
            if self.on_lost_node(pod) and not ended(pod):
                ready = {"type": "Ready", "status": "False"}
                conditions = [c for c in _conditions(pod) if c["type"] != "Ready"]
                name = pod["metadata"]["name"]
                self.api.update("Pod", name, status={"conditions": [*conditions, ready]})
                self.disrupt(self.api.objects["Pod", name], "DeletionByTaintManager")

    def remove_node(self, node: str) -> None:
        """The Node object is deleted: the pod garbage collector ends its pods."""
        for pod in self.api.of("Pod"):
            if pod["spec"].get("nodeName") == node:
                if not ended(pod):
                    self.api.update("Pod", pod["metadata"]["name"], status={"phase": "Failed"})
                self.api.delete("Pod", pod["metadata"]["name"])

    def _schedule(self, name: str) -> None:
        node = f"node-{self.api.version}"
        scheduled = {"type": "PodScheduled", "status": "True"}
        scheduled["lastTransitionTime"] = format_time(self.api.now)
        self.api.update(
            "Pod", name, spec={"nodeName": node}, status={"conditions": [scheduled]}
        )  # fmt: skip

    def _set(self, name: str, phase: str, state: dict[str, Any]) -> None:
        container = {"name": names.CONTAINER, "state": state}
        status = {"phase": phase, "podIP": "10.0.0.1", "containerStatuses": [container]}
        self.api.update("Pod", name, status=status)


def _conditions(pod: Json) -> list[Json]:
    return list(pod.get("status", {}).get("conditions", []))


def _state(pod: Json) -> Json:
    found: Json = pod["status"]["containerStatuses"][0]["state"]
    return found


def _index(pod: Json) -> int:
    return int(pod["metadata"]["annotations"][INDEX_ANNOTATION])


def _indexes(job: Json) -> set[int]:
    text = job.get("status", {}).get("completedIndexes", "")
    return {int(i) for i in text.split(",") if i}


def _end_of(job: Json, pod: Json) -> Json:
    """How the Job controller counts the end of a pod: by the first rule that matches."""
    succeeded = phase_of(pod) == "Succeeded"
    statuses = pod["status"].get("containerStatuses") or [{}]
    state = statuses[0].get("state", {}).get("terminated", {})
    at = state.get("finishedAt") or pod["metadata"]["creationTimestamp"]
    code, action = state.get("exitCode"), "Count"
    marked = any(c["type"] == "DisruptionTarget" for c in _conditions(pod))
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {}).get("values", ())
        if code in codes or ("onPodConditions" in rule and marked):
            action = rule["action"]
            break
    return {"index": _index(pod), "succeeded": succeeded, "action": action, "at": at}
