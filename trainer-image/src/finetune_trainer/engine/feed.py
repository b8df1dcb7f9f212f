"""The feed: from a plan's rows to tensors, ahead of the step that needs them.

A background thread reads samples and builds rows for the coming steps, so that the device does not
wait for data; how long it did wait is counted.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune_trainer.engine.dropout import token_keys
from finetune_trainer.engine.packed import RowLayout, group_documents
from finetune_trainer.engine.plan import Plan, Row, Step
from finetune_trainer.prepared.shards import TokenSample


@dataclass(frozen=True)
class RowTensors:
    """One row on the device. A row without documents holds one token and predicts nothing."""

    input_ids: Tensor
    """Token ids, shape [1, tokens]."""
    position_ids: Tensor
    """Positions that restart at each document, shape [1, tokens]."""
    predict: Tensor
    """Row positions whose next token is supervised, shape [supervised]."""
    labels: Tensor
    """That next token, shape [supervised]."""
    layout: RowLayout
    """Where the documents lie."""
    sources: Tensor
    """Number of the source of each supervised token, shape [supervised]."""


def build_row(
    samples: Sequence[TokenSample],
    positions: Sequence[int],
    *,
    sources: Sequence[int] | None = None,
    seed: int,
    step: int,
    device: torch.device,
) -> RowTensors:
    """Concatenate documents to a row.

    Args:
        positions: of the samples in the index, by which dropout is keyed.
        sources: number of the source of each; None: 0.

    Token j of a document is predicted from token j - 1 of the same document, so the first token
    of a document is never predicted, supervised or not.
    """
    if not samples:
        samples = [TokenSample(np.zeros(1, np.int32), np.zeros(1, np.bool_))]
        positions = [0]
        sources = None
    lengths = [len(s.ids) for s in samples]
    ids = np.concatenate([s.ids for s in samples]).astype(np.int64)
    supervised = np.concatenate([s.supervised for s in samples]).copy()
    starts = np.cumsum([0, *lengths[:-1]])
    supervised[starts] = False
    target = np.flatnonzero(supervised)
    source = np.repeat(np.asarray(sources or [0] * len(samples), np.int64), lengths)
    keys = [token_keys(seed, step, p, n) for p, n in zip(positions, lengths, strict=True)]
    position = np.concatenate([np.arange(n) for n in lengths])

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)

    return RowTensors(
        input_ids=tensor(ids)[None],
        position_ids=tensor(position)[None],
        predict=tensor(target - 1),
        labels=tensor(ids[target]),
        layout=RowLayout(
            group_documents(lengths, device),
            tensor(np.concatenate(keys)),
            tensor(np.repeat(lengths, lengths)),
        ),
        sources=tensor(source[target]),
    )


@dataclass(frozen=True)
class StepTensors:
    """What one rank computes in one step."""

    plan: Step
    rows: list[RowTensors]
    waited: float
    """Seconds that the step waited for its data."""


Reader = Callable[[Sequence[int]], list[TokenSample]]


class Feed:
    """Steps of a plan as tensors of one rank, from ``start`` to ``end``.

    Iterating yields ``StepTensors``; a fault of the reading thread is raised where the step that
    needs the data begins.
    """

    def __init__(
        self,
        plan: Plan,
        read: Reader,
        *,
        rank: int,
        start: int,
        end: int,
        device: torch.device,
        ahead: int = 4,
    ) -> None:
        self._plan = plan
        self._read = read
        self._rank = rank
        self._range = range(start, end)
        self._device = device
        self._queue: queue.Queue[tuple[Step, list[RowTensors]] | BaseException] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)

    def __iter__(self) -> Iterator[StepTensors]:
        for _ in self._range:
            began = time.perf_counter()
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield StepTensors(*item, waited=time.perf_counter() - began)

    def _work(self) -> None:
        try:
            for number in self._range:
                if self._stop.is_set():
                    return
                step = self._plan.step(number)
                self._queue.put((step, self._rows(step)))
        except BaseException as error:
            self._queue.put(error)

    def _rows(self, step: Step) -> list[RowTensors]:
        mine: tuple[Row, ...] = step.rows[self._rank]
        wanted = [position for row in mine for position in row]
        samples = dict(zip(wanted, self._read(wanted), strict=True))
        return [
            build_row(
                [samples[p] for p in row], row, sources=self._plan.sources[list(row)].tolist(),
                seed=self._plan.seed, step=step.number, device=self._device,
            )
            for row in mine
        ]  # fmt: skip
