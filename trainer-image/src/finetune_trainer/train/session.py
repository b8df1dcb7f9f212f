"""Everything a training process needs, built once, before the loop.

run spec ──► gang ──► data ──► model ──► plan, evaluator, checkpoints, telemetry
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torch import nn

from finetune_api.results import Ancestor, PreparedSummary
from finetune_api.run_spec import RunSpec
from finetune_api.spec import FineTuneJobSpec
from finetune_api.tasks import Metric
from finetune_trainer.engine.base import fetch_base
from finetune_trainer.engine.flops import Work, peak
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.memory.estimate import MemoryDecision
from finetune_trainer.engine.memory.fitting import Measure, fit, others
from finetune_trainer.engine.memory.formatting import table
from finetune_trainer.engine.memory.profile_cache import ProfileCache
from finetune_trainer.engine.memory.requirements import check_device
from finetune_trainer.engine.model import load_tokenizer, purpose_of
from finetune_trainer.engine.optimizers import Optimizers, make_optimizers
from finetune_trainer.engine.packing.context import ALONE, ContextGroup
from finetune_trainer.engine.packing.dropout import draws
from finetune_trainer.engine.packing.feed import MicroBatchBuilder, StaticShape
from finetune_trainer.engine.parameters import Parameters
from finetune_trainer.engine.planning.micro_batch_size import Samples, micro_batch_tokens_of
from finetune_trainer.engine.planning.plan import Plan, uniform_micro_batch
from finetune_trainer.engine.planning.schedule import replay_of, stages_of, steps_of, visits_of
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.engine.sharding import capacity
from finetune_trainer.engine.task_losses import TASKS, TaskLoss
from finetune_trainer.engine.tuning.anchors import OutputAnchor, WeightAnchor
from finetune_trainer.engine.world import World
from finetune_trainer.evaluate.classify import EVALUATORS
from finetune_trainer.evaluate.measure import Evaluator
from finetune_trainer.evaluate.metricnames import metrics_for
from finetune_trainer.evaluate.scores import GENERATED
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import Stores
from finetune_trainer.train.checkpoint import CheckpointManager
from finetune_trainer.train.telemetry import Telemetry
from finetune_trainer.train.tuned import open_model


@dataclass
class Session:
    """One process of one attempt."""

    run_spec: RunSpec
    world: World
    stores: Stores
    prepared: PreparedSummary
    data: PreparedData
    context: ContextGroup
    """The processes that share this one's rows."""
    build: MicroBatchBuilder
    """Makes the rows that are trained."""
    plan: Plan
    module: nn.Module
    """The loss of the task, under DDP in a gang of several."""
    loss: TaskLoss
    """The same without DDP: for evaluation and generation."""
    optimizers: Optimizers
    guard: Guard
    work: Work
    """Arithmetic of the model."""
    peak: float | None
    """Operations per second that the gang could do in the precision of the run, if known."""
    evaluator: Evaluator
    checkpointer: CheckpointManager
    telemetry: Telemetry
    parameters: Parameters
    trained: list[nn.Parameter]
    """Parameters that the optimizer changes."""
    sources: list[str]
    """Names of the training sets that have samples, in the order of the plan's sources."""
    memory: MemoryDecision
    """What a process was to take, by the estimate."""
    lineage: Sequence[Ancestor]
    """What the model is made from."""
    replay: list[bool]
    """Whether each of them is held to the untuned model's outputs."""
    output_anchor: OutputAnchor | None
    weight_anchor: WeightAnchor | None

    @property
    def spec(self) -> FineTuneJobSpec:
        return self.run_spec.spec

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
    run_spec: RunSpec, stores: Stores, world: World, checkpointer: CheckpointManager, telemetry:
    Telemetry, scratch: Path, go_on: Callable[[str], None] = lambda where: None,
) -> Session:  # fmt: skip
    """Load data and model and put the plan together.

    Args:
        go_on: called between the parts on all ranks together; it may raise.

    Raises:
        TrainerError: of the kind that names what is missing.
    """
    spec = run_spec.spec
    check_device(spec, world.device)
    prepared = world.on_main(lambda: runfiles.read_prepared(stores.default, run_spec.run_uri))
    data = PreparedData.open(stores.default, prepared.uri, scratch / "data")
    telemetry.reached("data")
    go_on("before the model was fetched")
    # One process of each pod fetches the model; the others find it in the shared folder.
    found = world.on_all(
        lambda: fetch_base(run_spec, stores, scratch, weights=True) if world.is_local_main else None
    )
    own, first = next(f for f in reversed(found[: world.rank + 1]) if f is not None), found[0]
    assert first is not None, "the first process is the first of its node"
    files = own.in_version_of(first)
    tokenizer = load_tokenizer(files.folder)
    precision = precision_of(spec, world.device.type == "cuda")
    kept = world.on_main(lambda: runfiles.read_memory_profiles(stores.default, run_spec.run_uri))
    measure = ProfileCache(files.folder, data.manifest.max_length, kept)
    memory = fitted(spec, data, world, measure)
    go_on("before the model was loaded")
    context = world.context_group(spec.compute.context_parallel)
    tuned = open_model(
        spec, files, stores, world, memory.placement, precision,
        purpose_of(spec, data.manifest.classes), memory.plain_head,
    )  # fmt: skip
    go_on("once the model was loaded")
    optimizers = make_optimizers(tuned.model, spec)
    telemetry.reached("model")
    task = TASKS[spec.task]
    index = data.index("train")
    longest = int(index.length.max())
    micro_batch_tokens = micro_batch_tokens_of(spec, data.manifest.max_length, longest)
    sets = {number: data.manifest.sets[number] for number, _ in data.set_names("train")}
    tokens = {entry.name: entry.tokens for entry in sets.values()}
    plan = Plan(
        index.length, index.supervised,
        sources=np.searchsorted(list(sets), index.set),
        stages=stages_of(spec, tokens, steps_of(spec, len(index))),
        batch_size=spec.training.batch_size, visits=visits_of(spec, len(index)),
        seed=spec.training.seed, micro_batch_tokens=micro_batch_tokens, ranks=world.size //
        context.size, packing=tuned.packing, virtual_tokens=spec.method.virtual_tokens,
    )  # fmt: skip
    shape = None
    if spec.training.compile and tuned.packing == "Concatenated":
        plan.micro_batch_tokens = uniform_micro_batch(plan, steps_of(spec, len(index)))
        shape = StaticShape(plan.micro_batch_tokens, longest)
    telemetry.reached("data")
    device_peak = peak(world.device)
    world_peak = device_peak and device_peak * world.size
    trained = [p for p in tuned.model.parameters() if p.requires_grad]
    return Session(
        run_spec=run_spec,
        world=world,
        stores=stores,
        prepared=prepared,
        data=data,
        context=context,
        build=task.builder(tuned.packing, context, shape, draws(spec)),
        plan=plan,
        module=tuned.module,
        loss=tuned.loss,
        optimizers=optimizers,
        guard=Guard(spec.training.guard, world.device),
        work=tuned.work,
        peak=world_peak if precision.bf16 else None,
        evaluator=EVALUATORS[spec.task](
            world=world, data=data, loss=tuned.loss,
            build=task.builder(tuned.packing, ALONE, None, False), tokenizer=tokenizer,
            micro_batch_tokens=_evaluation_tokens(micro_batch_tokens, data,
            spec.method.virtual_tokens), packing=tuned.packing, possible=spec.kind.metrics,
            virtual_tokens=spec.method.virtual_tokens, max_samples=spec.evaluation.max_samples,
            max_new_tokens=spec.evaluation.max_new_tokens or min(data.manifest.max_completion_tokens
            + 1, 512),
        ),
        checkpointer=checkpointer,
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
    """The untuned weights, where the spec pulls towards them; made before a checkpoint is
    restored."""
    coefficient = float(spec.training.anchor.l2_coefficient)
    return WeightAnchor(optimizers, coefficient) if coefficient else None


def fitted(
    spec: FineTuneJobSpec, data: PreparedData, world: World, measure: Measure
) -> MemoryDecision:
    """How the model will lie on the gang, alike on all ranks, by the memory that there is.

    Raises:
        UserError: 'DoesNotFit', and where the spec does not suit the model, before it is loaded.
    """
    room = min(world.on_all(lambda: capacity(world.device, world.processes_per_node)))
    there = {"nodes": world.nodes, "processes_per_node": world.processes_per_node}
    there["gpus_per_node"] = world.processes_per_node if world.device.type == "cuda" else 0
    spec = spec.model_copy(update={"compute": spec.compute.model_copy(update=there)})

    def decide() -> MemoryDecision:
        index = data.index("train")
        samples = Samples(index.length, index.supervised, data.manifest.max_length)
        found = fit(spec, samples, room, measure)
        print(table(found, others(spec, samples, found, measure)), flush=True)
        return found

    return world.on_main(decide)


def _evaluation_tokens(micro_batch_tokens: int, data: PreparedData, virtual_tokens: int) -> int:
    """Row size that holds the longest held-out sample too."""
    longest = [data.index(s).length.max(initial=1) for s in ("validation", "test")]
    return int(max(micro_batch_tokens, *(n + virtual_tokens for n in longest)))


def versions() -> dict[str, str]:
    """Versions of the packages that the result depends on."""
    names = ("finetune-trainer", "torch", "transformers", "peft", "accelerate", "tokenizers")
    return {name: version(name) for name in names}
