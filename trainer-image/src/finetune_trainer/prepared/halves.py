"""Halves of the retention sets, for ``evaluation.remedy``: one chooses, the other is reported.

    texts of the samples ──► digests ──► hash of each group's smallest digest ──► half

A half depends on the texts of a group and the seed of the split alone: not on the order of the
samples, the ranks or the other samples. Samples of one group stay together, as they are not
independent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.prepared.dataset import PreparedData, Reference
from finetune_trainer.prepared.split import Side, position

Positions = npt.NDArray[np.int64]
"""Positions in the index of a side, ascending."""
_AT_ONCE: Final = 1000
"""Samples whose text is in memory for their digests."""


@dataclass(frozen=True)
class Halves:
    """The halves of the retention sets: positions by number of the set."""

    choosing: Mapping[int, Positions]
    reported: Mapping[int, Positions]


def retention_halves(data: PreparedData, spec: FineTuneJobSpec) -> Halves | None:
    """Return the halves of the retention sets; None without ``evaluation.remedy``."""
    if spec.evaluation.remedy is None:
        return None
    index = data.index("retention")
    choosing, reported = {}, {}
    for number, _ in data.set_names("retention"):
        positions = np.flatnonzero(index.set == number)
        digests = list(sample_digests(data, "retention", positions))
        chooses = np.array(halves(digests, index.groups[positions].tolist(), spec.data.split.seed))
        choosing[number], reported[number] = positions[chooses], positions[~chooses]
    return Halves(choosing, reported)


def reported_part(parts: Halves | None, side: Side) -> Mapping[int, Positions] | None:
    """Return the positions that the results of a side are about, by number of the set; None: all
    samples."""
    return parts.reported if parts is not None and side == "retention" else None


def halves(digests: Sequence[str], groups: Sequence[int], seed: int) -> list[bool]:
    """Return whether each sample belongs to the half that chooses.

    Args:
        digests: of the samples, see ``sample_digest``.
        groups: number of the group of each sample.
        seed: of the split.
    """
    first: dict[int, str] = {}
    for digest, group in zip(digests, groups, strict=True):
        first[group] = min(digest, first.get(group, digest))
    chooses = {group: position(seed, digest) < 0.5 for group, digest in first.items()}
    return [chooses[group] for group in groups]


def sample_digest(reference: Reference) -> str:
    """Digest of a sample's text, by which a later run finds it again: 32 hexadecimal digits."""
    parts = (reference.prompt, reference.completion, reference.label or "")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def sample_digests(data: PreparedData, side: Side, positions: Iterable[int]) -> Iterator[str]:
    """Yield the digests of samples of a held-out side, in order."""
    at = [int(position) for position in positions]
    for start in range(0, len(at), _AT_ONCE):
        yield from map(sample_digest, data.references(side, at[start : start + _AT_ONCE]))
