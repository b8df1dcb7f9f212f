"""Requirements of a spec on the trainer image and on the device.

Prepare checks the image, which the workers use too, so that nothing is missing once GPUs are held.
Each worker checks its device before it loads a model.
"""

from __future__ import annotations

import shutil
from typing import Final

import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.failures import UserError
from finetune_trainer.optional_packages import is_installed, requirements

COMPILERS: Final = {"GPU": ("C", ("cc", "gcc", "clang")), "CPU": ("C++", ("g++", "c++", "clang++"))}
"""Compilers that torch.compile needs: on a GPU for the kernel launchers, on a CPU for the
kernels."""


def check_image(spec: FineTuneJobSpec) -> None:
    """Check that this image has what the spec needs.

    Raises:
        UserError: 'PackageMissing', 'NoCompiler'.
    """
    for needed in requirements(spec):
        if not is_installed(needed.package):
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
