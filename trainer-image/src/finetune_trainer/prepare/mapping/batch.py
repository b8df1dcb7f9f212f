"""Maps a batch of records in one pass: the work of each process of the pool.

raw record ─parse→ record ─render→ example ─(personal data)→ tokenize ─(overlength)→ sample
           ─(held-out text, digests)→ rows of a shard, sample statistics

A document that is too long is tokenized twice: the second time in pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune_api.sources import Data, Format
from finetune_trainer.failures import DataError
from finetune_trainer.languages import language_of
from finetune_trainer.personal import IN_WORDS, redacted, scan
from finetune_trainer.prepare.mapping.previews import preview
from finetune_trainer.prepare.mapping.reader import Batch
from finetune_trainer.prepare.mapping.statistics import Fault, Preview, statistics_of
from finetune_trainer.prepare.quality.contamination import first_shared
from finetune_trainer.prepare.quality.duplicates import digest_of
from finetune_trainer.prepare.quality.hashsets import HashSet
from finetune_trainer.prepare.quality.nearduplicates import fingerprints
from finetune_trainer.prepare.reading.faults import Faults
from finetune_trainer.prepare.reading.records import parse
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering.chat import ChatTemplate
from finetune_trainer.prepare.rendering.examples import RenderedExample, Renderer, renderer
from finetune_trainer.prepare.rendering.limits import LimitExceeded, limited_work, too_costly
from finetune_trainer.prepare.task_formats import RENDERINGS, format_of
from finetune_trainer.prepare.tokenizing.documents import is_document, split
from finetune_trainer.prepare.tokenizing.tokens import Cut, Model, TokenizedSample, fit
from finetune_trainer.prepared.dataset import REFERENCE_SCHEMA, TOKEN_SCHEMA
from finetune_trainer.prepared.split import Side

LANGUAGES_OF_A_BATCH: Final = 16
LANGUAGE_BATCHES: Final = 32
"""Language detection samples this many records of a batch, in the first batches of a split."""


@dataclass(frozen=True)
class Recipe:
    """Everything that samples depend on, besides the records."""

    data: Data
    sources: Sequence[Source]
    """All sources of the run. Their objects are not used here."""
    model: Model
    slices: Sequence[str]
    """Fields of ``evaluation.slices``."""


@dataclass(frozen=True)
class Task:
    """A batch to map."""

    source: int
    """Index of its source in ``Recipe.sources``."""
    batch: Batch
    known: Path | None
    """File of the held-out n-grams that its samples are compared with."""
    wanted: dict[Side, int]
    """Maximum previews of each side to return."""


@dataclass
class MappedBatch:
    """The result of mapping a batch."""

    samples: dict[Side, Any] = field(default_factory=dict)
    """Shard rows, one record batch per side."""
    statistics: Any = None
    """Sample statistics of all sides: a record batch of ``statistics.SCHEMA``."""
    counts: Counter[str] = field(default_factory=Counter)
    """Counters of ``SplitSummary``, by field name."""
    reasons: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    languages: Counter[str] = field(default_factory=Counter)
    previews: dict[Side, list[Preview]] = field(default_factory=dict)


def begin(recipe: Recipe) -> None:
    """Prepare this process to map batches."""
    _makers[:] = [SampleMaker(recipe)]


def map_batch(task: Task) -> MappedBatch:
    """Map a batch.

    Raises:
        DataError: for the first unusable record, where the policy is Fail.
        UserError: the tokenizer does not fit the model or the data; 'TemplateTooCostly'.
    """
    return _makers[0].map(task)


_makers: Final[list[SampleMaker]] = []
"""The ``SampleMaker`` of this process."""


class SampleMaker:
    """Turns records into samples."""

    def __init__(self, recipe: Recipe) -> None:
        self._data, self._sources, self._model = recipe.data, recipe.sources, recipe.model
        self._slices = recipe.slices
        self._renderers: dict[tuple[int, Format], Renderer] = {}
        self._known: tuple[Path, HashSet] | None = None

    def map(self, task: Task) -> MappedBatch:
        """See ``map_batch``."""
        try:
            return self._map(task)
        except DataError:
            # Steps process the whole batch, so this fault need not be the first in the data.
            # Mapping record by record raises the first.
            batch = task.batch
            for i, raw in enumerate(batch.records):
                without = int(i < batch.records_without_format)
                one = replace(batch, records=[raw], records_without_format=without, read_error=None)
                self._map(replace(task, batch=one))
            raise

    def _map(self, task: Task) -> MappedBatch:
        batch, quality = task.batch, self._data.quality
        source = self._sources[task.source]
        training = source.side == "train"
        faults = Faults(quality.faulty_records)
        found = MappedBatch()
        examples = self._examples(task.source, batch, faults)
        found.languages = _languages(batch, examples)
        own_group = self._data.split.group_by is None
        examples = [inspect(e, quality.personal_data, own_group=own_group) for e in examples]
        samples, cuts = self._fitted(examples, faults, found.counts)
        found.counts["records"] = len(batch.records)
        found.counts["training_examples"] += len(examples)
        if not training:
            del found.counts["training_examples"]

        digests = prints = None
        if training and quality.deduplicate:
            digests = [digest_of(s.text for s in sample.example.segments) for sample in samples]
        if training and quality.near_duplicates == "Drop":
            threshold = float(quality.near_duplicate_similarity)
            prints = fingerprints([sample.example.own for sample in samples], threshold)
        shared = self._shared(samples, task.known) if training else {}
        found.statistics = statistics_of(samples, cuts, digests, prints, shared)
        for side in dict.fromkeys(sample.example.side for sample in samples):
            rows = [i for i, sample in enumerate(samples) if sample.example.side == side]
            found.samples[side] = shard_rows([samples[i] for i in rows], side)
            found.previews[side] = [
                Preview(sample=i, shown=preview(samples[i], self._model.tokens))
                for i in rows[: task.wanted[side]]
            ]
        if batch.read_error is not None:
            raise batch.read_error
        found.reasons = faults.reasons
        found.faults = [Fault(reason=e.reason, message=e.message) for e in faults.first]
        return found

    def _examples(self, number: int, batch: Batch, faults: Faults) -> list[RenderedExample]:
        examples: list[RenderedExample] = []
        source = self._sources[number]
        where = f"data set {source.name!r}"
        try:
            with limited_work():
                make = self._renderer(number, batch.format) if batch.format else None
                for row, raw in enumerate(batch.records):
                    where = raw.where
                    try:
                        record = parse(raw)
                        if row < batch.records_without_format:
                            format_of(source.spec, record, self._model.task)
                        if make is not None:
                            examples += make(record)
                    except DataError as error:
                        faults.take(error)
        except LimitExceeded as error:
            raise too_costly(where, str(error)) from None
        return examples

    def _renderer(self, number: int, form: Format) -> Renderer:
        if (number, form) not in self._renderers:
            model, data = self._model, self._data
            chat = ChatTemplate(model.tokenizer, model.source) if form == "Messages" else None
            redact: Callable[[str], str] = str
            if data.quality.personal_data == "Redact":
                redact = redacted
            content = RENDERINGS[model.task].content
            self._renderers[number, form] = renderer(
                self._sources[number], form, data, chat, redact, content, self._slices
            )
        return self._renderers[number, form]

    def _fitted(
        self, examples: list[RenderedExample], faults: Faults, counts: Counter[str]
    ) -> tuple[list[TokenizedSample], list[Cut]]:
        """Samples of at most ``max_length`` tokens, and what was cut off each."""
        limit, bos = self._model.max_length, self._model.tokens.bos_id
        samples: list[TokenizedSample] = []
        cuts: list[Cut] = []
        for sample in self._tokenized(examples, faults, counts):
            fitted, cut = fit(sample, limit, self._data.quality.overlength, bos)
            if fitted is None:
                counts["overlength"] += 1
            else:
                samples.append(fitted)
                cuts.append(cut)
        return samples, cuts

    def _tokenized(
        self, examples: list[RenderedExample], faults: Faults, counts: Counter[str]
    ) -> Iterator[TokenizedSample]:
        """One sample per example; several per document that is split."""
        tokens, limit = self._model.tokens, self._model.max_length
        splits = self._data.quality.overlength == "Split"
        for sample in tokens.samples(examples, faults.take):
            if not splits or len(sample.ids) <= limit or not is_document(sample.example):
                yield sample
                continue
            pieces = split(sample.example, tokens, limit)
            counts["split"] += len(pieces) > 1
            counts["training_examples"] += len(pieces) - 1
            yield from pieces

    def _shared(self, samples: Sequence[TokenizedSample], known: Path | None) -> dict[int, str]:
        """Text that samples share with held-out samples, by row."""
        if known is None or not samples:
            return {}
        if self._known is None or self._known[0] != known:
            self._known = known, HashSet(known)
        starts = np.zeros(len(samples) + 1, np.int32)
        np.cumsum([len(sample.ids) for sample in samples], out=starts[1:])
        ids = np.concatenate([sample.ids for sample in samples])
        found = first_shared(ids, starts, self._known[1])
        decode = self._model.tokenizer.decode
        return {row: redacted(decode(tokens)) for row, tokens in found.items()}


def inspect(example: RenderedExample, policy: str, *, own_group: bool) -> RenderedExample:
    """Return the example with the kinds of personal data found in it; under Redact, with their
    values removed.

    Args:
        own_group: whether the group is the example's own prompt. The group is then redacted too:
            prompts that become equal stay on one side of the split.

    Raises:
        DataError: 'PersonalData' under policy Fail, with the record and the kinds.
    """
    if policy == "Ignore":
        return example
    scanned = [scan(segment.text) for segment in example.segments]
    if not any(kinds for _, kinds in scanned):
        return example
    found: Counter[str] = sum((kinds for _, kinds in scanned), Counter())
    if policy == "Fail":
        raise _refusal(example, [kinds for _, kinds in scanned])
    if policy == "Warn":
        return replace(example, personal=found)
    segments = tuple(
        segment._replace(text=text)
        for segment, (text, _) in zip(example.segments, scanned, strict=True)
    )
    return replace(
        example,
        segments=segments,
        prompt="".join(segment.text for segment in segments[:-1]),
        completion=redacted(example.completion),
        label=None if example.label is None else redacted(example.label),
        group=redacted(example.group) if own_group else example.group,
        own=redacted(example.own),
        personal=found,
    )


def _refusal(example: RenderedExample, by_segment: list[Counter[str]]) -> DataError:
    pairs = zip(example.segments, by_segment, strict=True)
    segment, kinds = next((segment, kinds) for segment, kinds in pairs if kinds)
    side = "its supervised text" if segment.supervised else "its prompt"
    named = " and ".join(IN_WORDS[kind] for kind in kinds)
    return DataError(
        "PersonalData",
        f"{example.where}: {side} holds {named}; take it out of the record, or set"
        " data.quality.personalData to Redact, Warn or Ignore",
    )


def _languages(batch: Batch, examples: Sequence[RenderedExample]) -> Counter[str]:
    """Languages of examples spread over the batch; empty after the first batches of a split."""
    if batch.number >= LANGUAGE_BATCHES:
        return Counter()
    step = max(1, len(examples) // LANGUAGES_OF_A_BATCH)
    some = examples[::step][:LANGUAGES_OF_A_BATCH]
    return Counter(language_of(example.own) for example in some)


def shard_rows(samples: Sequence[TokenizedSample], side: Side) -> Any:
    """Return samples of one side as shard rows: a record batch."""
    schema = TOKEN_SCHEMA if side == "train" else REFERENCE_SCHEMA
    examples = [sample.example for sample in samples]
    columns: dict[str, Any] = {
        "input_ids": _lists([sample.ids for sample in samples]),
        "spans": _lists([np.array(sample.spans, np.int32).reshape(-1) for sample in samples]),
        "prompt_length": [sample.prompt_length for sample in samples],
        "label": [example.label for example in examples],
        "where": [example.where for example in examples],
        "prompt": [example.prompt for example in examples],
        "completion": [example.completion for example in examples],
    }
    arrays = [
        columns[f.name] if pa.types.is_list(f.type) else pa.array(columns[f.name], f.type)
        for f in schema
    ]
    return pa.record_batch(arrays, schema=schema)


def _lists(arrays: Sequence[npt.NDArray[np.int32]]) -> Any:
    """A list column, from one array per row."""
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))
