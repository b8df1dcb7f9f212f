"""Shared by all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from timings import parts

pytest_plugins = ["cluster.fixtures"]

# Processes that tests start import torch: with its bytecode, in half the time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

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
