"""Requirements of a spec on the trainer image and on the device.

Prepare checks the image, which the workers use too, so that nothing is missing once GPUs are held.
Each worker checks its device before it loads a model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.failures import UserError

COMPILERS: Final = {"GPU": ("C", ("cc", "gcc", "clang")), "CPU": ("C++", ("g++", "c++", "clang++"))}
"""Compilers that torch.compile needs: on a GPU for the kernel launchers, on a CPU for the
kernels."""
_EIGHT_BITS: Final = (8, 9)
"""Lowest compute capability with 8-bit matrix products."""


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


def check_image(spec: FineTuneJobSpec) -> None:
    """Check that this image has what the spec needs.

    Raises:
        UserError: 'PackageMissing', 'NoCompiler'.
    """
    for needed in requirements(spec):
        if find_spec(needed.package) is None:
            raise UserError(
                "PackageMissing",
                f"spec.{needed.setting} needs {needed.package}, which this trainer image lacks:"
                " build it with --build-arg EXTRA=gpu (on one machine: pip install"
                f" 'finetune-trainer[gpu]'), or set {needed.instead}",
            )
    _check_compiler(spec, "GPU" if spec.compute.gpus_per_node else "CPU")


def check_device(spec: FineTuneJobSpec, device: torch.device) -> None:
    """Check that the device can train the spec.

    Raises:
        UserError: 'GPUMissing', 'NoFP8', 'NoCompiler'.
    """
    for needed in requirements(spec):
        if device.type != "cuda":
            raise UserError(
                "GPUMissing",
                f"spec.{needed.setting} trains on a GPU, and this process has the {device.type}"
                f" only; set compute.gpusPerNode, or {needed.instead}",
            )
        if torch.cuda.get_device_capability(device) < needed.capability:
            raise UserError(
                "NoFP8",
                f"spec.{needed.setting} needs a GPU that computes in 8 bits (Ada, Hopper or newer),"
                f" and this is a {torch.cuda.get_device_name(device)}; set {needed.instead}",
            )
    _check_compiler(spec, "GPU" if device.type == "cuda" else "CPU")


def _check_compiler(spec: FineTuneJobSpec, device: str) -> None:
    language, names = COMPILERS[device]
    if spec.training.compile and not any(map(shutil.which, names)):
        raise UserError(
            "NoCompiler",
            f"spec.training.compile: torch.compile needs a {language} compiler for a {device}, and"
            f" this image has none ({', '.join(names)}); add one (images built with EXTRA=gpu have"
            " one for C), or set it to false",
        )
