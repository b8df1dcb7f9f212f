"""The quickstart's tiny model and data, made once per test run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_trainer.quickstart import make_quickstart


@pytest.fixture(scope="session")
def tiny_base(
    made_once: Callable[[str, Callable[[Path], None]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder with ``model/`` (2 layers, Hugging Face layout) and ``data/*.jsonl``."""

    def make(folder: Path) -> None:
        make_quickstart(folder, tiny=True, cache=tmp_path_factory.mktemp("cache"))

    return made_once("tiny-base", make)
