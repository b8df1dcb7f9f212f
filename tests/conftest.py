"""Shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from timings import parts

pytest_plugins = ["cluster.fixtures"]

# No test depends on a clock: a busy machine must not fail one.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add each test's time (set-up and tear-down too) to its folder's."""
    parts[f"tests/{Path(report.fspath).parts[1]}"] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("time by part")
    for part, seconds in parts.items():
        terminalreporter.line(f"{seconds:7.1f} s  {part}")
