"""The rendezvous of an elastic gang: torchrun's c10d rendezvous of ``minNodes`` to ``nodes`` nodes.

A gang forms once all nodes are there, or when the last call after ``minNodes`` have come is over. A
later node waits in the rendezvous. torchrun would kill the workers for it at once, and would not
notice that a node is gone whose connections stay open. Here the workers are requested to save, and
the agent ends when a node of the gang shows no sign of life.

The store belongs to the agent of node 0, a new one at every start. Nodes that cannot reach it form
no gang of their own.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Final

from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from finetune_trainer.supervise import worker_files
from finetune_trainer.supervise.agent import ELASTIC

KEEP_ALIVE_SECONDS: Final = 5
MISSED: Final = 6
"""Signs of life that a node may miss before it is lost."""
SETTLE_SECONDS: Final = 5.0
"""Time in which other nodes may come after the first one that waits: the gang starts again once for
all of them."""


class PeersLost(RendezvousError):
    """Nodes of the gang are lost."""


class ElasticRendezvous(DynamicRendezvousHandler):
    """One start of an elastic gang, as one node sees it."""

    _nodes = 0
    """Nodes of the gang; 0 before it has formed."""
    _waited_for: float | None = None
    """Monotonic time of the first look at a node that waits."""
    _broken = False
    """Whether nodes, or the store, are lost."""

    def get_backend(self) -> str:
        """Return the name under which the backend is registered."""
        return ELASTIC

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the gang."""
        info: RendezvousInfo = super().next_rendezvous()
        self._nodes = info.world_size
        return info

    def num_nodes_waiting(self) -> int:
        """Look at the other nodes; torchrun calls this ten times a second, and the store is read
        once. Return 0, because torchrun would kill the workers.

        Raises:
            RendezvousError: nodes of the gang are lost, or the store.
        """
        self._broken = True
        waiting = super().num_nodes_waiting()
        lost = self._nodes - len(self._state_holder.state.participants)
        if lost > 0:
            raise PeersLost(f"{lost} of {self._nodes} nodes show no sign of life")
        self._broken = False
        self._let_in(waiting, time.monotonic())
        return 0

    def _let_in(self, waiting: int, now: float) -> None:
        if not waiting:
            self._waited_for = None
        elif self._waited_for is None:
            self._waited_for = now
        elif now - self._waited_for >= SETTLE_SECONDS:
            worker_files.ask_to_grow()

    def shutdown(self) -> bool:
        """Close the rendezvous, unless its store may not answer."""
        if not self._broken:
            return bool(super().shutdown())
        self._stop_heartbeats()
        return False


def register() -> None:
    """Make the backend known to torchrun in this process."""
    rendezvous_handler_registry.register(ELASTIC, _create)


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    backend, store = create_backend(parameters)
    handler: RendezvousHandler = ElasticRendezvous.from_backend(
        parameters.run_id, store, backend, parameters.min_nodes, parameters.max_nodes,
        parameters.local_addr,
        RendezvousTimeout(
            join=_seconds(parameters, "join_timeout"),
            last_call=_seconds(parameters, "last_call_timeout"),
        ),
        keep_alive_interval=KEEP_ALIVE_SECONDS, keep_alive_max_attempt=MISSED,
    )  # fmt: skip
    return handler


def _seconds(parameters: RendezvousParameters, key: str) -> timedelta:
    return timedelta(seconds=float(parameters.get_as_int(key) or 0))
