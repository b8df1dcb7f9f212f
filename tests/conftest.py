"""Fixtures and hooks for all tests."""

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

# Processes that tests start import torch, which takes half the time with cached bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# pytest workers share the cores: torch's threads must not spin while they wait for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# No deadlines: tests must not fail because the machine is busy.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers, run files with slow tests first, so that all workers end at about the
    same time."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


MadeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """``made_once(name, make)``: return a folder that ``make`` fills once, for all workers of the
    test run."""
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
    """Add each test's time, with set-up and tear-down, to its file and its folder. Print failures
    immediately, because a long run may be aborted before its summary."""
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
