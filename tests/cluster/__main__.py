"""``python -m cluster up|down|status``, in ``tests/``: a cluster for manual use; needs root.

``up`` leaves the cluster running, and the e2e tests then use it instead of starting their own.
``prepare test`` and ``prepare e2e`` make the prerequisites of that target's tests: binaries, and
for e2e also Debian packages and base images.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys

from cluster import build, images, state, system_packages
from cluster.api import NEEDS_ROOT, given
from cluster.real import NAME, NODES, RealCluster
from timings import told


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    actions = parser.add_subparsers(required=True)
    start = actions.add_parser("up")
    start.add_argument("--nodes", type=int, choices=(1, 2, 3), default=len(NODES))
    start.set_defaults(action=lambda arguments: up(arguments.nodes))
    actions.add_parser("down").set_defaults(action=lambda arguments: down())
    actions.add_parser("status").set_defaults(action=lambda arguments: status())
    ready = actions.add_parser("prepare")
    ready.add_argument("target", choices=("test", "e2e"))
    ready.set_defaults(action=lambda arguments: prepare(arguments.target))
    arguments = parser.parse_args()
    try:
        code: int = arguments.action(arguments)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # the shell convention for SIGINT
    return code


def prepare(target: str) -> int:
    if target == "test":
        build.build(build.TEST)
    elif given():
        build.build(build.E2E_GIVEN)
    elif os.geteuid() != 0:
        raise RuntimeError(NEEDS_ROOT)
    else:
        with told("Debian's packages"):
            system_packages.ensure()
        build.build(build.E2E)
        with told("base image"):
            images.base()
        with told("base image with PyTorch"):
            images.torch_base(importlib.metadata.version("torch").split("+")[0])
    return 0


def up(nodes: int) -> int:
    system_packages.ensure()
    build.build(build.E2E)
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
        print("no cluster is running")
        return 1
    print(f"export KUBECONFIG={cluster.kubeconfig}")
    for name in cluster.processes.names():
        print(f"{name}: {'runs' if cluster.processes.find(name) else 'ENDED'}")
    print(cluster.kubectl("get", "nodes,pods", "-A", "-o", "wide"), end="")
    return 0


sys.exit(main())
