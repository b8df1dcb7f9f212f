"""The way of a row's arrays to the device, beside the computation.

thread of the feed:  arrays → pinned memory → copies on a stream of their own → event
training loop:       its stream waits for the event; the host waits for nothing
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
    """A tensor of an array's values. To a GPU they are copied from pinned memory, on the stream of
    this thread, and nothing waits for them."""
    made = torch.from_numpy(np.ascontiguousarray(values))
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)


class Wait(Protocol):
    """How long a step has waited for its data."""

    def seconds(self) -> float | None:
        """None: the device has not got there yet."""


@dataclass(frozen=True)
class HostWait:
    """By the clock of the host, where the host computes."""

    took: float

    def seconds(self) -> float:
        return self.took


@dataclass(frozen=True)
class DeviceWait:
    """By the clock of the device: from when it had nothing left to do, or was told to wait, to when
    the data was there. The host may wait for data long before the device is out of work."""

    began: torch.cuda.Event
    ended: torch.cuda.Event

    def seconds(self) -> float | None:
        if not self.ended.query():  # type: ignore[no-untyped-call]
            return None
        return float(self.began.elapsed_time(self.ended)) / 1e3


class CopyStream:
    """A stream of a GPU for copies alone; on a CPU there is none."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copying(self) -> AbstractContextManager[Any]:
        """While the calling thread makes tensors, they are copied on this stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def copied(self) -> torch.cuda.Event | None:
        """What occurs when all copies so far are done."""
        return None if self._stream is None else self._stream.record_event()

    def mark(self) -> torch.cuda.Event | None:
        """What occurs when the computing stream has done what it was told so far."""
        return self._timed()

    def hand_over(
        self, micro_batches: object, copied: torch.cuda.Event | None, began: torch.cuda.Event |
        None, host_seconds: float,
    ) -> Wait:  # fmt: skip
        """Have the computing stream wait for tensors that were copied on this one.

        Args:
            rows: holds them, in dataclasses, lists and tuples.
            copied: as ``copied`` gave it once they were made.
            began: as ``mark`` gave it before the host waited for them.
            host_seconds: that the host waited.
        """
        if copied is None or began is None:
            return HostWait(host_seconds)
        computing = torch.cuda.current_stream(self._device())
        computing.wait_event(copied)
        for tensor in tensors_of(micro_batches):
            tensor.record_stream(computing)  # its memory is not used again before that has read it
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
    """The tensors within dataclasses, lists and tuples; one that is held twice comes twice."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
