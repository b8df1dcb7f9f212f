"""The private names of transformers, in the release that they were read in."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import finetune_trainer
from finetune_trainer.engine import transformers_loading

PRIVATE = ("conversion_mapping", "core_model_loading", "LoadStateDictConfig", "_get_dtype_plan")


def test_the_private_names_were_read_in_this_release() -> None:
    found = ".".join(version("transformers").split(".")[:2])
    assert found == transformers_loading.TESTED, (
        f"transformers {found}: read conversion_mapping, core_model_loading and"
        " LoadStateDictConfig again, run test_loading and test_sharded_loading, and then set TESTED"
    )


def test_one_module_knows_the_private_names() -> None:
    root = Path(finetune_trainer.__file__).parent
    users = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search("|".join(PRIVATE), path.read_text())
    }
    assert users == {"engine/transformers_loading.py"}
