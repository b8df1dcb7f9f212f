"""``evaluation.dataCurve``: trainings on parts of the training samples, after the run's own.

    weights of the start ──► training on 25 % ──► validation and test sets ──► data-curve/25.json
                        └──► training on 50 % ──► …                       ──► data-curve/50.json

The tuned model is in its checkpoint and is tested: nothing here can change it. A part that has
ended is not trained again by a later attempt. One that was begun ``TRIES`` times in vain is left
out, so that a run which is interrupted often still ends.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Final

from finetune_api.evaluation_results import DataCurvePoint
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.optimizers import make_optimizers
from finetune_trainer.engine.packing.feed import Feed
from finetune_trainer.engine.planning.schedule import learning_rate, log_interval, steps_of
from finetune_trainer.engine.world import Agreement
from finetune_trainer.evaluate.data_curve import SHARES
from finetune_trainer.evaluate.measure import overall
from finetune_trainer.liveness import stepped
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.runfiles import PartTraining
from finetune_trainer.supervise import worker_files
from finetune_trainer.train.remedy import free_training_state
from finetune_trainer.train.session import Session
from finetune_trainer.train.state import LoopState
from finetune_trainer.train.step import optimizer_step
from finetune_trainer.train.stopping import interrupted
from finetune_trainer.train.training_plan import Positions, Training, part_of, training_of

TRIES: Final = 2
"""Trainings on a part that may be begun."""


def data_curve(session: Session, state: LoopState, published: int) -> list[DataCurvePoint]:
    """Train on the parts that no earlier attempt has trained on; return the points of the curve,
    the run itself last. Without ``evaluation.dataCurve``: none. Leaves other weights in the model.

    Args:
        published: step of the published checkpoint.

    Raises:
        Interrupted: on all ranks, if a stop was requested on any rank.
    """
    if session.restart is None or not published:
        return []
    free_training_state(session)
    parts = [_part(session, share, published) for share in SHARES]
    loss = next((p.overall.get("Loss") for p in state.validation if p.step == published), None)
    whole = DataCurvePoint(
        share=1, samples=len(session.plan.lengths), steps=published,
        validation_loss=_finite(loss),
    )  # fmt: skip
    return [*(part.point for part in parts if part.point is not None), whole]


def _part(session: Session, share: float, published: int) -> PartTraining:
    """Return the training on a share of the samples, of this attempt or of an earlier one."""
    world, store, run_uri = session.world, session.stores.default, session.run_spec.run_uri
    known = world.on_main(lambda: runfiles.read_part(store, run_uri, share))
    if known.point is not None:
        return known
    if known.tries >= TRIES:
        _log(session, f"data curve: {100 * share:g} % is left out, as it was interrupted before")
        return known
    begun = PartTraining(tries=known.tries + 1)
    world.on_main(lambda: runfiles.write_part(store, run_uri, share, begun))
    done = _trained(session, share, published, begun)
    world.on_main(lambda: runfiles.write_part(store, run_uri, share, done))
    worker_files.note_commit()  # an interruption from here on loses less than the attempt
    return done


def _trained(session: Session, share: float, published: int, begun: PartTraining) -> PartTraining:
    """Train on a share of the samples, and measure the model."""
    began = time.monotonic()
    spec, world, plan = session.spec, session.world, session.plan
    positions = part_of(plan.sources, share, spec.training.seed)
    training = training_of(
        spec, session.data, plan.ranks, plan.packing, plan.micro_batch_tokens, positions
    )
    # The same share of the schedule as of the published checkpoint.
    steps = -(-training.total * published // steps_of(spec, len(plan.lengths)))
    _log(session, f"data curve: {100 * share:g} %, {len(positions):,} samples, {steps:,} steps")
    assert session.restart is not None, "evaluation.dataCurve is set"
    session.restart()
    part = replace(
        session, plan=training.plan, optimizers=make_optimizers(session.loss.model, spec),
        guard=Guard(spec.training.guard, world.device),
    )  # fmt: skip
    _train(part, training, positions, steps)
    free_training_state(part)
    wanted = session.metrics_of_sets("validation", ["Loss"])
    validation = session.evaluator.sets("validation", wanted)
    tested = session.evaluator.sets("test", session.metrics_of_sets("test"))
    loss = overall(validation)["Loss"] if validation else None
    seconds = (time.monotonic() - began) * world.size
    point = DataCurvePoint(
        share=share, samples=len(positions), steps=steps, validation_loss=_finite(loss),
        process_seconds=round(seconds, 3),
    )  # fmt: skip
    return begun.model_copy(
        update={"point": point, "sets": [result.to_answers() for result in tested]}
    )


def _train(session: Session, training: Training, positions: Positions, steps: int) -> None:
    """Take the steps of a training on some samples.

    Args:
        session: with the plan, optimizers and guard of this training.
        positions: of its samples in the index of all training samples.
    """
    spec, world, data = session.spec, session.world, session.data
    stop_requested = session.evaluator.stop_requested or (lambda: False)
    agreement, every = Agreement(world), log_interval(training.total)
    with Feed(
        session.plan, lambda at: data.samples("train", positions[at].tolist()),
        rank=world.rank // session.context.size, start=0, end=steps, device=world.device,
        build=session.build, replay=session.replay,
        expect=lambda at: data.expect("train", positions[at].tolist()),
    ) as feed:  # fmt: skip
        for batch in feed:
            number = batch.plan.number
            optimizer_step(session, batch, learning_rate(spec, training.total, number))
            stepped()
            if number % every == 0:
                session.guard.skipped()  # forgets what it has decided
            (stop,) = agreement.exchange(stop_requested())
            if stop:
                agreement.settle()
                raise interrupted(stop, "the data curve goes on with this part")
    agreement.settle()


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def _log(session: Session, text: str) -> None:
    if session.world.is_main:
        print(text, flush=True)
