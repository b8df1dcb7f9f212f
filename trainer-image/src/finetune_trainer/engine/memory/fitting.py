"""Whether training fits into the memory of its processes.

Used by prepare, with the memory stated in the manifest, and by training, with the memory of its
devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from finetune_api.results import MemoryEstimate
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.memory.alternatives import Measure, alternatives
from finetune_trainer.engine.memory.estimate import (
    CERTAIN,
    PARTS,
    MemoryDecision,
    Part,
    decide,
    decision_for,
    placements,
)
from finetune_trainer.engine.memory.formatting import gibibytes
from finetune_trainer.engine.planning.micro_batch_size import Samples
from finetune_trainer.failures import UserError


def fit(
    spec: FineTuneJobSpec, samples: Samples, available: int | None, measure: Measure
) -> MemoryDecision:
    """Return the memory decision for a run.

    The estimate may be wrong: if no placement fits by the estimate, but the certain parts fit, the
    smallest placement is used with a warning that names what fits.

    Args:
        spec: with the actual number of nodes and processes.
        available: bytes of memory of a process; None: unknown.

    Raises:
        UserError: 'DoesNotFit', naming what fits.
    """
    profile = measure(spec)
    found = decide(profile, spec, samples.largest_micro_batch(spec, profile.packing), available)
    if found.fits or available is None:
        return found
    fitting = alternatives(spec, samples, available, measure)
    remedy = (
        f"What fits: {'; or '.join(map(str, fitting))}"
        if fitting
        else "Nothing that was tried fits by the estimate (more GPUs, smaller micro-batches, other"
        " methods): take a smaller model"
    )
    where = "its GPU" if spec.compute.gpus_per_node else "its share of the node or the pod"
    there = f"but a process has {gibibytes(available)} ({where})"
    if found.impossible:
        raise UserError(
            "DoesNotFit",
            f"{_certain(spec)} alone take {gibibytes(found.certain)} of memory in each process"
            f" ({found.placement}: {_largest(found, CERTAIN)}), {there}. {remedy}",
        )
    work = "training" if spec.method.kind.trains else "evaluation"
    warning = (
        f"By the estimate, {work} takes {gibibytes(found.needed)} of memory in each process"
        f" ({found.placement}: {_largest(found, PARTS)}), {there}: it may not fit. {remedy}"
    )
    return replace(found, warning=warning)


def check_min_nodes(
    spec: FineTuneJobSpec, samples: Samples, available: int | None, measure: Measure
) -> None:
    """Check that the training fits on ``compute.minNodes`` too: a sharded model needs more memory
    in each process there.

    Raises:
        UserError: 'DoesNotFit', with the fewest nodes that suffice.
    """
    fewest, most = spec.compute.effective_min_nodes, spec.compute.nodes
    if available is None or fewest >= most:
        return
    profile = measure(spec)

    def decided(nodes: int) -> MemoryDecision:
        there = _with_nodes(spec, nodes)
        micro_batch = samples.largest_micro_batch(there, profile.packing)
        return decide(profile, there, micro_batch, available)

    found = decided(fewest)
    if not found.impossible:
        return
    enough = next((n for n in range(fewest + 1, most) if not decided(n).impossible), most)
    raise UserError(
        "DoesNotFit",
        f"compute.minNodes is {fewest}, but on {fewest} of {most} nodes {_certain(spec)} alone take"
        f" {gibibytes(found.certain)} of memory in each process ({found.placement}), which has"
        f" {gibibytes(available)}. Set compute.minNodes: {enough}",
    )


def _certain(spec: FineTuneJobSpec) -> str:
    """The ``CERTAIN`` parts in words."""
    return "weights" + ", gradients, optimizer state and anchors" * spec.method.kind.trains


def _with_nodes(spec: FineTuneJobSpec, nodes: int) -> FineTuneJobSpec:
    compute = spec.compute.model_copy(update={"nodes": nodes})
    return spec.model_copy(update={"compute": compute})


def _largest(found: MemoryDecision, parts: Iterable[Part]) -> str:
    """Format the three largest of some parts."""
    sizes = sorted(((found.parts.get(part, 0), part) for part in parts), reverse=True)
    return ", ".join(f"{part} {gibibytes(size)}" for size, part in sizes[:3] if size)


def others(
    spec: FineTuneJobSpec, samples: Samples, found: MemoryDecision, measure: Measure
) -> list[MemoryDecision]:
    """Return the memory decisions for the other placements that a spec allows."""
    profile = measure(spec)
    micro_batch = samples.largest_micro_batch(spec, profile.packing)
    return [
        decision_for(profile, spec, micro_batch, placement, found.available)
        for placement in placements(profile, spec)
        if placement != found.placement
    ]


def memory_estimate(found: MemoryDecision) -> MemoryEstimate:
    """Convert a memory decision to the form of prepare's summary."""
    return MemoryEstimate(
        needed=found.needed,
        available=found.available,
        sharding=found.placement.sharding,
        gradient_checkpointing=found.placement.checkpointing,
        parts={str(part): count for part, count in found.parts.items()},
        warning=found.warning or None,
    )
