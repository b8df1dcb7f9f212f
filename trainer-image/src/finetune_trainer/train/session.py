"""Everything a training process needs, built once, before the loop.

order ──► gang ──► data ──► model ──► plan, evaluator, checkpoints, telemetry
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torch import nn

from finetune_api.order import RunOrder
from finetune_api.results import Ancestor, PreparedSummary
from finetune_api.spec import FineTuneJobSpec
from finetune_api.tasks import Metric
from finetune_trainer.engine.base import fetch_base
from finetune_trainer.engine.flops import Work, peak
from finetune_trainer.engine.gang import Gang
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.memory.estimate import Verdict
from finetune_trainer.engine.memory.fitting import Measure, fit, others
from finetune_trainer.engine.memory.rehearsals import Rehearsals
from finetune_trainer.engine.memory.requirements import check_device
from finetune_trainer.engine.memory.words import table
from finetune_trainer.engine.model import load_tokenizer, purpose_of
from finetune_trainer.engine.optimizers import Optimizers, make_optimizers
from finetune_trainer.engine.parameters import Parameters
from finetune_trainer.engine.planning.plan import Plan, uniform_row
from finetune_trainer.engine.planning.rowsize import Samples, row_tokens_of
from finetune_trainer.engine.planning.schedule import replay_of, stages_of, steps_of, visits_of
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.engine.rows.context import ALONE, ContextGroup
from finetune_trainer.engine.rows.dropout import draws
from finetune_trainer.engine.rows.feed import RowBuilder, StaticShape
from finetune_trainer.engine.sharding import capacity
from finetune_trainer.engine.tasks import TASKS, RowLoss
from finetune_trainer.engine.tuning.anchors import OutputAnchor, WeightAnchor
from finetune_trainer.evaluate.classify import EVALUATORS
from finetune_trainer.evaluate.measure import Evaluator
from finetune_trainer.evaluate.metricnames import metrics_for
from finetune_trainer.evaluate.scores import GENERATED
from finetune_trainer.prepared.shards import PreparedData
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import Stores
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.telemetry import Telemetry
from finetune_trainer.train.tuned import open_model


@dataclass
class Session:
    """One process of one attempt."""

    order: RunOrder
    gang: Gang
    stores: Stores
    prepared: PreparedSummary
    data: PreparedData
    context: ContextGroup
    """The processes that share this one's rows."""
    build: RowBuilder
    """Makes the rows that are trained."""
    plan: Plan
    module: nn.Module
    """The loss of the task, under DDP in a gang of several."""
    loss: RowLoss
    """The same without DDP: for evaluation and generation."""
    optimizers: Optimizers
    guard: Guard
    work: Work
    """Arithmetic of the model."""
    peak: float | None
    """Operations per second that the gang could do in the precision of the run, if known."""
    evaluator: Evaluator
    checkpoints: Checkpoints
    telemetry: Telemetry
    parameters: Parameters
    trained: list[nn.Parameter]
    """Parameters that the optimizer changes."""
    sources: list[str]
    """Names of the training sets that have samples, in the order of the plan's sources."""
    memory: Verdict
    """What a process was to take, by the estimate."""
    lineage: Sequence[Ancestor]
    """What the model is made from."""
    replay: list[bool]
    """Whether each of them is held to the untuned model's outputs."""
    output_anchor: OutputAnchor | None
    weight_anchor: WeightAnchor | None

    @property
    def spec(self) -> FineTuneJobSpec:
        return self.order.spec

    def metrics_of_sets(self, split: Side, only: Sequence[Metric] = ()) -> dict[str, list[Metric]]:
        """Metrics to measure for each set of a split; ``only`` keeps generated ones to these."""
        wanted = {}
        for entry in self.data.manifest.sets:
            if entry.split != split:
                continue
            task = self.spec.task
            names = metrics_for(entry.format, self.spec.evaluation.metrics, task)
            if only:
                costly = GENERATED if self.spec.kind.generates else ()
                names = [m for m in names if m not in costly]
                names += metrics_for(entry.format, only, task)
            wanted[entry.name] = list(dict.fromkeys(names))
        return wanted


def open_session(
    order: RunOrder, stores: Stores, gang: Gang, checkpoints: Checkpoints, telemetry: Telemetry,
    scratch: Path, go_on: Callable[[str], None] = lambda where: None,
) -> Session:  # fmt: skip
    """Load data and model and put the plan together.

    Args:
        go_on: called between the parts on all ranks together; it may raise.

    Raises:
        TrainerError: of the kind that names what is missing.
    """
    spec = order.spec
    check_device(spec, gang.device)
    prepared = gang.from_first(lambda: runfiles.read_prepared(stores.default, order.run_uri))
    data = PreparedData.open(stores.default, prepared.uri, scratch / "data")
    telemetry.reached("data")
    go_on("before the model was fetched")
    # One process of each pod fetches the model; the others find it in the shared folder.
    found = gang.together(
        lambda: fetch_base(order, stores, scratch, weights=True) if gang.first_of_node else None
    )
    own, first = next(f for f in reversed(found[: gang.rank + 1]) if f is not None), found[0]
    assert first is not None, "the first process is the first of its node"
    files = own.in_version_of(first)
    tokenizer = load_tokenizer(files.folder)
    precision = precision_of(spec.training, gang.device.type == "cuda")
    kept = gang.from_first(lambda: runfiles.read_rehearsals(stores.default, order.run_uri))
    measure = Rehearsals(files.folder, data.manifest.max_length, kept)
    memory = fitted(spec, data, gang, measure)
    go_on("before the model was loaded")
    context = gang.sharing_rows(spec.compute.context_parallel)
    tuned = open_model(
        spec, files, stores, gang, memory.placement, precision,
        purpose_of(spec, data.manifest.classes), memory.plain_head,
    )  # fmt: skip
    go_on("once the model was loaded")
    optimizers = make_optimizers(tuned.model, spec)
    telemetry.reached("model")
    task = TASKS[spec.task]
    index = data.index("train")
    longest = int(index.length.max())
    row_tokens = row_tokens_of(spec, data.manifest.max_length, longest)
    sets = {number: data.manifest.sets[number] for number, _ in data.set_names("train")}
    tokens = {entry.name: entry.tokens for entry in sets.values()}
    plan = Plan(
        index.length, index.supervised,
        sources=np.searchsorted(list(sets), index.set),
        stages=stages_of(spec, tokens, steps_of(spec, len(index))),
        batch_size=spec.training.batch_size, visits=visits_of(spec, len(index)),
        seed=spec.training.seed, row_tokens=row_tokens, ranks=gang.size // context.size,
        packing=tuned.packing, virtual_tokens=spec.method.virtual_tokens,
    )  # fmt: skip
    shape = None
    if spec.training.compile and tuned.packing == "Concatenated":
        plan.row_tokens = uniform_row(plan, steps_of(spec, len(index)))
        shape = StaticShape(plan.row_tokens, longest)
    telemetry.reached("data")
    device_peak = peak(gang.device)
    gang_peak = device_peak and device_peak * gang.size
    trained = [p for p in tuned.model.parameters() if p.requires_grad]
    return Session(
        order=order,
        gang=gang,
        stores=stores,
        prepared=prepared,
        data=data,
        context=context,
        build=task.row(tuned.packing, context, shape, draws(spec)),
        plan=plan,
        module=tuned.module,
        loss=tuned.loss,
        optimizers=optimizers,
        guard=Guard(spec.training.guard, gang.device),
        work=tuned.work,
        peak=gang_peak if precision.halved else None,
        evaluator=EVALUATORS[spec.task](
            gang=gang, data=data, loss=tuned.loss,
            build=task.row(tuned.packing, ALONE, None, False), tokenizer=tokenizer,
            row_tokens=_evaluation_row(row_tokens, data, spec.method.virtual_tokens),
            packing=tuned.packing,
            possible=spec.kind.metrics,
            virtual_tokens=spec.method.virtual_tokens,
            max_samples=spec.evaluation.max_samples,
            max_new_tokens=spec.evaluation.max_new_tokens
            or min(data.manifest.max_completion_tokens + 1, 512),
        ),
        checkpoints=checkpoints,
        telemetry=telemetry,
        parameters=tuned.parameters,
        trained=trained,
        sources=list(tokens),
        memory=memory,
        lineage=files.base.lineage,
        replay=replay_of(spec, list(tokens)),
        output_anchor=tuned.output_anchor,
        weight_anchor=weight_anchor(spec, optimizers),
    )  # fmt: skip


def weight_anchor(spec: FineTuneJobSpec, optimizers: Optimizers) -> WeightAnchor | None:
    """The untuned weights, where the spec pulls towards them; made before a commit is restored."""
    coefficient = float(spec.training.anchor.l2_coefficient)
    return WeightAnchor(optimizers, coefficient) if coefficient else None


def fitted(spec: FineTuneJobSpec, data: PreparedData, gang: Gang, measure: Measure) -> Verdict:
    """How the model will lie on the gang, alike on all ranks, by the memory that there is.

    Raises:
        UserError: 'DoesNotFit', and where the spec does not suit the model, before it is loaded.
    """
    room = min(gang.together(lambda: capacity(gang.device, gang.per_node)))
    there = {"nodes": gang.nodes, "processes_per_node": gang.per_node}
    there["gpus_per_node"] = gang.per_node if gang.device.type == "cuda" else 0
    spec = spec.model_copy(update={"compute": spec.compute.model_copy(update=there)})

    def decide() -> Verdict:
        index = data.index("train")
        samples = Samples(index.length, index.supervised, data.manifest.max_length)
        found = fit(spec, samples, room, measure)
        print(table(found, others(spec, samples, found, measure)), flush=True)
        return found

    return gang.from_first(decide)


def _evaluation_row(row_tokens: int, data: PreparedData, virtual_tokens: int) -> int:
    """Row size that holds the longest held-out sample too."""
    longest = [data.index(s).length.max(initial=1) for s in ("validation", "test")]
    return int(max(row_tokens, *(n + virtual_tokens for n in longest)))


def versions() -> dict[str, str]:
    """Versions of the packages that the result depends on."""
    names = ("finetune-trainer", "torch", "transformers", "peft", "accelerate", "tokenizers")
    return {name: version(name) for name in names}
