"""The image store: a containerd root in the cache. Builds write to it and nodes start from it.

A node gets the whole store immediately and without disk space: its containerd has copies of the
databases, and links to everything else. This is safe because containerd never changes a blob or a
layer once it is complete; containers write to their own layers. Importing an archive of a trainer
image would take half a minute and 2 GB per node instead.

Layers may be removed only while no cluster is running: those of replaced images, and the older part
of the build cache.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import containerd, state
from cluster.api import eventually
from cluster.build import binary
from cluster.machine import Machine
from cluster.processes import Processes

_BUILDKIT = "/run/buildkit.sock"
_BUILD_CACHE = 6000  # MB
_SNAPSHOTTER = "io.containerd.snapshotter.v1.overlayfs"


class Store:
    """The store while its containerd is running: see ``opened``."""

    def __init__(self, machine: Machine, *, collect_garbage: bool) -> None:
        self._machine = machine
        self._collect = collect_garbage

    def has(self, image: str) -> bool:
        return bool(self.ctr("images", "ls", "-q", f"name=={image}").strip())

    def digest(self, image: str) -> str:
        """Return the digest of an image, to compare it with another store's image of this name."""
        return digest(self._machine, image)

    def drop_others(self, image: str) -> None:
        """Remove images of the same repository with other tags, which ``image`` has replaced."""
        repository = image.rpartition(":")[0]
        for other in self.ctr("images", "ls", "-q").split():
            if other.startswith(f"{repository}:") and other != image:
                self.ctr("images", "rm", other)

    @contextmanager
    def kept(self, image: str) -> Iterator[None]:
        """Keep the layers of an image while another one of its name is built: between naming the
        new image and unpacking it, nothing else refers to the layers that both share, and
        containerd's garbage collection may remove them."""
        old = f"{image}-replaced"
        if self.has(image):
            self.ctr("images", "tag", "--force", image, old)
        try:
            yield
        finally:
            if self.has(old):
                self.ctr("images", "rm", old)

    def ctr(self, *arguments: str | Path) -> str:
        return containerd.ctr(self._machine, *arguments)

    def buildctl(self, *arguments: str) -> str:
        """Run buildctl; the first call starts buildkitd. Raises RuntimeError on failure."""
        if "builder.buildkitd" not in self._machine.processes.names():
            self._start_buildkit()
        done = self._run_buildctl(*arguments)
        if done.returncode:
            raise RuntimeError(f"buildctl {arguments[0]} failed:\n{done.stdout[-6000:]}")
        return done.stdout

    def _run_buildctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        address = self._machine.folder / _BUILDKIT.lstrip("/")
        return subprocess.run(
            [binary("buildctl"), f"--addr=unix://{address}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _start_buildkit(self) -> None:
        self._machine.start(
            "buildkitd",
            [
                binary("buildkitd"),
                f"--addr=unix://{_BUILDKIT}",
                "--root=/var/lib/buildkit",
                "--oci-worker=false",
                "--containerd-worker=true",
                f"--containerd-worker-addr={containerd.SOCKET}",
                f"--containerd-worker-namespace={containerd.NAMESPACE}",
                "--containerd-worker-net=host",
                f"--containerd-worker-gc={str(self._collect).lower()}",
                f"--containerd-worker-gc-keepstorage={_BUILD_CACHE},0,{_BUILD_CACHE}",
            ],
        )
        eventually(
            "buildkitd answers",
            lambda: self._run_buildctl("debug", "workers").returncode == 0,
        )


@contextmanager
def opened() -> Iterator[Store]:
    """Run the store's containerd; only one process of the machine can at a time."""
    home = state.cache() / "images"
    with state.locked(home / ".lock"):
        folder = state.claim("builder")
        machine = Machine("builder", home, Processes(folder / "processes"))
        try:
            machine.power_on(network=False)
            collect = state.claimed() == {"builder"}
            keep_all, keep_some = containerd.FOR_BUILDS_THAT_KEEP_ALL, containerd.FOR_BUILDS
            containerd.start(machine, keep_some if collect else keep_all)
            try:
                yield Store(machine, collect_garbage=collect)
            finally:  # by SIGTERM, so that the databases on disk are complete
                for program in ("buildkitd", "containerd"):
                    if machine.processes.find(f"builder.{program}"):
                        machine.stop(program, patience=20)
        finally:
            state.release(folder)


def give_to(machine: Machine) -> None:
    """Put the store's images into a machine, before its first power-on."""
    home = state.cache() / "images"
    with state.locked(home / ".lock"):
        source, target = home / "lib" / containerd.STORE, machine.lib / containerd.STORE
        target.mkdir(parents=True)
        for entry in source.iterdir():
            if entry.name != _SNAPSHOTTER:
                subprocess.run(["cp", "-a", "--link", str(entry), str(target)], check=True)
        layers = target / _SNAPSHOTTER / "snapshots"
        layers.mkdir(parents=True, mode=0o700)
        for layer in (source / _SNAPSHOTTER / "snapshots").iterdir():
            (layers / layer.name).symlink_to(layer)
        for database in source.glob("*/*.db"):
            copy = target / database.relative_to(source)
            copy.unlink(missing_ok=True)
            shutil.copy2(database, copy)


def digest(machine: Machine, image: str) -> str:
    """Return the digest of an image in a running machine's store; empty if it is missing."""
    lines = containerd.ctr(machine, "images", "ls", f"name=={image}").splitlines()
    return lines[1].split()[2] if len(lines) > 1 else ""
