"""Copies of a micro-batch's arrays to the device, overlapped with computation.

feed thread:    arrays → pinned memory → copies on a separate stream → event
training loop:  its stream waits for the event; the host does not wait
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Return a tensor of an array's values. The copy to a GPU is asynchronous: from pinned memory,
    on this thread's current stream."""
    made = torch.from_numpy(np.ascontiguousarray(values))
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)


class Wait(Protocol):
    """Time that a step waited for its data."""

    def seconds(self) -> float | None:
        """Return the time in seconds; None: the device has not reached the step yet."""


@dataclass(frozen=True)
class HostWait:
    """Wait by the clock of the host, for computation on the CPU."""

    took: float

    def seconds(self) -> float:
        return self.took


@dataclass(frozen=True)
class DeviceWait:
    """Wait by the clock of the device: from ``began``, which the device reaches when its earlier
    work is done, until the data has arrived. (The host may wait for data long before the device is
    out of work.)"""

    began: torch.cuda.Event
    ended: torch.cuda.Event

    def seconds(self) -> float | None:
        if not self.ended.query():  # type: ignore[no-untyped-call]
            return None
        return float(self.began.elapsed_time(self.ended)) / 1e3


class CopyStream:
    """A CUDA stream for copies only; without a GPU, a no-op."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copying(self) -> AbstractContextManager[Any]:
        """Run the copies of the calling thread on this stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def copied(self) -> torch.cuda.Event | None:
        """Return an event that occurs when all copies so far are done."""
        return None if self._stream is None else self._stream.record_event()

    def mark(self) -> torch.cuda.Event | None:
        """Return an event that occurs when the computing stream has done its work so far."""
        return self._timed()

    def hand_over(
        self, micro_batches: object, copied: torch.cuda.Event | None, began: torch.cuda.Event |
        None, host_seconds: float,
    ) -> Wait:  # fmt: skip
        """Make the computing stream wait for tensors that were copied on this stream.

        Args:
            micro_batches: the tensors, in dataclasses, lists and tuples.
            copied: result of ``copied`` after the tensors were made.
            began: result of ``mark`` before the host waited for the tensors.
            host_seconds: time that the host waited.
        """
        if copied is None or began is None:
            return HostWait(host_seconds)
        computing = torch.cuda.current_stream(self._device())
        computing.wait_event(copied)
        for tensor in tensors_of(micro_batches):
            tensor.record_stream(computing)  # no reuse of its memory before that stream has read it
        ended = self._timed()
        assert ended is not None, "there is a stream"
        return DeviceWait(began, ended)

    def _timed(self) -> torch.cuda.Event | None:
        if self._stream is None:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device()))
        return event

    def _device(self) -> torch.device:
        assert self._stream is not None, "there is a stream"
        return torch.device(self._stream.device)


def tensors_of(value: object) -> Iterator[Tensor]:
    """Yield the tensors within dataclasses, lists and tuples; a tensor held twice, twice."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
