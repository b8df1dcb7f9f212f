"""Node rank, world size and rendezvous of a training pod, read from the environment."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from finetune_api.names import (
    ENV_GRACE_SECONDS,
    ENV_NODE_RANK,
    ENV_NODES,
    ENV_PROCESSES,
    ENV_RENDEZVOUS,
)
from finetune_trainer.failures import UserError

ENV_COMPLETION_INDEX = "JOB_COMPLETION_INDEX"
"""Set by Kubernetes in every pod of an Indexed Job."""


@dataclass(frozen=True)
class NodeEnvironment:
    """One node of a training attempt."""

    nodes: int
    processes: int
    """Training processes per node."""
    rank: int
    """Node rank, from 0."""
    host: str
    """Host of the rendezvous store: the node of rank 0."""
    port: int
    grace: int
    """Seconds between SIGTERM and SIGKILL."""

    @property
    def loopback(self) -> bool:
        """Whether all nodes run on one machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def read_node_environment(environ: Mapping[str, str]) -> NodeEnvironment:
    """Read the node's settings; unset variables mean a single node with one process.

    Raises:
        UserError: 'InvalidEnvironment', with the variable and its allowed values.
    """

    def number(name: str, default: str, least: int) -> int:
        text = environ.get(name) or default
        if not text.isdecimal() or int(text) < least:
            raise _invalid(name, text, f"a whole number of at least {least}")
        return int(text)

    nodes = number(ENV_NODES, "1", 1)
    rank = number(ENV_NODE_RANK, environ.get(ENV_COMPLETION_INDEX) or "0", 0)
    if rank >= nodes:
        raise _invalid(ENV_NODE_RANK, str(rank), f"below {ENV_NODES}={nodes}")
    rendezvous = environ.get(ENV_RENDEZVOUS) or ("127.0.0.1:0" if nodes == 1 else "")
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal():
        raise _invalid(ENV_RENDEZVOUS, rendezvous, "host:port of the rendezvous at rank 0")
    return NodeEnvironment(
        nodes=nodes,
        processes=number(ENV_PROCESSES, "1", 1),
        rank=rank,
        host=host,
        port=int(port),
        grace=number(ENV_GRACE_SECONDS, "30", 1),
    )


def _invalid(name: str, value: str, allowed: str) -> UserError:
    return UserError("InvalidEnvironment", f"{name}={value!r}: must be {allowed}")
