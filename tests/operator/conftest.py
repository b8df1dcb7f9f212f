"""Fixtures of the operator's tests. Their helpers are found by folder: a package called
``operator`` would shadow the standard library's."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
