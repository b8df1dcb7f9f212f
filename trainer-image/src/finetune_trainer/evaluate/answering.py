"""What a model does with the test and retention sets: the content of a row of the results.

samples as they are ──► losses, answers ──┐
questions of prepare ──► answers          ┴──► SetAnswers, identical on all ranks
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from finetune_api.evaluation_results import DataSetScores
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.evaluate.measure import Answer, Evaluator, Measured
from finetune_trainer.evaluate.metric_selection import measured_on, metrics_of
from finetune_trainer.evaluate.scores import OF_LOSS
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.halves import Halves, Positions, reported_part
from finetune_trainer.prepared.questions import Question
from finetune_trainer.prepared.split import TESTED, Side
from finetune_trainer.storage.runfiles import RowAnswers, SetAnswers


def metrics_of_sets(
    data: PreparedData, spec: FineTuneJobSpec, split: Side, only: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Return the metrics of each set of a split; ``only`` limits the generated metrics."""
    wanted = {}
    for entry in data.manifest.sets:
        if entry.split != split:
            continue
        names = measured_on(entry, spec)
        if only:
            costly = spec.kind.generates
            names = [m for m in names if m in OF_LOSS or not costly]
            names += metrics_of(entry, only, spec.task)
        wanted[entry.name] = list(dict.fromkeys(names))
    return wanted


def answer_sets(
    evaluator: Evaluator,
    spec: FineTuneJobSpec,
    halves: Halves | None,
    sides: Sequence[Side] = TESTED,
) -> list[SetAnswers]:
    """Answer the prompts of held-out sets as they are.

    Args:
        halves: of the retention sets: the reported ones are measured. None: all samples are.

    Raises:
        Interrupted: as ``Evaluator.sets``.
    """
    return [
        found.to_answers()
        for side in sides
        for found in evaluator.sets(
            side, metrics_of_sets(evaluator.data, spec, side), reported_part(halves, side)
        )
    ]


class HeldOutSet(NamedTuple):
    """Samples of a held-out set."""

    side: Side
    number: int
    """Index of the set in the manifest of the prepared data."""
    name: str
    positions: Positions
    """Of the samples that results are about, in the index of the side."""


def held_out_sets(
    data: PreparedData, halves: Halves | None, sides: Sequence[Side] = TESTED
) -> Iterator[HeldOutSet]:
    """Yield the sets whose samples ``answer_sets`` measures, in its order."""
    for side in sides:
        part = reported_part(halves, side)
        for number, name in data.set_names(side):
            everything = np.flatnonzero(data.index(side).set == number)
            yield HeldOutSet(side, number, name, everything if part is None else part[number])


def with_metrics(
    evaluator: Evaluator,
    spec: FineTuneJobSpec,
    halves: Halves | None,
    answered: Sequence[SetAnswers],
) -> list[SetAnswers]:
    """Return what ``answer_sets`` has measured, with its metrics computed anew."""
    found = []
    for of, answers in zip(held_out_sets(evaluator.data, halves), answered, strict=True):
        asked = of.positions[: len(answers.answers)].tolist()
        said = map(Answer, answers.answers, answers.tokens)
        measured = Measured(np.array(answers.losses), np.array(answers.labels), asked, list(said))
        wanted = metrics_of_sets(evaluator.data, spec, of.side)[of.name]
        metrics = evaluator.metrics(of.side, measured, answers.label_scores, wanted)
        found.append(answers.model_copy(update={"metrics": metrics}))
    return found


def answer_questions(
    evaluator: Evaluator, spec: FineTuneJobSpec, questions: Sequence[Question]
) -> list[SetAnswers]:
    """Answer questions that prepare has made of the prompts of the test sets."""
    answers = evaluator.generate([question.ids for question in questions])
    sets, wanted = [], metrics_of_sets(evaluator.data, spec, "test")
    for number, name in evaluator.data.set_names("test"):
        of_set = [i for i, question in enumerate(questions) if question.set == number]
        if of_set:
            sets.append(
                SetAnswers(
                    name=name,
                    positions=[questions[i].position for i in of_set],
                    answers=[answers[i].text for i in of_set],
                    tokens=[answers[i].tokens for i in of_set],
                    label_scores=evaluator.label_scores(
                        number, [questions[i].ids for i in of_set], wanted[name]
                    ),
                )
            )
    return sets


def scores_of_sets(base: RowAnswers, tuned: RowAnswers) -> Iterator[DataSetScores]:
    """Yield the scores of base and tuned model on each set, of the prompts as they are."""
    known = {found.name: found.metrics for found in base.sets}
    for found in tuned.sets:
        yield DataSetScores(
            name=found.name,
            samples=len(found.losses),
            base=known[found.name],
            tuned=found.metrics,
        )
