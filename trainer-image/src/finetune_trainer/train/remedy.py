"""``evaluation.remedy``: choose a point between the base and the tuned weights, after training.

    chosen checkpoint ──► ``point_scan`` ──► choice
                      └─► weights at the chosen point ──► checkpoint of their own ──► test, publish

What follows knows only a checkpoint. An attempt that ends during the scan leaves nothing, and the
next one scans again; one that ends later leaves the point with its choice.
"""

from __future__ import annotations

from functools import partial

from finetune_api.remedy import RemedyResult
from finetune_trainer.engine.sharding import reshard
from finetune_trainer.engine.tuning.interpolation import line_of, own_weights
from finetune_trainer.evaluate.point_scan import scan
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
    assert session.halves is not None, "a run with a remedy has halves"
    line = line_of(model, remedy.scan, base)
    found = scan(session.evaluator, line, session.spec.evaluation, session.halves)
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
