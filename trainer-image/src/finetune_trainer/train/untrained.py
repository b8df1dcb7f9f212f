"""Evaluation alone: a run whose method trains nothing measures its model as the base model of a
training is measured.

    rows that no earlier attempt has answered ──► RowAnswers in storage ──► result for publish
"""

from __future__ import annotations

from collections.abc import Callable

from finetune_api.evaluation_results import DataSetScores
from finetune_api.results import TrainSummary
from finetune_trainer.storage.runfiles import RunResult
from finetune_trainer.train.final import measure_base, write_result
from finetune_trainer.train.session import MeasuringSession, versions
from finetune_trainer.train.stopping import raise_if_stopping


def evaluate_alone(session: MeasuringSession, stop_requested: Callable[[], bool]) -> TrainSummary:
    """Answer all rows, and write the result for publish.

    Raises:
        Interrupted: when a stop was requested; the rows that are answered are kept.
    """
    world, checkpointer = session.world, session.checkpointer
    session.evaluator.stop_requested = stop_requested
    raise_if_stopping(world, stop_requested, "before the evaluation")
    base = measure_base(session, 0)
    summary = TrainSummary(
        attempt=checkpointer.head.attempt,
        restarts=checkpointer.head.restarts,
        steps=0,
        total_parameters=session.parameters.total,
        scores=[
            DataSetScores(name=found.name, samples=len(found.losses), base=found.metrics, tuned={})
            for found in base.answers.sets
        ],
        training_seconds=checkpointer.training_seconds(),
        time=session.recorder.use(saved=True),
    )
    result = RunResult(
        summary=summary,
        curve=[],
        validation=[],
        lineage=list(session.lineage),
        rows=base.rows,
        versions=versions(),
        processes=world.size,
        device=world.device.type,
    )
    write_result(session, result)
    return summary
