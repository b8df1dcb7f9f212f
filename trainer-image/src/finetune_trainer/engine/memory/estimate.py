"""Estimate the memory of a training process, and choose a placement of the model that fits.

    profiling ──► ModelProfile ──┐
    index ──► MicroBatchSize ────┼─► estimate ──► parts in bytes ──► decide ──► Placement
    spec ────────────────────────┘

The profile is measured on the real implementation without its weights (``profiling``); the rest is
arithmetic. Not counted: evaluation on held-out data, which saves nothing for a backward pass;
memory that Liger's kernels and torch.compile save; and CPU memory used while a model is loaded to a
GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.planning.micro_batch_size import MicroBatchSize
from finetune_trainer.engine.planning.plan import Packing

Sharding = Literal["NoShard", "HybridShard", "FullShard"]

Part = Literal[
    "parameters", "gradients", "optimizer", "anchors", "copies", "activations", "logits", "working",
    "checkpoint", "reserve",
]  # fmt: skip

PARTS: Final[dict[Part, str]] = {
    "parameters": "weights; trained weights in float32",
    "gradients": "gradients of trained weights, in float32",
    "optimizer": "optimizer state",
    "anchors": "base weights kept for the anchors",
    "copies": "bfloat16 copies of weights; weights and gradients gathered by FSDP",
    "activations": "activations of a micro-batch saved for the backward pass",
    "logits": "log-probabilities of supervised tokens, and gradients",
    "working": "backward pass of a decoder block, in excess of the logits",
    "checkpoint": "copy of trained weights and optimizer state during a checkpoint",
    "reserve": "runtime and libraries, communication buffers, fragmentation",
}

CERTAIN: Final[tuple[Part, ...]] = ("parameters", "gradients", "optimizer", "anchors")
"""Parts computed from parameter counts and element sizes; all of them exist when the optimizer
steps, so no error of the estimate can make them smaller. The other parts depend on kernels,
libraries and allocators."""

_LOGIT_BYTES: Final = 12
"""Bytes per logit at the peak, which is in the backward pass: log-probability, its gradient and the
gradient of the logit, each in float32. The model's own logits are freed by then."""

_ANCHORED_BYTES: Final = 20
"""Additional bytes per logit with an output anchor, in float32: the base logit, both
log-probabilities, and the divergence with its gradient."""

_GRADIENTS: Final = 0.5
"""Peak size of the activation gradients in a block's backward pass, relative to the activations
that the block saves: 0.2 to 0.5 in Llama-like blocks, counted on a CPU (see
``tests/trainer/test_profiling.py``)."""

_RUNTIME: Final = {"gpu": 3 << 29, "cpu": 5 << 28}
"""Memory of a process before training. GPU: context, workspaces of libraries, and buffers of
collectives (1.5 GiB). CPU: Python and libraries (0.9 GiB, measured) and thread pools (1.25 GiB
together)."""

_FRAGMENTATION: Final = 0.05
"""Fragmentation of allocators, as a fraction of all other parts."""

_UNMEASURED: Final = 0.3
"""Fraction of the memory reserved for activations if they could not be measured."""


@dataclass(frozen=True)
class Activations:
    """Activations that a forward pass saves for the backward pass: bytes per token, except
    ``constant``."""

    saved: float
    """All of them."""
    outside: float
    """Saved outside of decoder blocks."""
    block: float
    """Saved by the largest block."""
    inputs: float
    """Inputs of all blocks: all that is saved of blocks with gradient checkpointing."""
    keys: float
    """Keys and values of all blocks, which context parallelism gathers."""
    constant: int
    """Bytes at any number of tokens: casts of weights that autocast caches."""


@dataclass(frozen=True)
class Weights:
    """Sizes of a model under tuning."""

    held: int
    """Bytes of all weights in a process, without sharding."""
    numbers: int
    """Number of all elements."""
    trained: int
    """Number of trained elements."""
    optimizer: int
    """Bytes of the optimizer state."""
    anchors: int
    """Bytes that anchors keep."""
    block: int
    """Elements of the largest decoder block."""
    block_trained: int
    blocks: int
    """Elements of all decoder blocks."""
    blocks_trained: int


@dataclass(frozen=True)
class ModelProfile:
    """Memory profile of a model under tuning; needs neither its weights nor its data."""

    weights: Weights
    activations: Activations | None
    """None: not measured."""
    layers: int
    vocabulary: int
    """Logits of a token; 0 without an output head."""
    logits_at_once: int | None
    """Tokens whose logits exist at a time; None: all of a micro-batch."""
    plain_head: bool
    """Whether logits can be computed in chunks (``chunked_head.has_plain_head``)."""
    packing: Packing
    """How samples share micro-batches."""
    recomputes: bool
    """Whether blocks support gradient checkpointing."""
    bf16: bool
    """Whether matrix products are in bfloat16."""
    copies: bool
    """Whether FSDP makes bfloat16 copies of the weights, sharded or not."""
    masks: bool = False
    """Whether each layer saves the mask of a padded micro-batch, which the profile lacks."""


@dataclass(frozen=True)
class Placement:
    """Sharding of a model, and gradient checkpointing of its blocks."""

    sharding: Sharding
    checkpointing: bool
    gathered: bool = False
    """Whether weights that FSDP gathers (or copies) for the forward pass are kept for the backward
    pass instead of being gathered again."""

    def __str__(self) -> str:
        kept = ", weights kept gathered" if self.gathered else ""
        return f"{self.sharding}{kept}{', gradient checkpointing' if self.checkpointing else ''}"


@dataclass(frozen=True)
class MemoryDecision:
    """A placement with the estimated memory of a process."""

    placement: Placement
    parts: Mapping[Part, int]
    """Bytes by part."""
    available: int | None
    """Bytes of memory of a process; None: unknown."""
    measured: bool
    """Whether activations could be measured."""
    plain_head: bool = False
    """As in ``ModelProfile``."""
    warning: str = ""
    """Set if the placement is tried although it does not fit by the estimate; names what fits."""

    @property
    def needed(self) -> int:
        return sum(self.parts.values())

    @property
    def certain(self) -> int:
        """Bytes of the ``CERTAIN`` parts."""
        return sum(self.parts.get(part, 0) for part in CERTAIN)

    @property
    def fits(self) -> bool:
        return self.available is None or self.needed <= self.available

    @property
    def impossible(self) -> bool:
        """Whether the certain parts alone do not fit."""
        return self.available is not None and self.certain > self.available


def shards_of(sharding: Sharding, nodes: int, processes_per_node: int) -> int:
    """Processes that share one copy of the model."""
    return {
        "NoShard": 1,
        "HybridShard": processes_per_node,
        "FullShard": nodes * processes_per_node,
    }[sharding]


def may_shard(spec: FineTuneJobSpec) -> bool:
    """Whether a spec allows sharding of the model."""
    several = spec.compute.nodes * spec.compute.effective_processes_per_node > 1
    kinds = spec.method.kind.shards and spec.training.optimizer_kind.shards
    return several and kinds and spec.compute.sharding != "NoShard"


def placements(profile: ModelProfile, spec: FineTuneJobSpec) -> list[Placement]:
    """Return the placements that a spec allows, in order of preference.

    Gathering weights a second time costs less than gradient checkpointing, which costs at most a
    third of the time. The cost of sharding depends on the network, most of all between nodes.
    """
    compute = spec.compute
    shardings: list[Sharding] = ["NoShard"]
    if compute.sharding != "Auto":
        shardings = [compute.sharding]
    elif may_shard(spec):
        inner = compute.nodes > 1 and compute.effective_processes_per_node > 1
        shardings = ["NoShard", "HybridShard", "FullShard"] if inner else ["NoShard", "FullShard"]
    wanted = spec.training.gradient_checkpointing if profile.recomputes else "Never"
    again = {"Auto": (False, True), "Always": (True,), "Never": (False,)}[wanted]
    return [
        Placement(sharding, on, gathered)
        for sharding in shardings
        for on in again
        for gathered in ((True, False) if _gathers(profile, sharding) else (False,))
    ]


def _gathers(profile: ModelProfile, sharding: Sharding) -> bool:
    """Whether FSDP gathers or copies the weights of a block before the block runs."""
    return profile.copies or sharding != "NoShard"


def estimate(
    profile: ModelProfile, spec: FineTuneJobSpec, micro_batch: MicroBatchSize, placement: Placement
) -> dict[Part, int]:
    """Return the peak memory of a process in training, in bytes by part."""
    compute, weights = spec.compute, profile.weights
    processes_per_node = compute.effective_processes_per_node
    shards = shards_of(placement.sharding, compute.nodes, processes_per_node)
    found = profile.activations
    copies = 0.0 if found is None else found.constant
    if _gathers(profile, placement.sharding):
        copies += _gathered(profile, placement.gathered)
    parts: dict[Part, float] = {
        "parameters": weights.held / shards,
        "gradients": 4 * weights.trained / shards,
        "optimizer": weights.optimizer / shards,
        "anchors": weights.anchors / shards,
        "copies": copies,
    }
    if found is not None:
        parts |= _activations(profile, found, spec, micro_batch, placement)
    if compute.gpus_per_node == 0:
        parts["checkpoint"] = (4 * weights.trained + weights.optimizer) / shards
    total = sum(parts.values())
    runtime = _RUNTIME["gpu" if compute.gpus_per_node else "cpu"]
    share = _FRAGMENTATION if found is not None else _UNMEASURED / (1 - _UNMEASURED)
    parts["reserve"] = runtime + share * total
    return {part: round(parts[part]) for part in PARTS if parts.get(part)}


def _activations(
    profile: ModelProfile,
    found: Activations,
    spec: FineTuneJobSpec,
    micro_batch: MicroBatchSize,
    placement: Placement,
) -> dict[Part, float]:
    """Return the bytes of activations, logits and a block's backward pass. The last two never exist
    at the same time, so ``working`` counts only the excess over the logits."""
    tokens = -(-micro_batch.tokens // spec.compute.context_parallel)
    others = micro_batch.tokens - tokens
    block = found.block * tokens + found.keys / max(1, profile.layers) * others
    anchored = float(spec.training.anchor.kl_coefficient) > 0
    number = _LOGIT_BYTES + (_ANCHORED_BYTES if anchored else 0)
    learned = min(micro_batch.supervised, tokens, profile.logits_at_once or tokens)
    logits = float(number * profile.vocabulary * learned)
    mask = 0.0
    if profile.masks:
        mask = (2 if profile.bf16 else 4) * tokens * micro_batch.masked
        block += mask
    if placement.checkpointing:
        kept, working = (found.inputs + found.outside) * tokens, (1 + _GRADIENTS) * block
    else:
        kept, working = found.saved * tokens + found.keys * others, _GRADIENTS * block
        kept += profile.layers * mask
    return {"activations": kept, "logits": logits, "working": max(0.0, working - logits)}


def _gathered(profile: ModelProfile, all_blocks: bool) -> float:
    """Return the bytes that FSDP holds besides the shards.

    Weights: all outside of blocks; of blocks the current one, the prefetched one and its
    all-gather buffer (with ``all_blocks``: all blocks and one buffer). Gradients in float32, during
    the reduction: input and output of it for the last block and the one before, or outside of
    blocks, and what the micro-batches before have accumulated.
    """
    weights = profile.weights
    width = 2 if profile.copies else weights.held / weights.numbers  # mean bytes per element
    outside = weights.numbers - weights.blocks
    blocks = weights.blocks + weights.block if all_blocks else 3 * weights.block
    copies = width * (outside + max(blocks, 3 * weights.block))
    outside_trained = weights.trained - weights.blocks_trained
    reduced = max(2 * weights.block_trained, outside_trained)
    return copies + 4 * (reduced + max(weights.block_trained, outside_trained))


def decision_for(
    profile: ModelProfile,
    spec: FineTuneJobSpec,
    micro_batch: MicroBatchSize,
    placement: Placement,
    available: int | None,
) -> MemoryDecision:
    """Return the memory decision for a given placement."""
    parts = estimate(profile, spec, micro_batch, placement)
    return MemoryDecision(
        placement, parts, available, profile.activations is not None, profile.plain_head
    )


def decide(
    profile: ModelProfile, spec: FineTuneJobSpec, micro_batch: MicroBatchSize, available: int | None
) -> MemoryDecision:
    """Return the first placement that fits. If none fits: the smallest of the placements that are
    not impossible, else the smallest of all."""
    found = [
        decision_for(profile, spec, micro_batch, placement, available)
        for placement in placements(profile, spec)
    ]
    least = min(found, key=lambda one: (one.impossible, one.needed))
    return next((one for one in found if one.fits), least)
