"""A model under tuning as in a training process, and checks that hold for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine import CPU, samples
from peft import PeftModel
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from transformers import AutoModelForCausalLM

from finetune_api.sources import ModelLocation
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.checkpointing.dcp import load_state, save_state, state_of
from finetune_trainer.engine.checkpointing.staging import stage
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.model import Pretrained, build_base, load_tokenizer
from finetune_trainer.engine.optimizers import make_optimizers, step_if
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.tuning.derived import derive
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.publish.export import tuned_model, write_adapter, write_merged
from finetune_trainer.storage.published import Base
from finetune_trainer.storage.weight_reader import Weights

IDS = torch.arange(1, 25)[None]


class Tuning:
    """A model under tuning, as in a training process."""

    def __init__(self, folder: Path, spec: FineTuneJobSpec) -> None:
        kind = spec.method.kind
        init = Pretrained(quantize=kind.quantizes)
        base = build_base(folder, torch.float32, init, pack=kind.packs)
        self.model: Any = apply_method(base, spec)
        derive(self.model, spec)
        coefficient = float(spec.training.router_aux_loss_coefficient)
        self.loss = TokenLoss(self.model, coefficient).train()
        self.optimizers = make_optimizers(self.model, spec)

    def step(self, number: int) -> float:
        micro_batch = build_packed(samples([18], seed=number), [0], seed=0, step=number, device=CPU)
        self.model.train()
        with layout_context(micro_batch.layout):
            losses = self.loss(micro_batch)
            (losses.tokens.sum() + losses.added).backward()
        step_if(self.optimizers, 3e-2, torch.tensor(True))
        return float(losses.tokens.detach().sum())

    def trained(self) -> set[str]:
        return {n for n, p in self.model.named_parameters() if p.requires_grad}

    def values(self) -> dict[str, torch.Tensor]:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: value.detach().clone() for name, value in named}


def logits(model: Any) -> torch.Tensor:
    """Logits of the real tokens, without those of virtual tokens before them."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found[:, -IDS.shape[1] :]


def step_and_resume(base: Path, folder: Path, spec: FineTuneJobSpec, tuning: Tuning) -> Tuning:
    """Make three steps and a checkpoint (``folder/checkpoint``), and return what resumes from it.

    Checks that steps change exactly the trained parameters, and that a resume restores all values.
    """
    before = tuning.values()
    for number in range(3):
        tuning.step(number)
    after = tuning.values()
    assert {n for n in after if not torch.equal(before[n], after[n])} == tuning.trained()
    checkpoint = folder / "checkpoint"
    state = state_of(tuning.model, tuning.optimizers)
    save_state(FileSystemWriter(checkpoint), stage(state, None), None)
    resumed = Tuning(base, spec)
    load_state(FileSystemReader(checkpoint), resumed.model, resumed.optimizers, None)
    assert all(torch.equal(value, after[name]) for name, value in resumed.values().items())
    return resumed


def check_round(base: Path, folder: Path, spec: FineTuneJobSpec, tuning: Tuning) -> None:
    """Check that steps change exactly the trained parameters, that a resume continues exactly, and
    that the published model is the tuned model."""
    resumed = step_and_resume(base, folder, spec, tuning)
    check_published(base, folder, spec, logits(tuning.model))
    assert resumed.step(3) == tuning.step(3)
    ours, theirs = resumed.values(), tuning.values()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def check_published(
    base: Path, folder: Path, spec: FineTuneJobSpec, expected: torch.Tensor
) -> None:
    """Check that the files published from a checkpoint give the tuned model's logits in plain
    transformers and peft."""
    tokenizer, checkpoint = load_tokenizer(base), FileSystemReader(folder / "checkpoint")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(plain) - expected).abs().max() > 1e-3
    atol = 1e-5  # merging changes the order of sums; how they round depends on the processor
    if "Adapter" in spec.method.kind.formats:
        model = tuned_model(base, None, checkpoint, spec)
        files = BaseFiles(Base(ModelLocation(source="s3://models/base"), ()), base, None)
        write_adapter(model, tokenizer, files, spec, [128], folder / "adapter")
        adapted = PeftModel.from_pretrained(plain, str(folder / "adapter"))
        torch.testing.assert_close(logits(adapted), expected, atol=atol, rtol=1e-5)
    if "Merged" in spec.method.kind.formats:
        model = tuned_model(base, Weights.of_folder(base), checkpoint, spec)
        write_merged(model, tokenizer, base, [128], folder / "merged")
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
        torch.testing.assert_close(logits(merged), expected, atol=atol, rtol=1e-5)
