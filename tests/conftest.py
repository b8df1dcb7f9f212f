"""Shared by all tests."""

from __future__ import annotations

from hypothesis import settings

pytest_plugins = ["cluster.fixtures"]

# No test depends on a clock: a busy machine must not fail one.
settings.register_profile("project", deadline=None)
settings.load_profile("project")
