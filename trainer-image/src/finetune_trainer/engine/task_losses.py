"""The task-specific parts of the engine: one entry per task, as in ``finetune_api.tasks`` for what
needs no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from finetune_api.tasks import TaskName
from finetune_api.training import Training
from finetune_trainer.engine.classification import (
    ClassLoss,
    build_padded_classes,
    has_classes,
    head_names,
)
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.packing.context import ContextGroup
from finetune_trainer.engine.packing.feed import MicroBatchBuilder, StaticShape, build_packed
from finetune_trainer.engine.packing.packed import can_pack, can_pad
from finetune_trainer.engine.packing.padded import build_padded_tokens
from finetune_trainer.engine.planning.plan import Packing

TaskLoss = TokenLoss | ClassLoss


@dataclass(frozen=True)
class Task:
    """The engine's entry of one task."""

    auto: Any
    """Auto class of transformers that builds an empty model from a configuration."""
    classes: Any
    """Model classes of the task, by class of configuration."""
    called: str
    """Name of such a model in messages."""
    fits: Callable[[PreTrainedConfig], bool]
    """Whether the configuration allows such a model, as far as is known before loading."""
    peft_type: str
    """peft's name of the task."""
    head: Callable[[nn.Module], list[str]]
    """Names of the modules that every method trains."""
    loss: Callable[[nn.Module, Training, bool | None], TaskLoss]
    """Builds the module that is trained, from a model under tuning, the training settings, and
    ``chunked_head.has_plain_head`` of the model's profile (None: no profile)."""
    builder: Callable[[Packing, ContextGroup, StaticShape | None, bool], MicroBatchBuilder]
    """Returns the builder of micro-batches for a packing, a context-parallel group, a static shape
    (None: any shape), and whether dropout or noise needs keys."""
    packing: Callable[[PreTrainedModel, bool], Packing]
    """Returns the packing for a model, and whether the method allows packed sequences."""


def _token_loss(model: nn.Module, training: Training, plain_head: bool | None) -> TokenLoss:
    return TokenLoss(
        model,
        float(training.router_aux_loss_coefficient),
        float(training.label_smoothing),
        float(training.anchor.kl_coefficient),
        training.token_weighting,
        plain_head,
    )


def _token_micro_batch(
    packing: Packing, context: ContextGroup, shape: StaticShape | None, keyed: bool
) -> MicroBatchBuilder:
    if packing == "Padded":
        return partial(build_padded_tokens, keyed=keyed)
    return partial(build_packed, context=context, shape=shape, keyed=keyed)


def _token_packing(model: PreTrainedModel, packs: bool) -> Packing:
    if packs and can_pack(model):
        return "Concatenated"
    return "Padded" if can_pad(model) else "Unpacked"


def _class_loss(model: nn.Module, training: Training, _plain_head: bool | None) -> ClassLoss:
    return ClassLoss(model, float(training.label_smoothing))


TASKS: Final[dict[TaskName, Task]] = {
    "CausalLM": Task(
        auto=AutoModelForCausalLM,
        classes=MODEL_FOR_CAUSAL_LM_MAPPING,
        called="a causal language model",
        fits=lambda config: True,
        peft_type="CAUSAL_LM",
        head=lambda model: [],
        loss=_token_loss,
        builder=_token_micro_batch,
        packing=_token_packing,
    ),
    "SequenceClassification": Task(
        auto=AutoModelForSequenceClassification,
        classes=MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        called="a text classifier (an encoder or a decoder with a head)",
        fits=has_classes,
        peft_type="SEQ_CLS",
        head=head_names,
        loss=_class_loss,
        builder=lambda packing, context, shape, keyed: partial(build_padded_classes, keyed=keyed),
        packing=lambda model, packs: "Padded",
    ),
}
