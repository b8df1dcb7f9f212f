"""Imports of each command at startup: no stage loads dependencies that only others use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures_memory import spec_of

from finetune_api.run_spec import CONTRACT_VERSION, JobIdentity, RunSpec

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
        ("finetune_trainer.local.results", (*TORCH, *SCORES, "datasets", "pandas")),
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


def test_the_fork_server_leaves_cuda_to_its_processes(tmp_path: Path) -> None:
    """A process cannot use CUDA if it was forked from one that has asked CUDA for devices."""
    code = """
import os, sys
from finetune_trainer.train.process import preload

def forked():
    pid = os.fork()
    if pid == 0:
        os._exit(torch.cuda._is_in_bad_fork())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

import torch
assert "finetune_trainer.train.worker" in sys.modules
assert forked() == 0
torch.cuda.is_available()
assert forked() == 1, "the test can fail"
"""
    spec = spec_of(method={"type": "LoRA"})
    job = JobIdentity(namespace="default", name="job", uid="abcde")
    path = tmp_path / "run-spec.json"
    run_spec = RunSpec(version=CONTRACT_VERSION, job=job, run="1-abcde", spec=spec)
    path.write_text(run_spec.to_text())
    environment = os.environ | {"FINETUNE_RUN_SPEC": str(path)}
    environment.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
