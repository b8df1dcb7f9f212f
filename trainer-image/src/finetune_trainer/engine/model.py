"""The base model and its tokenizer.

    config.json ──► build_base (weights, placeholders or meta) ──► apply_method

``build_base`` and ``tuning.methods.apply_method`` are the two steps from a spec to a model, in
prepare (to profile it), in training and in publish.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune_api.spec import FineTuneJobSpec
from finetune_api.tasks import TaskName
from finetune_trainer.engine.classification import (
    draw_head,
    gives_classes,
    has_head,
    head_parts,
    name_classes,
)
from finetune_trainer.engine.packing import packed
from finetune_trainer.engine.placeholders import placeholder, replace_parameters
from finetune_trainer.engine.quantized import four_bits
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.engine.transformers_loading import float32_parameters
from finetune_trainer.failures import UserError
from finetune_trainer.storage import modelconfig
from finetune_trainer.storage.weight_reader import Weights

CPU: Final = torch.device("cpu")
GENERATION: Final = "generation_config.json"


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Without a padding token of its own, it pads with the
    end-of-sequence token; padding is masked and never supervised."""
    tokenizer = modelconfig.load_tokenizer(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class Purpose:
    """The task that a model is built for."""

    task: TaskName = "CausalLM"
    classes: tuple[str, ...] = ()
    """Names of the classes by number; empty for tasks without classes."""
    seed: int = 0
    """Of the draw of parameters that the checkpoint lacks."""


TEXT: Final = Purpose()


def purpose_of(spec: FineTuneJobSpec, classes: Sequence[str]) -> Purpose:
    """The purpose of a run's model.

    Args:
        classes: of the prepared data.
    """
    return Purpose(spec.task, tuple(classes), spec.training.seed)


def configuration(path: Path, purpose: Purpose = TEXT) -> PreTrainedConfig:
    """The configuration of a folder's model, for a purpose. For a model of texts and images whose
    class for the purpose takes texts alone: the configuration of the text model.

    Raises:
        UserError: 'UnsupportedModel' for quantised weights, which cannot be trained on.
    """
    config = modelconfig.load_config(path)
    quantized = getattr(config, "quantization_config", None)
    inner = config.sub_configs.get("text_config")
    if inner is not None and getattr(_class_of(config, purpose), "config_class", None) is inner:
        config = config.get_text_config()
        quantized = quantized or getattr(config, "quantization_config", None)
    if quantized:
        kind = dict(quantized).get("quant_method", "unknown")
        raise UserError(
            "UnsupportedModel",
            f"spec.model: its weights are quantised ({kind}), which cannot be trained on; give the"
            " model in 16 or 32 bits (method.type: QLoRA quantises it itself)",
        )
    if purpose.classes:
        name_classes(config, purpose.classes, load_tokenizer(path).pad_token_id)
    return config


def has_drawn_head(path: Path, purpose: Purpose) -> bool:
    """Whether the model starts with a classification head of random parameters."""
    return bool(purpose.classes) and not has_head(modelconfig.load_config(path), purpose.classes)


def drawn_names(model: PreTrainedModel, path: Path, purpose: Purpose) -> set[str]:
    """Parameters of the head that are drawn although the checkpoint has some: those are for other
    classes."""
    if not has_drawn_head(path, purpose):
        return set()
    parts = head_parts(model).items()
    return set().union(*(_names(n, part) for n, part in parts if gives_classes(model, part)))


def _names(path: str, part: nn.Module) -> set[str]:
    return {f"{path}.{name}" for name, _ in part.named_parameters(recurse=False)}


@dataclass(frozen=True)
class Pretrained:
    """Parameters with the weights of a checkpoint."""

    weights: Weights | None = None
    """None: those of the model's folder."""
    device: torch.device = CPU
    """Where the parameters are placed; the weights go there one by one."""
    quantize: bool = False
    """Whether linear layers are in 4 bits."""


Init = Pretrained | Literal["Placeholders", "Meta"]
"""Parameters of a new model: with weights; placeholders (zeros that take no memory until they are
written or sharded); or on the meta device."""


def build_base(
    path: Path,
    dtype: torch.dtype | None = None,
    init: Init = Pretrained(),
    purpose: Purpose = TEXT,
    pack: bool = True,
) -> PreTrainedModel:
    """Build the base model of a folder in Hugging Face layout.

    Args:
        dtype: of the weights; None: that of config.json.
        pack: whether attention keeps packed documents apart, where the architecture allows it.

    Raises:
        UserError: 'UnsupportedModel' where the architecture is unknown or unfit for the purpose;
            'IncompleteModel' where the checkpoint lacks weights.
    """
    packed.install()
    with _known(purpose):
        config = configuration(path, purpose)
        own = _disable_dropout(config)
        in_dtype: Any = dtype or config.dtype or torch.float32
        if isinstance(init, Pretrained):
            model, absent = _pretrained(path, config, in_dtype, init, purpose)
        elif init == "Placeholders":
            model, absent = _placeholders(config, in_dtype, purpose), None
        else:
            model, absent = _on_meta(config, in_dtype, purpose), set()
    parts = head_parts(model) if purpose.classes else {}
    drawn = [n for n, part in parts.items() if absent is None or absent >= _names(n, part)]
    if drawn:
        draw_head(model, drawn, purpose.seed)
    for name, probability in own.items():
        setattr(model.config, name, probability)
    model.config.name_or_path = str(path)
    model.config.use_cache = False
    if model.can_generate() and (path / GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    if pack and TASKS[purpose.task].packing(model, pack) == "Concatenated":
        model.set_attn_implementation(packed.ATTENTION)
    return model


def _pretrained(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype, init: Pretrained, purpose: Purpose
) -> tuple[PreTrainedModel, set[str]]:
    """The model with its weights, and the names of head parameters that the checkpoint lacks."""
    torch.manual_seed(purpose.seed)
    weights = init.weights or Weights.of_folder(path)
    options: dict[str, Any] = {}
    if init.quantize or init.device != CPU:
        options["device_map"] = {"": init.device}
    if init.quantize:
        options["quantization_config"] = four_bits(dtype)
    with weights.reading():
        model, loading = _class_of(config, purpose).from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=bool(purpose.classes), **options,
        )  # fmt: skip
    absent = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    head = tuple(f"{name}." for name in TASKS[purpose.task].head(model))
    check_complete(
        model, [n for n, _ in model.named_parameters() if n in absent and not n.startswith(head)]
    )
    _check_ties(model)
    return model, absent | drawn_names(model, path, purpose)


def _placeholders(
    config: PreTrainedConfig, dtype: torch.dtype, purpose: Purpose
) -> PreTrainedModel:
    """The model with placeholders for parameters; buffers are as a checkpoint's model has them."""
    torch.manual_seed(purpose.seed)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = TASKS[purpose.task].auto.from_config(config, dtype=dtype)
    model.tie_weights()  # init_empty_weights made tied parameters anew, one by one
    in_float32 = float32_parameters(model, dtype)
    replace_parameters(
        model,
        lambda name, p: nn.Parameter(
            placeholder(p.shape, torch.float32 if in_float32(name) else p.dtype),
            p.is_floating_point(),
        ),
    )
    return model


def _on_meta(config: PreTrainedConfig, dtype: torch.dtype, purpose: Purpose) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = TASKS[purpose.task].auto.from_config(config, dtype=dtype)
    return model


def _check_ties(model: PreTrainedModel) -> None:
    """Refuse a checkpoint with two weights where config.json ties head and embedding.

    Raises:
        UserError: 'IncompleteModel'.
    """
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    known: Any = model
    there = [known.get_input_embeddings(), known.get_output_embeddings()]
    if None not in there and there[0].weight is not there[1].weight:
        raise not_tied(model)


def check_complete(model: PreTrainedModel, lacking: Collection[str]) -> None:
    """Refuse a checkpoint that lacks parameters of the model.

    Raises:
        UserError: 'IncompleteModel'.
    """
    if lacking:
        raise UserError(
            "IncompleteModel",
            f"spec.model: the weights do not hold {', '.join(sorted(lacking)[:5])} of a"
            f" {type(model).__name__}; give a model of the architecture that config.json names",
        )


def not_tied(model: PreTrainedModel) -> UserError:
    """The error for a checkpoint with a head of its own where config.json ties it."""
    return UserError(
        "IncompleteModel",
        f"spec.model: config.json says that the head of this {type(model).__name__} is its"
        " embedding (tie_word_embeddings), but the weights hold two that differ; set"
        " tie_word_embeddings to false there",
    )


@contextmanager
def _known(purpose: Purpose) -> Iterator[None]:
    """Report transformers' errors about an unknown architecture as the user's.

    Raises:
        UserError: 'UnsupportedModel'.
    """
    try:
        yield
    except (ValueError, KeyError) as error:
        raise UserError(
            "UnsupportedModel",
            f"spec.model: the model cannot be loaded as {TASKS[purpose.task].called}: {error}",
        ) from error


def _class_of(config: PreTrainedConfig, purpose: Purpose) -> Any:
    """The transformers class for a configuration and a purpose."""
    known = TASKS[purpose.task].classes
    if type(config) not in known:
        raise ValueError(f"transformers has none for model_type {config.model_type!r}")
    found = known[type(config)]
    if not isinstance(found, tuple):
        return found
    return next((c for c in found if c.__name__ in (config.architectures or ())), found[0])


def _disable_dropout(config: Any) -> dict[str, float]:
    """Set a configuration's own dropout and router jitter to zero, and return what they were: their
    draws would follow no dropout key. ``training.dropout`` decides (see ``packing.dropout``)."""
    own = {k: v for k, v in vars(config).items() if _is_dropout(k) and isinstance(v, float)}
    for name in own:
        setattr(config, name, 0.0)
    return own


def _is_dropout(name: str) -> bool:
    return "dropout" in name or name.endswith(("pdrop", "jitter_noise"))
