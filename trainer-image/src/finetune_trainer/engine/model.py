"""The model: load it, choose what is trained, put tuned weights back into it.

``load_base`` and ``apply_method`` are the two steps of every tuning, in training and in publish, so
there is one way in which a spec becomes a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine import packed
from finetune_trainer.engine.dropout import key_dropouts
from finetune_trainer.failures import UserError


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token (the end of sequence where it has
    none; padding is masked and never learned)."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The untuned model of a folder in Hugging Face layout, on the CPU, with ``dtype`` weights and
    attention that keeps packed documents apart.

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
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)
        for name, probability in own.items():
            setattr(model.config, name, probability)
    except (ValueError, KeyError) as error:
        raise _unsupported(error) from error
    if packed.can_pack(model):
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
    """Give the trained parameters of an empty model (uninitialised) memory on the CPU."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                room = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(room))


def _unsupported(error: Exception) -> UserError:
    return UserError(
        "UnsupportedModel",
        f"spec.model.source: the model cannot be loaded as a causal language model: {error}",
    )


def _is_dropout(name: str) -> bool:
    return "dropout" in name or name.endswith("pdrop")


@dataclass(frozen=True)
class Parameters:
    """Sizes of a model under tuning."""

    trainable: int
    total: int


def apply_method(model: PreTrainedModel, spec: FineTuneJobSpec) -> PreTrainedModel | PeftModel:
    """Make the spec's part of the model trainable, the rest frozen, and dropout keyed.

    New weights are drawn by ``training.seed``, the same in every process. Trainable weights are
    float32 whatever the dtype of the frozen ones: an optimizer step is often smaller than the
    spacing of bfloat16.

    Raises:
        UserError: where ``lora.targetModules`` names no module of the model.
    """
    torch.manual_seed(spec.training.seed)
    tuned: PreTrainedModel | PeftModel = model
    if spec.method.type == "LoRA":
        lora = spec.method.effective_lora
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.effective_alpha,
            lora_dropout=float(lora.dropout),
            target_modules=list(lora.target_modules) if lora.target_modules else "all-linear",
        )
        try:
            tuned = get_peft_model(model, config)
        except ValueError as error:
            linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules()
                             if isinstance(m, nn.Linear)})  # fmt: skip
            raise UserError(
                "NoTargetModules",
                f"spec.method.lora.targetModules: {lora.target_modules} fits no module of the"
                f" model; its linear layers are called {', '.join(linear)}",
            ) from error
    key_dropouts(tuned, float(spec.training.dropout))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if spec.training.gradient_checkpointing:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if isinstance(tuned, PeftModel):
            tuned.enable_input_require_grads()
    return tuned


def parameter_counts(model: nn.Module) -> Parameters:
    """Trainable and total parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Parameters(sum(n for n, train in sizes if train), sum(n for n, _ in sizes))


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups of the optimizer: weight decay for matrices, none for norms and biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
