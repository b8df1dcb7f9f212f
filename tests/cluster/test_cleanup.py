"""If the harness is killed while a cluster is running, the next run removes everything of it.

Runs before the other tests with nodes (by its file's name), because they share one cluster.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import images, state, system_packages
from cluster.api import eventually
from cluster.real import NAME

pytestmark = pytest.mark.e2e

START_AND_HANG = """
import time
from cluster import state
from cluster.api import eventually
from cluster.real import NAME, RealCluster
cluster = RealCluster(state.claim(NAME), ["node-a"])
cluster.start()
print("up", flush=True)
time.sleep(600)
"""


def lines(*command: str) -> set[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def host() -> dict[str, set[str]]:
    """Return everything that a cluster could leave on the host."""
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    settings = [
        Path("/proc/sys") / name
        for name in ("vm/overcommit_memory", "kernel/panic", "fs/inotify/max_user_instances")
    ]
    return {
        "links": {path.name for path in Path("/sys/class/net").iterdir()},
        "routes": lines("ip", "route", "show"),
        "network namespaces": lines("lsns", "-n", "-t", "net", "-o", "NS"),
        "process namespaces": lines("lsns", "-n", "-t", "pid", "-o", "NS"),
        "mounts": mounts,
        "settings": {f"{setting} {setting.read_text()}" for setting in settings},
        "cgroups": {str(path) for path in Path("/sys/fs/cgroup").glob("**/fto-*")},
        "folders": {
            str(path)
            for folder in ("/var/lib", "/var/log", "/run", "/opt", "/etc/cni")
            for path in Path(folder).glob("*")
        },
        "processes": {
            line for line in lines("ps", "-eo", "pid,args") if str(state.cache() / "run") in line
        },
    }


def test_a_killed_cluster_is_removed_completely(needs_root: None) -> None:
    state.sweep()
    if NAME in state.claimed():
        pytest.skip("a cluster is in use")
    system_packages.ensure()  # before the comparison: installed packages stay on the host
    images.ensure_pause()
    before = host()
    killed = subprocess.Popen(
        [sys.executable, "-c", START_AND_HANG],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killed.stdout is not None
    assert killed.stdout.readline().strip() == "up"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    during = host()
    assert "fto-host" in during["links"]
    assert during["processes"] > before["processes"]
    assert during["mounts"] == before["mounts"], "all mounts are in namespaces of the nodes"
    assert NAME in state.sweep()
    with contextlib.suppress(TimeoutError):  # namespaces of unrelated processes may be short-lived
        eventually("nothing is left", lambda: not left(before), within=10)
    assert not left(before)


def left(before: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return what exists on the host now and did not before."""
    now = host()
    return {what: now[what] - before[what] for what in now if now[what] - before[what]}
