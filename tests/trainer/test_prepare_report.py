"""The data report: counts, languages, and the HTML page."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.languages import language_of
from finetune_trainer.prepare.reducing.page import render
from finetune_trainer.prepare.reducing.report import BINS, histogram, percentiles, shares

COUNTS = st.dictionaries(st.integers(1, 10_000), st.integers(0, 50), min_size=1).map(Counter)


@given(COUNTS)
def test_a_histogram_holds_every_sample_in_its_bin(counts: Counter[int]) -> None:
    bins = histogram(counts)
    assert len(bins) <= BINS
    for i, found in enumerate(bins):
        assert found["from"] == (bins[i - 1]["to"] + 1 if i else 1)
        between = range(found["from"], found["to"] + 1)
        assert found["samples"] == sum(n for value, n in counts.items() if value in between)
    assert sum(b["samples"] for b in bins) == counts.total()
    assert not bins or bins[-1]["samples"] > 0


@given(COUNTS)
def test_percentiles_ignore_values_with_zero_count(counts: Counter[int]) -> None:
    values = sorted(counts.elements())
    found = percentiles(counts)
    assert found == {} if not values else (found["p0"], found["p100"]) == (values[0], values[-1])


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The bird looked at the cat, and the cat looked back at it.", "en"),
        ("Der Vogel saß auf dem Baum und sah die Katze nicht.", "de"),
        ("Le chat regarde l'oiseau qui chante dans le jardin.", "fr"),
        ("<|im_start|>user\nWas ist die Hauptstadt dieses Landes am Meer?<|im_end|>", "de"),
        ("7 + 5 = 12", "und"),
        ("yes", "und"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert language_of(text) == language


def test_shares_are_ordered_from_the_largest() -> None:
    assert shares(Counter({"de": 1, "en": 3})) == {"en": 0.75, "de": 0.25}
    assert shares(Counter()) == {}


def report(**change: Any) -> dict[str, Any]:
    """A report with findings of every kind."""
    lengths = Counter({3: 5, 90: 2})
    side = {
        "samples": 7, "tokens": 195, "supervisedTokens": 20, "supervisedShare": 0.1,
        "lengthPercentiles": percentiles(lengths), "lengthHistogram": histogram(lengths),
        "labels": {"good": 4, "bad": 3}, "distinctLabels": 2,
        "personalData": {"EMAIL": {"samples": 2, "occurrences": 3, "places": ["a, line 9"]}},
        "previews": [{"where": "a, line 1", "tokens": 3, "parts": [
            {"text": "<script>alert(1)</script>", "supervised": False},
            {"text": "", "supervised": False, "cut": 1},
            {"text": " learned & marked", "supervised": True}]}],
    }  # fmt: skip
    source = {
        "name": "mine", "format": "Text", "objects": 1, "bytes": 2000, "records": 12,
        "dropped": {"Duplicate": 2, "MissingField": 1, "Overlength": 0, "Unheard": 1},
        "faults": [{"reason": "MissingField", "message": "a, line 4: field 'x' is missing"}],
        "languages": {"en": 0.75, "und": 0.25},
        "documentsSplit": 4,
        "truncated": {"promptBeginning": 1, "completionEnd": 2, "textEnd": 3},
        "splits": {"train": side},
    }  # fmt: skip
    example = {"where": "a, line 5", "shared": "the same words"}
    contamination = {
        "ngram": 13, "heldOutSamples": 30, "comparedSamples": 20, "policy": "Drop",
        "sets": {"mine": {"samples": 1, "examples": [example]}},
    }  # fmt: skip
    quality = {"personalData": "Warn"}
    return {"digest": "d", "quality": quality, "maxLength": 64, "sources": [source],
            "contamination": contamination, **change}  # fmt: skip


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.marked: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "mark":
            self.marked.append(data)


def test_the_page_shows_all_findings() -> None:
    page = render(report())
    tags = _Tags(page)
    assert tags.open == [] and " learned & marked" in tags.marked
    for shown in (
        "mine: 2 of 12 records cannot be used", "the end of 2 completions is cut off",
        "3 × an e-mail address (kept)", "a, line 9", "1 training samples share text",
        "10 held-out samples were not compared", "lacks a field", "Unheard", "the same words",
        "field &#39;x&#39; is missing", "en 75 %, unclear 25 %", "&lt;script&gt;", "good 4, bad 3",
        "without the end of the text", "[1 token cut off]", "documents split",
    ):  # fmt: skip
        assert shown in page, shown
    assert "<script" not in page and "http:" not in page


def test_the_page_of_data_without_findings_has_no_notes() -> None:
    clean = report(contamination=None)
    source = clean["sources"][0]
    source["dropped"] = {"Duplicate": 0}
    source["documentsSplit"] = 0
    source["truncated"] = {"promptBeginning": 0, "completionEnd": 0, "textEnd": 0}
    source["faults"] = []
    source["splits"]["train"]["personalData"] = {}
    page = render(clean)
    assert "Worth a look" not in page and "Left out, cut" not in page
    assert _Tags(page).open == []
