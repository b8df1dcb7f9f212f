"""Exceptions of libraries, told by what they say."""

from __future__ import annotations

import pytest
import torch

from finetune_trainer.failures import verdict


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "OutOfMemory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "OutOfMemory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "OutOfMemory"),
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), "OutOfMemory"),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error"), "NodeFailure"),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), "NodeFailure"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "Internal"),
        (RuntimeError("[gloo] Connection closed by peer"), "NodeFailure"),
        (RuntimeError("shapes do not match"), "Internal"),
    ],
)
def test_class_of_what_a_device_or_a_peer_says(error: Exception, expected: str) -> None:
    found = verdict(error)
    assert found.failure_class == expected
    assert found.retryable == (expected == "NodeFailure")
    assert str(error) in found.message
