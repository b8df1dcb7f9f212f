"""The scan of ``evaluation.remedy``: the model is moved to each point, and its losses are measured.

point 1, 0.8 … 0.2, 0 (in place) ──► losses of validation and choosing halves ──► choice
"""

from __future__ import annotations

from finetune_api.evaluation import Evaluation
from finetune_api.remedy import RemedyResult
from finetune_api.tasks import Metric
from finetune_trainer.engine.sharding import reshard
from finetune_trainer.engine.tuning.interpolation import Line
from finetune_trainer.evaluate.comparisons import Outcome
from finetune_trainer.evaluate.measure import Evaluator, overall
from finetune_trainer.evaluate.remedy import MeasuredPoint, choose
from finetune_trainer.evaluate.scores import answers_to
from finetune_trainer.prepared.halves import Halves


def scan(evaluator: Evaluator, line: Line, evaluation: Evaluation, halves: Halves) -> RemedyResult:
    """Measure all points, the base model at the end, and choose; on all ranks alike. The model is
    the base model afterwards.

    Args:
        line: of the evaluator's model, which is the tuned one.

    Raises:
        Interrupted: as ``Evaluator.sets``.
    """
    assert evaluation.remedy is not None, "scanned for a remedy"
    measured = []
    for point in (*evaluation.remedy.effective_points, 0.0):
        reshard(evaluator.loss)
        line.move(point)
        measured.append(_measured(evaluator, halves, point))
        _log(evaluator, f"point {point:g}: validation loss {measured[-1].validation_loss:.4f}")
    found = evaluator.world.on_main(lambda: choose(evaluation, measured))
    _log(evaluator, f"remedy ({found.scan}): {found.because}")
    return found


def _measured(evaluator: Evaluator, halves: Halves, point: float) -> MeasuredPoint:
    data = evaluator.data
    wanted: dict[str, list[Metric]] = {each.name: ["Loss"] for each in data.manifest.sets}
    validation = evaluator.sets("validation", wanted)
    retention = evaluator.sets("retention", wanted, halves.choosing)
    groups = data.index("retention").groups
    outcomes = {
        found.name: Outcome(
            found.losses, found.labels, answers_to([], []), groups[halves.choosing[number]]
        )
        for found, (number, _) in zip(retention, data.set_names("retention"), strict=True)
    }
    return MeasuredPoint(point, overall(validation)["Loss"], outcomes)


def _log(evaluator: Evaluator, text: str) -> None:
    if evaluator.world.is_main:
        print(text, flush=True)
