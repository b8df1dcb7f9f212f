"""What the texts of CUDA, cuBLAS, cuDNN and NCCL errors mean: pure data, the first match counts.

Three questions decide a row. Is the hardware or the node broken, so that another node helps? Is a
peer gone, so that waiting for it helps? Or does the same program fail again wherever it runs? What
no row knows of CUDA is the program's fault: texts of broken hardware are few and known, and a bug
that is called a bad node is retried for ever.

Texts: cudaGetErrorString of CUDA 13, torch's c10/cuda and ProcessGroupNCCL, ncclGetErrorString.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Final, Literal, NamedTuple

Kind = Literal["OutOfMemory", "NodeFailure", "PeerLost", "UserError", "Internal"]


class DeviceFault(NamedTuple):
    """One row."""

    patterns: tuple[str, ...]
    """Any of these in the text of the error, force the case of its letters."""
    kind: Kind
    reason: str
    what: str
    """What happened, before the text of the error."""
    remedy: str


_LESS_MEMORY: Final = (
    "Lower training.microBatchTokens or maxLength, set training.gradientCheckpointing: Always, or"
    " use more GPUs"
)
_ELSEWHERE: Final = "The run goes on elsewhere; have the node looked at if it comes again"
_OUR_FAULT: Final = (
    "Another node would fail alike. With CUDA_LAUNCH_BLOCKING=1 in the training pods"
    " (compute.podTemplate) the stack names the operation; report it, with the versions of torch"
    " and of the driver"
)
_IMAGE: Final = "Give compute.image a build for these GPUs, or nodes with a newer driver"

DEVICE_FAULTS: Final[tuple[DeviceFault, ...]] = (
    # Hardware first: other texts (NCCL's) quote these.
    DeviceFault(
        (
            "uncorrectable ecc", "ecc uncorrectable", "uncorrectable nvlink", "nvlink error",
            "peer gpu memory over nvlink or a hardware error", "fallen off the bus", "gpu is lost",
            "nvrm: xid", "cuda error: unknown error", "cuda driver error: unknown error",
        ),
        "NodeFailure", "DeviceFault", "the GPU failed", _ELSEWHERE,
    ),
    DeviceFault(
        (
            "busy or unavailable", "no cuda-capable device", "no cuda gpus are available",
            "system not yet initialized", "unsupported display driver / cuda driver combination",
            "forward compatibility was attempted", "mps server", "mps client",
            "cuda error: initialization error",
        ),
        "NodeFailure", "DeviceUnavailable", "the node's GPU or driver is not ready", _ELSEWHERE,
    ),
    DeviceFault(
        ("/dev/shm/nccl", "creating shared memory segment"),
        "UserError", "SharedMemoryFull", "/dev/shm is too small for the buffers of NCCL",
        "Raise compute.sharedMemory",
    ),
    DeviceFault(
        (
            "cuda out of memory", "cuda error: out of memory", "cuda driver error: out of memory",
            "'out of memory'", "cublas_status_alloc_failed", "cudnn_status_alloc_failed",
            # torch has emptied its cache and tried again before this is raised.
            "cublas_status_not_initialized",
        ),
        "OutOfMemory", "DeviceOutOfMemory", "the GPU's memory does not suffice",
        f"{_LESS_MEMORY}. Where this came while a checkpoint was copied, pinned memory of the host"
        " ran out: set checkpoint.staging: Disk",
    ),
    DeviceFault(
        ("defaultcpuallocator: can't allocate memory", "defaultcpuallocator: not enough memory"),
        "OutOfMemory", "HostOutOfMemory", "the memory of the host does not suffice",
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
        "UserError", "ImageUnsuitable", "the image does not suit the GPU or its driver", _IMAGE,
    ),
    DeviceFault(
        ("duplicate gpu detected", "ncclinvalidusage", "ncclinvalidargument"),
        "Internal", "NCCLMisused", "NCCL refuses how it was called",
        "Another try would fail alike: processes of a node need a GPU each"
        " (compute.processesPerNode, CUDA_VISIBLE_DEVICES). Else report it",
    ),
    DeviceFault(
        (
            # What a kernel did with the memory or instructions that it was given.
            "illegal memory access", "misaligned address",
            # In full: CUDA errors of torch end with advice on "device-side assertions".
            "device-side assert triggered",
            "unspecified launch failure", "illegal instruction", "invalid program counter",
            "hardware stack error", "operation not supported on global/shared address space",
            # How it was launched.
            "invalid argument", "invalid configuration argument", "invalid device function",
            "too many resources requested for launch", "invalid resource handle",
            "invalid device ordinal", "stream is capturing",
            "cublas_status_", "cudnn_status_", "cusparse_status_", "cusolver_status_",
        ),
        "Internal", "KernelFailed", "a computation on the GPU was wrong", _OUR_FAULT,
    ),
    DeviceFault(
        (
            "ncclremoteerror", "ncclsystemerror", "collective operation timeout",
            "watchdog got stuck", "nccl communicator was aborted", "nccl timeout",
            "connection closed by", "connection reset by peer", "connection refused",
            "socket recv failed", "got completion", "net/ib",
        ),
        "PeerLost", "PeerLost", "another process of the gang is gone", "",
    ),
    DeviceFault(
        ("ncclunhandledcudaerror",),
        "NodeFailure", "DeviceFault", "NCCL could not use the GPU", _ELSEWHERE,
    ),
    DeviceFault(
        ("ncclinternalerror",),
        "Internal", "NCCLFailed", "NCCL failed of itself",
        "NCCL_DEBUG=INFO in the training pods (compute.podTemplate) says more; report it",
    ),
    DeviceFault(
        ("cuda error:", "cuda driver error:", "cudnn error:"),
        "Internal", "KernelFailed", "a call to CUDA failed", _OUR_FAULT,
    ),
)  # fmt: skip


_SPEAKERS: Final = re.compile(
    r"cuda|cublas|cudnn|cusparse|cusolver|nccl|nvrm|nvlink|gpu|/dev/shm|defaultcpuallocator"
)
"""Who must be named in a text: other errors have invalid arguments and refused connections too."""


def device_fault(text: str) -> DeviceFault | None:
    """The first row that knows the text of an error; None: no row does."""
    lower = text.lower()
    if not _SPEAKERS.search(lower):
        return None
    return next((row for row in DEVICE_FAULTS if any(p in lower for p in row.patterns)), None)


def shown(text: str) -> str:
    """What a message quotes of the text of an error: the first line, and NCCL's last error."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    after = [b for a, b in pairwise(lines) if a.lower().startswith("last error")]
    return "; ".join([*lines[:1], *after[:1]])
