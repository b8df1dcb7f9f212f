"""``python -m cluster up|down|status``, in ``tests/``: a cluster to try things on; needs root.

``up`` leaves it running, and the e2e tests then use it instead of starting one of their own.
"""

from __future__ import annotations

import argparse
import sys

from cluster import state
from cluster.real import NAME, NODES, RealCluster


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    parser.add_argument("action", choices=("up", "down", "status"))
    parser.add_argument("--nodes", type=int, choices=(1, 2, 3), default=len(NODES))
    arguments = parser.parse_args()
    actions = {"up": lambda: up(arguments.nodes), "down": down, "status": status}
    return actions[arguments.action]()


def up(nodes: int) -> int:
    try:
        folder = state.claim(NAME, keep=True)
    except state.Busy as busy:
        print(busy, file=sys.stderr)
        return 1
    cluster = RealCluster(folder, NODES[:nodes])
    try:
        cluster.start()
    except BaseException:
        cluster.stop()
        raise
    print(f"export KUBECONFIG={cluster.kubeconfig}")
    return 0


def down() -> int:
    folder = state.kept(NAME)
    if folder:
        state.release(folder)
    for left in state.sweep():
        print(f"cleaned up what a killed run left: {left}", file=sys.stderr)
    return 0


def status() -> int:
    cluster = RealCluster.kept()
    if cluster is None:
        print("no cluster is kept up")
        return 1
    print(f"export KUBECONFIG={cluster.kubeconfig}")
    for name in cluster.processes.names():
        print(f"{name}: {'runs' if cluster.processes.find(name) else 'ENDED'}")
    print(cluster.kubectl("get", "nodes,pods", "-A", "-o", "wide"), end="")
    return 0


sys.exit(main())
