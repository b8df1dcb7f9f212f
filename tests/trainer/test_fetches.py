"""Shards of a batch are fetched in parallel, each shard once, and ahead of the step."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from engine import CPU, samples
from prepared_data import supervised_of, write_prepared

from finetune_trainer.engine.packing.feed import EXPECTED, Feed
from finetune_trainer.engine.planning.plan import Plan
from finetune_trainer.prepared.dataset import PreparedData, TokenSample
from finetune_trainer.prepared.fetches import Fetches
from finetune_trainer.storage.objects import ObjectStore

TOGETHER = 8
PATIENCE = 60
"""Timeout in seconds of every wait."""


class Meeting(ObjectStore):
    """A store in which downloads of shards wait for each other at a barrier."""

    def __init__(self, real: ObjectStore, parties: int) -> None:
        self.__dict__.update(real.__dict__)
        self._meeting = threading.Barrier(parties, timeout=PATIENCE)
        self.fetched: Counter[str] = Counter()

    def download(self, uri: str, path: Path) -> None:
        if "/shards/" in uri:
            self._meeting.wait()
            self.fetched[uri] += 1
        super().download(uri, path)


def test_shards_of_a_batch_are_fetched_in_parallel_and_once(
    store: ObjectStore, bucket: str, tmp_path: Path
) -> None:
    uri = f"s3://{bucket}/data"
    made = samples([5 + i % 7 for i in range(64)])
    write_prepared(store, uri, tmp_path / "write", map(supervised_of, made), 64 // TOGETHER)
    slow = Meeting(store, TOGETHER)
    data = PreparedData.open(slow, uri, tmp_path / "read")
    order = np.random.default_rng(0).permutation(64).tolist()
    # Two readers of the same shards at the same time.
    with ThreadPoolExecutor(2) as readers:
        found = list(readers.map(lambda side: data.samples(side, order), ["train", "train"]))
    for read in found:
        for sample, position in zip(read, order, strict=True):
            np.testing.assert_array_equal(sample.ids, made[position].ids)
            np.testing.assert_array_equal(sample.supervised, made[position].supervised)
    assert len(slow.fetched) == TOGETHER and set(slow.fetched.values()) == {1}


def test_fetches_are_bounded_and_failures_are_raised_and_retried() -> None:
    begun, allowed, broken = threading.Semaphore(0), threading.Semaphore(0), {"2"}
    running: list[int] = []
    lock, now = threading.Lock(), 0

    def fetch(name: str) -> str:
        nonlocal now
        with lock:
            now += 1
            running.append(now)
        begun.release()
        assert allowed.acquire(timeout=PATIENCE)
        with lock:
            now -= 1
        if name in broken:
            raise OSError("gone")
        return name

    fetches = Fetches(fetch, at_once=2)
    asked = [fetches.ask(str(i)) for i in range(5)]
    for _ in range(2):
        assert begun.acquire(timeout=PATIENCE)
    assert not begun.acquire(blocking=False), "the third waits"
    allowed.release(6)
    assert [f.result(PATIENCE) for i, f in enumerate(asked) if i != 2] == ["0", "1", "3", "4"]
    with pytest.raises(OSError, match="gone"):
        asked[2].result(PATIENCE)
    broken.clear()
    assert fetches.ask("2").result(PATIENCE) == "2"
    assert max(running) == 2


def test_the_feed_announces_samples_of_later_steps_before_reading() -> None:
    made = samples([8] * 24)
    lengths = np.array([8] * 24)
    plan = Plan(lengths, lengths // 2, batch_size=4, seed=0, micro_batch_tokens=16, ranks=1)
    told: list[tuple[str, frozenset[int]]] = []

    def read(positions: Sequence[int]) -> list[TokenSample]:
        told.append(("read", frozenset(positions)))
        return [made[p] for p in positions]

    def expect(positions: Sequence[int]) -> None:
        told.append(("expect", frozenset(positions)))

    with Feed(plan, read, rank=0, start=0, end=6, device=CPU, expect=expect) as feed:
        assert [batch.plan.number for batch in feed] == list(range(6))
    steps = [frozenset(plan.samples(i).tolist()) for i in range(6)]
    expected = [("expect", s) for s in steps[: EXPECTED + 1]]
    for i, step in enumerate(steps):
        expected.append(("read", step))
        if i + EXPECTED + 1 < len(steps):
            expected.append(("expect", steps[i + EXPECTED + 1]))
    assert told == expected
