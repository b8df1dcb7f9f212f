"""The quickstart: a small base model and labelled data, generated without any download."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

VERSION: Final = "3"
"""Increased with every change of the generated files; part of the cache folder's name."""
_TRAIN: Final = 640
_TEST: Final = 200


def make_quickstart(folder: Path, *, tiny: bool = False, cache: Path | None = None) -> bool:
    """Make ``folder/model`` (Hugging Face layout) and ``folder/data/*.jsonl``.

    Args:
        tiny: make a 2-layer model in a few seconds, for tests: it can be loaded and tuned, but is
            hardly trained.
        cache: folder that keeps the generated files; by default ``finetune-operator`` in the user's
            cache.

    Returns:
        Whether the files were already in the cache.
    """
    kind = "tiny" if tiny else "quickstart"
    kept = (cache or _user_cache()) / f"{kind}-{VERSION}"
    reused = kept.exists()
    if not reused:
        _make(kept, kind)
    for part in ("model", "data"):
        shutil.copytree(kept / part, folder / part, dirs_exist_ok=True)
    return reused


def _make(kept: Path, kind: str) -> None:
    from finetune_trainer.quickstart.pretrain import (  # imports torch: only if not cached
        SIZES,
        make_base,
    )
    from finetune_trainer.quickstart.records import make_data

    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as part:
        made = Path(part) / "made"
        seen = make_base(made / "model", SIZES[kind])
        share = 8 if kind == "tiny" else 1
        make_data(made / "data", seen, train=_TRAIN // share, test=_TEST // share)
        if not kept.exists():  # another process may have been faster
            made.rename(kept)


def _user_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "finetune-operator"
