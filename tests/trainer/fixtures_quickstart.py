"""The quickstart's tiny model and data, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer.quickstart import make_quickstart


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``model/`` (2 layers, Hugging Face layout) and ``data/*.jsonl``."""
    folder = tmp_path_factory.mktemp("tiny-base")
    make_quickstart(folder, tiny=True, cache=tmp_path_factory.mktemp("cache"))
    return folder
