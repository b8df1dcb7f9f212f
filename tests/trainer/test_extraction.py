"""What an answer says in the end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.evaluate.extraction import (
    choice_match,
    json_field_f1,
    json_match,
    number_match,
    strict_number_match,
)

GSM = "He buys 3 and 4 apples, so 3 + 4 = 7.\n#### 7"


@pytest.mark.parametrize(
    ("said", "wanted", "flexible", "strict"),
    [
        ("3 + 4 = 7\n#### 7", GSM, True, True),
        ("#### 8 ... no, #### 7", GSM, True, True),
        ("So he has 7 apples.", GSM, True, False),
        ("#### 7 apples of 12", GSM, False, True),
        ("#### 70", GSM, False, False),
        ("####7.0", GSM, True, True),
        ("#### $1,234.50", "It costs\n#### 1234.5", True, True),
        ("The answer is -5", "The answer is -5.", True, True),
        ("It is -5", "The answer is -5.", True, False),
        ("42", "42", True, True),
        ("42 is the answer to 1 question", "42", False, True),
        ("the answer is 42", "42", True, False),
        ("nothing", GSM, False, False),
        ("7", "no number", False, False),
        ("", "7", False, False),
        (".5", "0.5", True, True),
    ],
)
def test_numbers(said: str, wanted: str, flexible: bool, strict: bool) -> None:
    assert (number_match(said, wanted), strict_number_match(said, wanted)) == (flexible, strict)


@pytest.mark.parametrize(
    ("said", "wanted", "right"),
    [
        ("B", "B", True),
        ("b", "(B)", True),
        ("(B).", "B", True),
        ("The answer is (B).", "B", True),
        ("B. Paris", "B", True),
        ("B: Paris", "B", True),
        ("A or C? I choose C", "C", True),
        ("I'd say D", "D", True),
        ("A banana", "B", False),
        ("Because of Berlin", "B", False),
        ("", "A", False),
        ("A", "none", False),
    ],
)
def test_choices(said: str, wanted: str, right: bool) -> None:
    assert choice_match(said, wanted) is right


@pytest.mark.parametrize(
    ("said", "wanted", "equal", "f1"),
    [
        ('{"b": 2, "a": 1}', '{"a": 1, "b": 2}', True, 1.0),
        (' {"a":1}\n', '{"a": 1}', True, 1.0),
        ('{"a": 1, "b": 3}', '{"a": 1, "b": 2}', False, 0.5),
        ('{"a": true}', '{"a": 1}', False, 0.0),
        ('{"a": 1}', '{"a": 1, "b": {"c": 2}}', False, 2 / 3),
        ('{"tags": ["y", "x"]}', '{"tags": ["x", "y"]}', False, 1.0),
        ("[]", "[]", True, 1.0),
        ("not JSON", '{"a": 1}', False, 0.0),
        ('{"a": 1}', "not JSON", False, 0.0),
    ],
)
def test_json(said: str, wanted: str, equal: bool, f1: float) -> None:
    assert json_match(said, wanted) is equal
    assert json_field_f1(said, wanted) == pytest.approx(f1)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(VALUES, VALUES)
def test_json_values_are_equal_as_json_says(one: Any, other: Any) -> None:
    texts = [json.dumps(value, sort_keys=True) for value in (one, other)]
    assert json_match(json.dumps(one), json.dumps(other)) is (texts[0] == texts[1])
    assert json_match(json.dumps(one, indent=2), texts[0])
    assert json_field_f1(texts[0], texts[0]) == 1.0


@given(st.text(), st.text())
def test_any_text_is_read(said: str, wanted: str) -> None:
    for read in (number_match, strict_number_match, choice_match, json_match):
        assert read(said, wanted) in (True, False)
    assert 0 <= json_field_f1(said, wanted) <= 1


def test_values_as_deep_as_the_parser_allows() -> None:
    for depth in range(1, 3000, 37):
        text = "[" * depth + "1" + "]" * depth
        assert json_field_f1(text, text) == float(json_match(text, text))


def test_the_readings_take_linear_time() -> None:
    for text in ("1," * 50_000, "(" * 100_000, "A" * 100_000, "1" * 100_000, "[" * 100_000):
        number_match(text, text)
        strict_number_match(text, text)
        choice_match(text, text)
        json_match(text, text)
