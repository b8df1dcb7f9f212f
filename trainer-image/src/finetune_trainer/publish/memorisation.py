"""Words about memorisation: training answers that the tuned model reproduces, beside held-out
ones."""

from __future__ import annotations

from typing import Final

from finetune_trainer.storage.runfiles import Memorisation, Reproduced

_MUCH: Final = 0.1
"""Share of the training answers, beyond that of held-out ones, that is worth a warning."""
_LEVEL: Final = 0.05
_REMEDY: Final = (
    "Fewer epochs, a lower learning rate, near duplicates that are dropped"
    " (data.quality.nearDuplicates) or more data help"
)


def memorisation_text(found: Memorisation) -> str:
    """Return the figures in one line."""
    return " ".join(filter(None, [_answers_text(found), _canaries_text(found.canaries)]))


def _canaries_text(canaries: Reproduced | None) -> str | None:
    if canaries is None:
        return None
    return f"Of {_counted(canaries, 'canaries')} it writes the whole answer word for word."


def _answers_text(found: Memorisation) -> str | None:
    if not found.training.samples:
        return None
    text = (
        f"Of {_counted(found.training, 'training answers')} the model reproduces the first"
        f" {found.tokens} tokens word for word"
    )
    if not found.held_out.samples:
        return f"{text}. There are no held-out answers of that length to compare with."
    return f"{text}; of {_counted(found.held_out, 'held-out answers')}."


def memorisation_warning(found: Memorisation) -> str | None:
    """Return a warning if canaries are reproduced, or more training answers than held-out ones."""
    if found.canaries is not None and found.canaries.reproduced:
        count = found.canaries
        return (
            f"the model gives away {count.reproduced} of {count.samples} canaries: as much may come"
            f" out of other records that occur as often. {_REMEDY}"
        )
    if _more_by_heart(found):
        return (
            "the model reproduces training answers more often than held-out ones: it has learned"
            f" some by heart, and may reveal what they hold. {_REMEDY}"
        )
    return None


def _more_by_heart(found: Memorisation) -> bool:
    """Whether more training answers are reproduced than held-out ones (Fisher's exact test,
    one-sided, at 5 %), and the difference is large."""
    if not found.held_out.samples or found.training.share - found.held_out.share < _MUCH:
        return False
    from scipy.stats import fisher_exact  # late: takes long to import

    table = [
        [each.reproduced, each.samples - each.reproduced]
        for each in (found.training, found.held_out)
    ]
    return bool(fisher_exact(table, alternative="greater").pvalue < _LEVEL)


def _counted(found: Reproduced, what: str) -> str:
    return f"{found.samples} {what}, {found.reproduced} ({found.share:.0%})"
