"""The model as it was before tuning: its weights or its shape alone, and its tokenizer.

``load_base`` and ``apply_method`` (``methods``) are the two steps of every tuning, in training and
in publish, so there is one way in which a spec becomes a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import build_glob_alternation

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
from finetune_trainer.engine.pissa import is_kept
from finetune_trainer.engine.placeholders import placeholder, replace_parameters
from finetune_trainer.engine.quantized import four_bits
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.failures import UserError
from finetune_trainer.storage.weight_reader import Weights

CPU: Final = torch.device("cpu")
GENERATION: Final = "generation_config.json"


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
    """The configuration of the model of a folder, for a purpose: of one of texts and images, that
    of the texts, where the purpose's class is of these alone.

    Raises:
        UserError: 'UnsupportedModel' for weights in fewer bits, which nothing here can train on.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(path)
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


def is_drawn(path: Path, purpose: Purpose) -> bool:
    """Whether a model begins with a head of which nothing is learned."""
    return bool(purpose.classes) and not has_head(AutoConfig.from_pretrained(path), purpose.classes)


def drawn_names(model: PreTrainedModel, path: Path, purpose: Purpose) -> set[str]:
    """Weights of a head that are drawn, force the checkpoint has: it has other classes."""
    if not is_drawn(path, purpose):
        return set()
    parts = head_parts(model).items()
    return set().union(*(_names(n, part) for n, part in parts if gives_classes(model, part)))


def _names(path: str, part: nn.Module) -> set[str]:
    return {f"{path}.{name}" for name, _ in part.named_parameters(recurse=False)}


def load_base(
    path: Path,
    dtype: torch.dtype,
    pack: bool = True,
    quantize_on: torch.device | None = None,
    purpose: Purpose = TEXT,
    weights: Weights | None = None,
    device: torch.device = CPU,
) -> PreTrainedModel:
    """The untuned model of a folder in Hugging Face layout, with ``dtype`` weights and, where
    ``pack`` and the architecture allow it, attention that keeps packed documents apart.

    Args:
        quantize_on: device on which it is to lie with its linear layers in 4 bits.
        weights: absent: those of the folder.
        device: where it is to lie; weights go there one by one.

    Raises:
        UserError: where the architecture is unknown or not one for the purpose; 'IncompleteModel'
            where weights are lacking.
    """
    packed.install()
    torch.manual_seed(purpose.seed)
    weights = weights or Weights.of_folder(path)
    place: dict[str, Any] = {}
    if device != CPU:
        place = {"device_map": {"": device}}
    if quantize_on is not None:
        place = {"device_map": {"": quantize_on}, "quantization_config": four_bits(dtype)}
    with _known(purpose), weights.reading():
        config = configuration(path, purpose)
        own = _silence(config)
        model, loading = _class_of(config, purpose).from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=bool(purpose.classes), **place,
        )  # fmt: skip
    absent = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    head = tuple(f"{name}." for name in TASKS[purpose.task].head(model))
    check_complete(
        model, [n for n, _ in model.named_parameters() if n in absent and not n.startswith(head)]
    )
    if purpose.classes:
        absent |= drawn_names(model, path, purpose)
        draw_head(
            model,
            [n for n, part in head_parts(model).items() if absent >= _names(n, part)],
            purpose.seed,
        )
    _check_ties(model)
    return _settled(model, path, own, purpose, pack)


def placeholder_base(
    path: Path, dtype: torch.dtype, pack: bool = True, purpose: Purpose = TEXT
) -> PreTrainedModel:
    """As ``load_base``, with parameters that are all zero and take no memory until they are written
    or cut into shards. What is not a parameter is as ``load_base`` makes it, and a head is drawn as
    if the checkpoint lacked it.

    Raises:
        UserError: as ``load_base``.
    """
    packed.install()
    torch.manual_seed(purpose.seed)
    with _known(purpose):
        config = configuration(path, purpose)
        own = _silence(config)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = TASKS[purpose.task].auto.from_config(config, dtype=dtype)
        model.tie_weights()  # what is tied was made anew when it was put in place
    in_32_bits = _in_32_bits(model, dtype)
    replace_parameters(
        model,
        lambda name, p: nn.Parameter(
            placeholder(p.shape, torch.float32 if in_32_bits(name) else p.dtype),
            p.is_floating_point(),
        ),
    )
    if purpose.classes:
        draw_head(model, head_parts(model), purpose.seed)
    return _settled(model, path, own, purpose, pack)


def empty_base(
    path: Path, purpose: Purpose = TEXT, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model of a folder without its weights: all parameters are on the meta device, in
    ``dtype`` or that of the folder. Only its configuration is read.

    Raises:
        UserError: as ``load_base``.
    """
    with _known(purpose):
        config = configuration(path, purpose)
        _silence(config)
        with torch.device("meta"):
            model: PreTrainedModel = TASKS[purpose.task].auto.from_config(
                config, dtype=dtype or config.dtype
            )
    model.config.use_cache = False
    return model


def materialize_on_host(model: nn.Module) -> None:
    """Give the parameters of an empty model that commits hold (uninitialised) memory on the CPU."""

    def room(name: str, parameter: nn.Parameter) -> nn.Parameter:
        if not is_kept(name, parameter):
            return parameter
        return nn.Parameter(torch.empty_like(parameter, device=CPU), parameter.requires_grad)

    replace_parameters(model, room)


def _settled(
    model: PreTrainedModel, path: Path, own: dict[str, float], purpose: Purpose, pack: bool
) -> PreTrainedModel:
    """A model as it was made, with what its folder says beside the weights."""
    for name, probability in own.items():
        setattr(model.config, name, probability)
    model.config.name_or_path = str(path)
    if model.can_generate() and (path / GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    if TASKS[purpose.task].packing(model, pack) == "Concatenated":
        model.set_attn_implementation(packed.ATTENTION)
    model.config.use_cache = False
    return model


def _in_32_bits(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which weights transformers keeps in 32 bits force the dtype of the model."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: False
    pattern, *_ = build_glob_alternation(list(plan))
    return lambda name: pattern.search(name) is not None


def _check_ties(model: PreTrainedModel) -> None:
    """Refuse weights whose head is not the embedding that the configuration says it is."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    known: Any = model
    there = [known.get_input_embeddings(), known.get_output_embeddings()]
    if None not in there and there[0].weight is not there[1].weight:
        raise not_tied(model)


def check_complete(model: PreTrainedModel, lacking: Collection[str]) -> None:
    """Refuse weights that lack some of the model.

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
    """The weights have a head of their own, and the configuration none."""
    return UserError(
        "IncompleteModel",
        f"spec.model: config.json says that the head of this {type(model).__name__} is its"
        " embedding (tie_word_embeddings), but the weights hold two that differ; set"
        " tie_word_embeddings to false there",
    )


@contextmanager
def _known(purpose: Purpose) -> Iterator[None]:
    """What transformers says of an architecture that it does not know, for the user."""
    try:
        yield
    except (ValueError, KeyError) as error:
        raise UserError(
            "UnsupportedModel",
            f"spec.model: the model cannot be loaded as {TASKS[purpose.task].called}: {error}",
        ) from error


def _class_of(config: PreTrainedConfig, purpose: Purpose) -> Any:
    """The class of transformers that makes the model of a configuration."""
    known = TASKS[purpose.task].classes
    if type(config) not in known:
        raise ValueError(f"transformers has none for model_type {config.model_type!r}")
    found = known[type(config)]
    if not isinstance(found, tuple):
        return found
    return next((c for c in found if c.__name__ in (config.architectures or ())), found[0])


def _silence(config: Any) -> dict[str, float]:
    """Have a model draw neither dropout nor a router's jitter by itself, which would follow no key:
    ``training.dropout`` decides (see ``dropout``). Returns its own settings."""
    own = {k: v for k, v in vars(config).items() if _is_drawn(k) and isinstance(v, float)}
    for name in own:
        setattr(config, name, 0.0)
    return own


def _is_drawn(name: str) -> bool:
    return "dropout" in name or name.endswith(("pdrop", "jitter_noise"))
