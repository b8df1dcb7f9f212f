"""Test scores of the base model (before training) and of the chosen checkpoint (after)."""

from __future__ import annotations

import numpy as np

from finetune_api.results import Comparison, DataSetScores, TrainSummary
from finetune_api.tasks import METRICS, Metric
from finetune_trainer.evaluate.comparisons import Outcome, compare_outcomes
from finetune_trainer.evaluate.measure import SetResult
from finetune_trainer.evaluate.scores import answers_to
from finetune_trainer.prepared.dataset import Reference
from finetune_trainer.prepared.origins import origins_of
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.runfiles import Baseline, Example, RunResult, SetBaseline
from finetune_trainer.train.session import Session, versions
from finetune_trainer.train.state import LoopState

_EXAMPLES = 8
"""Generated answers kept per set for the report."""


def measure_base(session: Session) -> Baseline:
    """Return the test scores of the base model. Later attempts read the stored scores."""
    world, store, run_uri = session.world, session.stores.default, session.run_spec.run_uri
    known = world.on_main(lambda: runfiles.read_baseline(store, run_uri))
    if known is not None:
        return known
    session.telemetry.say(stage="Baseline")
    with session.recorder.of("evaluation"), session.loss.base_model():
        results = session.evaluator.sets("test", session.metrics_of_sets("test"))
    baseline = Baseline(
        sets=[
            SetBaseline(
                name=r.name,
                samples=r.samples,
                metrics=r.metrics,
                losses=r.losses.tolist(),
                labels=[int(n) for n in r.labels],
                answers=r.answers,
            )
            for r in results
        ]
    )
    world.on_main(lambda: runfiles.write_baseline(store, run_uri, baseline))
    return baseline


def test_and_write_result(session: Session, state: LoopState, baseline: Baseline) -> TrainSummary:
    """Evaluate the checkpoint to publish on the test sets, and write the result for publish."""
    world, checkpointer = session.world, session.checkpointer
    session.telemetry.say(stage="Testing", step=state.step)
    with session.recorder.of("evaluation"):
        chosen = checkpointer.load_best(session.loss.model, state.step)
        results = session.evaluator.sets("test", session.metrics_of_sets("test"))
    base = {s.name: s for s in baseline.sets}
    summary = TrainSummary(
        attempt=checkpointer.head.attempt,
        restarts=checkpointer.head.restarts,
        steps=state.step,
        stopped_early=state.stopped_early,
        loss=state.curve[-1].loss if state.curve else None,
        checkpoint=chosen.uri,
        checkpoint_step=chosen.step,
        trainable_parameters=session.parameters.trainable,
        total_parameters=session.parameters.total,
        scores=[
            DataSetScores(
                name=r.name,
                samples=r.samples,
                base=base[r.name].metrics,
                tuned=r.metrics,
                comparisons=_compare(session, r, base[r.name]),
            )
            for r in results
        ],
        training_seconds=checkpointer.training_seconds(),
        time=session.recorder.use(saved=True),
        tokens=state.tokens,
        skipped_steps=state.skipped_steps,
        rollbacks=len(checkpointer.head.rollbacks),
        quarantined_samples=len(session.plan.left_out),
        startup=session.telemetry.progress.startup,
    )
    result = RunResult(
        summary=summary,
        curve=state.curve,
        validation=state.validation,
        lineage=list(session.lineage),
        examples={r.name: _examples(session, r, base[r.name]) for r in results},
        quarantined=origins_of(session.data, "train", session.plan.left_out.tolist()),
        versions=versions(),
        processes=world.size,
        device=world.device.type,
    )
    world.on_main(
        lambda: runfiles.write_result(session.stores.default, session.run_spec.run_uri, result)
    )
    world.barrier()
    checkpointer.release()
    session.telemetry.say(stage="Done", step=state.step)
    return summary


def _compare(session: Session, tuned: SetResult, base: SetBaseline) -> dict[str, Comparison]:
    """Compare the tuned with the base model on a test set, on rank 0 for all."""

    def work() -> dict[Metric, Comparison]:
        references = _references(session, tuned.name, len(tuned.answers))
        outcomes = [
            Outcome(
                np.array(losses), np.array(labels), answers_to(references[: len(answers)], answers)
            )
            for losses, labels, answers in (
                (base.losses, base.labels, base.answers),
                (tuned.losses, tuned.labels, tuned.answers),
            )
        ]
        metrics = [m for m in METRICS if m in tuned.metrics and m in base.metrics]
        points = float(session.run_spec.spec.evaluation.min_effect)
        return compare_outcomes(outcomes[0], outcomes[1], metrics, points)

    return {str(metric): found for metric, found in session.world.on_main(work).items()}


def _examples(session: Session, tuned: SetResult, base: SetBaseline) -> list[Example]:
    references = _references(session, tuned.name, _EXAMPLES)
    return [
        Example(prompt=r.prompt, reference=r.completion, base=before, tuned=after)
        for r, before, after in zip(references, base.answers, tuned.answers, strict=False)
    ]


def _references(session: Session, name: str, most: int) -> list[Reference]:
    """The first samples of a test set."""
    number = next(number for number, each in session.data.set_names("test") if each == name)
    positions = (session.data.index("test").set == number).nonzero()[0][:most]
    return session.data.references("test", positions.tolist())
