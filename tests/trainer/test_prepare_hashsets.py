"""Hash sets on disk against sets in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.prepare.quality.hashsets import HashCounter, HashSet

EDGES = [0, 1, (1 << 58) - 1, 1 << 58, (1 << 64) - 1]
HASHES = st.lists(st.sampled_from(EDGES) | st.integers(0, (1 << 64) - 1), max_size=30)


def array(hashes: list[int]) -> np.ndarray:
    return np.array(hashes, np.uint64)


@given(st.lists(HASHES, max_size=4), HASHES, st.integers(1, 3))
def test_the_set_holds_the_rare_hashes(
    batches: list[list[int]], others: list[int], most: int
) -> None:
    counts = Counter(h for batch in batches for h in batch)
    asked = [*others, *counts, *others]
    with TemporaryDirectory() as folder:
        counter = HashCounter(Path(folder))
        for batch in batches:
            counter.add(array(batch))
        made = HashSet.write(Path(folder) / "hashes", counter.rare(most))
        found = made.among(array(asked))
    assert found.tolist() == [i for i, h in enumerate(asked) if 0 < counts[h] <= most]
    assert len(made) == sum(n <= most for n in counts.values())


def test_hashes_are_found_across_part_files(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    held = draw.integers(0, 1 << 64, 5000, np.uint64)
    counter = HashCounter(tmp_path)
    for some in np.array_split(held, 3):
        counter.add(some)
    HashSet.write(tmp_path / "hashes", counter.rare(1))
    made = HashSet(tmp_path / "hashes")
    asked = np.concatenate([draw.integers(0, 1 << 64, 5000, np.uint64), held])
    assert made.among(asked).tolist() == list(range(5000, 10000))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hashes", "hashes.table"]
