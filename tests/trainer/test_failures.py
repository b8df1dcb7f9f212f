"""Classification of library exceptions by their texts, as CUDA, torch and NCCL write them."""

from __future__ import annotations

import pytest
import torch

from finetune_trainer.devicefaults import DEVICE_FAULTS, device_fault
from finetune_trainer.failures import (
    PEER_LOST,
    Fenced,
    TrainerError,
    exit_code,
    failure_of,
    recognise,
)

_HINTS = """
Search for `cudaErrorAssert' in https://docs.nvidia.com/cuda/ for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below\
 might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
_NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "


def cuda(text: str) -> Exception:
    return torch.AcceleratorError(f"CUDA error: {text}{_HINTS}")


def nccl(code: str, text: str, last: str) -> Exception:
    tail = f"\nLast error:\n{last}" if last else ""
    return torch.distributed.DistBackendError(
        f"{_NCCL}{text} (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n{code}{tail}"
    )


SYSTEM = (
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device"
    " error."
)
REMOTE = (
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting"
    " prematurely."
)
UNHANDLED = "ncclUnhandledCudaError: Call to CUDA function failed."
INTERNAL = "ncclInternalError: Internal check failed."
WATCHDOG = (
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE,"
    " NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600041 milliseconds before timing out."
)
CUBLAS = "CUDA error: CUBLAS_STATUS_{} when calling `cublasLtMatmul(ltHandle, ...)`"

# error -> class, reason
CASES: list[tuple[Exception, str, str]] = [
    (
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19"
            " GiB of which 1.02 GiB is free."
        ),
        "OutOfMemory", "DeviceOutOfMemory",
    ),
    (cuda("out of memory"), "OutOfMemory", "DeviceOutOfMemory"),
    (RuntimeError("CUDA driver error: out of memory"), "OutOfMemory", "DeviceOutOfMemory"),
    (RuntimeError(CUBLAS.format("ALLOC_FAILED")), "OutOfMemory", "DeviceOutOfMemory"),
    (
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        "OutOfMemory", "DeviceOutOfMemory",
    ),
    (
        nccl(UNHANDLED, "unhandled cuda error", "Cuda failure 2 'out of memory'"),
        "OutOfMemory", "DeviceOutOfMemory",
    ),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate"
            " memory: you tried to allocate 4294967296 bytes. Error code 12 (Cannot allocate"
            " memory)"
        ),
        "OutOfMemory", "HostOutOfMemory",
    ),
    (cuda("uncorrectable ECC error encountered"), "NodeFailure", "DeviceFault"),
    (
        cuda("uncorrectable NVLink error detected during the execution"),
        "NodeFailure", "DeviceFault",
    ),
    (
        cuda("Invalid access of peer GPU memory over nvlink or a hardware error"),
        "NodeFailure", "DeviceFault",
    ),
    (cuda("unknown error"), "NodeFailure", "DeviceFault"),
    (
        RuntimeError("NVRM: Xid (PCI:0000:4e:00): 79, GPU has fallen off the bus."),
        "NodeFailure", "DeviceFault",
    ),
    (
        nccl(UNHANDLED, "unhandled cuda error", "Cuda failure 'uncorrectable ECC error'"),
        "NodeFailure", "DeviceFault",
    ),
    (
        cuda("CUDA-capable device(s) is/are busy or unavailable"),
        "NodeFailure", "DeviceUnavailable",
    ),
    (cuda("system not yet initialized"), "NodeFailure", "DeviceUnavailable"),
    (RuntimeError("No CUDA GPUs are available"), "NodeFailure", "DeviceUnavailable"),
    (cuda("an illegal memory access was encountered"), "Internal", "KernelFailed"),
    (cuda("device-side assert triggered"), "Internal", "KernelFailed"),
    (cuda("misaligned address"), "Internal", "KernelFailed"),
    (cuda("unspecified launch failure"), "Internal", "KernelFailed"),
    (cuda("invalid argument"), "Internal", "KernelFailed"),
    (cuda("invalid configuration argument"), "Internal", "KernelFailed"),
    (cuda("too many resources requested for launch"), "Internal", "KernelFailed"),
    (cuda("operation not permitted when stream is capturing"), "Internal", "KernelFailed"),
    (cuda("the launch timed out and was terminated"), "Internal", "KernelFailed"),
    (RuntimeError(CUBLAS.format("NOT_SUPPORTED")), "Internal", "KernelFailed"),
    (RuntimeError(CUBLAS.format("INVALID_VALUE")), "Internal", "KernelFailed"),
    (RuntimeError(CUBLAS.format("EXECUTION_FAILED")), "Internal", "KernelFailed"),
    (
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED_CUDART"),
        "Internal", "KernelFailed",
    ),
    (
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        "Internal", "KernelFailed",
    ),
    (
        cuda("no kernel image is available for execution on the device"),
        "UserError", "ImageUnsuitable",
    ),
    (
        cuda("CUDA driver version is insufficient for CUDA runtime version"),
        "UserError", "ImageUnsuitable",
    ),
    (
        nccl(
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
            "invalid usage", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4e000",
        ),
        "Internal", "NCCLMisused",
    ),
    (
        nccl("ncclInvalidArgument: Invalid value for an argument.", "invalid argument", ""),
        "Internal", "NCCLMisused",
    ),
    (
        nccl(
            SYSTEM, "unhandled system error",
            "Error while creating shared memory segment /dev/shm/nccl-5wPgqa (size 33030528),"
            " error: No space left on device (28)",
        ),
        "UserError", "SharedMemoryFull",
    ),
    (
        nccl(
            REMOTE, "remote process exited or there was a network error",
            "socketProgress: Connection closed by remote peer 10.0.0.7<41021>",
        ),
        "NodeFailure", PEER_LOST,
    ),
    (
        nccl(SYSTEM, "unhandled system error", "socketPollConnect: Connection refused"),
        "NodeFailure", PEER_LOST,
    ),
    (
        nccl(INTERNAL, "internal error", "NET/IB : Got completion from peer 10.0.0.7"),
        "NodeFailure", PEER_LOST,
    ),
    (nccl(INTERNAL, "internal error", ""), "Internal", "NCCLFailed"),
    (nccl(UNHANDLED, "unhandled cuda error", ""), "NodeFailure", "DeviceFault"),
    (
        nccl(
            UNHANDLED, "unhandled cuda error", "Cuda failure 'an illegal memory access was"
            " encountered'"
        ),
        "Internal", "KernelFailed",
    ),
    (torch.distributed.DistBackendError(WATCHDOG), "NodeFailure", PEER_LOST),
    (
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."),
        "NodeFailure", PEER_LOST,
    ),
    (
        torch.distributed.DistStoreError(
            "wait timeout after 300000ms, keys: /default_pg/0//cuda//0"
        ),
        "NodeFailure", PEER_LOST,
    ),
    (RuntimeError("[gloo] Connection closed by peer"), "NodeFailure", PEER_LOST),
    # The same phrases in errors that do not concern a device or a peer.
    (OSError(22, "Invalid argument"), "Internal", "Unexpected"),
    (ValueError("invalid argument: connection refused"), "Internal", "Unexpected"),
    (RuntimeError("shapes do not match"), "Internal", "Unexpected"),
    # The node's disk.
    (OSError(28, "No space left on device"), "NodeFailure", "DiskFailed"),
    (OSError(5, "Input/output error"), "NodeFailure", "DiskFailed"),
    (
        RuntimeError("[enforce fail at inline_container.cc] . No space left on device"),
        "NodeFailure", "DiskFailed",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("error", "kind", "reason"), CASES)
def test_device_and_peer_errors_are_classified(error: Exception, kind: str, reason: str) -> None:
    found = failure_of(error)
    assert (found.failure_class, found.reason) == (kind, reason)
    retried = kind == "NodeFailure" or reason in ("Unexpected", "HostOutOfMemory")
    assert found.retryable == retried
    assert str(error).splitlines()[0] in found.message


def test_a_message_has_the_last_error_of_nccl_and_a_remedy() -> None:
    last = "Error while creating shared memory segment /dev/shm/nccl-5wPgqa (size 33030528)"
    message = recognise(nccl(SYSTEM, "unhandled system error", last)).message
    assert last in message
    assert message.endswith(". Raise compute.sharedMemory")
    assert "CUDA_LAUNCH_BLOCKING=1" in recognise(cuda("misaligned address")).message


def test_every_row_is_covered_and_has_a_remedy() -> None:
    reached = {device_fault(str(error)) for error, _, _ in CASES}
    for row in DEVICE_FAULTS:
        assert row in reached, row.reason
        assert row.remedy or row.reason == PEER_LOST, "a lost peer is waited for"
        assert all(pattern == pattern.lower() for pattern in row.patterns)


KINDS = [k for k in TrainerError.__subclasses__() if k.__module__ == TrainerError.__module__]


@pytest.mark.parametrize("kind", [TrainerError, *KINDS])
def test_each_exception_ends_with_its_exit_code(kind: type[TrainerError]) -> None:
    reason = "Fenced" if kind is Fenced else "Reason"
    failure = failure_of(kind(reason, "message"))
    assert exit_code(failure) == kind.exit_code
    assert failure.retryable == (kind.exit_code >= 20)
