"""Format the memory estimate: byte counts, and the table that prepare and the trainer print."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_trainer.engine.memory.estimate import PARTS, MemoryDecision


def gibibytes(count: float) -> str:
    """Format a byte count: ``12.3 GiB``, ``45 MiB``."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):,.1f} GiB"
    return f"{count / (1 << 20):,.0f} MiB"


def table(found: MemoryDecision, others: Sequence[MemoryDecision] = ()) -> str:
    """Format a memory decision, one line per part; ``others``: placements that were tried, each
    with its sum."""
    available = (
        "not known before training" if found.available is None else gibibytes(found.available)
    )
    lines = [f"memory of a training process, estimated ({found.placement}):"]
    lines += [f"  {gibibytes(n):>12}  {part:<12} {PARTS[part]}" for part, n in found.parts.items()]
    lines += [f"  {gibibytes(found.needed):>12}  of {available}"]
    if not found.measured:
        lines.append("  activations could not be measured for this architecture: in the reserve")
    lines += [f"  {gibibytes(other.needed):>12}  with {other.placement}" for other in others]
    if found.warning:
        lines.append(f"  {found.warning}")
    return "\n".join(lines)
