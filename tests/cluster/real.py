"""``RealCluster``: a control plane on a bridge, and nodes that run containers. Needs root."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster import containerd, dns, host, images, state, store, system_packages
from cluster.api import eventually
from cluster.control_plane import ControlPlane
from cluster.network import HOST, Network, Place
from cluster.node import Node

NAME = "e2e"  # of the cluster's folder; one cluster at a time, because its addresses are fixed
NODES = ("node-a", "node-b", "node-c")


class RealCluster(ControlPlane):
    """A cluster with nodes. Use as a context manager. Each node has all images in the store."""

    def __init__(self, folder: Path, nodes: Sequence[str] = NODES) -> None:
        super().__init__(folder, address=HOST, port=6443)
        places = [Place(name, index) for index, name in enumerate(nodes, start=1)]
        self.network = Network(self.processes, places)
        self.nodes = {place.name: Node(place, self, self.network) for place in places}

    @classmethod
    def kept(cls) -> RealCluster | None:
        """Return the cluster started by ``python -m cluster up``, None if there is none."""
        folder = state.kept(NAME)
        if folder is None or not (folder / "nodes").exists():
            return None
        return cls(folder, (folder / "nodes").read_text().split())

    def start(self) -> None:
        if os.geteuid() != 0:
            raise RuntimeError("nodes need root; the control plane alone does not")
        with _timed("packages"):
            system_packages.ensure()
        with _timed("copying the image store"):
            images.ensure_pause()
            for node in self.nodes.values():
                store.give_to(node.machine)
        with _timed("control plane"):
            self.network.start()
            super().start()
            dns.start(self)
        with _timed(f"{len(self.nodes)} nodes"):
            host.remember_settings(self.folder)
            for node in self.nodes.values():
                node.prepare()
                node.start()
            self.wait_for_nodes(*self.nodes)
        (self.folder / "nodes").write_text(" ".join(self.nodes))

    def wait_for_nodes(self, *names: str, within: float = 180) -> None:
        """Wait until the nodes are ready. Raises Ended as soon as a program of a node has ended,
        and TimeoutError with the nodes' own words and logs."""

        def ready() -> bool:
            for name in names:
                self.nodes[name].require_programs()
            return set(names) <= self.ready_nodes()

        try:
            eventually("the nodes are ready", ready, within=within)
        except TimeoutError as error:
            reports = [self.nodes[name].report() for name in names]
            raise TimeoutError("\n".join([str(error), *self._ready_messages(), *reports])) from None

    def ready_nodes(self) -> set[str]:
        return {
            node["metadata"]["name"]
            for node in self.get("nodes")["items"]
            for condition in node["status"]["conditions"]
            if condition["type"] == "Ready" and condition["status"] == "True"
        }

    def _ready_messages(self) -> list[str]:
        return [
            f"{node['metadata']['name']}: {condition.get('reason')}: {condition.get('message')}"
            for node in self.get("nodes")["items"]
            for condition in node["status"]["conditions"]
            if condition["type"] == "Ready"
        ]

    def has(self, *names: str) -> bool:
        """Whether every node has the store's current version of these images."""
        with store.opened() as images:
            wanted = {name: images.digest(name) for name in names}
        machines = [node.machine for node in self.nodes.values()]
        return all(store.digest(each, name) == wanted[name] for each in machines for name in names)

    def provide(self, name: str) -> None:
        """Copy an image of the store to the running nodes; takes a minute per GB."""
        archive = self.folder / "image.tar"
        with store.opened() as images:
            images.ctr("images", "export", archive, name)
        for node in self.nodes.values():
            containerd.ctr(node.machine, "images", "import", archive)
        archive.unlink()


@contextmanager
def _timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
