"""A part, from records to shards and facts: all that costs time, and nothing that needs another
part.

records → drafts ─(personal data, duplicates within the part)→ tokens ─(overlength)→ shards, facts

A document that is too long goes twice from drafts to tokens: the second time in pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import compress
from pathlib import Path
from typing import Final, TypeVar

from finetune_api.sources import Data, Format
from finetune_trainer.prepare.mapping.facts import FactsWriter, Fault, PartSummary, Preview
from finetune_trainer.prepare.mapping.inspection import inspect
from finetune_trainer.prepare.mapping.languages import Languages
from finetune_trainer.prepare.mapping.previews import preview
from finetune_trainer.prepare.mapping.reader import Batch, Reader
from finetune_trainer.prepare.mapping.writer import ShardWriter
from finetune_trainer.prepare.quality.duplicates import Seen, digest_of
from finetune_trainer.prepare.quality.nearduplicates import Words, fingerprints
from finetune_trainer.prepare.reading.faults import Faults
from finetune_trainer.prepare.reading.parts import Part
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering.drafts import Draft
from finetune_trainer.prepare.tokenizing.documents import is_document, split
from finetune_trainer.prepare.tokenizing.overlength import fit
from finetune_trainer.prepare.tokenizing.tokens import Cut, Model, Sample
from finetune_trainer.prepared.split import SIDES, Side
from finetune_trainer.storage.objects import ObjectStore

T = TypeVar("T")

OFFERED: Final = 8
"""Samples of each side that a part offers the report to show: some may be duplicates of another
part's."""


class Mapper:
    """Maps parts of the data.

    Args:
        store: where the shards go.
        uri: prefix of the prepared data.
        scratch: folder for files on their way.
    """

    def __init__(
        self, data: Data, model: Model, reader: Reader, store: ObjectStore, uri: str, scratch: Path
    ) -> None:
        self._data, self._model, self._reader = data, model, reader
        self._store, self._uri, self._scratch = store, uri, scratch

    def map(self, part: Part, source: Source) -> tuple[PartSummary, Path]:
        """Write the shards of a part.

        Returns:
            What there is to say of the part, and the file of its facts.

        Raises:
            DataError: the first record that cannot be used, where the policy is Fail.
        """
        writers = {
            side: ShardWriter(self._store, self._uri, self._scratch, side, source.name, part.number)
            for side in SIDES
        }
        path = self._scratch / "facts.arrow"
        faults = Faults(self._data.quality.faulty_records)
        mapped = _Mapped(self._data, self._model, source, faults, writers, FactsWriter(path))
        form, batches = self._reader.read(part, self._data, self._model, faults)
        for batch in batches:
            mapped.add(batch)
        return mapped.finish(form), path


class _Mapped:
    """A part on its way."""

    def __init__(
        self, data: Data, model: Model, source: Source, faults: Faults,
        writers: dict[Side, ShardWriter], facts: FactsWriter,
    ) -> None:  # fmt: skip
        quality = data.quality
        training = source.side == "train"
        self._quality, self._model, self._faults = quality, model, faults
        self._own_group = data.split.group_by is None
        self._training = training
        self._seen = Seen() if training and quality.deduplicate else None
        self._similarity = (
            float(quality.near_duplicate_similarity)
            if training and quality.near_duplicates == "Drop"
            else None
        )
        self._writers, self._facts = writers, facts
        self._counts: Counter[str] = Counter()
        self._languages = Languages()
        self._previews: dict[Side, list[Preview]] = {}

    def add(self, batch: Batch) -> None:
        """Take some records."""
        self._counts["records"] += batch.records
        self._languages.look(batch.drafts)
        policy = self._quality.personal_data
        drafts = [inspect(d, policy, own_group=self._own_group) for d in batch.drafts]
        if self._training:
            self._counts["training_drafts"] += len(drafts)
        if self._seen is not None:  # what need not be tokenized
            drafts = self._without(drafts, self._seen.known(_digests(drafts)))
        fitted = self._fitted(drafts)
        digests: list[bytes] | None = None
        if self._seen is not None:
            fitted = self._without(fitted, self._seen.add(_digests(s.draft for s, _ in fitted)))
            digests = _digests(sample.draft for sample, _ in fitted)
        prints: Words | None = None
        if self._similarity is not None:
            prints = fingerprints([s.draft.own for s, _ in fitted], self._similarity)
        for i, (sample, cut) in enumerate(fitted):
            self._offer(sample)
            shard, row = self._writers[sample.draft.side].add(sample)
            digest = None if digests is None else digests[i]
            fingerprint = None if prints is None else prints[i]
            self._facts.add(sample, shard, row, cut, digest, fingerprint)

    def finish(self, form: Format | None) -> PartSummary:
        """Write what waits."""
        for writer in self._writers.values():
            writer.flush()
        self._facts.close()
        first = [Fault(reason=e.reason, message=e.message) for e in self._faults.first]
        return PartSummary(
            format=form,
            records=self._counts["records"],
            training_drafts=self._counts["training_drafts"],
            duplicates=self._counts["duplicates"],
            overlength=self._counts["overlength"],
            split=self._counts["split"],
            reasons=dict(self._faults.reasons),
            faults=first,
            languages=dict(self._languages.counts),
            previews=self._previews,
            shards={side: writer.files for side, writer in self._writers.items()},
        )

    def _without(self, found: list[T], known: list[bool]) -> list[T]:
        """Those that the part did not have before; the others are counted."""
        self._counts["duplicates"] += sum(known)
        return list(compress(found, (not old for old in known)))

    def _fitted(self, drafts: list[Draft]) -> list[tuple[Sample, Cut]]:
        """The samples of drafts, in at most as many tokens as they may have."""
        limit, bos = self._model.max_length, self._model.tokens.bos_id
        found: list[tuple[Sample, Cut]] = []
        for sample in self._sampled(drafts):
            fitted, cut = fit(sample, limit, self._quality.overlength, bos)
            if fitted is None:
                self._counts["overlength"] += 1
            else:
                found.append((fitted, cut))
        return found

    def _sampled(self, drafts: list[Draft]) -> Iterator[Sample]:
        """A sample of each draft; several of a document that is to be split."""
        tokens, limit = self._model.tokens, self._model.max_length
        splits = self._quality.overlength == "Split"
        for sample in tokens.samples(drafts, self._faults.take):
            if not splits or len(sample.ids) <= limit or not is_document(sample.draft):
                yield sample
                continue
            found = split(sample.draft, tokens, limit)
            self._counts["split"] += len(found) > 1
            if self._training:
                self._counts["training_drafts"] += len(found) - 1
            yield from found

    def _offer(self, sample: Sample) -> None:
        offered = self._previews.setdefault(sample.draft.side, [])
        if len(offered) < OFFERED:
            shown = preview(sample, self._model.tokens)
            offered.append(Preview(sample=self._facts.rows, shown=shown))


def _digests(drafts: Iterable[Draft]) -> list[bytes]:
    return [digest_of(part.text for part in draft.parts) for draft in drafts]
