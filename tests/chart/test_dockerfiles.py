"""The Dockerfiles: user, entry point and torch version agree with the project."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from finetune_operator.config import USER_ID

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "operator/Dockerfile", ROOT / "trainer-image/Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_user_and_entry_point_match_the_project(path: Path) -> None:
    text = path.read_text()
    assert f"USER {USER_ID}:{USER_ID}\n" in text
    (command,) = re.findall(r'ENTRYPOINT \["(.+)"\]', text)
    project = tomllib.loads((path.parent / "pyproject.toml").read_text())["project"]
    assert command in project["scripts"]


def test_torch_version_matches_the_requirements() -> None:
    pinned = (ROOT / "trainer-image/requirements.txt").read_text().splitlines()
    (torch,) = (need for need in pinned if need.startswith("torch=="))
    assert f'ARG TORCH_REQUIREMENT="{torch}"\n' in FILES[1].read_text()
