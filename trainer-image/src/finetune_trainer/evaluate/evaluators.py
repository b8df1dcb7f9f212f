"""The evaluator of each task."""

from __future__ import annotations

from typing import Final

from transformers import PreTrainedTokenizerBase

from finetune_api.spec import FineTuneJobSpec
from finetune_api.tasks import TaskName
from finetune_trainer.engine.packing.context import ALONE
from finetune_trainer.engine.planning.micro_batch_size import micro_batch_tokens_of, samples_of
from finetune_trainer.engine.planning.plan import Packing
from finetune_trainer.engine.task_losses import TASKS, TaskLoss
from finetune_trainer.engine.world import World
from finetune_trainer.evaluate.classify import ClassEvaluator
from finetune_trainer.evaluate.measure import Evaluator
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.split import SIDES

EVALUATORS: Final[dict[TaskName, type[Evaluator]]] = {
    "CausalLM": Evaluator,
    "SequenceClassification": ClassEvaluator,
}
"""Evaluator class of each task."""


def evaluator_of(
    spec: FineTuneJobSpec,
    world: World,
    data: PreparedData,
    loss: TaskLoss,
    packing: Packing,
    tokenizer: PreTrainedTokenizerBase,
) -> Evaluator:
    """Return the evaluator of a run's model on its prepared data.

    Args:
        loss: the task's loss over the model.
    """
    return EVALUATORS[spec.task](
        world=world,
        data=data,
        loss=loss,
        build=TASKS[spec.task].builder(packing, ALONE, None, False),
        tokenizer=tokenizer,
        micro_batch_tokens=_micro_batch_tokens(spec, data),
        packing=packing,
        possible=spec.kind.metrics,
        virtual_tokens=spec.method.virtual_tokens,
        max_samples=spec.evaluation.max_samples,
        max_new_tokens=data.manifest.answer_tokens(spec.evaluation.max_new_tokens),
    )


def _micro_batch_tokens(spec: FineTuneJobSpec, data: PreparedData) -> int:
    """Return the micro-batch size of the training, in tokens, or one that fits the longest held-out
    sample."""
    longest = samples_of(spec, data).longest
    held_out = [data.index(side).length.max(initial=1) for side in SIDES[1:]]
    return int(
        max(
            micro_batch_tokens_of(spec, data.manifest.max_length, longest),
            *(length + spec.method.virtual_tokens for length in held_out),
        )
    )
