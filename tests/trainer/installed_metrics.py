"""A package with metrics of its own, installed in a folder as pip would."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path


def install_metrics(
    folder: Path, points: Mapping[str, str], code: str, package: str = "own_metrics"
) -> None:
    """Write a package and its metadata.

    Args:
        points: attribute of the package by name of the metric.
        code: of the package.
    """
    folder.mkdir(exist_ok=True)
    (folder / f"{package}.py").write_text(textwrap.dedent(code))
    about = folder / f"{package}-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    lines = [f"{name} = {package}:{attribute}" for name, attribute in points.items()]
    (about / "entry_points.txt").write_text("\n".join(["[finetune_trainer.metrics]", *lines, ""]))
