"""Names of a model's files, which others may have written."""

from __future__ import annotations

import re
from typing import Final

_PLAIN: Final = re.compile(r"(?=.*[^.])[\w.+-][\w.+ -]{0,199}", re.ASCII)
"""No folders, no control characters."""


def is_plain(name: str) -> bool:
    """Return whether a name is that of a file, without a folder."""
    return _PLAIN.fullmatch(name) is not None
