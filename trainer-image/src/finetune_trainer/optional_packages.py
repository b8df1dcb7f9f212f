"""Optional packages of the trainer image, and the settings that need them.

transformers and peft import bitsandbytes and torchao wherever they are installed, which costs each
process seconds at its start and prints warnings. A run that needs neither imports neither.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from typing import Any, Final

from finetune_api.spec import FineTuneJobSpec

_EIGHT_BITS: Final = (8, 9)
"""Lowest compute capability with 8-bit matrix products."""
OPTIONAL: Final = ("bitsandbytes", "torchao")


@dataclass(frozen=True)
class Requirement:
    """Requirement of one setting."""

    setting: str
    """Path and value in the spec."""
    package: str
    instead: str
    """Alternative setting without the requirement."""
    capability: tuple[int, int] = (0, 0)
    """Minimum compute capability of the GPU."""


def requirements(spec: FineTuneJobSpec) -> Iterator[Requirement]:
    """Yield the settings that need a package and a GPU."""
    method, training = spec.method, spec.training
    if method.kind.quantizes:
        yield Requirement(f"method.type: {method.type}", "bitsandbytes", "method.type: LoRA")
    if training.optimizer_kind.needs_gpu:
        setting = f"training.optimizer: {training.optimizer}"
        yield Requirement(setting, "bitsandbytes", "training.optimizer: AdamW")
    if training.precision == "FP8":
        instead = "training.precision: BF16"
        yield Requirement("training.precision: FP8", "torchao", instead, _EIGHT_BITS)


def is_installed(package: str) -> bool:
    """Whether the image has a package, hidden or not."""
    return PathFinder.find_spec(package) is not None


def hide_unused(spec: FineTuneJobSpec) -> None:
    """Make the optional packages that a spec does not need unimportable in this process. Call it
    before torch, transformers and peft are imported."""
    needed = {requirement.package for requirement in requirements(spec)}
    modules: dict[str, Any] = sys.modules
    for package in OPTIONAL:
        if package not in needed:
            modules.setdefault(package, None)  # None: an import fails as if it was not installed
