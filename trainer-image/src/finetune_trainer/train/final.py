"""Rows of the results: the base model's answers to the test sets (before training), and those of
the chosen checkpoint (after).

    questions ──► Evaluator ──► RowAnswers in storage, one file a row ──► publish makes the table

The base model's rows are answered once in a run: later attempts find their files. The tuned
model's are answered again, as another attempt may end in other weights.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from finetune_api.evaluation_results import BASE, TUNED, DataSetScores, Metrics, Row, RowModel
from finetune_api.results import TrainSummary
from finetune_trainer.evaluate.base_kl import (
    BasePredictions,
    base_probabilities,
    from_bytes,
    to_bytes,
)
from finetune_trainer.evaluate.memorisation import SAMPLES, memorisation
from finetune_trainer.prepared.halves import reported_part
from finetune_trainer.prepared.origins import located
from finetune_trainer.prepared.questions import Prompting, Question
from finetune_trainer.prepared.split import TESTED
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.runfiles import Memorisation, RowAnswers, RunResult, SetAnswers
from finetune_trainer.train.data_curve import data_curve
from finetune_trainer.train.remedy import with_remedy
from finetune_trainer.train.session import Session, versions
from finetune_trainer.train.state import LoopState
from finetune_trainer.train.stopping import raise_if_stopping
from finetune_trainer.train.suspects import suspect_labels


@dataclass(frozen=True)
class BaseResults:
    """What the base model did with the test sets."""

    metrics: dict[str, Metrics]
    """Metrics by set, of the test prompts as they are."""
    rows: list[Row]
    """All its rows, in order."""


def measure_base(session: Session, step: int) -> BaseResults:
    """Measure of the base model what no earlier attempt has: its rows, and what ``base_kl`` needs.

    Args:
        step: where training goes on.
    """
    session.telemetry.say(stage="Baseline")
    world, store, run_uri = session.world, session.stores.default, session.run_spec.run_uri
    known = world.on_main(lambda: runfiles.known_rows(store, run_uri))
    with session.recorder.of("evaluation"), session.loss.base_model():
        if BASE.key in known:
            base = world.on_main(lambda: runfiles.read_row(store, run_uri, BASE))
        else:
            base = _test(session, BASE)
        rows = _ask(session, "Base", list(session.questions), known)
        session.base_predictions = _base_predictions(session, step)
    return BaseResults({found.name: found.metrics for found in base.sets}, [BASE, *rows])


def _base_predictions(session: Session, step: int) -> BasePredictions:
    """Return what the base model predicts for validation samples; nothing for a classifier, whose
    base has a drawn head, or once its weights are trained."""
    if not session.spec.kind.generates or not session.data.set_names("validation"):
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
        scores=[
            DataSetScores(
                name=found.name,
                samples=len(found.losses),
                base=base.metrics[found.name],
                tuned=found.metrics,
            )
            for found in tuned.sets
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
    world.on_main(
        lambda: runfiles.write_result(session.stores.default, session.run_spec.run_uri, result)
    )
    world.barrier()
    checkpointer.release()
    session.telemetry.say(stage="Done", step=state.step)
    return summary


def _memorisation(session: Session, steps: int) -> Memorisation | None:
    """Measure what the model has learned by heart of the samples of some of its steps."""
    if not (session.spec.kind.generates and steps):
        return None
    seed = session.spec.training.seed
    some = np.random.default_rng(seed).permutation(steps)[:SAMPLES]
    trained = np.concatenate([session.plan.samples(step) for step in sorted(some.tolist())])
    return memorisation(session.evaluator, np.unique(trained).tolist(), seed)


def _test(session: Session, row: Row) -> RowAnswers:
    """Answer the test prompts as they are."""
    began = time.monotonic()
    results = [
        result
        for side in TESTED
        for result in session.evaluator.sets(
            side, session.metrics_of_sets(side), reported_part(session.halves, side)
        )
    ]
    return _write(session, row, [result.to_answers() for result in results], began)


def _ask(
    session: Session,
    model: RowModel,
    promptings: Sequence[Prompting],
    known: Collection[str] = (),
) -> list[Row]:
    """Answer the questions that prepare has made, row by row.

    Args:
        known: keys of rows that are answered already.

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
            _answer(session, row, session.questions[prompting])
    return rows


def _answer(session: Session, row: Row, questions: Sequence[Question]) -> None:
    began = time.monotonic()
    answers = session.evaluator.generate([question.ids for question in questions])
    sets, wanted = [], session.metrics_of_sets("test")
    for number, name in session.data.set_names("test"):
        of_set = [i for i, question in enumerate(questions) if question.set == number]
        if of_set:
            sets.append(
                SetAnswers(
                    name=name,
                    positions=[questions[i].position for i in of_set],
                    answers=[answers[i].text for i in of_set],
                    tokens=[answers[i].tokens for i in of_set],
                    label_scores=session.evaluator.label_scores(
                        number, [questions[i].ids for i in of_set], wanted[name]
                    ),
                )
            )
    _write(session, row, sets, began)


def _write(session: Session, row: Row, sets: list[SetAnswers], began: float) -> RowAnswers:
    seconds = (time.monotonic() - began) * session.world.size
    answers = RowAnswers(row=row, sets=sets, process_seconds=round(seconds, 3))
    store, run_uri = session.stores.default, session.run_spec.run_uri
    session.world.on_main(lambda: runfiles.write_row(store, run_uri, answers))
    return answers
