"""Words about suspect labels: how many training samples stand out. A hint, no proof."""

from __future__ import annotations

from finetune_trainer.storage.runfiles import SuspectLabels


def suspects_hint(found: SuspectLabels | None) -> str | None:
    """Return one line about the samples that stand out; None: none does."""
    if found is None or not found.unlikely:
        return None
    some = "1 has a label" if found.unlikely == 1 else f"{found.unlikely:,} have labels"
    return (
        f"of {found.measured:,} training samples, {some} that the model, when it first saw them,"
        " found far less likely than those of similar samples: wrong, rare or hard ones."
        " report.html names the worst with file and line"
    )
