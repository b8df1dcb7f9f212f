"""Objects of a training process, built once before the training loop.

run spec ──► process group ──► data ──► model ──► plan, evaluator, checkpoints, telemetry
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from torch import nn

from finetune_api.results import Ancestor, PreparedSummary
from finetune_api.run_spec import RunSpec
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.base import BaseFiles, fetch_base
from finetune_trainer.engine.flops import Work, peak
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.memory.alternatives import Measure
from finetune_trainer.engine.memory.estimate import MemoryDecision
from finetune_trainer.engine.memory.fitting import check_min_nodes, fit, others
from finetune_trainer.engine.memory.formatting import table
from finetune_trainer.engine.memory.profile_cache import ProfileCache
from finetune_trainer.engine.memory.requirements import check_device
from finetune_trainer.engine.model import load_tokenizer, purpose_of
from finetune_trainer.engine.optimizers import Optimizers, make_optimizers
from finetune_trainer.engine.packing.context import ContextGroup
from finetune_trainer.engine.packing.dropout import draws
from finetune_trainer.engine.packing.feed import MicroBatchBuilder, StaticShape
from finetune_trainer.engine.parameters import Parameters
from finetune_trainer.engine.planning.micro_batch_size import micro_batch_tokens_of, samples_of
from finetune_trainer.engine.planning.plan import Plan, uniform_micro_batch
from finetune_trainer.engine.planning.schedule import replay_of
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.engine.sharding import capacity
from finetune_trainer.engine.task_losses import TASKS, TaskLoss
from finetune_trainer.engine.tuning.anchors import OutputAnchor, WeightAnchor
from finetune_trainer.engine.world import World
from finetune_trainer.evaluate.answering import metrics_of_sets
from finetune_trainer.evaluate.base_kl import BasePredictions
from finetune_trainer.evaluate.evaluators import evaluator_of
from finetune_trainer.evaluate.measure import Evaluator
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.halves import Halves, retention_halves
from finetune_trainer.prepared.questions import Questions, read_questions
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import Stores
from finetune_trainer.train.checkpoint import CheckpointManager
from finetune_trainer.train.telemetry import Telemetry
from finetune_trainer.train.time_recorder import TimeRecorder
from finetune_trainer.train.training_plan import training_of
from finetune_trainer.train.tuned import open_model, starting_weights


@dataclass(kw_only=True)
class MeasuringSession:
    """State of one process that measures a model, for one attempt."""

    run_spec: RunSpec
    world: World
    stores: Stores
    prepared: PreparedSummary
    data: PreparedData
    loss: TaskLoss
    """The task's loss module without DDP, for evaluation and generation."""
    evaluator: Evaluator
    questions: Questions
    """Test prompts as they are put to a model, beside the prompts as they are."""
    checkpointer: CheckpointManager
    telemetry: Telemetry
    parameters: Parameters
    memory: MemoryDecision
    """Placement and estimated memory of a process."""
    lineage: Sequence[Ancestor]
    """Ancestors of the base model."""
    halves: Halves | None
    """Halves of the retention sets; None without ``evaluation.remedy``."""
    base_files: BaseFiles
    base_predictions: BasePredictions = field(default_factory=dict)
    """What the base model predicts for validation samples, once it is measured."""

    @property
    def spec(self) -> FineTuneJobSpec:
        return self.run_spec.spec

    @property
    def recorder(self) -> TimeRecorder:
        """Measures what the attempt spends its time on."""
        return self.checkpointer.recorder

    def metrics_of_sets(self, split: Side, only: Sequence[str] = ()) -> dict[str, list[str]]:
        """Return the metrics of each set of a split; ``only`` limits the generated metrics."""
        return metrics_of_sets(self.data, self.spec, split, only)


@dataclass(kw_only=True)
class Session(MeasuringSession):
    """State of one training process for one attempt."""

    context: ContextGroup
    """The context-parallel group: processes that share this one's micro-batches."""
    build: MicroBatchBuilder
    """Builds the training micro-batches."""
    plan: Plan
    module: nn.Module
    """The loss module, wrapped in DDP if data parallel is DDP."""
    optimizers: Optimizers
    guard: Guard
    work: Work
    """Floating-point operations of the model."""
    peak: float | None
    """Peak operations per second of all ranks in the run's precision; None: unknown."""
    trained: list[nn.Parameter]
    """Parameters that the optimizer updates."""
    sources: list[str]
    """Names of the non-empty training sets, in the order of the plan's sources."""
    replay: list[bool]
    """Whether each of ``sources`` is a replay set, anchored to the base model's outputs."""
    output_anchor: OutputAnchor | None
    weight_anchor: WeightAnchor | None
    read_base: Callable[[], None]
    """See ``TunedModel``."""
    restart: Callable[[], None] | None
    """Puts the weights of the start of the training into the model; a collective. None without
    ``evaluation.dataCurve``."""


def open_session(
    run_spec: RunSpec, stores: Stores, world: World, checkpointer: CheckpointManager, telemetry:
    Telemetry, scratch: Path, go_on: Callable[[str], None] = lambda where: None,
) -> MeasuringSession:  # fmt: skip
    """Load data and model, and build the plan; a ``Session`` for a method that trains.

    Args:
        go_on: called between the parts of the startup, on all ranks; may raise to stop there.

    Raises:
        TrainerError: a subclass for the cause.
    """
    spec = run_spec.spec
    check_device(spec, world.device)
    prepared = world.on_main(lambda: runfiles.read_prepared(stores.default, run_spec.run_uri))
    data = PreparedData.open(stores.default, prepared.uri, scratch / "data")
    telemetry.reached("data")
    go_on("before the model was fetched")
    # The first process of each node fetches the model into a folder that the node shares.
    found = world.on_all(
        lambda: fetch_base(run_spec, stores, scratch, weights=True) if world.is_local_main else None
    )
    own, first = next(f for f in reversed(found[: world.rank + 1]) if f is not None), found[0]
    assert first is not None, "rank 0 is the local main process of its node"
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
    task, longest = TASKS[spec.task], samples_of(spec, data).longest
    micro_batch_tokens = micro_batch_tokens_of(spec, data.manifest.max_length, longest)
    measuring = MeasuringSession(
        run_spec=run_spec,
        world=world,
        stores=stores,
        prepared=prepared,
        data=data,
        loss=tuned.loss,
        evaluator=evaluator_of(spec, world, data, tuned.loss, tuned.packing, tokenizer),
        questions=read_questions(stores.default, run_spec.run_uri),
        checkpointer=checkpointer,
        telemetry=telemetry,
        parameters=tuned.parameters,
        memory=memory,
        lineage=files.base.lineage,
        halves=world.on_main(lambda: retention_halves(data, spec)),
        base_files=files,
    )
    if not spec.method.kind.trains:
        telemetry.reached("model")
        return measuring
    optimizers = make_optimizers(tuned.model, spec)
    telemetry.reached("model")
    training = training_of(
        spec, data, world.size // context.size, tuned.packing, micro_batch_tokens
    )
    plan = training.plan
    shape = None
    if spec.training.compile and tuned.packing == "Concatenated":
        plan.micro_batch_tokens = uniform_micro_batch(plan, training.total)
        shape = StaticShape(plan.micro_batch_tokens, longest)
    telemetry.reached("data")
    device_peak = peak(world.device)
    world_peak = device_peak and device_peak * world.size
    trained = [p for p in tuned.model.parameters() if p.requires_grad]
    return Session(
        **vars(measuring),
        context=context,
        build=task.builder(tuned.packing, context, shape, draws(spec)),
        plan=plan,
        module=tuned.module,
        optimizers=optimizers,
        guard=Guard(spec.training.guard, world.device),
        work=tuned.work,
        peak=world_peak if precision.bf16 else None,
        trained=trained,
        sources=training.sources,
        replay=replay_of(spec, training.sources),
        output_anchor=tuned.output_anchor,
        weight_anchor=weight_anchor(spec, optimizers),
        read_base=tuned.read_base,
        restart=starting_weights(spec, tuned, trained) if spec.evaluation.data_curve else None,
    )


def weight_anchor(spec: FineTuneJobSpec, optimizers: Optimizers) -> WeightAnchor | None:
    """Return the anchor to the base model's weights; None: the spec has no L2 coefficient. Call
    before a checkpoint is restored, while the weights are still those of the base model."""
    coefficient = float(spec.training.anchor.l2_coefficient)
    return WeightAnchor(optimizers, coefficient) if coefficient else None


def fitted(
    spec: FineTuneJobSpec, data: PreparedData, world: World, measure: Measure
) -> MemoryDecision:
    """Return the placement of the model that fits the available memory, identical on all ranks.

    Raises:
        UserError: 'DoesNotFit', or if spec and model are incompatible; before the model is loaded.
    """
    available = min(world.on_all(lambda: capacity(world.device, world.processes_per_node)))
    there = {"nodes": world.nodes, "processes_per_node": world.processes_per_node}
    there["gpus_per_node"] = world.processes_per_node if world.device.type == "cuda" else 0
    spec = spec.model_copy(update={"compute": spec.compute.model_copy(update=there)})

    def decide() -> MemoryDecision:
        samples = samples_of(spec, data)
        found = fit(spec, samples, available, measure)
        check_min_nodes(spec, samples, available, measure)
        print(table(found, others(spec, samples, found, measure)), flush=True)
        return found

    return world.on_main(decide)


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect the result."""
    names = ("finetune-trainer", "torch", "transformers", "peft", "accelerate", "tokenizers")
    return {name: version(name) for name in names}
