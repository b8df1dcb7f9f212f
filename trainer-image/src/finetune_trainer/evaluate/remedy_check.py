"""Refuses a remedy that could choose nothing, before GPUs are held for it."""

from __future__ import annotations

import numpy as np

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.evaluate.paired import FEWEST_GROUPS
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.halves import retention_halves


def check_remedy(spec: FineTuneJobSpec, data: PreparedData) -> None:
    """Check that there are validation samples, and enough in both halves of each retention set.

    Raises:
        UserError: 'RemedyNotMeasured', with the path, the counts and what to do.
    """
    halves = retention_halves(data, spec)
    if halves is None:
        return
    if not data.set_names("validation"):
        raise _refused(
            "data.validation",
            "no validation sample is there, by whose loss points are chosen; give data.validation,"
            " or a larger data.split.validation",
        )
    groups = data.index("retention").groups
    for number, name in data.set_names("retention"):
        counts = [
            len(np.unique(groups[half[number]])) for half in (halves.choosing, halves.reported)
        ]
        if min(counts) < FEWEST_GROUPS:
            raise _refused(
                "data.retention",
                f"{name} has {counts[0]} independent samples (groups) to choose by and {counts[1]}"
                f" to report, and fewer than {FEWEST_GROUPS} decide nothing; give it about"
                f" {3 * FEWEST_GROUPS}, or remove it",
            )


def _refused(path: str, why: str) -> UserError:
    return UserError("RemedyNotMeasured", f"spec.{path}: evaluation.remedy is given, but {why}")
