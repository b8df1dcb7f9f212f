"""The rendezvous of an elastic gang, with nodes as threads and a real store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)

from finetune_trainer.supervise import rendezvous, worker_files
from finetune_trainer.supervise.agent import ELASTIC
from finetune_trainer.supervise.rendezvous import ElasticRendezvous, PeersLost
from ports import free_port


class Gang:
    """Nodes that join one rendezvous, each in a thread."""

    def __init__(self, threads: ThreadPoolExecutor, fewest: int, most: int) -> None:
        self._threads = threads
        self._fewest, self._most = fewest, most
        self._port = free_port()

    def node(self, rank: int, **more: int) -> ElasticRendezvous:
        parameters = RendezvousParameters(
            ELASTIC, f"127.0.0.1:{self._port}", "run", self._fewest, self._most,
            local_addr=f"127.0.0.{rank + 1}",
            **{"is_host": int(rank == 0), "join_timeout": 60, "last_call_timeout": 1,
               "read_timeout": 30, **more},
        )  # fmt: skip
        made = rendezvous_handler_registry.create_handler(parameters)
        assert isinstance(made, ElasticRendezvous)
        return made

    def join(self, node: ElasticRendezvous) -> Future[RendezvousInfo]:
        return self._threads.submit(node.next_rendezvous)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadPoolExecutor]:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.setenv(worker_files.ENV_FOLDER, str(tmp_path))
    if ELASTIC not in rendezvous_handler_registry._registry:
        rendezvous.register()
    with ThreadPoolExecutor() as pool:
        yield pool


def test_enough_nodes_form_a_gang_that_asks_its_workers_to_let_a_late_node_in(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "SETTLE_SECONDS", 0.0)
    gang = Gang(threads, 2, 3)
    first, second = gang.node(0), gang.node(1)
    formed = [gang.join(second), gang.join(first)]
    infos = [each.result(60) for each in formed]
    assert [(i.rank, i.world_size) for i in infos] == [(1, 2), (0, 2)], "node 0 has rank 0"
    assert first.num_nodes_waiting() == 0 and not worker_files.grow_requested()
    late = gang.join(gang.node(2))
    deadline = time.monotonic() + 60
    while not worker_files.grow_requested():
        assert first.num_nodes_waiting() == 0, "torchrun would kill the workers"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not late.done(), "it waits until the gang starts again"
    first.shutdown()
    with pytest.raises(RendezvousClosedError):
        late.result(60)


def test_a_silent_node_ends_the_agents_of_the_others(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "KEEP_ALIVE_SECONDS", 1)
    monkeypatch.setattr(rendezvous, "MISSED", 3)
    gang = Gang(threads, 1, 2)
    nodes = [gang.node(0), gang.node(1)]
    assert {each.result(60).world_size for each in [*map(gang.join, nodes)]} == {2}
    assert nodes[0].num_nodes_waiting() == 0
    nodes[1]._stop_heartbeats()
    deadline = time.monotonic() + 60
    with pytest.raises(PeersLost, match="1 of 2 nodes show no sign of life"):
        while time.monotonic() < deadline:
            nodes[0].num_nodes_waiting()
            time.sleep(0.05)
    assert nodes[0].shutdown() is False, "the store may not answer"
    nodes[1].shutdown()


def test_without_node_0_no_gang_forms(threads: ThreadPoolExecutor) -> None:
    """Two parts of a gang that cannot reach each other never both train."""
    gang = Gang(threads, 2, 4)
    for rank in (1, 2, 3):
        with pytest.raises(RendezvousConnectionError):
            gang.node(rank, read_timeout=1)
