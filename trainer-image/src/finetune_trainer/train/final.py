"""Rows of the results: the base model's answers to the test sets (before training), and those of
the chosen checkpoint (after).

    questions ──► Evaluator ──► RowAnswers in storage, one file a row ──► publish makes the table

The base model's rows are answered once in a run: later attempts find their files, and other runs
what ``base_rows`` shares. The tuned model's are answered again, as another attempt may end in other
weights.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from finetune_api.evaluation_results import BASE, TUNED, Row, RowModel
from finetune_api.results import TrainSummary
from finetune_trainer.evaluate.answering import (
    answer_questions,
    answer_sets,
    scores_of_sets,
    with_metrics,
)
from finetune_trainer.evaluate.base_kl import (
    BasePredictions,
    base_probabilities,
    from_bytes,
    to_bytes,
)
from finetune_trainer.evaluate.base_row_key import sets_as_they_are, sets_of_questions
from finetune_trainer.evaluate.memorisation import SAMPLES, memorisation
from finetune_trainer.prepared.origins import located
from finetune_trainer.prepared.questions import Prompting, Question
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.runfiles import Memorisation, RowAnswers, RunResult, SetAnswers
from finetune_trainer.train.base_rows import BaseRows
from finetune_trainer.train.data_curve import data_curve
from finetune_trainer.train.remedy import with_remedy
from finetune_trainer.train.session import MeasuringSession, Session, versions
from finetune_trainer.train.state import LoopState
from finetune_trainer.train.stopping import raise_if_stopping
from finetune_trainer.train.suspects import suspect_labels


@dataclass(frozen=True)
class BaseResults:
    """What the base model did with the test sets."""

    answers: RowAnswers
    """Of the test prompts as they are."""
    rows: list[Row]
    """All its rows, in order."""


def measure_base(session: MeasuringSession, step: int) -> BaseResults:
    """Measure of the base model what no earlier attempt has: its rows, and what ``base_kl`` needs.

    Args:
        step: where training goes on.
    """
    trains = session.spec.method.kind.trains
    session.telemetry.say(stage="Baseline" if trains else "Testing")
    world, store, run_uri = session.world, session.stores.default, session.run_spec.run_uri
    known = world.on_main(lambda: runfiles.known_rows(store, run_uri))
    shared = BaseRows(session)
    with session.recorder.of("evaluation"), session.loss.base_model():
        if BASE.key in known:
            base = world.on_main(lambda: runfiles.read_row(store, run_uri, BASE))
        else:
            base = _base_as_it_is(session, shared)
        rows = _ask(session, "Base", list(session.questions), known, shared)
        session.base_predictions = _base_predictions(session, step)
    return BaseResults(base, [BASE, *rows])


def _base_predictions(session: MeasuringSession, step: int) -> BasePredictions:
    """Return what the base model predicts for validation samples; nothing for a classifier, whose
    base has a drawn head, where nothing is trained, or once its weights are trained."""
    needed = session.spec.kind.generates and session.spec.method.kind.trains
    if not needed or not session.data.set_names("validation"):
        return {}
    store, run_uri = session.stores.default, session.run_spec.run_uri
    text = session.world.on_main(lambda: runfiles.read_base_probabilities(store, run_uri))
    if text is not None:
        return from_bytes(text)
    if step > 0 and not session.spec.method.kind.adapts:
        return {}
    kept = base_probabilities(session.evaluator)
    session.world.on_main(lambda: runfiles.write_base_probabilities(store, run_uri, to_bytes(kept)))
    return kept


def test_and_write_result(session: Session, state: LoopState, base: BaseResults) -> TrainSummary:
    """Choose the checkpoint to publish, evaluate it on the test sets, and write the result for
    publish."""
    world, checkpointer = session.world, session.checkpointer
    session.telemetry.say(stage="Testing", step=state.step)
    with session.recorder.of("evaluation"):
        best = checkpointer.load_best(session.loss.model, state.step)
        chosen, remedy = with_remedy(session, best)
        tuned = _test(session, TUNED)
        more = _ask(session, "Tuned", [p for p in session.questions if p.tuned])
        by_heart = _memorisation(session, chosen.step)
        curve = data_curve(session, state, chosen.step)
        suspects, left_out = world.on_main(
            lambda: (
                suspect_labels(state.suspects, session.data, session.evaluator.tokenizer),
                located(session.data, session.plan.left_out.tolist()),
            )
        )
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
        scores=list(scores_of_sets(base.answers, tuned)),
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
        rows=[*base.rows, TUNED, *more],
        remedy=remedy,
        data_curve=curve,
        quarantined=left_out,
        memorisation=by_heart,
        suspects=suspects,
        versions=versions(),
        processes=world.size,
        device=world.device.type,
    )
    write_result(session, result)
    return summary


def write_result(session: MeasuringSession, result: RunResult) -> None:
    """Write the result for publish, and end the attempt."""
    session.world.on_main(
        lambda: runfiles.write_result(session.stores.default, session.run_spec.run_uri, result)
    )
    session.world.barrier()
    session.checkpointer.release()
    session.telemetry.say(stage="Done", step=result.summary.steps)


def _memorisation(session: Session, steps: int) -> Memorisation | None:
    """Measure what the model has learned by heart of the samples of some of its steps."""
    if not (session.spec.kind.generates and steps):
        return None
    seed = session.spec.training.seed
    some = np.random.default_rng(seed).permutation(steps)[:SAMPLES]
    trained = np.concatenate([session.plan.samples(step) for step in sorted(some.tolist())])
    sources = zip(session.spec.data.names("train"), session.spec.data.train or (), strict=True)
    canaries = [name for name, source in sources if source.canaries]
    return memorisation(session.evaluator, np.unique(trained).tolist(), seed, canaries)


def _test(session: MeasuringSession, row: Row) -> RowAnswers:
    """Answer the test prompts as they are."""
    began = time.monotonic()
    return _write(session, row, answer_sets(session.evaluator, session.spec, session.halves), began)


def _base_as_it_is(session: MeasuringSession, shared: BaseRows) -> RowAnswers:
    """Answer the test prompts as they are by the base model."""
    evaluator, spec, halves = session.evaluator, session.spec, session.halves
    return shared.row(
        BASE,
        lambda: sets_as_they_are(evaluator, spec, halves),
        lambda: _test(session, BASE),
        lambda sets: with_metrics(evaluator, spec, halves, sets),
    )


def _ask(
    session: MeasuringSession,
    model: RowModel,
    promptings: Sequence[Prompting],
    known: Collection[str] = (),
    shared: BaseRows | None = None,
) -> list[Row]:
    """Answer the questions that prepare has made, row by row.

    Args:
        known: keys of rows that are answered already.
        shared: rows of the base model; None: those of the tuned one are measured.

    Raises:
        Interrupted: on all ranks, before a row, if a stop was requested on any rank.
    """
    rows = []
    stop_requested = session.evaluator.stop_requested or (lambda: False)
    for prompting in promptings:
        row = Row(model=model, prompt=prompting.prompt, draw=prompting.draw)
        rows.append(row)
        if row.key not in known:
            raise_if_stopping(session.world, stop_requested, f"before row {row.key}")
            _answer(session, row, session.questions[prompting], shared)
    return rows


def _answer(
    session: MeasuringSession, row: Row, questions: Sequence[Question], shared: BaseRows | None
) -> None:
    evaluator, spec = session.evaluator, session.spec

    def measure() -> RowAnswers:
        began = time.monotonic()
        return _write(session, row, answer_questions(evaluator, spec, questions), began)

    if shared is None:
        measure()
    else:
        shared.row(row, lambda: sets_of_questions(evaluator, spec, questions), measure)


def _write(session: MeasuringSession, row: Row, sets: list[SetAnswers], began: float) -> RowAnswers:
    seconds = (time.monotonic() - began) * session.world.size
    answers = RowAnswers(row=row, sets=sets, process_seconds=round(seconds, 3))
    store, run_uri = session.stores.default, session.run_spec.run_uri
    session.world.on_main(lambda: runfiles.write_row(store, run_uri, answers))
    return answers
