"""Imports of each command at startup: no stage loads dependencies that only others use."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from fixtures_memory import spec_of

pytestmark = pytest.mark.slow

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
        ("finetune_trainer.optional_packages", (*TORCH, *SCORES, *TOOLS, "boto3", "numpy")),
        ("finetune_trainer.train.process", (*TORCH, *SCORES, *TOOLS, "boto3", "numpy")),
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


@pytest.mark.parametrize(
    ("spec", "needed"),
    [
        ({"method": {"type": "LoRA"}}, set()),
        ({"method": {"type": "QLoRA"}}, {"bitsandbytes"}),
        (
            {"method": {"type": "Full"}, "training": {"precision": "FP8", "compile": True}},
            {"torchao"},
        ),
    ],
    ids=["LoRA", "QLoRA", "FP8"],
)
def test_a_training_process_imports_only_the_optional_packages_of_its_run(
    spec: dict[str, Any], needed: set[str]
) -> None:
    code = """
import json, sys
from finetune_api.spec import parse_spec
from finetune_trainer.optional_packages import OPTIONAL, hide_unused
hide_unused(parse_spec(json.loads(sys.argv[1])))
import finetune_trainer.train.worker
print(*[name for name in OPTIONAL if sys.modules.get(name)])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(spec_of(**spec).to_json())],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(done.stdout.split()) == needed
    if not needed:
        assert done.stderr == "", "a library warned"
