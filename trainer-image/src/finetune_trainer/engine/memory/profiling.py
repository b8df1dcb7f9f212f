"""Profile a model without its weights: build it, apply the tuning method and run a forward pass on
fake tensors, as training will do it.

This finds a method that does not suit the model before a GPU is held. The activations saved for the
backward pass are counted on the implementation itself, so any architecture is covered. Profiling
takes seconds and almost no memory.
"""

from __future__ import annotations

import logging
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.memory.activations import (
    ATTENTION,
    ActivationTracker,
    TrackedActivations,
    profiled_attention,
)
from finetune_trainer.engine.memory.estimate import Activations, ModelProfile, Weights
from finetune_trainer.engine.model import build_base, purpose_of
from finetune_trainer.engine.optimizers import check_optimizer, state_bytes
from finetune_trainer.engine.packing import packed
from finetune_trainer.engine.packing.context import ALONE
from finetune_trainer.engine.packing.dropout import draws
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.parameters import decoder_blocks
from finetune_trainer.engine.planning.plan import Packing
from finetune_trainer.engine.precision import Precision, precision_of
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.engine.tuning.anchors import anchor_bytes
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import TokenSample

log = logging.getLogger(__name__)

_ALONE: Final = threading.Lock()
"""Serializes profiling: building a model temporarily changes torch's default dtype, in all
threads."""
_FOUR_BITS: Final = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight in 4 bits, with its share of the quantization constants (Dettmers et al.
2023)."""


def profile_model(path: Path, spec: FineTuneJobSpec, max_length: int) -> ModelProfile:
    """Return the memory profile of a model under the spec's tuning method.

    Args:
        path: the model's folder; only its configuration is read.
        max_length: tokens of the longest sample.

    Raises:
        UserError: if the spec's method, losses or parallelism do not fit the model; the message
            names what would fit.
    """
    with _ALONE:
        return _profile(path, spec, max_length)


def _profile(path: Path, spec: FineTuneJobSpec, max_length: int) -> ModelProfile:
    precision = precision_of(spec, spec.compute.gpus_per_node > 0)
    model = _Model(path, spec, precision)
    weights = model.weights()
    if precision.copies:
        model.cast_weights()
    return ModelProfile(
        weights=weights,
        activations=model.forward(max_length, precision.autocast),
        layers=len(model.blocks),
        vocabulary=model.vocabulary,
        logits_at_once=model.logits_at_once,
        plain_head=model.plain_head,
        packing=model.packing,
        recomputes=model.recomputes,
        bf16=precision.bf16,
        copies=precision.copies,
        masks=model.masks,
    )


def frozen_dtype(spec: FineTuneJobSpec, precision: Precision) -> torch.dtype:
    """Dtype in which a base model is loaded; trained weights are cast to float32 later."""
    return precision.frozen_dtype if spec.method.kind.freezes else torch.float32


def packing_of(base: PreTrainedModel, spec: FineTuneJobSpec) -> Packing:
    """How samples share micro-batches.

    Raises:
        UserError: 'UnsuitableModel' if the spec requests context parallelism and the model does not
            support it.
    """
    packing = TASKS[spec.task].packing(base, spec.method.kind.packs)
    if packing != "Unpacked" and spec.training.longest > packed.reach(base):
        packing = "Unpacked"
    if packing == "Padded" and spec.kind.generates and balances(spec):
        packing = "Unpacked"  # some models count padding in their router loss
    if spec.compute.context_parallel > 1 and packing != "Concatenated":
        raise UserError(
            "UnsuitableModel",
            f"spec.compute.contextParallel: {spec.compute.context_parallel}, but a"
            f" {type(base).__name__} does not support context parallelism; set it to 1",
        )
    return packing


def balances(spec: FineTuneJobSpec) -> bool:
    """Whether the loss has a term for the load balance of experts."""
    return float(spec.training.router_aux_loss_coefficient) > 0


def recomputes(base: PreTrainedModel, spec: FineTuneJobSpec) -> bool:
    """Whether the model supports activation checkpointing.

    Raises:
        UserError: 'UnsuitableModel' if the spec requires it and the model does not support it.
    """
    if base.supports_gradient_checkpointing:
        return spec.method.kind.trains and spec.method.kind.recomputes
    if spec.training.gradient_checkpointing == "Always":
        raise UserError(
            "UnsuitableModel",
            f"spec.training.gradientCheckpointing: Always, but a {type(base).__name__} does not"
            " support gradient checkpointing; set it to Never",
        )
    return False


class _Model:
    """The model and its loss on fake tensors."""

    def __init__(self, path: Path, spec: FineTuneJobSpec, precision: Precision) -> None:
        self._bf16 = precision.bf16
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._spec = spec
        packed.register(ATTENTION, profiled_attention(spec.compute.gpus_per_node > 0))
        task = TASKS[spec.task]
        # The number of classes is unknown before the data is read, and does not matter here.
        classes = () if spec.kind.generates else ("0", "1")
        purpose, dtype = purpose_of(spec, classes), frozen_dtype(spec, precision)
        base = build_base(path, dtype, "Meta", purpose, pack=False)
        self.packing = packing_of(base, spec)
        self.recomputes = recomputes(base, spec)
        if self.packing == "Concatenated":
            base.set_attn_implementation(ATTENTION)
        # A classifier always gets a mask, so the profile already contains it. With attention other
        # than SDPA the quadratic memory of the longest document is measured.
        self.masks = self.packing == "Padded" and spec.kind.generates and base._supports_sdpa
        self._tuned = apply_method(base, spec)
        check_optimizer(self._tuned, spec)
        self.loss = task.loss(self._tuned, spec.training, None).train()
        self.logits_at_once: int | None = None
        self.plain_head = False
        if isinstance(self.loss, TokenLoss):
            self.logits_at_once = self.loss.logits_at_once()
            self.plain_head = self.loss.plain_head
        self._build = task.builder(self.packing, ALONE, None, draws(spec))
        _hold_nothing(self.loss, self._fake)
        head = base.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._head = None if head is None else head.weight
        self.blocks = decoder_blocks(self._tuned)

    @property
    def vocabulary(self) -> int:
        return 0 if self._head is None else int(self._head.shape[0])

    def cast_weights(self) -> None:
        """Cast the weights to bfloat16, as FSDP does with its copies."""
        _hold_nothing(self.loss, self._fake, torch.bfloat16)

    def weights(self) -> Weights:
        """Sizes of the weights, before any bfloat16 copies."""
        numbers = sum(p.numel() for p in self.loss.parameters())
        held = sum(p.numel() * p.element_size() for p in self.loss.parameters())
        held += sum(b.numel() * b.element_size() for b in self.loss.buffers())
        if self._spec.method.kind.quantizes:
            held -= round(self._quantized() * (2 - _FOUR_BITS))
        sizes = [_numbers(block) for block in self.blocks]
        largest = max(sizes, default=(0, 0))
        trained = _numbers(self.loss)[1]
        return Weights(
            held=held,
            numbers=numbers,
            trained=trained,
            optimizer=round(state_bytes(self._tuned, self._spec.training.optimizer)),
            anchors=anchor_bytes(self._tuned, self._spec, self._bf16),
            block=largest[0],
            block_trained=largest[1],
            blocks=sum(size for size, _ in sizes),
            blocks_trained=sum(size for _, size in sizes),
        )

    def _quantized(self) -> int:
        """Number of elements held in 4 bits: those of the base's linear layers except the head."""
        return sum(
            module.weight.numel()
            for name, module in self._tuned.named_modules()
            if isinstance(module, nn.Linear)
            and not module.weight.requires_grad
            and module.weight is not self._head
            and ".lora_" not in name
        )

    def forward(self, max_length: int, autocast: bool) -> Activations | None:
        """Saved activations per token, from forward passes of two sizes (a linear fit). None if the
        architecture cannot run on fake tensors.

        Raises:
            UserError: if training would raise it.
        """
        sizes = max(max_length // 2, 1), max(max_length, 2)
        try:
            less, more = (self._run(tokens, autocast) for tokens in sizes)
        except UserError:
            raise
        except Exception as error:
            log.warning(
                "activations of a %s could not be measured: %s: %s",
                type(self._tuned).__name__, type(error).__name__, error,
            )  # fmt: skip
            return None
        step = sizes[1] - sizes[0]
        rest = less.saved - (more.saved - less.saved) / step * sizes[0]
        if rest < 0:  # attention with quadratic memory: take the mean at the longest sample
            less, step, rest = TrackedActivations(), sizes[1], 0.0

        def slope(name: str) -> float:
            return float((getattr(more, name) - getattr(less, name)) / step)

        return Activations(
            saved=slope("saved"), outside=slope("outside"), block=slope("block"),
            inputs=slope("inputs"), keys=slope("keys"), constant=round(rest),
        )  # fmt: skip

    def _run(self, tokens: int, autocast: bool) -> TrackedActivations:
        # One document with one supervised token, because logits are counted separately.
        learned = np.zeros(tokens, np.bool_)
        learned[-1] = True
        sample = TokenSample(np.zeros(tokens, np.int32), learned)
        micro_batch = self._build([sample], [0], seed=0, step=0, device=torch.device("cpu"))
        precision = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        tracker = ActivationTracker(self.loss, self.blocks)
        with self._fake, precision, layout_context(micro_batch.layout), tracker.watching():
            self.loss(micro_batch)
        return tracker.kept()


def _hold_nothing(model: nn.Module, fake: FakeTensorMode, dtype: torch.dtype | None = None) -> None:
    """Replace a model's parameters and buffers by fake CPU tensors; floating-point ones get
    ``dtype`` if given."""
    made: dict[Tensor, Tensor] = {}

    def as_fake(old: Tensor) -> Tensor:
        if old not in made:
            kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
            new = torch.empty(old.shape, dtype=kind)
            trained = old.requires_grad
            made[old] = nn.Parameter(new, trained) if isinstance(old, nn.Parameter) else new
        return made[old]

    with fake:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                tensors: dict[str, Any] = held
                tensors.update({n: as_fake(old) for n, old in held.items() if old is not None})


def _numbers(module: nn.Module) -> tuple[int, int]:
    """Number of elements of all parameters, and of the trained ones."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
