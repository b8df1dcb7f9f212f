"""Text classification: a head on an encoder or a decoder, and the loss of a padded micro-batch.

A micro-batch has the shape [documents, longest document]. So each architecture pools in its own way
(first token, last token, a pooler), and an encoder attends in both directions without reaching
another document. The plan puts documents of similar length together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from finetune_trainer.engine.cross_entropy import token_losses
from finetune_trainer.engine.loss import MicroBatchLosses
from finetune_trainer.engine.packing.feed import MicroBatch
from finetune_trainer.engine.packing.padded import pad_documents
from finetune_trainer.engine.packing.transfer import on_device
from finetune_trainer.prepared.dataset import TokenSample


@dataclass(frozen=True)
class ClassMicroBatch(MicroBatch):
    """Padded documents of shape [documents, longest]; ``labels`` are class indices."""

    attention_mask: Tensor
    """1 for a token, 0 for padding, shape [documents, longest]."""


def build_padded_classes(
    samples: Sequence[TokenSample],
    positions: Sequence[int],
    *,
    numbers: Sequence[int] | None = None,
    seed: int,
    step: int,
    device: torch.device,
    keyed: bool = True,
) -> ClassMicroBatch:
    """Pad documents at their ends to the longest; arguments as in ``build_packed``."""
    labels, numbers = [s.label for s in samples], numbers or [0] * len(samples)
    padded = pad_documents(samples, positions, seed, step, device, keyed)

    def tensor(values: Any) -> Tensor:
        return on_device(np.asarray(values, np.int64), device)

    return ClassMicroBatch(
        input_ids=tensor(padded.ids),
        attention_mask=tensor(padded.mask),
        labels=tensor(labels),
        layout=padded.layout,
        numbers=tensor(numbers),
    )


class ClassLoss(nn.Module):
    """A classifier as a module from a micro-batch to its losses, with the interface of
    ``TokenLoss``: one loss per document, in nats."""

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model: Any = model
        config: Any = self.model.config
        self._padding: int = config.get_text_config().pad_token_id
        self._label_smoothing = label_smoothing

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """Use the base model: a no-op, because only called before the first step."""
        yield

    def forward(
        self, micro_batch: ClassMicroBatch, base: None = None, with_logits: bool = False
    ) -> MicroBatchLosses:
        """Return one loss per document, and with ``with_logits`` also the logits, shape
        [documents, classes]."""
        # Decoders find the end of a document by the padding token; some encoders, its positions.
        ids = micro_batch.input_ids.masked_fill(micro_batch.attention_mask == 0, self._padding)
        found: Tensor = self.model(
            input_ids=ids, attention_mask=micro_batch.attention_mask
        ).logits.float()
        if micro_batch.labels.numel() == 0:
            losses = found.sum()[None] * 0.0
        else:
            smoothing = self._label_smoothing if self.training else 0.0
            losses = class_losses(found, micro_batch.labels, smoothing)
        none = found.new_zeros(())
        logits = found[: len(micro_batch.labels)] if with_logits else None
        return MicroBatchLosses(losses, none, found.new_zeros(0), none, logits)


def class_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Negative log likelihood of each label in nats, shape [documents]. Smoothing changes the
    gradient alone."""
    return token_losses(logits, labels, smoothing)


def head_names(model: nn.Module) -> list[str]:
    """Names of the modules of the head: all modules beside the encoder or decoder, and its pooler,
    which many published checkpoints lack."""
    classifier: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    prefix = classifier.base_model_prefix
    body: nn.Module = getattr(classifier, prefix)
    beside = [name for name, module in classifier.named_children() if module is not body]
    within = [f"{prefix}.{name}" for name, _ in body.named_children() if name == "pooler"]
    named = [(name, classifier.get_submodule(name)) for name in (*beside, *within)]
    return [name for name, module in named if list(module.parameters())]


def name_classes(config: PreTrainedConfig, classes: Sequence[str], padding: int) -> None:
    """Set the class names and the padding token of a configuration."""
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    config.get_text_config().pad_token_id = padding


def has_classes(config: PreTrainedConfig) -> bool:
    """Return whether transformers has a classifier of the model's architecture that this trainer
    supports: an encoder or a decoder, not an encoder-decoder."""
    known = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return known and not config.is_encoder_decoder


def has_head(config: PreTrainedConfig, classes: Sequence[str]) -> bool:
    """Return whether a model has a head for exactly these classes, in this order."""
    made_for = config.architectures or []
    names: dict[Any, str] = dict(config.id2label or {})
    has_one = any(name.endswith("ForSequenceClassification") for name in made_for)
    return has_one and [names.get(i) for i in range(len(names))] == list(classes)


def head_parts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Modules of the head that hold weights of their own, by name."""
    return {
        path: module
        for name in head_names(model)
        for path, module in model.get_submodule(name).named_modules(prefix=name)
        if list(module.parameters(recurse=False))
    }


def gives_classes(model: PreTrainedModel, part: nn.Module) -> bool:
    """Return whether each weight of a module has one row per class."""
    return all(len(w) == model.config.num_labels for w in part.parameters(recurse=False))


def draw_head(model: PreTrainedModel, names: Collection[str], seed: int) -> None:
    """Initialise the named modules of the head from the seed, on the CPU, so that the values are
    the same on any device."""
    for number, (path, part) in enumerate(head_parts(model).items()):
        if path not in names:
            continue
        there = dict(part.named_parameters(recurse=False))
        for name, old in there.items():
            setattr(part, name, nn.Parameter(torch.zeros_like(old, device="cpu")))
        torch.manual_seed(seed + number)
        model._init_weights(part)  # type: ignore[no-untyped-call]
        for name, old in there.items():
            setattr(part, name, nn.Parameter(getattr(part, name).to(old.device)))
