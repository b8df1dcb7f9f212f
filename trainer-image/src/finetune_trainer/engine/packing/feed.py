"""The feed: from a plan's rows to tensors, ahead of the step that needs them.

A background thread reads samples and builds rows for the coming steps, so that the device does not
wait for data; how long it did wait is counted. What still later steps will read is said in advance,
so that it is fetched meanwhile.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune_trainer.engine.compilation import varies
from finetune_trainer.engine.packing.context import ALONE, ContextGroup, share
from finetune_trainer.engine.packing.dropout import token_keys
from finetune_trainer.engine.packing.layout import DocumentLayout, cu_seqlens_of
from finetune_trainer.engine.packing.transfer import CopyStream, Wait, on_device
from finetune_trainer.engine.planning.plan import MicroBatchSamples, Plan, Step
from finetune_trainer.prepared.dataset import TokenSample


@dataclass(frozen=True)
class MicroBatch:
    """One row on the device, or this process's share of one (see ``context``). A row without
    documents holds padding alone and predicts nothing."""

    input_ids: Tensor
    """Token ids."""
    labels: Tensor
    """What is learned, shape [supervised]."""
    layout: DocumentLayout
    """Where the documents lie."""
    sources: Tensor
    """Number of the source of each label, shape [supervised]."""


@dataclass(frozen=True)
class TokenMicroBatch(MicroBatch):
    """Documents one after the other, shape [1, tokens], or one below the other, padded to the
    longest, shape [documents, longest]; ``labels`` are tokens."""

    position_ids: Tensor
    """Positions that restart at each document; as ``input_ids``."""
    predict: Tensor
    """Positions in the flattened ``input_ids`` whose next token is a label, shape [supervised]."""
    sources_here: npt.NDArray[np.int64]
    """As ``sources``, on the host: what depends on them waits for no device."""
    replay: Replay | None = None
    """Its replay documents, where any rank's row of this turn has some and they are wanted."""
    attention_mask: Tensor | None = None
    """1 where there is a token, 0 where there is padding, as ``input_ids``; None: no padding."""

    @property
    def is_padded(self) -> bool:
        """Whether documents stand one below the other: the model's own attention takes them."""
        return not self.layout.spans


@dataclass(frozen=True)
class Replay:
    """The replay documents of a row, as the untuned model reads them."""

    micro_batch: TokenMicroBatch
    """They alone; where processes share rows, the whole row, with their labels alone."""
    at: Tensor
    """Their supervised tokens among those of the whole row, in the same order; shape [replayed]."""


class MicroBatchBuilder(Protocol):
    """Makes a row of samples; of none, one that predicts nothing."""

    def __call__(
        self,
        samples: Sequence[TokenSample],
        positions: Sequence[int],
        *,
        sources: Sequence[int] | None = None,
        seed: int,
        step: int,
        device: torch.device,
        keyed: bool = True,
    ) -> MicroBatch: ...


class StaticShape(NamedTuple):
    """One shape for all rows, as torch.compile wants it."""

    micro_batch_tokens: int
    """Tokens of every row, padding included."""
    longest: int
    """Tokens of the longest document, padding included."""

    def padding(self, tokens: int) -> list[int]:
        """Sizes of the documents of padding that fill a row."""
        missing = max(self.micro_batch_tokens - tokens, 0)
        whole, rest = divmod(missing, self.longest)
        return [self.longest] * whole + [rest] * bool(rest)


def build_packed(
    samples: Sequence[TokenSample],
    positions: Sequence[int],
    *,
    sources: Sequence[int] | None = None,
    seed: int,
    step: int,
    device: torch.device,
    keyed: bool = True,
    context: ContextGroup = ALONE,
    shape: StaticShape | None = None,
) -> TokenMicroBatch:
    """Concatenate documents to a row.

    Args:
        positions: of the samples in the index, by which dropout is keyed.
        sources: number of the source of each; None: 0.
        keyed: whether dropout or noise is drawn in this row, and so wants keys.
        context: the processes that share the row.
        shape: that the row is padded to, by documents that nothing is learned from.

    Token j of a document is predicted from token j - 1 of the same document, so the first token
    of a document is never predicted, supervised or not.
    """
    samples, positions, sources = (
        list(samples),
        list(positions),
        list(sources or [0] * len(samples)),
    )
    fixed, shape = shape is not None, shape or StaticShape(1, 1)
    tokens = sum(len(s.ids) for s in samples)
    for padding in (*shape.padding(tokens), context.padding(max(tokens, shape.micro_batch_tokens))):
        if padding:
            samples.append(TokenSample(np.zeros(padding, np.int32), np.zeros(padding, np.bool_)))
            positions.append(0)
            sources.append(0)
    lengths = [len(s.ids) for s in samples]
    ids = np.concatenate([s.ids for s in samples]).astype(np.int64)
    # What is predicted at each place: the supervised token behind it.
    predicts = np.concatenate([np.append(s.supervised[1:], False) for s in samples])
    following = np.append(ids[1:], 0)
    source = np.repeat(np.asarray(sources, np.int64), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    held = context.held(len(ids))
    target = np.flatnonzero(predicts[held])
    spans, wanted = share(lengths, context, device)
    cu_seqlens = cu_seqlens_of(spans, device)
    if fixed:
        varies(cu_seqlens.q)
        varies(cu_seqlens.kv)

    def tensor(values: np.ndarray) -> Tensor:
        return on_device(values, device)

    keys: Tensor | None = None
    if keyed:
        drawn = [token_keys(seed, step, p, n) for p, n in zip(positions, lengths, strict=True)]
        keys = tensor(np.concatenate(drawn)[held])
    return TokenMicroBatch(
        input_ids=tensor(ids[held])[None],
        position_ids=tensor(position[held])[None],
        predict=tensor(target),
        labels=tensor(following[held][target]),
        layout=DocumentLayout(
            spans=spans,
            cu_seqlens=cu_seqlens,
            max_seqlen=max(shape.longest, *(span.kv_len for span in spans)),
            dropout_keys=keys,
            lengths=tensor(np.repeat(lengths, lengths)[held]) if keyed else None,
            wanted=wanted,
        ),
        sources=tensor(source[held][target]),
        sources_here=source[held][target],
    )


@dataclass(frozen=True)
class StepTensors:
    """What one rank computes in one step."""

    plan: Step
    micro_batches: list[MicroBatch]
    wait: Wait
    """How long the step waited for its data."""


@dataclass(frozen=True)
class _Ready:
    """A step whose tensors are on their way to the device."""

    plan: Step
    micro_batches: list[MicroBatch]
    copied: torch.cuda.Event | None
    """When they are there; None: they are."""


Reader = Callable[[Sequence[int]], list[TokenSample]]
Expect = Callable[[Sequence[int]], object]

EXPECTED: Final = 2
"""Steps behind the one that is read whose samples are said in advance."""


class Feed:
    """Steps of a plan as tensors of one rank, from ``start`` to ``end``, in rows that ``build``
    makes. Processes that share rows have one rank in the plan; ``replay`` says by source whether
    its documents are wanted apart too (empty: none). ``expect`` is told early of the positions that
    will be read, and must not wait.

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
        build: MicroBatchBuilder = build_packed,
        replay: Sequence[bool] = (),
        expect: Expect | None = None,
        ahead: int = 4,
    ) -> None:
        self._plan = plan
        self._read, self._expect = read, expect
        self._rank = rank
        self._range = range(start, end)
        self._device = device
        self._build = build
        self._replay = np.array(replay, np.bool_) if any(replay) else None
        self._copies = CopyStream(device)
        self._queue: queue.Queue[_Ready | BaseException] = queue.Queue(ahead)
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
            marked = self._copies.mark()
            began = time.perf_counter()
            item = self._queue.get()
            waited = time.perf_counter() - began
            if isinstance(item, BaseException):
                raise item
            wait = self._copies.hand_over(item.micro_batches, item.copied, marked, waited)
            yield StepTensors(item.plan, item.micro_batches, wait)

    def _work(self) -> None:
        try:
            with self._copies.copying():
                for step in self._planned():
                    if self._stop.is_set():
                        return
                    micro_batches = self._micro_batches(step)
                    self._queue.put(_Ready(step, micro_batches, self._copies.copied()))
        except BaseException as error:
            self._queue.put(error)

    def _planned(self) -> Iterator[Step]:
        """The steps; of each, and of those behind it, the samples have been said in advance."""
        coming: deque[Step] = deque()
        for number in self._range:
            coming.append(self._plan.step(number))
            if self._expect is not None:
                self._expect(self._wanted(coming[-1]))
            if len(coming) > EXPECTED:
                yield coming.popleft()
        yield from coming

    def _wanted(self, step: Step) -> list[int]:
        return [
            position for micro_batch in step.micro_batches[self._rank] for position in micro_batch
        ]

    def _micro_batches(self, step: Step) -> list[MicroBatch]:
        mine: tuple[MicroBatchSamples, ...] = step.micro_batches[self._rank]
        wanted = self._wanted(step)
        samples = dict(zip(wanted, self._read(wanted), strict=True))

        def build(by: MicroBatchBuilder, micro_batch: MicroBatchSamples) -> MicroBatch:
            return by(
                [samples[p] for p in micro_batch], micro_batch,
                sources=self._plan.sources[list(micro_batch)].tolist(), seed=self._plan.seed,
                step=step.number, device=self._device,
            )  # fmt: skip

        def with_replay(turn: int, micro_batch: MicroBatchSamples) -> MicroBatch:
            built = build(self._build, micro_batch)
            # By the plan, and so alike on all ranks: in shards all take part in every pass.
            if self._replay is None or not any(
                self._of_replay(micro_batches[turn]) for micro_batches in step.micro_batches
            ):
                return built
            assert isinstance(built, TokenMicroBatch), "outputs of tokens are what is anchored"
            at = on_device(np.flatnonzero(self._replay[built.sources_here]), self._device)
            if built.layout.wanted is None:
                alone = self._build if built.is_padded else partial(build_packed, keyed=False)
                apart = build(alone, self._of_replay(micro_batch))
                assert isinstance(apart, TokenMicroBatch)
                return replace(built, replay=Replay(apart, at))
            # Of a shorter row this process would hold other tokens: the whole one is read again.
            again = replace(built, predict=built.predict[at], labels=built.labels[at])
            return replace(built, replay=Replay(again, at))

        return [with_replay(turn, micro_batch) for turn, micro_batch in enumerate(mine)]

    def _of_replay(self, micro_batch: MicroBatchSamples) -> MicroBatchSamples:
        """The documents of a row that are of replay sources."""
        return tuple(
            p
            for p in micro_batch
            if self._replay is not None and self._replay[self._plan.sources[p]]
        )
