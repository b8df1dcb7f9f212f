"""Personal data and secrets in text: found by their form, counted, and never repeated.

A form is a pattern and, where a pattern alone says too little, a check: the check digit of a card,
the number of digits of a telephone number, the spread of a key's characters. What has no form of
its own (names, street addresses) is not found, and a number that looks like one of these is.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

from finetune_trainer.failures import DataError
from finetune_trainer.prepare.drafts import Draft

IN_WORDS: Final = {
    "SECRET": "a key or access token",
    "EMAIL": "an e-mail address",
    "CARD": "a payment card number",
    "PHONE": "a telephone number",
}
"""The kinds; Redact writes them in brackets."""

KEY_BITS: Final = 3.0
"""Least spread of a key's characters, in bits each; 20 random letters and digits have about 4, a
placeholder such as sk-xxxxxxxx has fewer."""


class _Form(NamedTuple):
    kind: str
    hint: re.Pattern[str]
    """What a text must hold to be searched at all: cheap."""
    pattern: re.Pattern[str]
    holds: Callable[[str], bool]


def scan(text: str) -> tuple[str, Counter[str]]:
    """The text with a bracketed word for everything that is found, and how often each kind was."""
    found: Counter[str] = Counter()

    def write(kind: str, _: str) -> str:
        found[kind] += 1
        return f"[{kind}]"

    return _with_each(text, write), found


def redacted(text: str) -> str:
    """The text with a bracketed word for everything that is found."""
    return scan(text)[0]


def covered(text: str) -> str:
    """The text in as many characters, each of what is found replaced by one that stands for its
    kind: stretches of it are still where they were."""
    return _with_each(text, lambda kind, what: _COVERS[kind] * len(what))


def uncovered(text: str) -> str:
    """A stretch of a covered text with the bracketed words."""
    return _COVERED.sub(lambda match: f"[{_KINDS[match[0][0]]}]", text)


_COVERS: Final = {kind: chr(0xFDD0 + i) for i, kind in enumerate(IN_WORDS)}
"""Unicode's noncharacters, which no text holds."""
_KINDS: Final = {cover: kind for kind, cover in _COVERS.items()}
_COVERED: Final = re.compile("|".join(f"{cover}+" for cover in _KINDS))


def _with_each(text: str, write: Callable[[str, str], str]) -> str:
    """The text with something else written for everything that is found, by its kind."""

    def replaced(form: _Form, match: re.Match[str]) -> str:
        return write(form.kind, match[0]) if form.holds(match[0]) else match[0]

    for form in _FORMS:
        if form.hint.search(text):
            text = form.pattern.sub(partial(replaced, form), text)
    return text


def inspect(draft: Draft, policy: str, *, own_group: bool) -> Draft:
    """The draft with the kinds that its parts hold; under Redact, without their values.

    Args:
        own_group: whether the group is the draft's own prompt, which is redacted with it: prompts
            that have become equal stay on one side of the split.

    Raises:
        DataError: 'PersonalData' under policy Fail, naming record and kind.
    """
    if policy == "Ignore":
        return draft
    scanned = [scan(part.text) for part in draft.parts]
    found: Counter[str] = sum((kinds for _, kinds in scanned), Counter())
    if not found:
        return draft
    if policy == "Fail":
        raise _refusal(draft, [kinds for _, kinds in scanned])
    if policy == "Warn":
        return replace(draft, personal=found)
    parts = tuple(
        part._replace(text=text) for part, (text, _) in zip(draft.parts, scanned, strict=True)
    )
    return replace(
        draft,
        parts=parts,
        prompt="".join(part.text for part in parts[:-1]),
        completion=scan(draft.completion)[0],
        label=None if draft.label is None else scan(draft.label)[0],
        group=scan(draft.group)[0] if own_group else draft.group,
        own=scan(draft.own)[0],
        personal=found,
    )


def _refusal(draft: Draft, by_part: list[Counter[str]]) -> DataError:
    part, kinds = next((part, k) for part, k in zip(draft.parts, by_part, strict=True) if k)
    side = "what is learned of it" if part.learned else "its prompt"
    named = " and ".join(IN_WORDS[kind] for kind in kinds)
    return DataError(
        "PersonalData",
        f"{draft.where}: {side} holds {named}; take it out of the record, or set"
        " data.quality.personalData to Redact, Warn or Ignore",
    )


def _always(_: str) -> bool:
    return True


def _card(text: str) -> bool:
    """Length by issuer, and the check digit (Luhn; ISO/IEC 7812-1)."""
    number = re.sub(r"\D", "", text)
    digits = [int(c) for c in number]
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    return bool(_ISSUED.fullmatch(number)) and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


_ISSUED: Final = re.compile(
    r"4\d{15}(\d{3})?|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[0689]\d{12}|35\d{14}|6\d{15,18}"
)


def _dialled(text: str) -> bool:
    """At most 15 digits (ITU-T E.164), and at least 8 behind a plus, 10 without: fewer are more
    likely something else. One point among digits is that of a decimal number."""
    least = 8 if text.startswith("+") else 10
    decimal = re.fullmatch(r"\+\d+\.\d+", text)
    return least <= sum(c.isdigit() for c in text) <= 15 and not decimal


def _random(text: str) -> bool:
    """Whether a key's characters are spread as random ones are (Shannon entropy)."""
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log2(share) for share in shares) >= KEY_BITS


_FORMS: Final = (
    _Form(
        "SECRET",
        re.compile(r"-----BEGIN "),
        re.compile(
            r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
            r"(?:[^-]*-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
            r"|(?:\s*[A-Za-z0-9+/=]{16,})*)"
        ),
        _always,
    ),
    _Form(
        "SECRET",
        re.compile(
            r"sk[-_]|rk_|AKIA|ASIA|gh[oprsu]_|github_pat_|glpat-|xox|hf_|AIza|npm_|pypi-|eyJ|SG\."
        ),
        re.compile(
            r"(?<![A-Za-z0-9_-])(?:"
            r"(?:AKIA|ASIA)[A-Z0-9]{16}"
            r"|sk-(?:[a-z0-9]{1,12}-){0,3}[A-Za-z0-9_-]{20,}"
            r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}"
            r"|gh[oprsu]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,}"
            r"|glpat-[A-Za-z0-9_-]{20,}|xox[abeprs]-[A-Za-z0-9-]{10,}"
            r"|hf_[A-Za-z0-9]{30,}|AIza[A-Za-z0-9_-]{35}|npm_[A-Za-z0-9]{36}"
            r"|pypi-[A-Za-z0-9_-]{40,}|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"
            r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
            r")(?![A-Za-z0-9_-])"
        ),
        _random,
    ),
    _Form(
        "EMAIL",
        re.compile("@"),
        re.compile(
            r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63}"
            r"@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])"
        ),
        _always,
    ),
    _Form(
        "CARD",
        re.compile(r"\d{4}[ -]?\d{4}"),
        re.compile(r"(?<![\w.,+-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])"),
        _card,
    ),
    _Form(
        "PHONE",
        re.compile(r"\d{3}"),
        re.compile(
            r"(?<![\w.,+/-])(?:"
            r"\+[1-9]\d{0,2}(?:[ .()/-]{0,2}\d{1,12}){1,6}"
            r"|\([2-9]\d{2}\)[ -]?\d{3}[ .-]\d{4}|[2-9]\d{2}(?P<gap>[ .-])\d{3}(?P=gap)\d{4}"
            r"|\(?0[1-9]\d{0,4}\)?[ /-]{1,3}\d{3,8}(?:[ -]\d{2,6}){0,3}"
            r")(?![\w-])"
        ),
        _dialled,
    ),
)
"""Keys first: an e-mail address or a number may stand inside of one."""
