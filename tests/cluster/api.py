"""Access of the tests to a cluster's API: a kubeconfig, and kubectl with it."""

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
    """Any cluster for which there is a kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        """Run kubectl and return its output. Raises RuntimeError with its error output."""
        command = [binary("kubectl"), "--kubeconfig", self.kubeconfig, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(map(str, arguments))}: {done.stderr.strip()}")
        return done.stdout

    def get(self, *arguments: str) -> Any:
        """``get("pod", "name", "-n", "ns")``: return the object, or the List, parsed from JSON."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: dict[str, Any]) -> None:
        """Server-side apply of the objects."""
        manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=manifest)


def given() -> Api | None:
    """Return the cluster that the environment gives the tests, or None.

    KUBECONFIG alone is not enough: it usually names a cluster in use, and tests create and delete
    objects. Raises RuntimeError if FINETUNE_TEST_USE_KUBECONFIG=1 is set without KUBECONFIG.
    """
    if os.environ.get("FINETUNE_TEST_USE_KUBECONFIG") != "1":
        return None
    if "KUBECONFIG" not in os.environ:
        raise RuntimeError("FINETUNE_TEST_USE_KUBECONFIG=1 needs KUBECONFIG, a file's path")
    return Api(Path(os.environ["KUBECONFIG"]))


def eventually(what: str, look: Callable[[], T | None], *, within: float = 30) -> T:
    """Call ``look`` until its result is true, and return the result. RuntimeError, as of kubectl,
    counts as not true yet. Raises TimeoutError after ``within`` seconds."""
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
