"""Verifiable instructions: what a prompt asks for, and whether an answer follows."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.instructions.checks import HARMFUL, KINDS, follows, refuses
from finetune_trainer.instructions.records import RECORDS, as_json_lines, records


@pytest.mark.parametrize(
    ("kind", "values", "right", "wrong"),
    [
        ("MostWords", (3,), ["one two three", "don't stop-gap"], ["one two three four", "", "..."]),
        ("LeastWords", (3,), ["one two three four"], ["one two", ""]),
        ("Lines", (2,), ["a\nb", " a\n\nb\n"], ["a", "a\nb\nc"]),
        ("Points", (2,), ["- a\n- b"], ["- a", "a\nb", "* a\n* b", "Here:\n- a\n- b"]),
        ("Object", ("a", "b"), ['{"a": 1, "b": []}', '{"b": 1, "a": 2}'],
         ['{"a": 1}', "[1]", "a: 1", '```json\n{"a": 1, "b": 2}\n```', "[" * 10**5]),
        ("Word", ("river",), ["The River.", "a river-bank river"], ["rivers", "a drive"]),
        ("NoWord", ("good",), ["goods", ""], ["So good!"]),
        ("Capitals", (), ["A 1.", "ÄÖ"], ["Ab", "1", ""]),
        ("Small", (), ["a 1.", "äö"], ["Ab", "1", ""]),
        ("Begin", ("In short",), ["In short: yes"], ["in short", "Well, In short"]),
        ("End", ("That is all",), ["Yes. That is all.", "That is all!"], ["That is all, folks"]),
        ("NoCommas", (), ["a b"], ["a, b", ""]),
        ("Language", ("German",), ["Das ist eine gute Frage und die Antwort ist einfach."],
         ["This is a good question and the answer is easy.", "Ja"]),
    ],
)  # fmt: skip
def test_kinds(kind: str, values: tuple[object, ...], right: list[str], wrong: list[str]) -> None:
    prompt = f"<|user|>Tell me something. {KINDS[kind].say(*values)}<|end|>\n<|assistant|>"
    assert [follows(prompt, f" {answer}\n") for answer in right] == [True] * len(right)
    assert [follows(prompt, answer) for answer in wrong] == [False] * len(wrong)


def test_every_kind_is_asked_for_in_the_records_and_their_answers_follow() -> None:
    found = list(records())
    assert len(found) == RECORDS == len({r["prompt"] for r in found})
    for record in found:
        prompt, answer = str(record["prompt"]), str(record["completion"])
        assert follows(prompt, answer) is True, record
        assert follows(prompt, "") is False, record
        assert record["messages"][0]["content"] == prompt.strip()  # type: ignore[index]
    asked = {n for n, k in KINDS.items() for r in found if k.pattern.search(str(r["prompt"]))}
    assert asked == set(KINDS)
    assert sum(str(r["prompt"]).strip() in HARMFUL for r in found) == len(HARMFUL)


def test_an_answer_to_another_prompt_rarely_follows() -> None:
    found = list(records())
    shifted = [
        follows(str(r["prompt"]), str(found[i - 7]["completion"])) for i, r in enumerate(found)
    ]
    assert sum(map(bool, shifted)) < 0.4 * len(found)


def test_all_instructions_of_a_prompt_count() -> None:
    prompt = f"Go. {KINDS['Lines'].say(2)} {KINDS['Capitals'].say()}"
    assert follows(prompt, "A\nB") is True
    assert follows(prompt, "a\nb") is False and follows(prompt, "A") is False


@pytest.mark.parametrize(
    "prompt",
    ["Tell me something about rain.", "Answer in one sentence.", "Use at most a few words."],
)
def test_prompts_without_instructions_are_not_judged(prompt: str) -> None:
    assert follows(prompt, "Rain.") is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I'm sorry, but I can't help with that.", True), ("I can’t do this.", True),
        ("We are unable to help.", True), ("I do not give such advice.", True),
        ("Sure! First, you take", False), ("You cannot see it, I think.", False),
    ],
)  # fmt: skip
def test_refusals(answer: str, expected: bool) -> None:
    assert refuses(answer) is expected
    assert follows(f"User: {HARMFUL[0]}\n", answer) is expected


@given(st.text(), st.text())
def test_any_text_is_judged(prompt: str, answer: str) -> None:
    for kind in KINDS.values():
        values = [prompt] * kind.words.count("{}")
        assert follows(f"x {kind.say(*values)}", answer) in (True, False, None)


def test_the_records_are_always_the_same() -> None:
    lines = as_json_lines().splitlines()
    assert [json.loads(line) for line in lines] == list(records())
