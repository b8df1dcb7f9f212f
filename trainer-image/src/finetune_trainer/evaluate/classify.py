"""Evaluation of classifiers: one pass over a set gives its loss and predicted classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from finetune_trainer.engine.loss import MicroBatchLosses
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.evaluate.measure import Answer, Evaluator, LossSums, Measured
from finetune_trainer.prepared.split import Side


class ClassEvaluator(Evaluator):
    """Evaluate a classifier. The answer to a sample is the name of the predicted class."""

    def _measure(self, split: Side, positions: np.ndarray, wanted: Sequence[str]) -> Measured:
        names = self.data.manifest.classes
        sums, said = LossSums(len(positions)), list[tuple[int, str]]()
        for chosen, micro_batch in self._micro_batches(split, positions):
            with torch.no_grad(), self.world.autocast(), layout_context(micro_batch.layout):
                found: MicroBatchLosses = self.loss(micro_batch, with_logits=True)
            assert found.logits is not None, "requested by with_logits"
            sums.add(micro_batch, found.tokens)
            likeliest = found.logits.argmax(-1).tolist()
            said += [(at, names[number]) for at, number in zip(chosen, likeliest, strict=False)]
        answers = dict(pair for part in self.world.on_all(lambda: said) for pair in part)
        losses, labels = sums.on_all(self.world)
        asked = positions.tolist()
        return Measured(losses, labels, asked, [Answer(answers[at], 0) for at in asked])
