"""The feed: turns a plan's micro-batches into tensors, ahead of the step that needs them.

A background thread reads samples and builds micro-batches for the next steps, so that the device
does not wait for data; any wait is measured. The samples of still later steps are announced, so
that they are prefetched.
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
    """One micro-batch on the device, or this process's share of it under context parallelism (see
    ``context``). A micro-batch without documents holds only padding and predicts nothing."""

    input_ids: Tensor
    """Token ids."""
    labels: Tensor
    """Targets of the loss, shape [supervised]."""
    layout: DocumentLayout
    """Document boundaries and dropout keys."""
    numbers: Tensor
    """Number of each label's sample in the step, or in the set in evaluation; shape
    [supervised]."""


@dataclass(frozen=True)
class TokenMicroBatch(MicroBatch):
    """A packed sequence, shape [1, tokens], or documents padded to the longest, shape
    [documents, longest]; ``labels`` are token ids."""

    position_ids: Tensor
    """Positions, restarting at each document; shape of ``input_ids``."""
    predict: Tensor
    """Positions in the flattened ``input_ids`` whose next token is a label, shape [supervised]."""
    numbers_here: npt.NDArray[np.int64]
    """``numbers`` on the host, so that reading them does not wait for the device."""
    replay: Replay | None = None
    """Replay documents; None where the feed builds none, or where no rank's micro-batch of this
    turn has any."""
    attention_mask: Tensor | None = None
    """1 for tokens, 0 for padding, shape of ``input_ids``; None: no padding."""

    @property
    def is_padded(self) -> bool:
        """Whether documents are padded, so that the model's own attention runs."""
        return not self.layout.spans


@dataclass(frozen=True)
class Replay:
    """The replay documents of a micro-batch, as input of the base model."""

    micro_batch: TokenMicroBatch
    """The replay documents alone. With context parallelism: the whole micro-batch, with only the
    labels of the replay documents."""
    at: Tensor
    """Indices of the replay labels among all labels of the micro-batch, in the same order; shape
    [replayed]."""


class MicroBatchBuilder(Protocol):
    """Builds a micro-batch of samples; without samples, one that predicts nothing."""

    def __call__(
        self,
        samples: Sequence[TokenSample],
        positions: Sequence[int],
        *,
        numbers: Sequence[int] | None = None,
        seed: int,
        step: int,
        device: torch.device,
        keyed: bool = True,
    ) -> MicroBatch: ...


class StaticShape(NamedTuple):
    """One shape for all micro-batches, for torch.compile."""

    micro_batch_tokens: int
    """Tokens of every micro-batch, padding included."""
    longest: int
    """Tokens of the longest document, padding included."""

    def padding(self, tokens: int) -> list[int]:
        """Return the lengths of the padding documents that fill a micro-batch."""
        missing = max(self.micro_batch_tokens - tokens, 0)
        whole, rest = divmod(missing, self.longest)
        return [self.longest] * whole + [rest] * bool(rest)


def build_packed(
    samples: Sequence[TokenSample],
    positions: Sequence[int],
    *,
    numbers: Sequence[int] | None = None,
    seed: int,
    step: int,
    device: torch.device,
    keyed: bool = True,
    context: ContextGroup = ALONE,
    shape: StaticShape | None = None,
) -> TokenMicroBatch:
    """Concatenate documents to a packed sequence.

    Args:
        positions: index positions of the samples, part of the dropout keys.
        numbers: number of each sample, as in ``MicroBatch``; None: 0.
        keyed: whether to make dropout keys, which dropout and noise need.
        context: the processes that share the micro-batch.
        shape: shape to pad to, with documents without supervised tokens.

    Token j of a document is predicted from token j - 1 of the same document, so the first token
    of a document is never predicted, supervised or not.
    """
    samples, positions, numbers = (
        list(samples),
        list(positions),
        list(numbers or [0] * len(samples)),
    )
    fixed, shape = shape is not None, shape or StaticShape(1, 1)
    tokens = sum(len(s.ids) for s in samples)
    for padding in (*shape.padding(tokens), context.padding(max(tokens, shape.micro_batch_tokens))):
        if padding:
            samples.append(TokenSample(np.zeros(padding, np.int32), np.zeros(padding, np.bool_)))
            positions.append(0)
            numbers.append(0)
    lengths = [len(s.ids) for s in samples]
    ids = np.concatenate([s.ids for s in samples]).astype(np.int64)
    # Each position predicts the next token, if that token is supervised.
    predicts = np.concatenate([np.append(s.supervised[1:], False) for s in samples])
    following = np.append(ids[1:], 0)
    number = np.repeat(np.asarray(numbers, np.int64), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    held = context.held(len(ids))
    target = np.flatnonzero(predicts[held])
    spans, shared_keys = share(lengths, context, device)
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
            document_lengths=tensor(np.repeat(lengths, lengths)[held]) if keyed else None,
            shared_keys=shared_keys,
        ),
        numbers=tensor(number[held][target]),
        numbers_here=number[held][target],
    )


@dataclass(frozen=True)
class StepTensors:
    """Input of one rank for one step."""

    plan: Step
    micro_batches: list[MicroBatch]
    sources: Tensor
    """Source index of each sample of the step, shape [samples]."""
    wait: Wait
    """Time that the step waited for its data."""


@dataclass(frozen=True)
class _Ready:
    """A step whose tensors are being copied to the device."""

    plan: Step
    micro_batches: list[MicroBatch]
    sources: Tensor
    copied: torch.cuda.Event | None
    """Event after the copies; None: nothing is being copied."""


Reader = Callable[[Sequence[int]], list[TokenSample]]
Expect = Callable[[Sequence[int]], object]

EXPECTED: Final = 2
"""Number of steps after the one being read whose samples are announced in advance."""


class Feed:
    """Steps ``start`` to ``end`` (excluded) of a plan as tensors of one rank. Processes that share
    micro-batches have one rank in the plan.

    Args:
        read: reads samples by index position.
        build: builds the micro-batches.
        replay: by source, whether its documents are also built as ``Replay``; empty: none.
        expect: receives positions before they are read; must not block.
        ahead: steps that are built ahead.

    Iterating yields ``StepTensors``. An error of the reading thread is raised at the first step
    whose data is missing.
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
            tensors = (item.micro_batches, item.sources)
            wait = self._copies.hand_over(tensors, item.copied, marked, waited)
            yield StepTensors(item.plan, *tensors, wait)

    def _work(self) -> None:
        try:
            with self._copies.copying():
                for step in self._planned():
                    if self._stop.is_set():
                        return
                    micro_batches = self._micro_batches(step)
                    sources = on_device(self._sources_of(step), self._device)
                    self._queue.put(_Ready(step, micro_batches, sources, self._copies.copied()))
        except BaseException as error:
            self._queue.put(error)

    def _planned(self) -> Iterator[Step]:
        """Yield the steps, each after announcing its samples and those of the ``EXPECTED`` steps
        after it."""
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
        numbers, sources = step.numbers, self._sources_of(step)

        def build(by: MicroBatchBuilder, micro_batch: MicroBatchSamples) -> MicroBatch:
            return by(
                [samples[p] for p in micro_batch], micro_batch,
                numbers=[numbers[p] for p in micro_batch], seed=self._plan.seed,
                step=step.number, device=self._device,
            )  # fmt: skip

        def with_replay(turn: int, micro_batch: MicroBatchSamples) -> MicroBatch:
            built = build(self._build, micro_batch)
            # Decided by the plan, so identically on all ranks: FSDP needs all ranks in every pass.
            if self._replay is None or not any(
                self._of_replay(micro_batches[turn]) for micro_batches in step.micro_batches
            ):
                return built
            assert isinstance(built, TokenMicroBatch), "only token outputs are anchored"
            replayed = self._replay[sources[built.numbers_here]]
            at = on_device(np.flatnonzero(replayed), self._device)
            if built.layout.shared_keys is None:
                alone = self._build if built.is_padded else partial(build_packed, keyed=False)
                apart = build(alone, self._of_replay(micro_batch))
                assert isinstance(apart, TokenMicroBatch)
                return replace(built, replay=Replay(apart, at))
            # The share of a shorter micro-batch would hold other tokens, so reuse the whole one.
            again = replace(built, predict=built.predict[at], labels=built.labels[at])
            return replace(built, replay=Replay(again, at))

        return [with_replay(turn, micro_batch) for turn, micro_batch in enumerate(mine)]

    def _sources_of(self, step: Step) -> npt.NDArray[np.int64]:
        return self._plan.sources[list(step.samples)]

    def _of_replay(self, micro_batch: MicroBatchSamples) -> MicroBatchSamples:
        """Return the documents of a micro-batch that belong to replay sources."""
        return tuple(
            p
            for p in micro_batch
            if self._replay is not None and self._replay[self._plan.sources[p]]
        )
