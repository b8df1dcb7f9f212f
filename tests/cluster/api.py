"""A cluster's API as tests use it: a kubeconfig, and kubectl with it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cluster.build import binary

T = TypeVar("T")

NEEDS_ROOT = (
    "nodes and image builds need root on Linux; or give a cluster by KUBECONFIG and"
    " FINETUNE_TEST_USE_KUBECONFIG=1 (see README, Development)"
)


class Api:
    """Any cluster whose kubeconfig we have."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        """What kubectl prints; raises RuntimeError with what it complained of."""
        command = [binary("kubectl"), "--kubeconfig", self.kubeconfig, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(map(str, arguments))}: {done.stderr.strip()}")
        return done.stdout

    def get(self, *arguments: str) -> Any:
        """``get("pod", "name", "-n", "ns")``: the object, or the List, as it is in JSON."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: dict[str, Any]) -> None:
        """Server-side apply of these objects."""
        manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=manifest)


def given() -> Api | None:
    """The cluster that the environment gives the tests to use, if it does.

    KUBECONFIG alone does not give one: it usually names the cluster that somebody works with, and
    tests make and delete things. Raises RuntimeError where the wish has no KUBECONFIG.
    """
    if os.environ.get("FINETUNE_TEST_USE_KUBECONFIG") != "1":
        return None
    if "KUBECONFIG" not in os.environ:
        raise RuntimeError("FINETUNE_TEST_USE_KUBECONFIG=1 needs KUBECONFIG, a file's path")
    return Api(Path(os.environ["KUBECONFIG"]))


def eventually(what: str, look: Callable[[], T | None], *, within: float = 30) -> T:
    """The first result of ``look`` that is true; errors of kubectl count as not yet."""
    until = time.monotonic() + within
    trouble = ""
    while True:
        try:
            found = look()
        except RuntimeError as error:
            found, trouble = None, f" ({error})"
        if found:
            return found
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {within:.0f} s{trouble}")
        time.sleep(0.1)
