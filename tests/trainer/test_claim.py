"""The checkpoint protocol on a real S3 server: one owner, no commit by a stale owner, no partial
checkpoint."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.time_use import TimeUse
from finetune_trainer.failures import (
    Fenced,
    StorageUnavailable,
    TrainerError,
    exit_code,
    failure_of,
)
from finetune_trainer.storage.checkpoint_files import read_file
from finetune_trainer.storage.claim import (
    Checkpoint,
    Claim,
    CorruptCheckpoint,
    Rollback,
    claim,
    read_head,
)
from finetune_trainer.storage.heartbeat import BEAT_SECONDS, Heartbeat
from finetune_trainer.storage.objects import Credentials, ObjectStore
from finetune_trainer.storage.s3server import EmbeddedS3

RUN = "1-abcde"


def lower(new: float, old: float) -> bool:
    return new < old


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Storage:
    """A run's prefix in object storage, with the operations of the tests."""

    def __init__(self, store: ObjectStore, bucket: str, folder: Path) -> None:
        self.store = store
        self.uri = f"s3://{bucket}/space/runs/job/{RUN}"
        self.folder = folder
        self.clock = Clock()

    def claim(self, store: ObjectStore | None = None, keep_last: int = 2, **more: Any) -> Claim:
        return claim(
            store or self.store, self.uri, RUN, better=lower, keep_last=keep_last,
            clock=self.clock, **more,
        )  # fmt: skip

    def upload(self, owner: Claim, step: int) -> dict[str, Any]:
        files = {}
        for name in ("shard-0", "deep/state.json"):
            path = self.folder / "up"
            path.write_text(f"{name} of attempt {owner.head.attempt}, step {step}")
            files[name] = self.store.upload(path, f"{owner.checkpoint_uri(step)}/{name}")
        return files

    def commit(self, owner: Claim, step: int, metric: float | None = None) -> Checkpoint:
        return owner.commit(step, self.upload(owner, step), metric)

    def contents(self, checkpoint: Checkpoint) -> str:
        found = {name: read_file(self.store, checkpoint, name) for name in checkpoint.files}
        return found["deep/state.json"].decode()

    def steps_in_storage(self) -> set[str]:
        prefix = f"{self.uri}/"
        return {
            info.uri.removeprefix(prefix).rsplit("/", 1)[0].removesuffix("/deep")
            for info in self.store.list(f"{prefix}attempt-")
        }


@pytest.fixture
def storage(s3: EmbeddedS3, bucket: str, tmp_path: Path) -> Storage:
    return Storage(s3.store(), bucket, tmp_path)


def test_a_run_from_claim_to_release(storage: Storage) -> None:
    assert read_head(storage.store, storage.uri) is None
    first = storage.claim()
    assert (first.head.attempt, first.head.restarts, first.checkpoints, first.best) == (
        1,
        0,
        [],
        None,
    )
    made = storage.commit(first, 5, 0.7)
    assert made.uri == f"{storage.uri}/attempt-1/step-00000005"
    first.release()
    first.release()
    second = storage.claim()
    assert (second.head.attempt, second.head.restarts) == (2, 0)
    assert second.checkpoints == [made] and second.best == made
    assert storage.contents(made) == "deep/state.json of attempt 1, step 5"


def test_restarts_and_seconds(storage: Storage) -> None:
    clock = storage.clock
    first = storage.claim()
    clock.now += 100
    storage.commit(first, 5)
    clock.now += 30
    assert first.training_seconds() == 130
    second = storage.claim()  # the first attempt has died
    assert second.head.restarts == 1
    clock.now += 7
    third = storage.claim()  # the second attempt committed nothing
    assert third.head.restarts == 2
    clock.now += 3
    third.release()
    clock.now += 5000  # suspended
    assert third.training_seconds() == 140
    fourth = storage.claim()
    assert (fourth.head.attempt, fourth.head.restarts) == (4, 2)
    assert fourth.training_seconds() == 140


def test_time_between_attempts_is_not_counted(storage: Storage) -> None:
    clock = storage.clock
    first = storage.claim()
    clock.now += 100
    storage.commit(first, 5)
    clock.now += 500
    Heartbeat(storage.store, storage.uri, 1, clock).beat()
    clock.now += 200_000  # killed; the run continues after the weekend
    second = storage.claim()
    assert second.head.training_seconds == 100 + 500 + BEAT_SECONDS
    clock.now += 200_000  # killed immediately: the first attempt's heartbeat does not count
    third = storage.claim()
    assert third.head.training_seconds == 100 + 500 + 2 * BEAT_SECONDS
    storage.store.put(f"{storage.uri}/heartbeat.json", b"?")
    assert storage.claim().head.attempt == 4


def account(attempt: int, until: float, **spent: float) -> TimeUse:
    """Account of an attempt of one process that began at 1000 and was at work at ``until``."""
    return TimeUse(
        attempt=attempt, processes=1, began=1000, until=until, progressed=until, seconds=spent
    )  # fmt: skip


@pytest.mark.parametrize(
    ("beat", "previous", "expected"),
    [
        # The attempt was killed at 1150; HEAD has its account up to 1100, the next begins at 1190.
        (None, [], {"load": 20, "productive": 80, "recomputed": BEAT_SECONDS}),
        (1120, [], {"load": 20, "productive": 80, "evaluation": 20, "recomputed": BEAT_SECONDS}),
        (1120, [(1150.0, None)],
         {"load": 20, "productive": 80, "evaluation": 20, "recomputed": 30}),
        (1120, [(None, None), (1150.0, 1149.0)],
         {"load": 20, "productive": 80, "evaluation": 49, "recomputed": 1}),
    ],
    ids=["HEAD alone", "a heartbeat", "a node that survived", "the node of rank 0 survived"],
)  # fmt: skip
def test_the_next_attempt_accounts_for_one_that_was_killed(
    storage: Storage,
    beat: float | None,
    previous: list[tuple[Any, Any]],
    expected: dict[str, float],
) -> None:
    def begun(attempt: int, earlier: TimeUse | None) -> TimeUse:
        seconds = dict(earlier.seconds) if earlier else {}
        return account(attempt, storage.clock.now).model_copy(update={"seconds": seconds})

    def at(until: float) -> TimeUse:
        return account(1, until, load=20, productive=80, evaluation=until - 1100)

    first = storage.claim(account=begun)
    storage.clock.now = 1102
    storage.commit(first, 5)
    first._move(lambda head: head.model_copy(update={"time": account(1, 1100, load=20,
                                                                      productive=80)}))  # fmt: skip
    if beat is not None:
        Heartbeat(storage.store, storage.uri, 1, lambda: beat, lambda: at(beat)).beat()
    storage.clock.now = 1200
    told = [(end, None if until is None else at(until)) for end, until in previous]
    second = storage.claim(account=begun, previous=told, began=1190.0)
    assert second.head.time is not None and second.head.time.attempt == 2
    found = {name: spent for name, spent in second.head.time.seconds.items() if spent}
    late = 2 if beat is None and not previous else 0  # the commit itself is a sign of life
    assert found == {**expected, "recomputed": expected["recomputed"] + late}
    second.release(second.head.time)
    third = storage.claim(account=begun)
    assert third.head.time is not None and third.head.time.seconds == second.head.time.seconds


def test_a_new_revision_is_not_a_restart(storage: Storage) -> None:
    first = storage.claim()
    assert (first.head.revision, first.head.restarts) == (1, 0)
    # The attempt fails permanently for lack of memory; the spec is changed and the run continues.
    second = storage.claim(revision=2, restarts=0)
    assert (second.head.attempt, second.head.revision, second.head.restarts) == (2, 2, 0)
    assert storage.claim(revision=2, restarts=0).head.restarts == 1, "same revision"
    # A restart that only the operator has seen: it then replaced the gang.
    assert storage.claim(revision=3, restarts=2).head.restarts == 2
    assert storage.claim(revision=4, restarts=1).head.restarts == 2, "counts never fall"


def test_eight_concurrent_claims_get_distinct_attempt_numbers(storage: Storage) -> None:
    barrier = threading.Barrier(8)
    owners: list[Claim] = []

    def take() -> None:
        barrier.wait()
        owners.append(storage.claim())

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(owner.head.attempt for owner in owners) == list(range(1, 9))
    fenced = 0
    for owner in owners:
        try:
            storage.commit(owner, 1)
        except Fenced:
            fenced += 1
    assert fenced == 7
    found = read_head(storage.store, storage.uri)
    assert found is not None
    assert [c.attempt for c in found[0].checkpoints] == [8]


def test_a_stale_writer_cannot_change_head(storage: Storage) -> None:
    stale = storage.claim()
    kept = storage.commit(stale, 5, 0.5)
    owner = storage.claim()
    before = storage.store.get(f"{storage.uri}/HEAD.json")
    with pytest.raises(Fenced, match="attempt 2 has taken the run") as caught:
        storage.commit(stale, 10, 0.1)
    assert exit_code(failure_of(caught.value)) == 16
    for change in (stale.release, lambda: stale.discard(kept)):
        with pytest.raises(Fenced):
            change()
    assert storage.store.get(f"{storage.uri}/HEAD.json") == before
    assert storage.contents(kept) == "deep/state.json of attempt 1, step 5"
    assert owner.best == kept
    made = storage.commit(owner, 6, 0.4)
    assert owner.checkpoints == [made, kept]
    assert storage.steps_in_storage() == {"attempt-2/step-00000006", "attempt-1/step-00000005"}


def test_a_writer_whose_head_was_removed_is_fenced(storage: Storage) -> None:
    owner = storage.claim()
    storage.store.delete([f"{storage.uri}/HEAD.json"])
    with pytest.raises(Fenced, match=r"HEAD\.json is gone"):
        storage.commit(owner, 1)


class Flaky(ObjectStore):
    """Object store that loses the replies to writes of HEAD, whether the write is done or not."""

    def __init__(self, s3: EmbeddedS3) -> None:
        super().__init__(s3.endpoint, credentials=Credentials(s3.access_key, s3.secret_key))
        self.faults: Iterator[str] = iter(())

    def put(self, uri: str, data: bytes, **condition: Any) -> str:
        fault = next(self.faults, "none")
        etag = super().put(uri, data, **condition) if fault != "not done" else ""
        if fault != "none":
            raise StorageUnavailable("StorageUnreachable", f"the answer was lost; {fault}")
        return etag


@pytest.mark.parametrize(
    "faults", [["done"], ["not done"], ["not done", "done"], ["done", "not done"]], ids=str
)
def test_a_lost_reply_is_resolved(storage: Storage, s3: EmbeddedS3, faults: list[str]) -> None:
    flaky = Flaky(s3)
    flaky.faults = iter(faults)
    owner = storage.claim(flaky)
    assert owner.head.attempt == 1
    flaky.faults = iter(faults)
    made = storage.commit(owner, 3, 0.3)
    assert storage.contents(made)
    flaky.faults = iter(faults)
    owner.release()
    found = read_head(storage.store, storage.uri)
    assert found is not None
    assert found[0].checkpoints == [made] and found[0].released
    assert found[0] == owner.head


@pytest.mark.parametrize("faults", [[], ["done"], ["not done"], ["not done", "done"]], ids=str)
def test_a_rollback_is_recorded_once_and_drops_later_checkpoints(
    storage: Storage, s3: EmbeddedS3, faults: list[str]
) -> None:
    flaky = Flaky(s3)
    owner = storage.claim(flaky, keep_last=3)
    kept = [storage.commit(owner, step, metric) for step, metric in ((3, 0.5), (6, 0.4))]
    storage.commit(owner, 9, 0.1)
    back = Rollback(attempt=1, skipped=[6, 7], skipped_steps=3)
    flaky.faults = iter(faults)
    owner.rewind(back)
    found = read_head(storage.store, storage.uri)
    assert found is not None and found[0] == owner.head
    assert (found[0].rollbacks, found[0].left_out) == ([back], [6, 7])
    assert found[0].checkpoints == kept[::-1] and owner.best == kept[1]

    again = storage.commit(owner, 9, 0.2)  # the same step, repeated
    second = storage.claim(keep_last=3)
    other = Rollback(attempt=2, skipped=[4], skipped_steps=4)
    second.rewind(other)
    assert second.head.rollbacks == [back, other], "rollbacks of all attempts, oldest first"
    assert again not in second.checkpoints and second.checkpoints == kept[:1]
    with pytest.raises(Fenced):
        owner.rewind(back)


def test_a_stale_writer_is_fenced_after_a_lost_reply(storage: Storage, s3: EmbeddedS3) -> None:
    flaky = Flaky(s3)
    owner = storage.claim(flaky)
    storage.claim()
    flaky.faults = iter(["not done"])
    with pytest.raises(Fenced):
        storage.commit(owner, 3)


def test_unreachable_storage_is_reported(storage: Storage, s3: EmbeddedS3) -> None:
    flaky = Flaky(s3)
    owner = storage.claim(flaky)
    flaky.faults = itertools.repeat("not done")
    with pytest.raises(StorageUnavailable, match="20 tries"):
        storage.commit(owner, 3)
    flaky.faults = iter(())
    made = storage.commit(owner, 4)
    assert owner.checkpoints == [made]


def spoil(storage: Storage, checkpoint: Checkpoint, how: str) -> None:
    uri = f"{checkpoint.uri}/shard-0"
    text = storage.store.get(uri)
    changes: dict[str, Callable[[], object]] = {
        "missing": lambda: storage.store.delete([uri]),
        "cut": lambda: storage.store.put(uri, text[:-1]),
        "altered": lambda: storage.store.put(uri, text[:-1] + b"x"),
    }
    changes[how]()


@pytest.mark.parametrize("how", ["missing", "cut", "altered"])
def test_a_corrupt_checkpoint_is_detected_and_the_next_older_one_used(
    storage: Storage, how: str
) -> None:
    first = storage.claim()
    older = storage.commit(first, 5, 0.5)
    newest = storage.commit(first, 10, 0.1)
    spoil(storage, newest, how)
    second = storage.claim()
    assert second.checkpoints == [newest, older]
    with pytest.raises(CorruptCheckpoint, match="shard-0") as caught:
        storage.contents(second.checkpoints[0])
    assert newest.uri in caught.value.message
    second.discard(newest)
    second.discard(newest)
    assert second.checkpoints == [older] and second.best == older
    assert storage.contents(older) == "deep/state.json of attempt 1, step 5"
    made = storage.commit(second, 10, 0.2)
    assert second.checkpoints == [made, older] and second.best == made


def test_a_crash_between_upload_and_commit_leaves_the_previous_checkpoint(
    storage: Storage,
) -> None:
    first = storage.claim()
    kept = storage.commit(first, 5)
    storage.upload(first, 10)
    second = storage.claim()
    assert second.checkpoints == [kept]
    assert storage.contents(kept)
    storage.commit(second, 7)
    assert storage.steps_in_storage() == {"attempt-1/step-00000005", "attempt-2/step-00000007"}


def test_parts_of_dead_uploads_are_removed_at_the_next_commit(storage: Storage) -> None:
    first = storage.claim()
    storage.commit(first, 5)
    dead = f"{first.checkpoint_uri(10)}/shard-0"
    storage.store.put_part(dead, storage.store.begin_parts(dead), 1, b"half")
    second = storage.claim()
    going_on = f"{second.checkpoint_uri(12)}/shard-0"
    upload = storage.store.begin_parts(going_on)
    assert {uri for uri, _ in storage.store.open_parts(f"{storage.uri}/")} == {dead, going_on}
    storage.commit(second, 7)
    assert list(storage.store.open_parts(f"{storage.uri}/")) == [(going_on, upload)]


def test_newest_and_best_are_kept_and_the_rest_removed(storage: Storage) -> None:
    owner = storage.claim()
    metrics = {1: 0.9, 2: 0.2, 3: 0.5, 4: None, 5: float("nan"), 6: 0.2001}
    for step, metric in metrics.items():
        storage.commit(owner, step, metric)
        assert storage.steps_in_storage() == {
            c.uri[len(storage.uri) + 1 :] for c in owner.checkpoints
        }
    assert [c.step for c in owner.checkpoints] == [6, 5, 2]
    assert owner.best and owner.best.step == 2
    assert storage.commit(owner, 7, 0.2).step == 7
    assert owner.best and owner.best.step == 7  # the newer of two equal metrics
    assert [c.step for c in owner.checkpoints] == [7, 6]


def test_an_upload_in_progress_is_not_removed(storage: Storage) -> None:
    owner = storage.claim()
    files = storage.upload(owner, 9)
    storage.commit(owner, 8)
    made = owner.commit(9, files)
    assert storage.contents(made)


def test_a_step_is_committed_once(storage: Storage) -> None:
    owner = storage.claim()
    storage.commit(owner, 8)
    with pytest.raises(ValueError, match="step 8 is committed already"):
        storage.commit(owner, 8)


def test_head_of_another_run(storage: Storage) -> None:
    storage.claim()
    with pytest.raises(TrainerError, match="is of run 1-abcde, not of 2-abcde"):
        claim(storage.store, storage.uri, "2-abcde", better=lower, keep_last=2)
