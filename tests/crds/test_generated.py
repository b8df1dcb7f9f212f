"""Generated files are up to date: ``crds/generate.py --check``."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import yaml

from finetune_api.crd import crd

ROOT = Path(__file__).resolve().parents[2]
GENERATE = ROOT / "crds/generate.py"


def test_no_file_is_stale() -> None:
    done = subprocess.run(
        [sys.executable, str(GENERATE), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_difference_shows_the_diff_of_a_stale_file() -> None:
    module = runpy.run_path(str(GENERATE))
    path = ROOT / "docs/reference.md"
    assert module["difference"](path, path.read_text()) == ""
    assert "+one more line" in module["difference"](path, path.read_text() + "one more line\n")


def test_the_files_contain_the_crd() -> None:
    for name in (
        "crds/finetunejob.crd.yaml",
        "charts/finetune-operator/files/finetunejob.crd.yaml",
    ):
        assert yaml.safe_load((ROOT / name).read_text()) == crd()
