"""Changes of a spec that fit into memory, for the message of a spec that does not.

ladder = changes of one kind, from the smallest to the largest; its first rung that fits is used
base   = changes that every rung of a pass starts from: none, then the cheap ones, then a method
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from finetune_api.base import InvalidSpec
from finetune_api.optimizers import OPTIMIZERS
from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_trainer.engine.memory.estimate import MemoryDecision, ModelProfile, decide
from finetune_trainer.engine.memory.formatting import gibibytes
from finetune_trainer.engine.memory.requirements import check_image
from finetune_trainer.engine.planning.micro_batch_size import Samples, micro_batch_tokens_of
from finetune_trainer.failures import UserError

Change = dict[str, Any]
"""Values at dotted paths of a spec."""

Measure = Callable[[FineTuneJobSpec], ModelProfile]
"""Memory profile of a model under any spec (``ProfileCache``)."""

_SUGGESTED: Final = 3
"""Largest number of alternatives in a message."""
_MOST_TIMES: Final = 64
"""Largest factor tried for the number of nodes."""


@dataclass(frozen=True)
class Alternative:
    """A changed spec that fits."""

    change: Change
    spec: FineTuneJobSpec
    found: MemoryDecision

    def __str__(self) -> str:
        shown = [
            f"{path}.type: {value['type']}" if isinstance(value, dict) else f"{path}: {value}"
            for path, value in self.change.items()
        ]
        return f"{' with '.join(shown)} ({gibibytes(self.found.needed)})"


def alternatives(
    spec: FineTuneJobSpec, samples: Samples, available: int, measure: Measure
) -> list[Alternative]:
    """Return up to three independent changes of a spec, each of which makes it fit. If no single
    change does, several changes are combined.

    Each kind of change is a ladder from the smallest to the largest change; its first rung that
    fits is used.
    """

    def profile_of(other: FineTuneJobSpec) -> ModelProfile | None:
        try:
            check_image(other)
            return measure(other)
        except UserError:
            return None

    def tried(change: Change) -> Alternative | None:
        other = _changed(spec, change)
        profile = profile_of(other) if other is not None else None
        if other is None or profile is None:
            return None
        found = decide(
            profile, other, samples.largest_micro_batch(other, profile.packing), available
        )
        return Alternative(change, other, found) if found.fits else None

    for base in _bases(spec, samples):
        if base and (one := tried(base)):
            return [one]
        found = (
            next((one for rung in ladder if (one := tried(base | rung))), None)
            for ladder in _ladders(spec, samples)
        )
        if fitting := list(islice(filter(None, found), _SUGGESTED)):
            return fitting
    return []


def _bases(spec: FineTuneJobSpec, samples: Samples) -> Iterator[Change]:
    """Yield the changes to start from: none; all changes that only cost time; these with another
    method."""
    yield {}
    saving = {path: value for ladder in _cheap(spec, samples) for path, value in ladder[-1].items()}
    yield saving
    for method in _methods(spec):
        yield saving | method


def _ladders(spec: FineTuneJobSpec, samples: Samples) -> list[list[Change]]:
    compute = spec.compute
    processes = compute.effective_processes_per_node
    sharing = [n for n in range(2 * compute.context_parallel, processes + 1) if processes % n == 0]
    ladders = [*_cheap(spec, samples)]
    if spec.method.kind.trains:
        ladders.append([{"compute.contextParallel": n} for n in sharing])
    if 0 < compute.gpus_per_node < 8 and compute.processes_per_node is None:
        ladders.append([{"compute.gpusPerNode": n} for n in (2, 4, 8) if n > compute.gpus_per_node])
    ladders += [[method] for method in _methods(spec)]
    ladders.append(_optimizers(spec))
    times = [2**i for i in range(1, _MOST_TIMES.bit_length())]
    ladders.append([{"compute.nodes": compute.nodes * n} for n in times])
    return [ladder for ladder in ladders if ladder]


def _cheap(spec: FineTuneJobSpec, samples: Samples) -> list[list[Change]]:
    """Return ladders of changes that affect neither the result nor the hardware."""
    ladders: list[list[Change]] = []
    if spec.training.gradient_checkpointing == "Never":
        ladders.append([{"training.gradientCheckpointing": "Auto"}])
    if spec.compute.sharding != "Auto":
        ladders.append([{"compute.sharding": "Auto"}])
    micro_batches = []
    tokens = micro_batch_tokens_of(spec, samples.max_length, samples.longest)
    while tokens > samples.longest:
        tokens = max(tokens // 2, samples.longest, 8)
        micro_batches.append({"training.microBatchTokens": tokens})
        if tokens == 8:
            break
    return [*ladders, *([micro_batches] if micro_batches else [])]


def _methods(spec: FineTuneJobSpec) -> list[Change]:
    """Return methods that train fewer weights or hold them in fewer bits."""
    found: list[Change] = []
    if not spec.method.kind.trains:
        return found
    if not spec.method.kind.adapts:
        found.append({"method": {"type": "LoRA"}})
    if not spec.method.kind.quantizes and spec.compute.gpus_per_node > 0:
        lora = spec.method.lora.to_json() if spec.method.lora else None
        found.append({"method": {"type": "QLoRA", **({"lora": lora} if lora else {})}})
    return found


def _optimizers(spec: FineTuneJobSpec) -> list[Change]:
    """Return optimizers with less state, the next smaller one first."""
    if not spec.method.kind.trains:
        return []
    own = spec.training.optimizer_kind.state_bytes
    smaller = [(kind.state_bytes, name) for name, kind in OPTIMIZERS.items()]
    return [
        {"training.optimizer": name} for size, name in sorted(smaller, reverse=True) if size < own
    ]


def _changed(spec: FineTuneJobSpec, change: Change) -> FineTuneJobSpec | None:
    """Return a spec with values set at dotted paths; None if the changed spec is invalid."""
    raw = spec.to_json()
    for path, value in change.items():
        *parents, last = path.split(".")
        block = raw
        for parent in parents:
            block = block[parent]
        block[last] = value
    try:
        return parse_spec(raw)
    except InvalidSpec:
        return None
