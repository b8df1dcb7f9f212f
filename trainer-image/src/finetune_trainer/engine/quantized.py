"""What bitsandbytes does, and where it can: base weights in 4 bits (NormalFloat with doubly
quantised constants; Dettmers et al. 2023, arXiv:2305.14314), and moments in 8 (``optimizers``).

Every start quantises the base anew, and the same weights give the same bits: nothing of it is kept.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.failures import UserError


def check_package(spec: FineTuneJobSpec) -> None:
    """Refuse what needs the package where it is not installed.

    Raises:
        UserError: 'PackageMissing'.
    """
    if (asks := _asking(spec)) and find_spec("bitsandbytes") is None:
        raise UserError(
            "PackageMissing",
            f"spec.{asks[0]} needs bitsandbytes, which this trainer image lacks: build it with"
            " --build-arg EXTRA=gpu (on one machine: pip install 'finetune-trainer[gpu]'), or set"
            f" {asks[1]}",
        )


def check_device(spec: FineTuneJobSpec, device: torch.device) -> None:
    """Refuse what the device cannot train.

    Raises:
        UserError: 'GPUMissing'.
    """
    if (asks := _asking(spec)) and device.type != "cuda":
        raise UserError(
            "GPUMissing",
            f"spec.{asks[0]} trains on a GPU, and this process has the {device.type} only; set"
            f" compute.gpusPerNode, or {asks[1]}",
        )


def _asking(spec: FineTuneJobSpec) -> tuple[str, str] | None:
    """What of the spec asks for 4 or 8 bits, and what to set instead."""
    if spec.method.kind.quantizes:
        return f"method.type: {spec.method.type}", "method.type: LoRA"
    if spec.training.optimizer_kind.needs_gpu:
        return f"training.optimizer: {spec.training.optimizer}", "training.optimizer: AdamW"
    return None


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How linear layers are quantised; ``dtype`` is that of their products."""
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
