"""Near duplicates: the similarity estimate against the exact value, detection, and memory."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.sources import Quality
from finetune_trainer.prepare.mapping.statistics import SampleStatistics
from finetune_trainer.prepare.quality.nearduplicates import (
    BANDS,
    MET,
    SeenFingerprints,
    _low_bits,
    fingerprints,
    rows_for,
    shingles,
    signature,
    similarity,
)
from finetune_trainer.prepare.reading.faults import Faults
from finetune_trainer.prepare.reducing.deduplicate import Deduplicator
from finetune_trainer.prepare.reducing.report import SourceReport

VOCABULARY = [f"w{i}" for i in range(5000)]


def text(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=words))


def changed(original: str, changes: int, seed: int = 0) -> str:
    """The text with ``changes`` words replaced."""
    words = original.split()
    for i in random.Random(seed).sample(range(len(words)), changes):
        words[i] = f"new{seed}-{i}"
    return " ".join(words)


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def estimate(a: str, b: str) -> float:
    bits = _low_bits(np.stack([signature(a), signature(b)]))
    return float(similarity(bits[0], bits[1:])[0])


def test_shingles() -> None:
    assert shingles("One, two three.  FOUR") == {"one two three", "two three four"}
    assert shingles("one two") == {"one two"} and shingles("?!") == {"?!"}
    for unspaced in ("ສະບາຍດີ", "သတင်း", "ភាសាខ្មែរ"):
        assert len(shingles(unspaced)) == len(unspaced) - 2
    assert shingles("猫は好き") == {"猫 は 好", "は 好 き"}


def test_the_similarity_estimate_has_the_documented_error() -> None:
    errors = []
    for seed in range(150):
        a = text(seed)
        b = changed(a, changes=seed % 12, seed=seed)
        errors.append(estimate(a, b) - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.015 and np.std(errors) < 0.05


@given(st.floats(0.5, 1.0))
def test_pairs_at_the_threshold_share_a_band(threshold: float) -> None:
    rows = rows_for(threshold)
    assert 1 <= rows <= 16
    assert 1 - (1 - threshold**rows) ** BANDS >= MET
    assert rows == 16 or 1 - (1 - threshold ** (rows + 1)) ** BANDS < MET
    assert rows_for(0.85) == 8


@pytest.mark.parametrize("batch", [1, 50, 1000])
def test_near_duplicates_are_found_within_and_across_batches(batch: int) -> None:
    originals = [text(i, words=120) for i in range(200)]
    stream = originals + [changed(o, 1, i) for i, o in enumerate(originals)]
    stream += [changed(o, 30, i) for i, o in enumerate(originals)] + originals
    seen = SeenFingerprints(0.85)
    known = [
        k
        for i in range(0, len(stream), batch)
        for k in seen.add(fingerprints(stream[i : i + batch], 0.85))
    ]
    first, near, far, same = (known[i : i + 200] for i in range(0, 800, 200))
    assert not any(first) and not any(far) and all(same)
    assert sum(near) >= 197


def test_texts_that_share_a_long_template_are_kept() -> None:
    frame = text(7, words=40)
    stream = [f"{frame} {text(i, words=20)}" for i in range(1000, 3000)]
    assert 0.4 < jaccard(stream[0], stream[1]) < 0.6
    assert sum(SeenFingerprints(0.85).add(fingerprints(stream, 0.85))) == 0


def test_the_samples_of_a_conversation_are_kept_or_dropped_together() -> None:
    stream = [("a", 1), ("b", 2), ("b", 2), ("b", 2), ("c", 1), ("c", 1), ("d", 3)]
    prints = fingerprints([text(seed) for _, seed in stream], 0.85)
    table = pa.table({"where": [place for place, _ in stream],
                      "fingerprint": [p.tobytes() for p in prints]})  # fmt: skip
    quality = Quality.model_validate({"nearDuplicates": "Drop", "deduplicate": False})
    for size in range(1, len(stream) + 1):
        deduplicator, report = Deduplicator(quality), SourceReport("a", 1, 1, Faults("Fail"))
        kept = [
            batch.column("where")[int(row)].as_py()
            for batch in table.to_batches(max_chunksize=size)
            for row in deduplicator.fresh(SampleStatistics(batch, 0), report)
        ]
        assert kept == ["a", "b", "b", "b", "d"] and report.near_duplicates == 2


def test_memory_is_128_bytes_per_record() -> None:
    seen = SeenFingerprints(0.85)
    for start in range(0, 4096, 512):
        seen.add(fingerprints([text(i, words=8) for i in range(start, start + 512)], 0.85))
    assert 4096 * 100 < seen.nbytes < 4096 * 170
