"""``python -m finetune_operator``: run the operator in a pod, or on any machine with a kubeconfig.

Each option has an environment variable, named in its help.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import uvloop

from finetune_operator.app import Operator, Options, own_namespace
from finetune_operator.cluster import NoCluster
from finetune_operator.config import Config, NetworkAccess


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="finetune-operator", description=__doc__)

    def option(flag: str, variable: str, default: str | None, text: str) -> None:
        value = os.environ.get(variable, default)
        made.add_argument(flag, default=value, help=f"{text} [{variable}]")

    option("--image", "FINETUNE_IMAGE", None, "trainer image of this release (required)")
    option("--image-pull-policy", "FINETUNE_IMAGE_PULL_POLICY", None, "of the trainer pods")
    option(
        "--model-cache", "FINETUNE_MODEL_CACHE", None,
        "folder on every node where gangs cache base models; user 65532 must be able to write",
    )  # fmt: skip
    option(
        "--network-policy", "FINETUNE_NETWORK_POLICY", "{}",
        'NetworkPolicies of runs: off, or JSON with "metricsFrom" (peers that may read the metrics'
        ' port; absent: all) and "egress" (egress rules; absent: all destinations)',
    )  # fmt: skip
    option(
        "--node-conditions", "FINETUNE_NODE_CONDITIONS", "",
        "comma-separated patterns of node conditions that are problems of the node, such as Gpu*;"
        " needs the right to get nodes",
    )  # fmt: skip
    option("--kubeconfig", "KUBECONFIG", None, "kubeconfig; absent: the pod's service account")
    option("--context", "KUBE_CONTEXT", None, "context of the kubeconfig")
    option(
        "--managed-by", "FINETUNE_MANAGED_BY", "",
        "name of this operator: it works on jobs with this spec.managedBy",
    )  # fmt: skip
    option("--namespaces", "FINETUNE_NAMESPACES", "", "comma-separated; empty: the whole cluster")
    option("--host", "FINETUNE_HOST", "0.0.0.0", "address of probes and metrics")
    option("--port", "FINETUNE_PORT", "8080", "port of probes and metrics")
    option("--leader-election", "FINETUNE_LEADER_ELECTION", "true", "true or false")
    option("--lease-namespace", "FINETUNE_LEASE_NAMESPACE", own_namespace(), "Lease namespace")
    option("--lease-name", "FINETUNE_LEASE_NAME", "finetune-operator", "Lease name")
    option("--progress", "FINETUNE_PROGRESS", "auto", "direct, proxy or auto (proxy outside pods)")
    option("--log-level", "FINETUNE_LOG_LEVEL", "INFO", "DEBUG, INFO, WARNING or ERROR")
    return made


def options(arguments: Sequence[str] | None = None) -> Options:
    """Parse the command line; exit with a message if an option is invalid."""
    made = parser()
    given = made.parse_args(arguments)
    if not given.image:
        made.error("--image (or FINETUNE_IMAGE): the trainer image of this release is required")
    if given.leader_election not in ("true", "false"):
        made.error(f"--leader-election: true or false; got {given.leader_election!r}")
    if given.progress not in ("auto", "direct", "proxy"):
        made.error(f"--progress: auto, direct or proxy; got {given.progress!r}")
    if not str(given.port).isdigit():
        made.error(f"--port: a port number; got {given.port!r}")
    if given.model_cache and not given.model_cache.startswith("/"):
        made.error(f"--model-cache: an absolute path; got {given.model_cache!r}")
    try:
        off = given.network_policy == "off"
        network = None if off else NetworkAccess.from_text(given.network_policy)
    except ValueError as error:
        made.error(f"--network-policy: off or JSON; got {given.network_policy!r} ({error})")
    logging.basicConfig(
        level=given.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    logging.getLogger("kopf").setLevel(max(logging.WARNING, logging.root.level))
    return Options(
        config=Config(
            image=given.image,
            image_pull_policy=given.image_pull_policy or None,
            model_cache=given.model_cache or None,
            node_conditions=tuple(t for t in given.node_conditions.split(",") if t),
            network=network,
        ),
        kubeconfig=given.kubeconfig or None,
        context=given.context or None,
        managed_by=given.managed_by,
        namespaces=tuple(n for n in given.namespaces.split(",") if n),
        host=given.host,
        port=int(given.port),
        leader_election=given.leader_election == "true",
        lease_namespace=given.lease_namespace,
        lease_name=given.lease_name,
        proxy={"auto": None, "direct": False, "proxy": True}[given.progress],
    )


def main() -> None:
    """Entry point."""
    chosen = options()

    async def run() -> int:
        return await Operator(chosen).run()

    try:
        sys.exit(uvloop.run(run()))
    except NoCluster as error:
        sys.exit(f"finetune-operator: no access to a cluster: {error}")


if __name__ == "__main__":
    main()
