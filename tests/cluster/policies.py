"""Enforcement of NetworkPolicies: kube-router's firewall on each node, for tests of policies alone.

The cluster's own network enforces none, as many network plugins. Of kube-router only the firewall
runs: it writes iptables rules into the node's network namespace, which see all traffic of pods
because it is routed (``node``). The kernel needs ipset; kube-network-policies would need nftables'
queue, which fewer kernels have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.api import eventually
from cluster.build import binary
from cluster.control_plane import SERVICES
from cluster.node import Node
from cluster.real import RealCluster

_PROGRAM = "kube-router"


@contextmanager
def enforced(cluster: RealCluster) -> Iterator[None]:
    """Enforce the NetworkPolicies of a cluster."""
    kubeconfig = cluster.kubeconfig_of(_PROGRAM, _PROGRAM, "system:masters")
    started: list[Node] = []
    try:
        for node in cluster.nodes.values():
            started.append(node)
            node.machine.start(
                _PROGRAM,
                [
                    binary(_PROGRAM),
                    f"--kubeconfig={kubeconfig}",
                    f"--hostname-override={node.name}",
                    f"--service-cluster-ip-range={SERVICES}",
                    "--run-firewall=true",
                    "--run-router=false",
                    "--run-service-proxy=false",
                    "--health-port=0",
                    "--metrics-port=0",
                ],
            )
        for node in started:
            eventually(f"{node.name} has a firewall", lambda node=node: _rules(node))
        yield
    finally:
        for node in started:
            node.machine.stop(_PROGRAM, patience=10)
            # Of the cluster's programs only kube-router uses this table.
            node.machine.execute("sh", "-c", "iptables -F && iptables -X && ipset destroy")


def _rules(node: Node) -> str:
    return node.machine.execute("iptables", "-S", "KUBE-ROUTER-FORWARD")
