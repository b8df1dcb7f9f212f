"""containerd in a machine: in the nodes, and in the one that builds images for them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cluster import system_packages
from cluster.api import eventually
from cluster.machine import Machine

NAMESPACE = "k8s.io"  # kubelet's
SOCKET = "/run/containerd/containerd.sock"
STORE = "containerd"  # its folder in the machine's /var/lib
PAUSE_IMAGE = "docker.io/fto/pause:1"

# `restrict_oom_score_adj`: in a sandbox that may not lower it, no pod would start otherwise.
_CONFIG = f"""
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{system_packages.CNI_PLUGINS}"
    conf_dir = "/var/lib/cni-config"
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd-opt"
"""


_KEEP_GARBAGE = """
[plugins."io.containerd.gc.v1.scheduler"]
  deletion_threshold = 0
  mutation_threshold = 0
  startup_delay = "0s"
"""


def start(machine: Machine, *, collect_garbage: bool = True) -> None:
    """Start it, and wait until it answers."""
    config = machine.folder / "containerd.toml"
    config.write_text(_CONFIG + ("" if collect_garbage else _KEEP_GARBAGE))
    machine.start("containerd", ["containerd", "--config", config])
    eventually(f"containerd of {machine.name}", lambda: ctr(machine, "version"))


def ctr(machine: Machine, *arguments: str | Path) -> str:
    """Run ctr on the machine's containerd, from outside: it may read and write host files."""
    socket = machine.folder / SOCKET.lstrip("/")
    done = subprocess.run(
        ["ctr", "--address", socket, "--namespace", NAMESPACE, *arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"ctr {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout
