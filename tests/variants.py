"""Marks for further variants of what a test shows: ``make test-all`` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def beyond(cases: Iterable[tuple[Any, ...]], kept: Callable[..., bool]) -> list[Any]:
    """Return the cases of a parametrized test, those that are not ``kept`` marked as ``long``."""
    return [case if kept(*case) else pytest.param(*case, marks=pytest.mark.long) for case in cases]
