"""How much memory a training process takes, and how a model is laid out so that it fits.

    rehearsal ──► Facts ─┐
    index ──► MicroBatchSize ───┼─► estimate ──► parts in bytes ──► decide ──► Placement
    spec ────────────────┘

Facts are measured on the real implementation without its weights (``rehearsal``); the rest is
arithmetic. Not counted are measurements on held-out data, which keep nothing for a backward pass,
what Liger's kernels and torch.compile save, and the model's way through the memory of the CPU to
that of a GPU.
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
    "parameters": "weights, trained ones in 32 bits",
    "gradients": "of trained weights, in 32 bits",
    "optimizer": "its state",
    "anchors": "untuned weights that the model is held to",
    "copies": "weights in the precision of the matrix products, and what sharding gathers",
    "activations": "what the forward pass of a row keeps for the backward pass",
    "logits": "probabilities of the learned tokens and their gradients",
    "working": "what a decoder block takes on the way back, beyond the room of the logits",
    "checkpoint": "copy of what is trained, while it is saved",
    "reserve": "runtime and libraries, communication buffers, fragmentation",
}

CERTAIN: Final[tuple[Part, ...]] = ("parameters", "gradients", "optimizer", "anchors")
"""Parts that are numbers of parameters by their widths, and are all there when the optimizer steps:
no error of the estimate can make them smaller. All others depend on what kernels, libraries and
allocators do."""

_LOGIT_BYTES: Final = 12
"""A number of the logits at the peak, which is in the backward pass: its logarithm of the
probability, the gradient of that, and that of the logit, each in 32 bits. The model's own logits
are gone by then."""

_ANCHORED_BYTES: Final = 20
"""What an anchor to the untuned outputs adds to each: the untuned logit, both logarithms of the
probability, and the divergence with its gradient."""

_GRADIENTS: Final = 0.5
"""Gradients of its activations that a block holds at a time on the way back, over what it keeps:
0.2 to 0.5 of Llama-like blocks, counted on a CPU (see ``tests/trainer/test_profiling.py``)."""

_RUNTIME: Final = {"gpu": 3 << 29, "cpu": 5 << 28}
"""What a process takes before it trains: on a GPU its context, the libraries' workspaces and the
buffers of the collectives (1.5 GiB); on a CPU Python and the libraries (0.9 GiB, as measured) and
the threads' pools (together 1.25 GiB)."""

_FRAGMENTATION: Final = 0.05
"""Share of everything else that allocators lose between blocks."""

_UNMEASURED: Final = 0.3
"""Share of the memory that is left to activations where they could not be measured."""


@dataclass(frozen=True)
class Activations:
    """What the forward pass of a row keeps for the backward pass: bytes per token, but for
    ``constant``."""

    saved: float
    """Everything."""
    outside: float
    """Of that, what no decoder block keeps."""
    block: float
    """Of that, what the largest block keeps."""
    inputs: float
    """Inputs of all blocks: what is kept of them where they are computed again."""
    keys: float
    """Keys and values of all blocks, which processes that share a row gather."""
    constant: int
    """Bytes at any number of tokens: the casts of weights that autocast keeps."""


@dataclass(frozen=True)
class Weights:
    """Sizes of a model under tuning."""

    held: int
    """Bytes of all weights, as a process holds them that holds all."""
    numbers: int
    trained: int
    """Numbers that are trained."""
    optimizer: int
    """Bytes of the optimizer's state."""
    anchors: int
    """Bytes of what anchors keep."""
    block: int
    """Numbers of the largest decoder block."""
    block_trained: int
    blocks: int
    """Numbers of all decoder blocks."""
    blocks_trained: int


@dataclass(frozen=True)
class ModelProfile:
    """What is known of a model under tuning without its weights and its data."""

    weights: Weights
    activations: Activations | None
    """None: not measured."""
    layers: int
    vocabulary: int
    """Numbers of a token's logits; 0 without an output head."""
    logits_at_once: int | None
    """Tokens whose logits are there at a time; None: all of a row's."""
    plain_head: bool
    """Whether logits can be had in chunks (``head.has_plain_head``)."""
    packing: Packing
    """How samples share rows."""
    recomputes: bool
    """Whether blocks can compute their activations again."""
    bf16: bool
    """Whether matrix products are in bfloat16."""
    copies: bool
    """Whether FSDP makes bfloat16 copies of the weights, in shards or not."""
    masks: bool = False
    """Whether each layer keeps the mask of a padded row, which the measured one had none of."""


@dataclass(frozen=True)
class Placement:
    """How a model lies on the processes, and whether blocks compute their activations again."""

    sharding: Sharding
    checkpointing: bool
    gathered: bool = False
    """Whether weights that sharding gathers (or copies) for the forward pass are kept for the
    backward pass, not gathered a second time."""

    def __str__(self) -> str:
        kept = ", weights kept gathered" if self.gathered else ""
        return f"{self.sharding}{kept}{', gradient checkpointing' if self.checkpointing else ''}"


@dataclass(frozen=True)
class MemoryDecision:
    """A placement with what a process takes in it."""

    placement: Placement
    parts: Mapping[Part, int]
    room: int | None
    """Bytes of memory of a process; None: not known."""
    measured: bool
    """Whether activations could be measured."""
    plain_head: bool = False
    """As ``Facts`` has it."""
    warning: str = ""
    """Where it is taken though it does not fit by the estimate: what would fit."""

    @property
    def needed(self) -> int:
        return sum(self.parts.values())

    @property
    def certain(self) -> int:
        """Of it, what no error of the estimate makes smaller."""
        return sum(self.parts.get(part, 0) for part in CERTAIN)

    @property
    def fits(self) -> bool:
        return self.room is None or self.needed <= self.room

    @property
    def impossible(self) -> bool:
        """Whether it does not fit, however wrong the estimate may be."""
        return self.room is not None and self.certain > self.room


def shards_of(sharding: Sharding, nodes: int, processes_per_node: int) -> int:
    """Processes that share one copy of the model."""
    return {
        "NoShard": 1,
        "HybridShard": processes_per_node,
        "FullShard": nodes * processes_per_node,
    }[sharding]


def may_shard(spec: FineTuneJobSpec) -> bool:
    """Whether a spec allows that processes hold parts of the model."""
    several = spec.compute.nodes * spec.compute.effective_processes_per_node > 1
    kinds = spec.method.kind.shards and spec.training.optimizer_kind.shards
    return several and kinds and spec.compute.sharding != "NoShard"


def placements(profile: ModelProfile, spec: FineTuneJobSpec) -> list[Placement]:
    """What a spec allows, the preferred first: gathering weights a second time costs less than
    computing activations again, which costs a third of the time at most; what sharding costs
    depends on the network, most of all between nodes."""
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
    """Whether FSDP gathers or copies the weights of a block before it is run."""
    return profile.copies or sharding != "NoShard"


def estimate(
    profile: ModelProfile, spec: FineTuneJobSpec, micro_batch: MicroBatchSize, placement: Placement
) -> dict[Part, int]:
    """Bytes that a process takes at most while it trains."""
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
    """Logits and what a block computes on the way back are there at different times."""
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
    """What FSDP holds beside the shards.

    Of weights: outside of blocks all, of blocks the one at work, the next, and the buffer that it
    comes in (with ``all_blocks`` all of them, and the buffer). Of gradients, in 32 bits, what is
    being added up over the processes: the last block's and the one before it, or what lies outside
    of blocks.
    """
    weights = profile.weights
    width = 2 if profile.copies else weights.held / weights.numbers  # a mean, in bytes
    gradient_width = 2 if profile.copies else 4
    outside = weights.numbers - weights.blocks
    blocks = weights.blocks + weights.block if all_blocks else 3 * weights.block
    copies = width * (outside + max(blocks, 3 * weights.block))
    outside_trained = weights.trained - weights.blocks_trained
    reduced = max(2 * weights.block_trained, outside_trained)
    return copies + 4 * reduced + gradient_width * max(weights.block_trained, outside_trained)


def decision_for(
    profile: ModelProfile,
    spec: FineTuneJobSpec,
    micro_batch: MicroBatchSize,
    placement: Placement,
    room: int | None,
) -> MemoryDecision:
    """What a process takes in a placement."""
    parts = estimate(profile, spec, micro_batch, placement)
    return MemoryDecision(
        placement, parts, room, profile.activations is not None, profile.plain_head
    )


def decide(
    profile: ModelProfile, spec: FineTuneJobSpec, micro_batch: MicroBatchSize, room: int | None
) -> MemoryDecision:
    """The first placement that fits; where none does, of those that are possible the one that takes
    least."""
    found = [
        decision_for(profile, spec, micro_batch, placement, room)
        for placement in placements(profile, spec)
    ]
    least = min(found, key=lambda one: (one.impossible, one.needed))
    return next((one for one in found if one.fits), least)
