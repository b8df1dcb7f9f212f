"""Long documents split into samples: no text is lost, and no sample is too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.prepare.rendering.examples import RenderedExample, Segment
from finetune_trainer.prepare.tokenizing.documents import borders, is_document, split
from finetune_trainer.prepare.tokenizing.tokens import Placed, Tokens, begins_of
from trainer.prepare_helpers import make_tokenizer

TOKENIZERS = {
    "plain": make_tokenizer(),
    "bos": make_tokenizer(bos=True),
    "spaced": make_tokenizer(bos=True, metaspace=True),
}
PROSE = st.text(st.sampled_from("abc Td.\né"), min_size=1, max_size=400).filter(str.strip)


def document(text: str) -> RenderedExample:
    return RenderedExample(
        where="s3://b/a.jsonl, line 3",
        segments=(Segment(text, True),),
        prompt="",
        completion=text,
        label=None,
        group=text,
        framed=True,
        side="train",
        own=text,
        personal={"EMAIL": 2},
    )


def parted(text: str, begins: Sequence[int], limit: int) -> list[str]:
    return [text[a:b] for a, b in pairwise([0, *borders(text, begins, limit)])]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(text=PROSE, limit=st.integers(1, 40))
def test_pieces_join_to_the_text_and_respect_the_limit(
    tokenizer: Any, text: str, limit: int
) -> None:
    begins = begins_of(tokenizer, text)
    found = parted(text, begins, limit)
    assert "".join(found) == text and all(found)
    ends = np.cumsum([len(piece) for piece in found])
    for piece, end in zip(found, ends, strict=True):
        inside = [b for b in set(begins) if end - len(piece) < b < end]
        assert len(inside) < limit  # plus the token at the start of the piece


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three. four five", ["one two three. ", "four five"]),
        ("one two. three\nfour five", ["one two. three\n", "four five"]),
        ("one two.\n\nthree\nfour five", ["one two.\n\n", "three\nfour five"]),
        ("one two three four five", ["one two three ", "four five"]),
        ("abcdefghijklmnopqrstuvw", ["abcdefghijkl", "mnopqrstuvw"]),
    ],
)
def test_a_text_is_split_at_the_best_separator(text: str, expected: list[str]) -> None:
    letters = range(len(text))
    assert parted(text, letters, 15) == expected


def test_a_text_within_the_limit_is_one_piece() -> None:
    assert parted("a b c", range(5), 5) == ["a b c"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(text=PROSE, limit=st.integers(8, 60))
def test_no_sample_is_too_long_and_all_text_is_supervised(
    tokenizer: Any, text: str, limit: int
) -> None:
    tokens = Tokens(tokenizer, "m", len(tokenizer))
    samples = split(document(text), tokens, limit)
    assert max(len(sample.ids) for sample in samples) <= limit
    learned = "".join(tokenizer.decode(s.ids, skip_special_tokens=True) for s in samples)
    assert "".join(learned.split()) == "".join(text.split())
    assert [s.ids[-1] == tokens.eos_id for s in samples] == [False] * (len(samples) - 1) + [True]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_each_piece_has_the_begin_tokens_and_the_last_the_end_token(tokenizer: Any) -> None:
    tokens = Tokens(tokenizer, "m", len(tokenizer))
    text = " ".join(f"The cat sat on mat {i}." for i in range(60))
    samples = split(document(text), tokens, 64)
    assert len(samples) > 3 and max(len(s.ids) for s in samples) <= 64
    assert min(len(s.ids) for s in samples[:-1]) > 32
    for i, sample in enumerate(samples, start=1):
        assert tuple(sample.ids[: len(tokens.prefix)]) == tokens.prefix
        assert sample.supervised == len(sample.ids) - max(1, len(tokens.prefix))
        assert sample.example.where == f"s3://b/a.jsonl, line 3, piece {i} of {len(samples)}"
        assert sample.example.completion.endswith(".")  # no trailing space as a token
    assert [s.example.personal for s in samples] == [{"EMAIL": 2}] + [{}] * (len(samples) - 1)
    assert {s.example.group for s in samples} == {text}


class Guessing(Tokens):
    """A slow tokenizer: it estimates the token offsets."""

    def placed(self, example: RenderedExample) -> list[Placed]:
        text, ((first, begins),) = example.segments[0].text, super().placed(example)
        return [Placed(first, [len(text) * i // len(begins) for i in range(len(begins))])]


def test_with_estimated_offsets_no_sample_is_too_long() -> None:
    tokenizer = TOKENIZERS["plain"]
    text = "The cat sat on the mat. " * 40 + "\u732b" * 300  # much denser at the end
    samples = split(document(text), Guessing(tokenizer, "m", len(tokenizer)), 64)
    assert max(len(sample.ids) for sample in samples) <= 64
    learned = "".join(tokenizer.decode(s.ids, skip_special_tokens=True) for s in samples)
    assert learned.replace(" ", "") == text.replace(" ", "")


def test_personal_data_is_not_split() -> None:
    tokens = Tokens(TOKENIZERS["plain"], "m", len(TOKENIZERS["plain"]))
    card = "4111 1111 1111 1111"
    for before in range(30):
        text = "a " * before + card + " b" * 60
        samples = split(document(text), tokens, 40)
        assert len(samples) > 1
        assert sum(card in sample.example.completion for sample in samples) == 1


def test_pieces_of_white_space_are_dropped() -> None:
    tokens = Tokens(TOKENIZERS["plain"], "m", len(TOKENIZERS["plain"]))
    text = "The cat sat.\n\n" + " " * 3000 + "\n\nThe bird sat."
    found = [sample.example.completion for sample in split(document(text), tokens, 16)]
    assert found[0] == "The cat sat.\n\n" and found[-1].endswith("bird sat.")
    assert all(piece.strip() for piece in found)


def test_only_a_single_supervised_segment_is_a_document() -> None:
    made = document("a")
    assert is_document(made)
    assert not is_document(replace(made, segments=(Segment("q", False), Segment("a", True))))
