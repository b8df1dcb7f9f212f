"""Import path of the operator tests' helpers: a package called ``operator`` would shadow the
standard library's, so the helpers are found by folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
