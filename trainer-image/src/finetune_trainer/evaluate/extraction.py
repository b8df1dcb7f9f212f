"""What an answer says in the end: its number, its choice, its JSON value.

An answer with a chain of thought is rarely equal to the reference. Where a strict and a flexible
reading differ, both are metrics: the strict one also measures the wanted form.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any, Final

_NUMBER: Final = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_CHOICE: Final = re.compile(r"(?<![A-Za-z0-9'])\(?([A-J])(?:\)|[.:](?=\s|$)|(?=\s|$))")
_ONLY_CHOICE: Final = re.compile(r"\(?([A-Ja-j])\)?[.:]?$")
_NOTHING: Final = object()


def number_match(said: str, wanted: str) -> bool:
    """Whether the last numbers of answer and reference are equal (flexible)."""
    number = _last_number(wanted)
    return number is not None and _last_number(said) == number


def strict_number_match(said: str, wanted: str) -> bool:
    """Whether the answer has the reference's last number behind the words that stand in front of it
    in its line of the reference (``#### 42``, ``The answer is 42``), in their last occurrence; a
    reference that is a number alone wants an answer that begins with it."""
    found = list(_NUMBER.finditer(wanted))
    if not found:
        return False
    marker = wanted[: found[-1].start()].rpartition("\n")[2].strip(" $€£")
    _, there, tail = said.strip().rpartition(marker) if marker else ("", "", said.strip())
    if marker and not there:
        return False
    first = _NUMBER.match(tail.lstrip(" $€£"))
    return first is not None and _value(first[0]) == _value(found[-1][0])


def choice_match(said: str, wanted: str) -> bool:
    """Whether the answer chooses the reference's letter, A to J: the last letter that stands alone
    (``The answer is (B).``, ``B``, ``B. Paris``)."""
    letter = _choice(wanted)
    return letter is not None and _choice(said) == letter


def is_json(text: str) -> bool:
    """Whether a text is one JSON value."""
    return _json(text) is not _NOTHING


def json_match(said: str, wanted: str) -> bool:
    """Whether both are one JSON value, and equal: order of fields and spaces do not matter."""
    value = _json(wanted)
    return value is not _NOTHING and _same(_json(said), value)


def json_field_f1(said: str, wanted: str) -> float:
    """F1 of the fields of a JSON answer: pairs of path and value that answer and reference share.
    Items of a list are at the list's path. 0 if the answer is no JSON value."""
    value, answer = _json(wanted), _json(said)
    if value is _NOTHING or answer is _NOTHING:
        return 0.0
    ours, theirs = Counter(_leaves(answer)), Counter(_leaves(value))
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return _value(found[-1]) if found else None


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:  # more digits than a Decimal's exponent
        return None


def _choice(text: str) -> str | None:
    alone = _ONLY_CHOICE.match(text.strip())
    if alone:
        return alone[1].upper()
    found = _CHOICE.findall(text)
    return str(found[-1]) if found else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOTHING


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values; unlike Python's, 1 is not true."""
    return Counter(_leaves(one, places=True)) == Counter(_leaves(other, places=True))


def _leaves(value: Any, *, places: bool = False) -> Iterator[tuple[str, str]]:
    """Yield path and text of every value without parts; an empty object or list is one.

    Without recursion: an answer may be nested as deep as the parser allows.

    Args:
        places: whether a list's items have their positions in the path.
    """
    todo: list[tuple[str, Any]] = [("", value)]
    while todo:
        path, each = todo.pop()
        if isinstance(each, dict) and each:
            todo += [(f"{path}.{json.dumps(key)}", part) for key, part in each.items()]
        elif isinstance(each, list) and each:
            todo += [(f"{path}.{i if places else '[]'}", part) for i, part in enumerate(each)]
        else:
            yield path, "(nothing)" if each is _NOTHING else json.dumps(each)
