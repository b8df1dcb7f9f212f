"""Shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

import timings
from cluster import state

pytest_plugins = ["cluster.fixtures"]

# Processes that tests start import torch: with its bytecode, in half the time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Workers of the run share the cores: torch's threads must not spin while they wait for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# No test depends on a clock: a busy machine must not fail one.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where workers share the files out, files with slow tests go first: short ones fill the end,
    and no worker waits for another."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


MadeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """``made_once(name, make)``: a folder of that name, which the first worker that asks for it
    fills by ``make`` and all workers of the run read."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared / name
        with state.locked(shared / f".{name}.lock"):
            if not folder.exists():
                partial = tmp_path_factory.mktemp(name)
                make(partial)
                partial.rename(folder)
        return folder

    return get


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add each test's time (set-up and tear-down too) to its file's and its folder's. A failure is
    named at once: a long run may be ended before its summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid} ({report.when})", flush=True)
    timings.files[report.fspath] += report.duration
    timings.parts[f"tests/{Path(report.fspath).parts[1]}"] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("slowest files")
    for path, seconds in timings.slowest():
        terminalreporter.line(f"{seconds:7.1f} s  {path}")
    terminalreporter.section("time by part")
    for part, seconds in timings.parts.items():
        terminalreporter.line(f"{seconds:7.1f} s  {part}")
