"""Layout of the training processes on one machine: a supervisor per node, and its GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from finetune_api.cluster import Compute


@dataclass(frozen=True)
class Layout:
    """Supervisors to start, and the processes and GPUs of each."""

    nodes: int
    processes: int
    """Training processes per node."""
    gpus: tuple[tuple[int, ...], ...]
    """GPU indices of each node; empty: the node trains on the CPU."""
    context_parallel: int
    """Processes that share a micro-batch."""
    notes: tuple[str, ...] = ()
    """Differences from the manifest, shown to the user."""


def lay_out(compute: Compute, gpus: int, cores: int) -> Layout:
    """Return the layout for a machine with ``gpus`` GPUs and ``cores`` cores.

    The training result does not depend on the number of processes, so a smaller machine only takes
    longer.
    """
    nodes, processes = compute.nodes, compute.effective_processes_per_node
    notes = []
    if compute.gpus_per_node > 0 and gpus == 0:
        processes = 1
        nodes = min(nodes, cores)
        notes.append(
            f"compute.gpusPerNode is {compute.gpus_per_node}, but this machine has no GPU: training"
            f" on the CPU with {nodes} {'process' if nodes == 1 else 'processes'}"
        )
    dealt: list[tuple[int, ...]] = [()] * nodes
    if compute.gpus_per_node > 0 and gpus > 0:
        processes_per_node = compute.gpus_per_node
        if nodes * processes_per_node > gpus:
            nodes, processes_per_node = (nodes, gpus // nodes) if gpus >= nodes else (1, gpus)
            processes = min(processes, processes_per_node)
            notes.append(
                f"the manifest requests {compute.nodes} x {compute.gpus_per_node} GPUs, this"
                f" machine has {gpus}: training with {nodes} x {processes_per_node}"
            )
        dealt = [
            tuple(range(i * processes_per_node, (i + 1) * processes_per_node)) for i in range(nodes)
        ]
    shared = math.gcd(compute.context_parallel, processes)
    if shared != compute.context_parallel:
        notes.append(
            f"compute.contextParallel is {compute.context_parallel}, but a node has {processes}"
            f" {'process' if processes == 1 else 'processes'} here: {shared} of them share a"
            " micro-batch"
        )
    return Layout(nodes, processes, tuple(dealt), shared, tuple(notes))


def count_gpus() -> int:
    """Count this machine's NVIDIA GPUs by /dev entries; importing torch would take seconds."""
    return len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdecimal()])
