"""The way of small arrays to the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of an array's values. To a GPU they are copied from pinned memory, beside the
    computation, and nothing waits for them."""
    made = torch.from_numpy(np.ascontiguousarray(values))
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)
