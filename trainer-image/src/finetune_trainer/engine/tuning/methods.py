"""Tuning methods: one function per method that selects or adds the trainable parameters.

Properties of a method that need no model are in ``finetune_api.methods``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import PreTrainedModel

from finetune_api.methods import Lora, Method, MethodName
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.packing.dropout import add_noise, key_dropouts
from finetune_trainer.engine.pissa import add_initial
from finetune_trainer.engine.placeholders import in_float32
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.engine.ties import adapted_ties
from finetune_trainer.engine.tuning.interpolation import check_scan
from finetune_trainer.engine.tuning.partial import partial_parameters, shown
from finetune_trainer.failures import UserError

Tuned = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class New:
    """Modules that the task trains besides those of the method."""

    peft_type: str
    """peft's name of the task."""
    modules: list[str]
    """Names of modules that are fully trained and saved with an adapter."""


def apply_method(model: PreTrainedModel, spec: FineTuneJobSpec) -> Tuned:
    """Make the parameters of the spec's method trainable (with None: none), freeze the others, and
    key the dropout.

    New weights are drawn with ``training.seed``, identically in every process; some are derived
    from the base weights later (``derive``). Trainable weights are float32 for any dtype of the
    frozen ones: an optimizer step is often smaller than the spacing of bfloat16.

    Raises:
        UserError: if the method's settings do not fit the model; the message names what would fit.
            'UnsuitableModel' if dropout is set and the model has no place for it, or by
            ``check_scan``; 'NotMergeable' if the output format cannot hold the trained weights.
    """
    torch.manual_seed(spec.training.seed)
    task = TASKS[spec.task]
    tuned = _APPLY[spec.method.type](model, spec.method, New(task.peft_type, task.head(model)))
    if spec.effective_output_format not in (None, "Adapter"):
        _check_mergeable(model, spec)
    check_scan(model, spec)
    dropout = float(spec.training.dropout)
    if not key_dropouts(tuned, dropout) and dropout > 0:
        raise UserError(
            "UnsuitableModel",
            f"spec.training.dropout: {spec.training.dropout} would drop nothing: a"
            f" {type(model).__name__} has no dropout of its own and no blocks that are known as"
            " attention or feed-forward; set it to 0 (for an adapter, method.lora.dropout works)",
        )
    if alpha := float(spec.training.neftune_alpha):
        add_noise(model.get_input_embeddings(), alpha)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = in_float32(parameter.data)
    return tuned


def _check_mergeable(model: PreTrainedModel, spec: FineTuneJobSpec) -> None:
    """Refuse a merged output if an adapter changes one of two tied weights."""
    if ends := adapted_ties(model):
        raise UserError(
            "NotMergeable",
            f"spec.output.format: {spec.effective_output_format}, but {' and '.join(ends)} are one"
            " weight of this model (tie_word_embeddings): merged, an adapter of one would change"
            " both; set output.format: Adapter, or leave them out of"
            f" method.{spec.method.kind.block}.targetModules",
        )


def checkpoint_activations(tuned: Tuned) -> None:
    """Enable activation checkpointing: decoder blocks save only their inputs and recompute the rest
    in the backward pass."""
    tuned.activation_checkpointing_enable({"use_reentrant": False})
    if isinstance(tuned, PeftModel):
        tuned.enable_input_require_grads()


def _none(model: PreTrainedModel, method: Method, new: New) -> Tuned:
    return model.requires_grad_(False)


def _full(model: PreTrainedModel, method: Method, new: New) -> Tuned:
    return model


def _partial(model: PreTrainedModel, method: Method, new: New) -> Tuned:
    chosen = partial_parameters(model, method.effective_partial)
    whole = tuple(f"{name}." for name in new.modules)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen or name.startswith(whole))
    return model


def _lora(model: PreTrainedModel, method: Method, new: New) -> Tuned:
    lora = method.effective_lora
    _check_targets(model, lora)
    config = LoraConfig(
        task_type=new.peft_type,
        modules_to_save=new.modules or None,
        r=lora.rank,
        lora_alpha=lora.effective_alpha,
        lora_dropout=float(lora.dropout),
        target_modules=_target_modules(model, lora),
        target_parameters=lora.target_parameters,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    try:
        tuned = get_peft_model(model, config)
        if lora.initialization == "PiSSA":
            add_initial(tuned, config)
        return tuned
    except ValueError as error:
        raise UserError(
            "UnsuitableMethod",
            f"spec.method.lora: peft cannot adapt a {type(model).__name__} so: {error}",
        ) from error


def _target_modules(model: nn.Module, lora: Lora) -> list[str] | str:
    """Value of peft's ``target_modules``. For models that hold all experts in one tensor, peft
    would mistake other linear layers for the experts' former ones, so attention layers are listed
    by name."""
    if lora.target_modules or lora.target_parameters:
        return lora.target_modules or []
    if not any("experts" in n and p.ndim == 3 for n, p in model.named_parameters()):
        return "all-linear"
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = {n.rsplit(".", 1)[-1] for n in linear if "attn" in n or "attention" in n}
    if not found:
        raise _no_target(model, "lora", None)
    return sorted(found)


def _check_targets(model: nn.Module, lora: Lora) -> None:
    """Refuse every target that matches nothing; peft only warns if another target matches."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, weight in model.named_parameters() if weight.ndim in (2, 3)]
    for name in lora.target_modules or ():
        if not any(_ends_with(there, name) for there in modules):
            raise _no_target(model, "lora", [name])
    for name in lora.target_parameters or ():
        if not any(_ends_with(there, name) for there in parameters):
            raise UserError(
                "NoSuchParameters",
                f"spec.method.lora.targetParameters: {name} fits no matrix of the model, which has"
                f" {shown(parameters)}",
            )


def _ends_with(there: str, name: str) -> bool:
    return there == name or there.endswith(f".{name}")


def _ia3(model: PreTrainedModel, method: Method, new: New) -> Tuned:
    ia3 = method.effective_ia3
    config = IA3Config(
        task_type=new.peft_type,
        modules_to_save=new.modules or None,
        target_modules=ia3.target_modules,
        feedforward_modules=(ia3.feedforward_modules or []) if ia3.target_modules else None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise _no_target(model, "ia3", ia3.target_modules) from error


def _no_target(model: nn.Module, block: str, wanted: list[str] | None) -> UserError:
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    said = f"{wanted} fits no module of the model" if wanted else "this model needs names"
    return UserError(
        "NoTargetModules",
        f"spec.method.{block}.targetModules: {said}; its linear layers are called"
        f" {', '.join(sorted(linear))}",
    )


def _prompt_tuning(model: PreTrainedModel, method: Method, new: New) -> Tuned:
    embeddings: Any = model.get_input_embeddings()
    return get_peft_model(
        model,
        PromptTuningConfig(
            task_type=new.peft_type,
            num_virtual_tokens=method.virtual_tokens,
            token_dim=embeddings.weight.shape[1],
        ),
    )


def _prefix_tuning(model: PreTrainedModel, method: Method, new: New) -> Tuned:
    return get_peft_model(
        model,
        PrefixTuningConfig(task_type=new.peft_type, num_virtual_tokens=method.virtual_tokens),
    )


_APPLY: Final[dict[MethodName, Callable[[PreTrainedModel, Method, New], Tuned]]] = {
    "Full": _full,
    "Partial": _partial,
    "LoRA": _lora,
    "QLoRA": _lora,
    "IA3": _ia3,
    "PromptTuning": _prompt_tuning,
    "PrefixTuning": _prefix_tuning,
    "None": _none,
}
