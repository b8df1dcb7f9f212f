"""The two measurements that frame a training: the untuned model before, the chosen commit after."""

from __future__ import annotations

from finetune_api.results import DataSetScores, TrainSummary
from finetune_trainer.evaluate.measure import SetResult
from finetune_trainer.prepared.places import places_of
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.runfiles import Baseline, Example, RunResult, SetBaseline
from finetune_trainer.train.session import Session, versions
from finetune_trainer.train.state import LoopState

_EXAMPLES = 8
"""Answers kept per set for the report."""


def measure_untuned(session: Session) -> Baseline:
    """Test scores of the model as it is before the first step; read back by later attempts."""
    gang, store, run_uri = session.gang, session.stores.default, session.order.run_uri
    known = gang.from_first(lambda: runfiles.read_baseline(store, run_uri))
    if known is not None:
        return known
    session.telemetry.say(stage="Baseline")
    with session.loss.untuned():
        results = session.evaluator.sets("test", session.metrics_of_sets("test"))
    baseline = Baseline(
        sets=[
            SetBaseline(
                name=r.name, samples=r.samples, metrics=r.metrics, answers=r.answers[:_EXAMPLES]
            )
            for r in results
        ]
    )
    gang.from_first(lambda: runfiles.write_baseline(store, run_uri, baseline))
    return baseline


def test_and_write_result(session: Session, state: LoopState, baseline: Baseline) -> TrainSummary:
    """Test the commit that will be published, and leave the result for publish."""
    gang, checkpoints = session.gang, session.checkpoints
    session.telemetry.say(stage="Testing", step=state.step)
    chosen = checkpoints.load_best(session.loss.model, state.step)
    results = session.evaluator.sets("test", session.metrics_of_sets("test"))
    untuned = {s.name: s for s in baseline.sets}
    summary = TrainSummary(
        attempt=checkpoints.head.attempt,
        restarts=checkpoints.head.restarts,
        steps=state.step,
        stopped_early=state.stopped_early,
        loss=state.curve[-1].loss if state.curve else None,
        checkpoint=chosen.uri,
        checkpoint_step=chosen.step,
        trainable_parameters=session.parameters.trainable,
        total_parameters=session.parameters.total,
        scores=[
            DataSetScores(
                name=r.name, samples=r.samples, untuned=untuned[r.name].metrics, tuned=r.metrics
            )
            for r in results
        ],
        training_seconds=checkpoints.training_seconds(),
        lost_seconds=checkpoints.head.lost_seconds,
        tokens=state.tokens,
        skipped_steps=state.skipped_steps,
        rollbacks=len(checkpoints.head.rollbacks),
        quarantined_samples=len(session.plan.left_out),
        startup=session.telemetry.progress.startup,
    )
    result = RunResult(
        summary=summary,
        curve=state.curve,
        validation=state.validation,
        lineage=list(session.lineage),
        examples={r.name: _examples(session, i, r, untuned[r.name]) for i, r in enumerate(results)},
        quarantined=places_of(session.data, "train", session.plan.left_out.tolist()),
        versions=versions(),
        processes=gang.size,
        device=gang.device.type,
    )
    gang.from_first(
        lambda: runfiles.write_result(session.stores.default, session.order.run_uri, result)
    )
    gang.barrier()
    checkpoints.release()
    session.telemetry.say(stage="Done", step=state.step)
    return summary


def _examples(
    session: Session, order: int, tuned: SetResult, untuned: SetBaseline
) -> list[Example]:
    number = session.data.set_names("test")[order][0]
    index = session.data.index("test")
    positions = [int(p) for p in (index.set == number).nonzero()[0][:_EXAMPLES]]
    references = session.data.references("test", positions)
    return [
        Example(prompt=r.prompt, reference=r.completion, untuned=before, tuned=after)
        for r, before, after in zip(references, untuned.answers, tuned.answers, strict=False)
    ]
