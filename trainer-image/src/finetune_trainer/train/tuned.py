"""Build the model under tuning and distribute it over the world.

    weights ──► base ──► method ──► loss ──► on the device, whole or sharded

Each process reads its own shards. Of replicas (DDP, and FSDP without shards), rank 0 reads and
broadcasts (except quantized weights, which each process reads). Weights that a method derives from
the base are initialized after the base's weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.compilation import compile_blocks
from finetune_trainer.engine.dtensors import local_tensor
from finetune_trainer.engine.flops import Work, work_of
from finetune_trainer.engine.kernels import use_liger
from finetune_trainer.engine.loading import fill_shards, named_in, names_of
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.memory.estimate import Placement, shards_of
from finetune_trainer.engine.memory.profiling import frozen_dtype, packing_of
from finetune_trainer.engine.model import Pretrained, Purpose, build_base
from finetune_trainer.engine.parameters import Parameters, parameter_counts
from finetune_trainer.engine.placeholders import materialize
from finetune_trainer.engine.planning.plan import Packing
from finetune_trainer.engine.precision import Precision, use_fp8
from finetune_trainer.engine.sharding import broadcast, data_parallel_of, distribute, reshard
from finetune_trainer.engine.task_losses import TASKS, TaskLoss
from finetune_trainer.engine.tuning.anchors import OutputAnchor, wants_copy
from finetune_trainer.engine.tuning.derived import derive
from finetune_trainer.engine.tuning.methods import Tuned, apply_method, checkpoint_activations
from finetune_trainer.engine.world import World
from finetune_trainer.storage.objects import Stores


@dataclass(frozen=True)
class TunedModel:
    """The model of a run, with its loss and sizes."""

    model: Tuned
    loss: TaskLoss
    """The task's loss over the model, for evaluation and generation."""
    module: nn.Module
    """``loss`` as it is trained: sharded by FSDP, wrapped by DDP, or itself."""
    parameters: Parameters
    work: Work
    """Weights in the matrix products, for FLOP counts."""
    packing: Packing
    output_anchor: OutputAnchor | None
    read_base: Callable[[], None]
    """Writes the base's weights into the model again, in place; a collective. For a method that
    trains the model's own weights, of a task without classes."""


def open_model(
    spec: FineTuneJobSpec,
    files: BaseFiles,
    stores: Stores,
    world: World,
    placement: Placement,
    precision: Precision,
    purpose: Purpose,
    plain_head: bool,
) -> TunedModel:
    """Return the model of the spec with its weights, on the device.

    Args:
        plain_head: whether logits can be computed in chunks, from the memory profile; cannot be
            determined once kernels are fused.

    Raises:
        UserError: as ``build_base``, ``apply_method`` and ``fill_shards``.
    """
    kind, path = spec.method.kind, files.folder
    dtype = frozen_dtype(spec, precision)
    data_parallel = data_parallel_of(world, placement.sharding, precision, kind.trains)
    shards = shards_of(placement.sharding, world.nodes, world.processes_per_node)
    filled = data_parallel == "FSDP" and shards > 1
    broadcast = data_parallel != "Single" and not filled and not kind.quantizes
    if filled:
        base = build_base(path, dtype, "Placeholders", purpose, kind.packs)
    elif broadcast and not world.is_main:
        base = build_base(path, dtype, "Placeholders", purpose, kind.packs)
        materialize(base, world.device)
    else:
        init = Pretrained(files.weights(stores), world.device, kind.quantizes)
        base = build_base(path, dtype, init, purpose, kind.packs)
    names = names_of(base)
    packing = packing_of(base, spec)
    if precision.bf16 and not spec.training.compile:
        use_liger(base, world.device)
    model = apply_method(base, spec)
    if placement.checkpointing:
        checkpoint_activations(model)
    parameters, work = parameter_counts(model), work_of(model, base)
    loss = TASKS[spec.task].loss(model, spec.training, plain_head)
    loss.train()
    if precision.fp8:
        use_fp8(model)
    if spec.training.compile:
        compile_blocks(model)
    named = named_in(loss, names)
    world.barrier()  # reading may take longer than the timeout of the collectives that follow
    module = distribute(loss, world, placement.sharding, precision, placement.gathered)
    if filled:
        fill_shards(loss, named, path, files.weights(stores), purpose)
    derive(model, spec, world.rank, world.size)
    anchor = output_anchor(spec, files, stores, loss, world, placement, precision)
    fill = partial(fill_shards, loss, named, path, purpose=purpose)
    read_base = partial(
        _read_base, loss, world, filled, lambda: fill(weights=files.weights(stores))
    )
    return TunedModel(model, loss, module, parameters, work, packing, anchor, read_base)


def _read_base(loss: nn.Module, world: World, sharded: bool, fill: Callable[[], None]) -> None:
    """Read the base's weights into a model: each process its shards; of replicas, rank 0 reads and
    broadcasts."""
    reshard(loss)
    if sharded:
        world.on_all(fill)
        return
    world.on_main(fill)
    if world.size > 1:
        broadcast(loss)


def starting_weights(
    spec: FineTuneJobSpec, tuned: TunedModel, trained: Sequence[nn.Parameter]
) -> Callable[[], None]:
    """Return what puts the weights that a model starts its training with into it again; a
    collective. Adapters and the heads of classifiers are drawn: they are kept on the host. A
    model's own weights are read again.

    Args:
        tuned: with these weights.
        trained: its trained parameters.
    """
    if spec.kind.generates and not spec.method.kind.adapts:
        return tuned.read_base
    kept = [local_tensor(p.detach()).to("cpu", copy=True) for p in trained]

    @torch.no_grad()
    def put_back() -> None:
        reshard(tuned.loss)
        for parameter, value in zip(trained, kept, strict=True):
            local_tensor(parameter).copy_(value)

    return put_back


def output_anchor(
    spec: FineTuneJobSpec,
    files: BaseFiles,
    stores: Stores,
    loss: TaskLoss,
    world: World,
    placement: Placement,
    precision: Precision,
) -> OutputAnchor | None:
    """Return the output anchor of the spec, or None. A copy of the base model is placed as the
    model is."""
    if float(spec.training.anchor.kl_coefficient) == 0:
        return None
    assert isinstance(loss, TokenLoss), "validated: anchors require a language model"
    if not wants_copy(spec):
        return OutputAnchor(loss)
    dtype = precision.frozen_dtype
    filled = data_parallel_of(world, placement.sharding, precision, trained=False) == "FSDP"
    if filled:
        base = build_base(files.folder, dtype, "Placeholders")
    else:
        base = build_base(files.folder, dtype, Pretrained(files.weights(stores), world.device))
    if precision.bf16 and not spec.training.compile:
        use_liger(base, world.device)
    copy = TokenLoss(base.requires_grad_(False)).eval()
    named = named_in(copy, names_of(base))
    distribute(copy, world, placement.sharding, precision)
    if filled:
        fill_shards(copy, named, files.folder, files.weights(stores))
    return OutputAnchor(loss, copy)
