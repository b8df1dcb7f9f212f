"""Renders questions with retrieved passages: RAFT (Zhang et al. 2024, arXiv:2403.10131).

A prompt shows numbered passages, as a retriever returns them: the oracle holds the answer, the
distractors do not. In a share of the training records the oracle is omitted and the answer is still
supervised, so that the model also retains knowledge that it cannot look up. A citation of the
oracle in the answer (``[oracle]``, ``[oracle 2]`` of several) becomes the number of the passage; it
is removed where the oracle is omitted. Held-out records always show the oracle, as the paper
measures.

Choice and order of the passages are a pure function of the split's seed, question and passages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from finetune_api.templates import Retrieval
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.rendering.formats import (
    Pair,
    field_value,
    from_json,
    text_value,
    wrong_type,
)
from finetune_trainer.prepared.split import position

_CITATION: Final = re.compile(r"[ \t]*\[oracle(?: ([0-9]+))?\]")


class RetrievalPrompts:
    """Renders records of format Retrieval.

    Args:
        retrieval: number of distractors, and share of records that show the oracle.
        seed: of the split.
    """

    def __init__(self, retrieval: Retrieval, seed: int) -> None:
        self._wanted = retrieval.distractors
        self._share = float(retrieval.oracle_share)
        self._seed = seed

    def with_oracle(self, record: Record) -> Pair:
        """Render a record with its oracle among the passages.

        Raises:
            DataError: 'MissingField', 'WrongType', 'TooFewDistractors' or 'UnknownPassage', with
                object, line and field.
        """
        return self._pair(record, shown=True)

    def drawn(self, record: Record) -> Pair:
        """Render a record with or without its oracle, by the share.

        Raises:
            DataError: see ``with_oracle``.
        """
        question = text_value(record, "question")
        at = position(self._seed, f"oracle\0{question}")
        return self._pair(record, shown=at < self._share)

    def _pair(self, record: Record, *, shown: bool) -> Pair:
        question, answer = text_value(record, "question"), text_value(record, "answer")
        oracles = _passages(record, "oracle")
        if not oracles:
            raise wrong_type(record, "oracle", "at least one passage", record.fields["oracle"])
        distractors = self._distractors(record, question, oracles)
        passages = [*(oracles if shown else ()), *distractors]
        passages = self._shuffled("order", question, passages)
        numbered = [f"[{i}] {passage}\n\n" for i, passage in enumerate(passages, start=1)]
        numbers = [passages.index(oracle) + 1 for oracle in oracles] if shown else None
        learned = _cited(record, answer, len(oracles), numbers).strip()
        prompt = f"{''.join(numbered)}Question: {question}\nAnswer:"
        return Pair(prompt, f" {learned}" if learned else "", subject=question)

    def _distractors(self, record: Record, question: str, oracles: list[str]) -> list[str]:
        listed = _passages(record, "distractors") if record.fields.get("distractors") else []
        there = [passage for passage in listed if passage not in oracles]
        if self._wanted is None:
            return there
        if len(there) < self._wanted:
            raise DataError(
                "TooFewDistractors",
                f"{record.where}: field 'distractors' has {len(there)} passages beside the oracle,"
                f" but retrieval.distractors is {self._wanted}; lower it, or add passages",
            )
        return self._shuffled("choice", question, there)[: self._wanted]

    def _shuffled(self, what: str, question: str, passages: Sequence[str]) -> list[str]:
        def at(passage: str) -> float:
            return position(self._seed, f"{what}\0{question}\0{passage}")

        return sorted(passages, key=lambda passage: (at(passage), passage))


def _passages(record: Record, field: str) -> list[str]:
    """Return the passages of a field: a list, a JSON list in a string (for CSV), or a string that
    is one passage."""
    value: Any = field_value(record, field)
    listed = from_json(value) if isinstance(value, str) else value
    if isinstance(listed, list) and all(isinstance(p, str) and p for p in listed):
        return listed
    if not isinstance(value, str) or not value:
        raise wrong_type(record, field, "a passage or a list of passages (strings)", value)
    return [value]


def _cited(record: Record, answer: str, oracles: int, numbers: Sequence[int] | None) -> str:
    """Return the answer with its citations replaced by the numbers of the passages; with the
    citations removed if no oracle is shown (``numbers`` is None)."""

    def written(mark: re.Match[str]) -> str:
        which = int(mark[1] or 1)
        if not 1 <= which <= oracles:
            raise DataError(
                "UnknownPassage",
                f"{record.where}: field 'answer' cites {mark[0].strip()}, but the record has"
                f" {oracles} oracle passages, counted from 1; correct the record",
            )
        if numbers is None:
            return ""
        space = mark[0][: mark[0].index("[")]
        return f"{space}[{numbers[which - 1]}]"

    return _CITATION.sub(written, answer)
