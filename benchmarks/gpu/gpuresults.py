"""pytest plugin that writes the outcome of each test as a line of JSON as soon as it is known.

Loaded by ``run.py`` (``-p gpuresults``). The process exits at a test that hangs (with a stack dump)
or that leaves the device unusable; ``run.py`` then starts another process for the remaining tests.
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

UNUSABLE = (
    "illegal memory access", "device-side assert triggered", "unspecified launch failure",
    "misaligned address", "illegal instruction", "uncorrectable",
)  # fmt: skip
"""Texts of CUDA errors after which every later call in the process fails."""

_results = Path(os.environ["GPU_RESULTS"])
_seconds = float(os.environ.get("GPU_TEST_SECONDS", "60"))


def tell(**row: Any) -> None:
    """Append a line of JSON to the results file."""
    with _results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Record a failure for a file that cannot be imported."""
    if report.failed:
        tell(
            event="end", test=report.nodeid, outcome="failed", seconds=0.0,
            message=last_line(str(report.longrepr)), figures={},
        )  # fmt: skip


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    tell(event="start", test=nodeid, time=time.time())
    faulthandler.dump_traceback_later(_seconds, exit=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown" and report.passed:
        faulthandler.cancel_dump_traceback_later()
    if report.when != "call" and not (report.failed or report.skipped):
        return
    message = ""
    if report.skipped and isinstance(report.longrepr, tuple):
        message = str(report.longrepr[2]).removeprefix("Skipped: ")
    elif report.failed:
        message = last_line(str(report.longrepr))
    tell(
        event="end", test=report.nodeid, outcome=report.outcome,
        seconds=round(report.duration, 2), message=message, figures=dict(report.user_properties),
    )  # fmt: skip
    if report.failed and any(text in str(report.longrepr) for text in UNUSABLE):
        os._exit(3)


def last_line(text: str) -> str:
    """Return the line of a traceback that has the error message."""
    lines = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()
    return " ".join(lines[0].removeprefix("E ").split())[:300] if lines else ""
