"""HTML pages of hostile records: nothing of a record becomes markup, style or a request, and
nothing is hidden from the reader."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections import Counter
from html.parser import HTMLParser
from typing import Any, Final

import pytest

from finetune_api.evaluation_results import BASE, TUNED, Row
from finetune_trainer.prepare.reducing.page import render as data_page
from finetune_trainer.publish.report import render as run_page
from trainer.test_prepare_report import report
from trainer.test_publish_papers import DATA_REPORT, about, measured

HOSTILE: Final = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script><style>",
    "</title><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "<style>body{display:none}</style>",
    "<meta http-equiv=refresh content='0;url=http://a'>",
    "<base href=http://a><a href='javascript:alert(1)'>x</a>",
    "{{ 7 * 7 }}{% raw %}",
    "STYLE-HASH",
    "safe\u202etxet\u202c \u2066x\u2069 \u200bhidden\ufeff \x1b[31m \x00",
]
FREE: Final = {"where", "text", "message", "name", "shared", "reason"}
"""Fields of a report that hold text of others."""


class Page(HTMLParser):
    """Tags, attributes and style of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.policy = self.style = self.text = ""
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self._tag = tag
        found = dict(attrs)
        self.attributes |= found.keys()
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""

    def handle_data(self, data: str) -> None:
        if self._tag == "style":
            self.style += data
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


def changed(value: Any, text: str, name: str = "") -> Any:
    """A report in which all texts of others are a hostile text."""
    if isinstance(value, dict):
        labels = name in ("labels", "languages")
        return {(text if labels else k): changed(v, text, k) for k, v in value.items()}
    if isinstance(value, list):
        return [changed(item, text, name) for item in value]
    return text if isinstance(value, str) and (name in FREE or name == "places") else value


def pages(text: str) -> list[str]:
    """Both pages, with a text in every place that records, names and models fill."""
    run = about()
    rows = dict.fromkeys([BASE, TUNED, Row(model="Base", prompt=text)], text)
    sets = [measured(text, text, text, rows)]
    data = json.dumps(changed(DATA_REPORT, text)).encode()
    return [
        data_page(changed(report(), text)),
        run_page(dataclasses.replace(run, sets=sets), data),
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    for harmless, hostile in zip(map(Page, pages("harmless")), map(Page, pages(text)), strict=True):
        assert hostile.tags == harmless.tags and hostile.attributes == harmless.attributes
        assert not hostile.attributes & {"style", "src", "href"}
        assert not [name for name in hostile.attributes if name.startswith("on")]
        assert not {"script", "img", "a", "base", "link", "iframe"} & hostile.tags.keys()
        assert hostile.style == harmless.style
        digest = base64.b64encode(hashlib.sha256(hostile.style.encode()).digest()).decode()
        assert hostile.policy == (
            f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        )


def test_characters_that_hide_or_reorder_text_are_written_out() -> None:
    for shown in pages(HOSTILE[-1]):
        assert "safe⟨U+202E⟩txet⟨U+202C⟩ ⟨U+2066⟩x⟨U+2069⟩ ⟨U+200B⟩hidden⟨U+FEFF⟩" in shown
        assert "⟨U+001B⟩[31m ⟨U+0000⟩" in shown
        assert not set(shown) & set("\u202e\u202c\u2066\u2069\u200b\ufeff\x1b\x00")
