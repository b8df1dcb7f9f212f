"""Imports of each command at startup: no stage loads dependencies that only others use."""

from __future__ import annotations

import subprocess
import sys

import pytest

TORCH = ("torch", "transformers", "peft", "accelerate")
SCORES = ("sklearn", "sacrebleu", "rouge_score")
TOOLS = ("datasets", "pandas", "trl", "matplotlib", "rich")


@pytest.mark.parametrize(
    ("entry", "forbidden"),
    [
        ("finetune_trainer.cli", (*TORCH, *SCORES, *TOOLS, "boto3", "pyarrow", "numpy", "yaml")),
        ("finetune_trainer.local.manifest", (*TORCH, *SCORES, *TOOLS, "boto3", "numpy")),
        ("finetune_trainer.local.runner", (*TORCH, *SCORES, "datasets", "pandas")),
        ("finetune_trainer.local.templates", ("torch", "peft", "accelerate", *SCORES)),
        ("finetune_trainer.stage", (*TORCH, *SCORES, *TOOLS, "boto3", "numpy")),
        (
            "finetune_trainer.supervise.supervisor",
            (*TORCH, *SCORES, *TOOLS, "boto3", "pyarrow", "numpy", "yaml"),
        ),
        ("finetune_trainer.supervise.agent", (*TORCH, *SCORES, *TOOLS, "boto3", "numpy", "yaml")),
        ("finetune_trainer.prepare.pipeline", (*SCORES, *TOOLS)),
        ("finetune_trainer.train.worker", (*SCORES, *TOOLS, "datasketch", "py3langid")),
        ("finetune_trainer.publish.pipeline", (*SCORES, *TOOLS, "datasketch", "py3langid")),
    ],
)
def test_an_entry_point_imports_no_dependencies_of_other_stages(
    entry: str, forbidden: tuple[str, ...]
) -> None:
    code = f"import {entry}, sys; print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert entry in imported
    assert not set(forbidden) & set(imported)
