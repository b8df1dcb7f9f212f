"""Detection of personal data and secrets in text. Findings are counted; their values are never
output.

A form is a pattern and, where the pattern alone is too weak, a check: the check digit of a card,
the digit count of a telephone number, the entropy of a key. Data without a form (names, street
addresses) is not found. Other numbers of the same form are false positives.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

IN_WORDS: Final = {
    "SECRET": "a key or access token",
    "EMAIL": "an e-mail address",
    "CARD": "a payment card number",
    "PHONE": "a telephone number",
}
"""The kinds, with their names in messages; Redact writes the kind in brackets."""

KEY_BITS: Final = 3.0
"""Minimum entropy of a key in bits per character: 20 random letters and digits have about 4, a
placeholder such as sk-xxxxxxxx fewer."""


EXCERPT: Final = 60
"""Characters of a text shown in a message."""

_AROUND: Final = 1 << 16
"""Characters on both sides of a position that are scanned before an excerpt is cut."""

_ESCAPED: Final = re.compile(r"\\[nrt]")


class _Form(NamedTuple):
    kind: str
    beginnings: tuple[str, ...]
    """A text without any of these is skipped: many times faster than the pattern."""
    hint: re.Pattern[str] | None
    """A text without a match of this cheaper pattern is skipped too."""
    pattern: re.Pattern[str]
    held: Callable[[str], str]
    """Returns the prefix of a match that passes the check; empty: no finding."""

    def may_hold(self, text: str) -> bool:
        """Whether a text must be searched."""
        # \d also matches digits of other scripts.
        unknown = self.beginnings is _DIGITS and not text.isascii()
        if not unknown and not any(beginning in text for beginning in self.beginnings):
            return False
        return self.hint is None or self.hint.search(text) is not None


_DIGITS: Final = tuple("0123456789")


def scan(text: str) -> tuple[str, Counter[str]]:
    """Return the text with every finding replaced by its kind in brackets, and counts by kind."""
    found: Counter[str] = Counter()

    def write(kind: str, _: str) -> str:
        found[kind] += 1
        return f"[{kind}]"

    return _with_each(text, write), found


def redacted(text: str) -> str:
    """Return the text with every finding replaced by its kind in brackets."""
    return scan(text)[0]


def covered(text: str) -> str:
    """Return the text with each character of a finding replaced by the cover character of its kind.
    The length and all offsets stay the same."""
    return _with_each(text, lambda kind, what: _COVERS[kind] * len(what))


def uncovered(text: str) -> str:
    """Replace the cover characters of a part of a covered text by the kinds in brackets."""
    return _COVERED.sub(lambda match: f"[{_KINDS[match[0][0]]}]", text)


_COVERS: Final = {kind: chr(0xFDD0 + i) for i, kind in enumerate(IN_WORDS)}
"""Unicode noncharacters, which do not occur in text."""
_KINDS: Final = {cover: kind for kind, cover in _COVERS.items()}
_COVERED: Final = re.compile("|".join(f"{cover}+" for cover in _KINDS))


def excerpt(text: str, position: int = 0) -> str:
    """Return at most ``EXCERPT`` characters around a position, for messages. Personal data is
    redacted, since more people read messages than the data; it is detected before the cut."""
    begin = max(0, position - _AROUND)
    # The letter of an escaped line break would hide a number that follows it.
    near = covered(_ESCAPED.sub("  ", text[begin : position + _AROUND]))
    start = max(0, min(position - begin - EXCERPT // 3, len(near) - EXCERPT))
    part = near[start : start + EXCERPT].rstrip("\n")
    more = begin + start + EXCERPT < len(text)
    return f"{'…' if begin + start else ''}{uncovered(part)}{'…' if more else ''}"


def _with_each(text: str, write: Callable[[str, str], str]) -> str:
    """Return the text with every finding replaced by ``write(kind, finding)``."""

    def replaced(form: _Form, match: re.Match[str]) -> str:
        held = form.held(match[0])
        return write(form.kind, held) + match[0].removeprefix(held) if held else match[0]

    for form in _FORMS:
        if form.may_hold(text):
            text = form.pattern.sub(partial(replaced, form), text)
    return text


def _card(text: str) -> str:
    """Return the card number at the start of the text; an expiry date or check value may follow."""
    ends = [len(text), *(gap.start() for gap in reversed([*re.finditer("[ -]", text)]))]
    return next((text[:end] for end in ends if _is_card(text[:end])), "")


def _is_card(text: str) -> bool:
    """Check the length by issuer, and the check digit (Luhn; ISO/IEC 7812-1)."""
    number = re.sub(r"\D", "", text)
    digits = [int(c) for c in number]
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    return bool(_ISSUED.fullmatch(number)) and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


_ISSUED: Final = re.compile(
    r"4\d{15}(\d{3})?|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[0689]\d{12}|35\d{14}|6\d{15,18}"
)


def _dialled(text: str) -> str:
    """Return the text if it is a telephone number, else an empty string. A number has at most 15
    digits (ITU-T E.164), and at least 8 after a plus, 10 without: shorter ones are rarely telephone
    numbers. Digits with a single point are a decimal number."""
    least = 8 if text.startswith("+") else 10
    decimal = re.fullmatch(r"\+\d+\.\d+", text)
    return text if least <= sum(c.isdigit() for c in text) <= 15 and not decimal else ""


def _random(text: str) -> str:
    """Return the text if its Shannon entropy is that of a key, else an empty string."""
    shares = [count / len(text) for count in Counter(text).values()]
    return text if -sum(share * math.log2(share) for share in shares) >= KEY_BITS else ""


_LETTER: Final = r"A-Za-z\u00c0-\u052f"
"""Letters of scripts with spaces between words. Text of other scripts ends an e-mail address."""


_FORMS: Final = (
    _Form(
        "SECRET",
        ("-----BEGIN ",),
        None,
        re.compile(
            r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
            # Headers contain dashes; five dashes end the body.
            r"(?:(?:[^-]|-(?!----))*+-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
            r"|(?:\s*[A-Za-z0-9+/=]{16,})*)"
        ),
        str,
    ),
    _Form(
        "SECRET",
        (
            *("sk-", "sk_", "rk_", "AKIA", "ASIA", "gho_", "ghp_", "ghr_", "ghs_", "ghu_"),
            *("github_pat_", "glpat-", "xox", "hf_", "AIza", "npm_", "pypi-", "eyJ", "SG."),
        ),
        None,
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
        ("@",),
        None,
        re.compile(
            rf"(?<![{_LETTER}0-9._%+-])[{_LETTER}0-9_%+-][{_LETTER}0-9._%+-]{{0,63}}"
            r"@(?!\dx\.(?:png|jpe?g|gif|webp|svg)\b)"  # image names such as icon@2x.png
            rf"(?:[{_LETTER}0-9-]{{1,63}}\.){{1,8}}[{_LETTER}]{{2,24}}(?![{_LETTER}0-9-])"
        ),
        str,
    ),
    _Form(
        "CARD",
        _DIGITS,
        re.compile(r"\d{4}[ -]?\d{4}"),
        re.compile(r"(?<![\w.,+-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])"),
        _card,
    ),
    _Form(
        "PHONE",
        _DIGITS,
        re.compile(r"\+[1-9]|\d\d[ .()/-]{0,3}\d\d"),
        re.compile(
            r"(?<![\w.,+/-])(?:"
            r"(?:\+[1-9]|00[1-9]\d{1,2} )\d{0,14}(?:[ .()/-]{1,2}\d{1,12}){0,6}"
            r"|(?:1[ .-])?(?:\([2-9]\d{2}\)[ -]?\d{3}[ .-]\d{4}"
            r"|[2-9]\d{2}(?P<gap>[ .-])\d{3}(?P=gap)\d{4})"
            r"|0[1-9](?P<pair>[ .-])\d{2}(?:(?P=pair)\d{2}){3}"
            r"|\(?0[1-9]\d{0,4}\)?[ /-]{1,3}\d{3,8}(?:[ -]\d{2,6}){0,3}"
            r")(?![\w-])"
        ),
        _dialled,
    ),
)
"""Keys first: a key may contain an e-mail address or a number."""
