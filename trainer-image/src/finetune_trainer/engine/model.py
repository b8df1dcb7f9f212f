"""The model as it was before tuning: its weights or its shape alone, and its tokenizer.

``load_base`` and ``apply_method`` (``methods``) are the two steps of every tuning, in training and
in publish, so there is one way in which a spec becomes a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune_trainer.engine import packed
from finetune_trainer.engine.pissa import is_kept
from finetune_trainer.engine.quantized import four_bits
from finetune_trainer.failures import UserError


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token (the end of sequence where it has
    none; padding is masked and never learned)."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    path: Path, dtype: torch.dtype, pack: bool = True, quantize_on: torch.device | None = None
) -> PreTrainedModel:
    """The untuned model of a folder in Hugging Face layout, with ``dtype`` weights and, where
    ``pack`` and the architecture allow it, attention that keeps packed documents apart. It is on
    the CPU, or, with linear layers in 4 bits, on the device ``quantize_on``.

    Raises:
        UserError: where the architecture is unknown or not a causal language model.
    """
    packed.install()
    try:
        config = AutoConfig.from_pretrained(path)
        own = {k: v for k, v in vars(config).items() if _is_dropout(k) and isinstance(v, float)}
        # training.dropout decides (see ``dropout``); what a model drops by itself follows no key.
        for name in own:
            setattr(config, name, 0.0)
        bits: dict[str, Any] = {}
        if quantize_on is not None:
            bits = {"quantization_config": four_bits(dtype), "device_map": {"": quantize_on}}
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, **bits)
        for name, probability in own.items():
            setattr(model.config, name, probability)
    except (ValueError, KeyError) as error:
        raise _unsupported(error) from error
    if pack and packed.can_pack(model):
        model.set_attn_implementation(packed.ATTENTION)
    model.config.use_cache = False
    return model


def empty_base(path: Path) -> PreTrainedModel:
    """The model of a folder without its weights: all parameters are on the meta device. Only its
    configuration is read.

    Raises:
        UserError: as ``load_base``.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError) as error:
        raise _unsupported(error) from error
    return model


def make_room(model: nn.Module) -> None:
    """Give the parameters of an empty model that commits hold (uninitialised) memory on the CPU."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_kept(f"{path}.{name}", parameter):
                room = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(room, parameter.requires_grad))


def _unsupported(error: Exception) -> UserError:
    return UserError(
        "UnsupportedModel",
        f"spec.model: the model cannot be loaded as a causal language model: {error}",
    )


def _is_dropout(name: str) -> bool:
    return "dropout" in name or name.endswith("pdrop")
