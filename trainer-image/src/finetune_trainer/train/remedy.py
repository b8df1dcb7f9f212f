"""``evaluation.remedy``: choose a point between the base and the tuned weights, after training.

    chosen checkpoint ──► points 1, 0.8 … 0.2, 0 (in place) ──► losses ──► choice
                      └─► weights at the chosen point ──► checkpoint of their own ──► test, publish

What follows knows only a checkpoint. An attempt that ends during the scan leaves nothing, and the
next one scans again; one that ends later leaves the point with its choice.
"""

from __future__ import annotations

from functools import partial

from finetune_api.remedy import Remedy, RemedyResult
from finetune_api.tasks import Metric
from finetune_trainer.engine.sharding import reshard
from finetune_trainer.engine.tuning.interpolation import Line, line_of, own_weights
from finetune_trainer.evaluate.comparisons import Outcome
from finetune_trainer.evaluate.measure import overall
from finetune_trainer.evaluate.remedy import MeasuredPoint, choose
from finetune_trainer.evaluate.scores import answers_to
from finetune_trainer.storage.run_head import Checkpoint
from finetune_trainer.train.session import Session


def with_remedy(session: Session, tuned: Checkpoint) -> tuple[Checkpoint, RemedyResult | None]:
    """Choose a point, and return the checkpoint that the run goes on with. The model has its
    weights.

    Args:
        tuned: checkpoint whose weights the model has.

    Raises:
        Interrupted: on all ranks, during the scan, if a stop was requested on any rank.
        CorruptCheckpoint: the files of ``tuned`` are damaged.
        StorageUnavailable, Fenced: as ``CheckpointManager.settle``.
    """
    remedy, checkpointer = session.spec.evaluation.remedy, session.checkpointer
    if remedy is None:
        return tuned, None
    model = session.loss.model
    if (known := checkpointer.load_point(model, tuned)) is not None:
        return known[0], RemedyResult.model_validate_json(known[1])
    free_training_state(session)
    reshard(session.loss)
    base = own_weights(model, session.read_base)
    load = partial(checkpointer.load, model, tuned)
    load()
    found = _scan(session, line_of(model, remedy.scan, base), remedy)
    load()  # points were reached by many roundings, the chosen one by a single one
    if found.chosen is None or found.chosen == 1:
        return tuned, found
    reshard(session.loss)
    line_of(model, remedy.scan, base).move(found.chosen)
    return checkpointer.save_point(model, tuned, found.model_dump_json(by_alias=True)), found


def free_training_state(session: Session) -> None:
    """Make room for base weights, or for another training: no step of the run follows."""
    for optimizer in session.optimizers:
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()


def _scan(session: Session, line: Line, remedy: Remedy) -> RemedyResult:
    """Measure all points, the base model at the end, and choose; on all ranks alike."""
    measured = []
    for point in (*remedy.effective_points, 0.0):
        reshard(session.loss)
        line.move(point)
        measured.append(_measured(session, point))
        _log(session, f"point {point:g}: validation loss {measured[-1].validation_loss:.4f}")
    found = session.world.on_main(lambda: choose(session.spec.evaluation, measured))
    _log(session, f"remedy ({found.scan}): {found.because}")
    return found


def _log(session: Session, text: str) -> None:
    if session.world.is_main:
        print(text, flush=True)


def _measured(session: Session, point: float) -> MeasuredPoint:
    halves, data = session.halves, session.data
    assert halves is not None, "a run with a remedy has halves"
    wanted: dict[str, list[Metric]] = {each.name: ["Loss"] for each in data.manifest.sets}
    validation = session.evaluator.sets("validation", wanted)
    retention = session.evaluator.sets("retention", wanted, halves.choosing)
    groups = data.index("retention").groups
    outcomes = {
        found.name: Outcome(
            found.losses, found.labels, answers_to([], []), groups[halves.choosing[number]]
        )
        for found, (number, _) in zip(retention, data.set_names("retention"), strict=True)
    }
    return MeasuredPoint(point, overall(validation)["Loss"], outcomes)
