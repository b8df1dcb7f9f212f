"""The network of the nodes: one bridge in its own namespace, to which the host is connected too.

The host has one interface, ``fto-host``, and the routes through it. The bridge is not on the host,
where a firewall (such as dockerd's) would filter the traffic between nodes. There are no other
routes, so nothing in the cluster can reach external networks.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.api import eventually
from cluster.build import binary
from cluster.control_plane import SERVICES
from cluster.processes import Process, Processes

HOST = "10.200.0.1"
PODS = "10.201.0.0/16"
_NODES = "10.200.0.0/24"
_HOST_LINK = "fto-host"


@dataclass(frozen=True)
class Place:
    """Address and pod range of a node; ``index`` counts from 1."""

    name: str
    index: int

    @property
    def address(self) -> str:
        return f"10.200.0.{10 + self.index}"

    @property
    def pods(self) -> str:
        return f"10.201.{self.index}.0/24"


class Network:
    """The bridge, and the links and routes of host and nodes."""

    def __init__(self, processes: Processes, places: list[Place]) -> None:
        self._processes = processes
        self._places = places

    def start(self) -> None:
        """Make the bridge and connect the host to it."""
        self._processes.start("switch", ["unshare", "--net", binary("pause")])
        switch = eventually("the switch is up", self._switch, within=10)
        _ip(
            f"link add {_HOST_LINK} type veth peer name host netns {switch.pid}",
            f"address add {HOST}/24 dev {_HOST_LINK}",
            f"link set {_HOST_LINK} up",
            *(f"route add {each.pods} via {each.address}" for each in self._places),
            # The host reaches Services through the first node, whose kube-proxy also masquerades.
            f"route add {SERVICES} via {self._places[0].address}",
        )
        _ip(
            "link add bridge type bridge",
            "link set bridge up",
            "link set host master bridge",
            "link set host up",
            inside=switch,
        )

    def connect(self, place: Place, node: Process) -> None:
        """Give a node its interface ``eth0`` and its routes; ``node`` is its process 1."""
        switch = self._processes.require("switch")
        others = [each for each in self._places if each != place]
        _ip(
            f"link add {place.name} type veth peer name eth0 netns {node.pid}",
            f"link set {place.name} master bridge",
            f"link set {place.name} up",
            inside=switch,
        )
        _ip(
            "link set lo up",
            f"address add {place.address}/24 dev eth0",
            "link set eth0 up",
            *(f"route add {each.pods} via {each.address}" for each in others),
            # Only a placeholder: kube-proxy rewrites the destination of these packets.
            f"route add {SERVICES} dev eth0",
            inside=node,
        )

    def cut(self, place: Place) -> None:
        """Take a node off the network; its processes run on."""
        _ip(f"link set {place.name} down", inside=self._processes.require("switch"))

    def restore(self, place: Place) -> None:
        """Undo ``cut``."""
        _ip(f"link set {place.name} up", inside=self._processes.require("switch"))

    def _switch(self) -> Process | None:
        process = self._processes.require("switch")
        apart = _network_of(process.pid) != _network_of("self")
        return process if apart else None


def _network_of(process: int | str) -> str:
    return str(Path(f"/proc/{process}/ns/net").readlink())


def _ip(*commands: str, inside: Process | None = None) -> None:
    enter = ["nsenter", f"--target={inside.pid}", "--net"] if inside else []
    done = subprocess.run(
        [*enter, "ip", "-batch", "-"], input="\n".join(commands), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"ip: {done.stderr.strip()}")
