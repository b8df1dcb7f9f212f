"""``report.html``: renders ``report.json`` as one self-contained page."""

from __future__ import annotations

from typing import Any, Final

from finetune_trainer.pages import page
from finetune_trainer.personal import IN_WORDS
from finetune_trainer.prepared.split import SIDES

CAUSES: Final = {
    "Duplicate": "equal to an earlier record",
    "NearDuplicate": "similar to an earlier record",
    "Overlength": "longer than training.maxLength",
    "Contaminated": "shares text with a held-out sample",
    "MalformedRecord": "not a JSON object",
    "MissingField": "lacks a field",
    "WrongType": "a field of another type",
    "UnknownRole": "unknown role",
    "NothingSupervised": "no supervised tokens",
    "EmptyPrompt": "empty prompt",
    "TemplateFailed": "the template fails on it",
}
"""Descriptions of the causes of dropped records; other causes are shown by their name."""


def render(report: dict[str, Any]) -> str:
    """Return the HTML page of a report, given the content of ``report.json``."""
    sources = report["sources"]
    return page(__package__, "report.html.j2").render(
        report=report,
        causes=CAUSES,
        kinds=IN_WORDS,
        records=sum(s["records"] for s in sources),
        left_out=sum(sum(s["dropped"].values()) for s in sources),
        train=_samples(sources, "train"),
        held_out=sum(_samples(sources, side) for side in SIDES[1:]),
        notes=_notes(report),
    )


def _samples(sources: list[dict[str, Any]], side: str) -> int:
    return sum(s["splits"][side]["samples"] for s in sources if side in s["splits"])


def _notes(report: dict[str, Any]) -> list[str]:
    """Findings to check before training, one sentence each."""
    notes = []
    quality, contamination = report["quality"], report["contamination"]
    for source in report["sources"]:
        name = source["name"]
        faulty = sum(n for cause, n in source["dropped"].items() if cause not in _ASKED_FOR)
        if faulty:
            notes.append(f"{name}: {faulty:,} of {source['records']:,} records cannot be used.")
        cut = source["truncated"]["completionEnd"]
        if cut:
            notes.append(f"{name}: the end of {cut:,} completions is cut off (too long).")
        for side, found in source["splits"].items():
            if found["personalData"]:
                counts = ", ".join(
                    f"{found['occurrences']:,} × {IN_WORDS[kind]}"
                    for kind, found in found["personalData"].items()
                )
                done = "redacted" if quality["personalData"] == "Redact" else "kept"
                notes.append(f"{name}, {side}: {counts} ({done}).")
    if contamination:
        for name, found in contamination["sets"].items():
            done = "left out" if contamination["policy"] == "Drop" else "kept"
            notes.append(
                f"{name}: {found['samples']:,} training samples share text with a held-out one"
                f" ({done})."
            )
        missed = contamination["heldOutSamples"] - contamination["comparedSamples"]
        if missed:
            notes.append(f"{missed:,} held-out samples were not compared with the training set.")
    return notes


_ASKED_FOR: Final = ("Duplicate", "NearDuplicate", "Overlength", "Contaminated")
"""Causes of dropped records that are not faults."""
