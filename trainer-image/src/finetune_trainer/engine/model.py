"""The model as it was before tuning: its weights or its shape alone, and its tokenizer.

``load_base`` and ``apply_method`` (``methods``) are the two steps of every tuning, in training and
in publish, so there is one way in which a spec becomes a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune_api.spec import FineTuneJobSpec
from finetune_api.tasks import TaskName
from finetune_trainer.engine import packed
from finetune_trainer.engine.classification import has_head, name_classes, settle_head
from finetune_trainer.engine.pissa import is_kept
from finetune_trainer.engine.quantized import four_bits
from finetune_trainer.engine.tasks import TASKS
from finetune_trainer.failures import UserError


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token (the end of sequence where it has
    none; padding is masked and never learned)."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class Purpose:
    """What a model is loaded for."""

    task: TaskName = "CausalLM"
    classes: tuple[str, ...] = ()
    """Names of the classes by number, of a task that has some."""
    seed: int = 0
    """By which weights that the checkpoint lacks are drawn."""


TEXT: Final = Purpose()


def purpose_of(spec: FineTuneJobSpec, classes: Sequence[str]) -> Purpose:
    """What a run loads its model for; ``classes`` are those of its prepared data."""
    return Purpose(spec.task, tuple(classes), spec.training.seed)


def configuration(path: Path, purpose: Purpose = TEXT) -> PreTrainedConfig:
    """The configuration of the model of a folder, for a purpose."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(path)
    if purpose.classes:
        name_classes(config, purpose.classes, load_tokenizer(path).pad_token_id)
    return config


def is_drawn(path: Path, purpose: Purpose) -> bool:
    """Whether a model begins with a head of which nothing is learned."""
    return bool(purpose.classes) and not has_head(AutoConfig.from_pretrained(path), purpose.classes)


def load_base(
    path: Path,
    dtype: torch.dtype,
    pack: bool = True,
    quantize_on: torch.device | None = None,
    purpose: Purpose = TEXT,
) -> PreTrainedModel:
    """The untuned model of a folder in Hugging Face layout, with ``dtype`` weights and, where
    ``pack`` and the architecture allow it, attention that keeps packed documents apart. It is on
    the CPU, or, with linear layers in 4 bits, on the device ``quantize_on``.

    Raises:
        UserError: where the architecture is unknown or not one for the purpose.
    """
    packed.install()
    task = TASKS[purpose.task]
    torch.manual_seed(purpose.seed)
    try:
        config = configuration(path, purpose)
        own = _silence(config)
        bits: dict[str, Any] = {}
        if quantize_on is not None:
            bits = {"quantization_config": four_bits(dtype), "device_map": {"": quantize_on}}
        model, loading = task.auto.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=bool(purpose.classes), **bits,
        )  # fmt: skip
        for name, probability in own.items():
            setattr(model.config, name, probability)
    except (ValueError, KeyError) as error:
        raise _unsupported(error, purpose) from error
    if purpose.classes:
        settle_head(model, loading, keep=not is_drawn(path, purpose))
    if task.packing(model, pack) == "Concatenated":
        model.set_attn_implementation(packed.ATTENTION)
    model.config.use_cache = False
    return model  # type: ignore[no-any-return]


def empty_base(
    path: Path, purpose: Purpose = TEXT, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model of a folder without its weights: all parameters are on the meta device, in
    ``dtype`` or that of the folder. Only its configuration is read.

    Raises:
        UserError: as ``load_base``.
    """
    try:
        config = configuration(path, purpose)
        _silence(config)
        with torch.device("meta"):
            model: PreTrainedModel = TASKS[purpose.task].auto.from_config(
                config, dtype=dtype or config.dtype
            )
    except (ValueError, KeyError) as error:
        raise _unsupported(error, purpose) from error
    model.config.use_cache = False
    return model


def make_room(model: nn.Module) -> None:
    """Give the parameters of an empty model that commits hold (uninitialised) memory on the CPU."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_kept(f"{path}.{name}", parameter):
                room = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(room, parameter.requires_grad))


def _unsupported(error: Exception, purpose: Purpose) -> UserError:
    return UserError(
        "UnsupportedModel",
        f"spec.model: the model cannot be loaded as {TASKS[purpose.task].called}: {error}",
    )


def _silence(config: Any) -> dict[str, float]:
    """Have a model drop nothing by itself, which would follow no key: ``training.dropout`` decides
    (see ``dropout``). Returns its own probabilities."""
    own = {k: v for k, v in vars(config).items() if _is_dropout(k) and isinstance(v, float)}
    for name in own:
        setattr(config, name, 0.0)
    return own


def _is_dropout(name: str) -> bool:
    return "dropout" in name or name.endswith("pdrop")
