"""Table that classifies CUDA, cuBLAS, cuDNN and NCCL errors by their text. First match wins.

The reason of a fault, by its row in ``finetune_api.failures``, answers three questions. Is the
hardware or the node broken, so that another node helps? Is a peer lost, so that waiting for its
replacement helps? Or does the same program fail on any node? An unknown CUDA error is treated as a
program bug: the texts of hardware faults are few and known, and a bug classified as a node failure
would be retried forever.

Sources of the texts: cudaGetErrorString of CUDA 13, torch's c10/cuda and ProcessGroupNCCL,
ncclGetErrorString.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Final, NamedTuple


class DeviceFault(NamedTuple):
    """One row of the table."""

    patterns: tuple[str, ...]
    """Lower-case substrings; the row matches if any is in the lower-cased error text."""
    reason: str
    what: str
    """What happened: the start of the message, before the error text."""
    remedy: str


_LESS_MEMORY: Final = (
    "Lower training.microBatchTokens or maxLength, set training.gradientCheckpointing: Always, or"
    " use more GPUs"
)
_ELSEWHERE: Final = "The run continues on another node; check this node if the error recurs"
_OUR_FAULT: Final = (
    "Another node would fail the same way. With CUDA_LAUNCH_BLOCKING=1 in the training pods"
    " (compute.podTemplate) the stack trace names the operation; report it, with the versions of"
    " torch and of the driver"
)
_IMAGE: Final = "Give compute.image a build for these GPUs, or nodes with a newer driver"

DEVICE_FAULTS: Final[tuple[DeviceFault, ...]] = (
    # Hardware faults come first: NCCL errors quote these texts.
    DeviceFault(
        (
            "uncorrectable ecc", "ecc uncorrectable", "uncorrectable nvlink", "nvlink error",
            "peer gpu memory over nvlink or a hardware error", "fallen off the bus", "gpu is lost",
            "nvrm: xid", "cuda error: unknown error", "cuda driver error: unknown error",
        ),
        "DeviceFault", "the GPU failed", _ELSEWHERE,
    ),
    DeviceFault(
        (
            "busy or unavailable", "no cuda-capable device", "no cuda gpus are available",
            "system not yet initialized", "unsupported display driver / cuda driver combination",
            "forward compatibility was attempted", "mps server", "mps client",
            "cuda error: initialization error",
        ),
        "DeviceUnavailable", "the node's GPU or driver is not ready", _ELSEWHERE,
    ),
    DeviceFault(
        ("/dev/shm/nccl", "creating shared memory segment"),
        "SharedMemoryFull", "/dev/shm is too small for the buffers of NCCL",
        "Raise compute.sharedMemory",
    ),
    DeviceFault(
        (
            "cuda out of memory", "cuda error: out of memory", "cuda driver error: out of memory",
            "'out of memory'", "cublas_status_alloc_failed", "cudnn_status_alloc_failed",
            # torch raises this only after it has emptied its cache and retried.
            "cublas_status_not_initialized",
        ),
        "DeviceOutOfMemory", "the GPU is out of memory",
        f"{_LESS_MEMORY}. If it happened while a checkpoint was copied, the host ran out of pinned"
        " memory: set checkpoint.staging: Disk",
    ),
    DeviceFault(
        ("defaultcpuallocator: can't allocate memory", "defaultcpuallocator: not enough memory"),
        "HostOutOfMemory", "the host is out of memory",
        "Raise compute.resources.limits.memory, lower training.microBatchTokens or, if it happened"
        " while a checkpoint was saved, set checkpoint.staging: Disk",
    ),
    DeviceFault(
        (
            "no kernel image is available", "driver version is insufficient",
            "provided ptx was compiled with an unsupported toolchain",
            "cublas_status_arch_mismatch", "cudnn_status_arch_mismatch",
            "not supported in the installed cuda driver",
        ),
        "ImageUnsuitable", "the image does not suit the GPU or its driver", _IMAGE,
    ),
    DeviceFault(
        ("duplicate gpu detected", "ncclinvalidusage", "ncclinvalidargument"),
        "NCCLMisused", "NCCL rejected a call as invalid",
        "A retry would fail the same way: each process of a node needs its own GPU"
        " (compute.processesPerNode, CUDA_VISIBLE_DEVICES). Otherwise report it",
    ),
    DeviceFault(
        (
            # Faults inside a kernel: memory accesses and instructions.
            "illegal memory access", "misaligned address",
            # The full phrase: torch's CUDA errors end with a hint on "device-side assertions".
            "device-side assert triggered",
            "unspecified launch failure", "illegal instruction", "invalid program counter",
            "hardware stack error", "operation not supported on global/shared address space",
            # Faults of a launch.
            "invalid argument", "invalid configuration argument", "invalid device function",
            "too many resources requested for launch", "invalid resource handle",
            "invalid device ordinal", "stream is capturing",
            "cublas_status_", "cudnn_status_", "cusparse_status_", "cusolver_status_",
        ),
        "KernelFailed", "a GPU kernel failed", _OUR_FAULT,
    ),
    DeviceFault(
        (
            "ncclremoteerror", "ncclsystemerror", "collective operation timeout",
            "watchdog got stuck", "nccl communicator was aborted", "nccl timeout",
            "connection closed by", "connection reset by peer", "connection refused",
            "socket recv failed", "got completion", "net/ib",
        ),
        "PeerLost", "another rank was lost", "",
    ),
    DeviceFault(
        ("ncclunhandledcudaerror",),
        "DeviceFault", "NCCL could not use the GPU", _ELSEWHERE,
    ),
    DeviceFault(
        ("ncclinternalerror",),
        "NCCLFailed", "NCCL reports an internal error",
        "NCCL_DEBUG=INFO in the training pods (compute.podTemplate) logs details; report it",
    ),
    DeviceFault(
        ("cuda error:", "cuda driver error:", "cudnn error:"),
        "KernelFailed", "a call to CUDA failed", _OUR_FAULT,
    ),
)  # fmt: skip


_SPEAKERS: Final = re.compile(
    r"cuda|cublas|cudnn|cusparse|cusolver|nccl|nvrm|nvlink|gpu|/dev/shm|defaultcpuallocator"
)
"""Only a text that names one of these is classified: other libraries' errors contain "invalid
argument" and "connection refused" too."""


def device_fault(text: str) -> DeviceFault | None:
    """Return the first row that matches an error text, or None."""
    lower = text.lower()
    if not _SPEAKERS.search(lower):
        return None
    return next((row for row in DEVICE_FAULTS if any(p in lower for p in row.patterns)), None)


def shown(text: str) -> str:
    """Return the part of an error text to quote: its first line, and NCCL's last error."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    after = [b for a, b in pairwise(lines) if a.lower().startswith("last error")]
    return "; ".join([*lines[:1], *after[:1]])
