"""containerd in a machine: in each node, and in the builder of their images."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cluster import system_packages
from cluster.api import eventually
from cluster.machine import Machine

NAMESPACE = "k8s.io"  # the namespace that kubelet uses
SOCKET = "/run/containerd/containerd.sock"
STORE = "containerd"  # its folder below the machine's /var/lib
PAUSE_IMAGE = "localhost/fto/pause:1"

_CONFIG = """
version = 2
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd-opt"
"""
# `restrict_oom_score_adj`: else no pod starts where the score may not be lowered, as in a sandbox.
FOR_NODES = f"""{_CONFIG}
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{system_packages.CNI_PLUGINS}"
    conf_dir = "/var/lib/cni-config"
"""
# The CRI plugin would name every image a second time, by its digest, and so keep it forever.
FOR_BUILDS = f"""
disabled_plugins = ["io.containerd.grpc.v1.cri"]
{_CONFIG}
"""
_LAST_OF_CRI = b"Start streaming server"
"""What the plugin writes to the log just before it answers."""
FOR_BUILDS_THAT_KEEP_ALL = f"""{FOR_BUILDS}
[plugins."io.containerd.gc.v1.scheduler"]
  deletion_threshold = 0
  mutation_threshold = 0
  startup_delay = "0s"
"""


def start(machine: Machine, config: str) -> None:
    """Start containerd, and wait until it answers, and for nodes until kubelet may ask it: kubelet
    ends if it does so before."""
    file = machine.folder / "containerd.toml"
    file.write_text(config)
    log = machine.processes.log(f"{machine.name}.containerd")
    before = log.stat().st_size if log.exists() else 0  # a node that is powered on again
    machine.start("containerd", ["containerd", "--config", file])
    eventually(f"containerd of {machine.name}", lambda: ctr(machine, "version"))
    if config == FOR_NODES:
        eventually(
            f"the CRI plugin of {machine.name}",
            lambda: _LAST_OF_CRI in log.read_bytes()[before:],
        )


def ctr(machine: Machine, *arguments: str | Path) -> str:
    """Run ctr on the host against the machine's containerd, so that it can access host files."""
    socket = machine.folder / SOCKET.lstrip("/")
    done = subprocess.run(
        ["ctr", "--address", socket, "--namespace", NAMESPACE, *arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"ctr {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout
