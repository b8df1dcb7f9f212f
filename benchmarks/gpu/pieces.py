"""Duration of single parts of a training step and of a checkpoint on a GPU.

    python benchmarks/gpu/pieces.py

Without a GPU the parts run on small tensors, as a smoke test. Each result is a line of JSON in the
file that GPU_RESULTS names.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent))

from training import tell

from finetune_trainer.engine.checkpointing.staging import Staging
from finetune_trainer.engine.muon import orthogonalise
from finetune_trainer.storage.checkpoint_files import PART_BYTES

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315), 5, 1e-7


def settle() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """Return the shortest duration of several runs, after one warm-up run."""
    work()
    found = []
    for _ in range(times):
        settle()
        began = time.perf_counter()
        work()
        settle()
        found.append(time.perf_counter() - began)
    return min(found)


def show(name: str, **figures: Any) -> None:
    print(name, *(f"{k} {v}" for k, v in figures.items()), flush=True)
    tell(name=name, **figures)


def staging(matrices: int) -> None:
    """Measure how long staging blocks training; the state is matrices of 4 MiB."""
    state = {f"w{i}": torch.randn(1024, 1024, device=DEVICE) for i in range(matrices)}
    size = sum(t.nbytes for t in state.values())
    copies = Staging(None, None)
    settle()
    began = time.perf_counter()
    copies.copy(state)
    first = time.perf_counter() - began
    again = seconds(lambda: copies.copy(state))
    show(
        "checkpoint: copy to the host", size=f"{size / 1e6:.0f} MB", first_s=round(first, 3),
        ms=round(again * 1e3, 2), rate=f"{size / again / 1e9:.1f} GB/s",
        parts=-(-size // PART_BYTES),
    )  # fmt: skip


def muon(rows: int, columns: int, count: int) -> None:
    matrices = [torch.randn(rows, columns, device=DEVICE).bfloat16() for _ in range(count)]
    took = seconds(lambda: orthogonalise(matrices, *NEWTON_SCHULZ))
    low, high = sorted((rows, columns))
    operations = count * 5 * (4 * low * low * high + 2 * low**3)
    show(
        "Muon: Newton-Schulz", size=f"{count} of {rows} x {columns}", ms=round(took * 1e3, 2),
        rate=f"{operations / took / 1e12:.1f} TFLOP/s",
    )  # fmt: skip


def logits(tokens: int, hidden: int, vocabulary: int) -> None:
    """Measure output head and loss of a micro-batch without chunks, the baseline of chunking."""
    x = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(vocabulary, hidden, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.randint(vocabulary, (tokens,), device=DEVICE)

    def work() -> None:
        cross_entropy((x @ head.T).float(), labels).backward()

    show("head and loss, no chunks", size=f"{tokens} tokens", ms=round(seconds(work) * 1e3, 2))


def main() -> None:
    if CUDA:
        staging(900)
        muon(4096, 4096, 8)
        muon(16, 4096, 448)
        logits(2048, 2048, 128_256)
    else:
        staging(3)
        muon(64, 64, 2)
        muon(4, 64, 4)
        logits(16, 32, 97)


if __name__ == "__main__":
    main()
