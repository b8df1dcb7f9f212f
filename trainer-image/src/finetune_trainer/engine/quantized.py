"""Base weights in 4 bits: NormalFloat with doubly quantised constants (Dettmers et al. 2023,
arXiv:2305.14314), by bitsandbytes.

Every start quantises the base anew, and the same weights give the same bits: nothing of it is kept.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.failures import UserError


def check_package(spec: FineTuneJobSpec) -> None:
    """Refuse a method whose package is not installed.

    Raises:
        UserError: 'PackageMissing'.
    """
    if spec.method.kind.quantizes and find_spec("bitsandbytes") is None:
        raise UserError(
            "PackageMissing",
            f"spec.method.type: {spec.method.type} needs bitsandbytes, which this trainer image"
            " lacks: build it with --build-arg EXTRA=gpu (on one machine: pip install"
            " 'finetune-trainer[gpu]'), or set method.type: LoRA",
        )


def check_device(spec: FineTuneJobSpec, device: torch.device) -> None:
    """Refuse a method that the device cannot train.

    Raises:
        UserError: 'GPUMissing'.
    """
    if spec.method.kind.quantizes and device.type != "cuda":
        raise UserError(
            "GPUMissing",
            f"spec.method.type: {spec.method.type} trains on a GPU, and this process has the"
            f" {device.type} only; set compute.gpusPerNode, or method.type: LoRA",
        )


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How linear layers are quantised; ``dtype`` is that of their products."""
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
