"""What a worker of a data curve does differently in tests."""

from __future__ import annotations

from finetune_trainer.train import data_curve


def train_on_all() -> None:
    """Train on all samples once more, instead of on parts."""
    data_curve.SHARES = (1.0,)  # type: ignore[misc]
