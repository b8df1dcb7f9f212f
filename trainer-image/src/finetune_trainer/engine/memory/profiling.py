"""A model under tuning without its weights: made, tuned and run forward on tensors that hold
nothing, as training will do it.

So that a method does not suit a model is found before a GPU is held, and what a forward pass keeps
for the backward pass is counted on the implementation itself, force the architecture. It takes
seconds and next to no memory.
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
from finetune_trainer.engine.model import empty_base, purpose_of
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
"""Making a model changes torch's default dtype for a moment, in all threads."""
_FOUR_BITS: Final = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits, with its share of the constants (Dettmers et al. 2023)."""


def profile_model(path: Path, spec: FineTuneJobSpec, max_length: int) -> ModelProfile:
    """What is known of the model of a folder under the spec's tuning.

    Args:
        path: of the folder; only its configuration is read.
        max_length: most tokens of a sample.

    Raises:
        UserError: where the spec's method, losses or parallelism do not fit the model, naming what
            would.
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
    """In which numbers a base is loaded: what is trained becomes 32-bit later."""
    return precision.frozen_dtype if spec.method.kind.freezes else torch.float32


def packing_of(base: PreTrainedModel, spec: FineTuneJobSpec) -> Packing:
    """How samples share rows.

    Raises:
        UserError: 'UnsuitableModel' where processes were to share rows of which they cannot.
    """
    packing = TASKS[spec.task].packing(base, spec.method.kind.packs)
    if packing != "Unpacked" and spec.training.longest > packed.reach(base):
        packing = "Unpacked"
    if packing == "Padded" and spec.kind.generates and balances(spec):
        packing = "Unpacked"  # not every model keeps padding out of its router loss
    if spec.compute.context_parallel > 1 and packing != "Concatenated":
        raise UserError(
            "UnsuitableModel",
            f"spec.compute.contextParallel: {spec.compute.context_parallel}, but the rows of a"
            f" {type(base).__name__} cannot be shared; set it to 1",
        )
    return packing


def balances(spec: FineTuneJobSpec) -> bool:
    """Whether the loss has a part for the balance of experts."""
    return float(spec.training.router_aux_loss_coefficient) > 0


def recomputes(base: PreTrainedModel, spec: FineTuneJobSpec) -> bool:
    """Whether activations can be computed again.

    Raises:
        UserError: 'UnsuitableModel' where the spec asks for it and they cannot.
    """
    if base.supports_gradient_checkpointing:
        return spec.method.kind.recomputes
    if spec.training.gradient_checkpointing == "Always":
        raise UserError(
            "UnsuitableModel",
            f"spec.training.gradientCheckpointing: Always, but a {type(base).__name__} cannot"
            " compute its activations again; set it to Never",
        )
    return False


class _Model:
    """The model and its loss, of tensors that hold nothing."""

    def __init__(self, path: Path, spec: FineTuneJobSpec, precision: Precision) -> None:
        self._bf16 = precision.bf16
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._spec = spec
        packed.register(ATTENTION, profiled_attention(spec.compute.gpus_per_node > 0))
        task = TASKS[spec.task]
        # How many classes there are is known with the data, and makes no difference.
        classes = () if spec.kind.generates else ("0", "1")
        base = empty_base(path, purpose_of(spec, classes), frozen_dtype(spec, precision))
        self.packing = packing_of(base, spec)
        self.recomputes = recomputes(base, spec)
        if self.packing == "Concatenated":
            base.set_attn_implementation(ATTENTION)
        # A classifier is given a mask in any row. Of other attention than PyTorch's own the square
        # of the longest document is measured.
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
        """Compute with weights in bfloat16, as FSDP's copies are."""
        _hold_nothing(self.loss, self._fake, torch.bfloat16)

    def weights(self) -> Weights:
        """Sizes, before anything is copied."""
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
        """Numbers that are held in 4 bits: of the base's linear layers, but for the head."""
        return sum(
            module.weight.numel()
            for name, module in self._tuned.named_modules()
            if isinstance(module, nn.Linear)
            and not module.weight.requires_grad
            and module.weight is not self._head
            and ".lora_" not in name
        )

    def forward(self, max_length: int, autocast: bool) -> Activations | None:
        """What forward passes of two sizes keep: what differs grows with the tokens. None where the
        architecture cannot be run so.

        Raises:
            UserError: where training would raise it.
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
        if rest < 0:  # attention that keeps its square: measured at the longest sample
            less, step, rest = TrackedActivations(), sizes[1], 0.0

        def slope(name: str) -> float:
            return float((getattr(more, name) - getattr(less, name)) / step)

        return Activations(
            saved=slope("saved"), outside=slope("outside"), block=slope("block"),
            inputs=slope("inputs"), keys=slope("keys"), constant=round(rest),
        )  # fmt: skip

    def _run(self, tokens: int, autocast: bool) -> TrackedActivations:
        # One document, of which one token is learned: logits are counted apart.
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
    """Give a model fake parameters and buffers, as if they were on the CPU; floating ones in
    ``dtype``, if it is given."""
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
    """Numbers of all parameters, and of the trained ones."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
