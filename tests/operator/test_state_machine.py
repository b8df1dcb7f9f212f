"""Reconcile as a state machine: any interleaving of edits, pods that start, succeed and fail,
evictions, lost nodes, deletions by hand, crashes between two writes, lost answers and late or
repeated events reaches the end that a quiet cluster reaches.

``FINETUNE_FUZZ_EXAMPLES=5000`` tries more examples than the suite does, other ones each time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from simulated_api import FAULTS, NAMESPACE, Fault, Json
from simulated_nodes import deleting, ended, phase_of, role_of
from simulation import Simulation, clock_of

from finetune_api import names
from finetune_api.classes import class_digest
from finetune_api.names import ExitCode
from finetune_operator.config import OVERDUE
from finetune_operator.watch import RESOURCES

EXAMPLES = int(os.environ.get("FINETUNE_FUZZ_EXAMPLES", "0"))
KINDS = st.sampled_from(sorted(RESOURCES))
PICK = st.integers(0, 3)
RETRIED = (1, 137, ExitCode.NODE_FAILURE, ExitCode.STORAGE_UNAVAILABLE, ExitCode.STALLED)
FINAL = (ExitCode.DATA_ERROR, ExitCode.OUT_OF_MEMORY, ExitCode.INTERNAL)
MAX_RESTARTS = 3
STAGE_TRIES = 3
LONGEST_WAIT = 3000.0
"""Seconds for which an example may let a pod wait: less than startDeadlineSeconds."""

EDITS: dict[str, list[dict[str, Any]]] = {
    "Live": [{"failurePolicy": {"maxRestarts": n}} for n in (MAX_RESTARTS, MAX_RESTARTS + 1)],
    "Resume": [{"compute": {"resources": {"requests": {"cpu": str(n)}}}} for n in (1, 2)],
    "NewRun": [{"training": {"maxSteps": n}} for n in (10, 20)],
    "rerun": [{"rerunToken": t} for t in ("a", "b")],
    "retry": [{"retryToken": t} for t in ("a", "b")],
}


class Reconcile(RuleBasedStateMachine):
    """One job in a simulated cluster. ``excuses`` has what a run may fail for."""

    def __init__(self) -> None:
        super().__init__()
        self.exit = ExitStack()
        self.excuses: set[str] = set()
        self.faults = 0
        self.waited = 0.0
        self.outcomes: dict[tuple[str, int], str] = {}
        self.digests: dict[tuple[str, str], list[str]] = {}
        self.problems: list[str] = []
        """Violations seen inside of a pass, where the controller would catch an exception."""

    @initialize(nodes=st.sampled_from([1, 2]), workers=st.sampled_from([1, 2]))
    def begin(self, nodes: int, workers: int) -> None:
        self.sim = Simulation(
            compute={"nodes": nodes}, prepare={"workers": workers},
            failurePolicy={"maxRestarts": MAX_RESTARTS},
        )  # fmt: skip
        self.exit.enter_context(clock_of(self.sim.api))
        self.sim.api.on_create = self.check_child
        self.sim.api.on_status = self.check_status
        self.sim.restart()

    # --- the operator ----------------------------------------------------------------------------

    @rule(kind=KINDS, count=st.integers(1, 4))
    def events_arrive(self, kind: str, count: int) -> None:
        self.sim.process.deliver(kind, count)

    @rule(passes=st.integers(1, 3))
    def operator_works(self, passes: int) -> None:
        for _ in range(passes):
            self.sim.work()

    @rule(count=st.integers(1, 4))
    def all_goes_on(self, count: int) -> None:
        for _ in range(count):
            self.sim.cluster.control()
            self.sim.cluster.kubelets()
            for kind in RESOURCES:
                self.sim.process.deliver(kind, 100)
            self.sim.work()

    @rule(kind=KINDS)
    def an_event_is_repeated(self, kind: str) -> None:
        self.sim.process.repeat(kind)

    @rule(kind=KINDS)
    def a_watch_expires(self, kind: str) -> None:
        self.sim.process.list(kind)

    @rule()
    def operator_is_killed(self) -> None:
        self.sim.restart()

    @rule(place=st.integers(0, 3), fault=st.sampled_from(FAULTS))
    def a_request_fails(self, place: int, fault: Fault) -> None:
        self.sim.process.connection.faults = [None] * place + [fault]

    @rule(kind=KINDS)
    def events_overtake_an_answer(self, kind: str) -> None:
        process = self.sim.process

        def arrive() -> None:
            process.connection.while_waiting = lambda: None
            self.sim.cluster.control()
            process.deliver(kind, 100)

        process.connection.while_waiting = arrive

    # --- the cluster -----------------------------------------------------------------------------

    @rule()
    def controllers_work(self) -> None:
        self.sim.cluster.control()

    @rule()
    def kubelets_work(self) -> None:
        self.sim.cluster.kubelets()

    @rule()
    def stages_succeed(self) -> None:
        self.sim.cluster.succeed()

    @rule(step=st.integers(0, 9))
    def progress_is_read(self, step: int) -> None:
        self.sim.report(step)

    @rule(pick=PICK, code=st.sampled_from(RETRIED))
    def a_pod_fails(self, pick: int, code: int) -> None:
        for pod in self.picked(self.sim.cluster.running(), pick):
            self.count_failure(pod)
            self.sim.cluster.end(pod, int(code))

    @rule(pick=PICK, code=st.sampled_from(FINAL))
    def a_pod_fails_for_good(self, pick: int, code: int) -> None:
        for pod in self.picked(self.sim.cluster.running(), pick):
            self.excuses.add(f"final exit code of {role_of(pod)}")
            said = {"class": "DataError", "reason": "Bad", "message": "m", "retryable": False}
            self.sim.cluster.end(pod, int(code), failure=said)

    @rule(pick=PICK, reason=st.sampled_from(["EvictionByEvictionAPI", "PreemptionByScheduler"]))
    def a_pod_is_evicted(self, pick: int, reason: str) -> None:
        for pod in self.picked(self.sim.unfinished(), pick):
            if not deleting(pod):
                self.sim.cluster.disrupt(pod, reason)

    @rule(pick=PICK)
    def a_node_is_lost(self, pick: int) -> None:
        for pod in self.picked(self.sim.cluster.running(), pick):
            self.sim.cluster.lose_node(pod["spec"]["nodeName"])

    @rule(back=st.booleans())
    def a_lost_node_is_back_or_removed(self, back: bool) -> None:
        for node in sorted(self.sim.cluster.lost)[:1]:
            if not back:
                self.sim.cluster.remove_node(node)
            self.sim.cluster.lost.discard(node)

    @rule(seconds=st.sampled_from([1.0, 8.0, 35.0, 70.0, 200.0]))
    def time_passes(self, seconds: float) -> None:
        if self.waited + seconds < LONGEST_WAIT:
            self.waited += seconds
            self.sim.wait(seconds)

    # --- the user --------------------------------------------------------------------------------

    @rule(kind=st.sampled_from(sorted(EDITS)), pick=st.integers(0, 1))
    def the_spec_is_edited(self, kind: str, pick: int) -> None:
        self.sim.edit(**EDITS[kind][pick])

    @rule(suspend=st.booleans())
    def suspend_is_set(self, suspend: bool) -> None:
        self.sim.edit(suspend=suspend)

    @rule(kind=st.sampled_from(["Job", "Service", "ConfigMap", "Pod"]), pick=PICK)
    def a_child_is_deleted(self, kind: str, pick: int) -> None:
        for obj in self.picked(self.sim.api.of(kind), pick):
            if kind == "Pod" and role_of(obj) != "train" and not ended(obj):
                self.count_failure(obj)
            self.sim.api.delete(kind, obj["metadata"]["name"])

    # --- what must hold --------------------------------------------------------------------------

    @staticmethod
    def picked(objects: list[Json], pick: int) -> list[Json]:
        return [sorted(objects, key=lambda o: str(o["metadata"]["name"]))[pick % len(objects)]] if (
            objects
        ) else []  # fmt: skip

    def count_failure(self, pod: Json) -> None:
        self.faults += 1
        most = MAX_RESTARTS if role_of(pod) == "train" else STAGE_TRIES
        if self.faults > most:
            self.excuses.add("as many faults as the run allows")

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    @invariant()
    def nothing_was_violated(self) -> None:
        assert not self.problems, self.problems

    def check_child(self, obj: Json) -> None:
        meta = obj["metadata"]
        run, revision = (meta["labels"][k] for k in (names.LABEL_RUN, names.LABEL_REVISION))
        if obj["kind"] == "ConfigMap":
            spec = json.loads(obj["data"][names.RUN_SPEC_KEY])["spec"]
            digests = [class_digest(spec, kind) for kind in ("NewRun", "Resume")]
            known = self.digests.setdefault((run, revision), digests)
            self.expect(known == digests, f"revision {revision} of run {run} has two run specs")
        if obj["kind"] == "Job":
            outcome = self.outcomes.get((run, int(revision)))
            self.expect(outcome is None, f"run {run} is {outcome}, and gets {meta['name']}")
            if role_of(obj) == "train":
                self.check_gang(obj)

    def check_gang(self, new: Json) -> None:
        """No pod of an earlier gang of the run may run, as far as watches have told."""
        run = new["metadata"]["labels"][names.LABEL_RUN]
        uid = self.sim.job["metadata"]["uid"]
        for pod in self.sim.process.store.children(uid, "Pod").values():
            truth = self.sim.api.get("Pod", pod.name) if pod is not None else None
            if truth is None or role_of(truth) != "train" or ended(truth):
                continue
            if truth["metadata"]["labels"][names.LABEL_RUN] != run or self.on_lost_node(truth):
                continue
            name = new["metadata"]["name"]
            self.expect(self.is_overdue(truth), f"{name} beside {truth['metadata']['name']}")

    def on_lost_node(self, pod: Json) -> bool:
        reasons = {c.get("reason") for c in pod.get("status", {}).get("conditions", [])}
        return "DeletionByTaintManager" in reasons

    def is_overdue(self, pod: Json) -> bool:
        due = pod["metadata"].get("deletionTimestamp")
        return due is not None and datetime.fromisoformat(due) + OVERDUE <= self.sim.api.now

    def check_status(self, before: Json, after: Json) -> None:
        old, new, expect = before.get("run"), after.get("run"), self.expect
        reasons = {c["reason"] for c in after["conditions"]}
        expect("OperatorDefect" not in reasons, f"a pass has raised: {after['conditions']}")
        if new is None:
            return expect(old is None, "status has lost its run")
        place = (new["id"], new["revision"])
        known = self.outcomes.get(place)
        expect(known in (None, new.get("outcome")), f"run {place} was {known}: {new}")
        if "outcome" in new:
            self.outcomes[place] = new["outcome"]
        if old is None:
            return None
        expect(new["number"] in (old["number"], old["number"] + 1), f"after run {old}: {new}")
        if new["id"] != old["id"]:
            return None
        expect(new["revision"] >= old["revision"], "revisions never fall")
        expect(new["attempt"] >= old["attempt"], "attempts never fall")
        expect(after["restarts"] >= before["restarts"], "restarts never fall within a run")
        expect(new.get("startTime") == old.get("startTime"), "a run begins once")
        expect(self.done(before) <= self.done(after), "a stage that was done is done")
        numbers = [i["number"] for i in after.get("incidents", [])]
        return expect(numbers == sorted(set(numbers), reverse=True), f"incidents {numbers}")

    @staticmethod
    def done(status: Json) -> set[str]:
        return {
            c["type"]
            for c in status.get("conditions", [])
            if c["status"] == "True" and c["type"] in ("Prepared", "Evaluated", "Published")
        }

    def teardown(self) -> None:
        try:
            if hasattr(self, "sim"):
                self.check_end()
        finally:
            self.exit.close()

    def check_end(self) -> None:
        sim = self.sim
        self.nothing_was_violated()
        sim.converge()
        self.nothing_was_violated()
        if sim.job["spec"].get("suspend") and sim.phase not in ("Complete", "Failed"):
            assert sim.phase == "Suspended"
            assert not sim.unfinished(), [p["metadata"]["name"] for p in sim.unfinished()]
            sim.edit(suspend=False)
            sim.converge()
        assert sim.phase == "Complete" or (sim.phase == "Failed" and self.excuses), sim.status
        assert "failure" not in sim.status or sim.phase == "Failed"
        assert sim.status["observedGeneration"] == sim.job["metadata"]["generation"]
        assert not sim.unfinished() and not any(
            phase_of(p) == "Pending" for p in sim.api.of("Pod")
        )  # fmt: skip
        writes = sim.api.writes
        sim.wait(86_400)
        sim.process.queue.put(sim.job["metadata"]["uid"])
        sim.work()
        assert sim.api.writes == writes, "a run at rest is written"


TestReconcile = Reconcile.TestCase
TestReconcile.settings = settings(
    max_examples=EXAMPLES or 50,
    stateful_step_count=40,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


# --- examples that once failed -----------------------------------------------------------------


@contextmanager
def simulated(**more: Any) -> Iterator[Simulation]:
    sim = Simulation(**more)
    with clock_of(sim.api):
        sim.restart()
        yield sim


def test_an_edit_after_a_lost_answer_begins_a_new_run() -> None:
    """The run spec exists, and neither its answer nor a watch event has told the operator."""
    with simulated() as sim:
        sim.process.connection.faults = ["lost"]
        sim.work()
        sim.edit(training={"maxSteps": 10})
        sim.process.deliver(names.KIND, 1)
        sim.work()
        assert sim.phase != "Failed", sim.status["failure"]
        sim.converge()
        assert (sim.phase, sim.status["run"]["number"]) == ("Complete", 2)


def test_a_child_of_that_name_that_is_not_the_jobs_is_shown_and_left_alone() -> None:
    with simulated() as sim:
        taken = {"name": "bot-1-uid0-run-spec-1", "namespace": NAMESPACE}
        sim.api.create("ConfigMap", {"metadata": taken, "data": {"mine": "1"}})
        sim.work()
        (prepared,) = [c for c in sim.status["conditions"] if c["type"] == "Prepared"]
        assert prepared["reason"] == "ChildRefused" and "already exists" in prepared["message"]
        (kept,) = sim.api.of("ConfigMap")
        assert kept["data"] == {"mine": "1"}
        sim.api.delete("ConfigMap", taken["name"])
        sim.converge()
        assert sim.phase == "Complete"
