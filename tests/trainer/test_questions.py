"""Questions: test prompts behind examples, instructions and passages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.prepare.questions.examples import SIMILAR, Pool, shingles_of, similarity
from finetune_trainer.prepare.questions.joining import Joint
from finetune_trainer.prepare.questions.passages import Retriever
from finetune_trainer.prepared.dataset import AnsweredPrompt
from finetune_trainer.prepared.questions import (
    Prompting,
    Question,
    read_questions,
    write_questions,
)

BOS, END, TURN = 1, 2, 9


def ids(*tokens: int) -> Any:
    return np.array(tokens, np.int32)


def example(*tokens: int, label: str | None = None) -> AnsweredPrompt:
    """A sample whose last token is the answer."""
    return AnsweredPrompt(ids(*tokens), len(tokens) - 1, label)


def words(text: str) -> list[int]:
    return [100 + ord(c) for c in text]


def test_labels_take_turns() -> None:
    listed = [example(i, i + 50, 5, label=label) for i, label in enumerate("aaabbc")]
    chosen = Pool(listed).choose(4, ids(77, 78))
    assert [found.label for found in chosen] == ["a", "b", "c", "a"]


tokens = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@given(st.lists(tokens, max_size=20), tokens, st.integers(1, 6))
def test_examples_are_no_near_duplicates(
    samples: list[list[int]], question: list[int], count: int
) -> None:
    pool = Pool([example(*sample, 99) for sample in samples])
    chosen = pool.choose(count, ids(*question))
    assert len(chosen) <= count
    asked = shingles_of(ids(*question)) - pool._common
    for found in chosen:
        prompt = shingles_of(found.ids[: found.prompt_length]) - pool._common
        assert similarity(prompt, asked) < SIMILAR


def test_the_words_of_a_template_make_no_near_duplicates() -> None:
    frame = list(range(40, 60))
    pool = Pool([example(*frame, i, i + 1, i + 2, 99) for i in range(0, 30, 3)])
    assert len(pool.choose(3, ids(*frame, 0, 1, 2))) == 3
    assert all(found.ids[20] != 0 for found in pool.choose(9, ids(*frame, 0, 1, 2)))


def test_texts_are_joined_with_empty_lines() -> None:
    joint = Joint(words, None, BOS, {END})
    made = joint.question(["ab"], [example(BOS, 5, 6, END)], ids(BOS, 7, 8))
    line = words("\n\n")
    assert made.tolist() == [BOS, *words("ab"), *line, 5, 6, *line, 7, 8]
    assert joint.question([], [], ids(BOS, 7, 8)).tolist() == [BOS, 7, 8]


def test_conversations_are_joined_turn_by_turn() -> None:
    """All begin with the same system turn, which is written once."""
    joint = Joint(words, lambda text: f"<{text}>", BOS, {TURN})
    first, question = (BOS, 30, TURN, 40, 5, TURN, 50, 6, TURN), (BOS, 30, TURN, 40, 7, TURN, 50)
    made = joint.question([], [example(*first)], ids(*question))
    assert made.tolist() == [*first, 40, 7, TURN, 50]
    instructed = joint.question(["x"], [], ids(BOS, 40, 7, TURN, 50))
    assert instructed.tolist() == [BOS, *words("<x>"), 40, 7, TURN, 50]


def test_questions_are_read_as_written(store: Any, bucket: str) -> None:
    questions = {
        Prompting("1-shot", 0): [Question(0, 3, ids(1, 2)), Question(1, 9, ids(4))],
        Prompting("1-shot", 1): [Question(0, 3, ids(5, 6, 7))],
        Prompting("retrieval", 0, tuned=True): [Question(0, 0, ids(8))],
    }
    assert read_questions(store, f"s3://{bucket}/run") == {}
    for written in ({}, questions):
        write_questions(store, f"s3://{bucket}/run", written)
        found = read_questions(store, f"s3://{bucket}/run")
        assert found.keys() == written.keys()
        for prompting, asked in written.items():
            for ours, theirs in zip(asked, found[prompting], strict=True):
                assert (ours.set, ours.position) == (theirs.set, theirs.position)
                assert np.array_equal(ours.ids, theirs.ids)


def test_the_passage_with_the_words_comes_first() -> None:
    passages = ["the river is long", "a bridge of stone", "the mountain is high"]
    retriever = Retriever(passages)
    found = retriever.find(["who built a stone bridge?", "unheard"], 2)
    assert found == [["a bridge of stone"], []]


@pytest.mark.parametrize("top", [1, 5])
def test_no_more_passages_than_there_are(top: int) -> None:
    (found,) = Retriever(["one fish", "two fish"]).find(["two"], top)
    assert found == ["two fish"]
