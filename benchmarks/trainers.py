"""This project's trainer and TRL's SFTTrainer on the same model and data, for benchmarks.

Both are built once and take turns of some steps in one process, so that other load of the machine
affects both. Both count real tokens, without padding. The first step of a turn is a warm-up and is
not counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)

from finetune_api.spec import parse_spec
from finetune_trainer.engine.chunked_head import has_plain_head
from finetune_trainer.engine.compilation import compile_blocks
from finetune_trainer.engine.flops import Work, work_of
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.kernels import use_liger
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.optimizers import make_optimizers
from finetune_trainer.engine.packing import packed
from finetune_trainer.engine.packing.feed import Feed, StaticShape, build_packed
from finetune_trainer.engine.planning.plan import Plan, uniform_micro_batch
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.engine.sharding import distribute
from finetune_trainer.engine.tuning.methods import apply_method
from finetune_trainer.engine.world import join
from finetune_trainer.prepared.dataset import TokenSample
from finetune_trainer.train.step import optimizer_step


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights, and the micro-batches it is trained on."""

    layers: int
    hidden: int
    feedforward: int
    heads: int
    key_heads: int
    vocabulary: int
    micro_batch_tokens: int
    """Largest number of tokens of a micro-batch, and of a document."""
    micro_batches: int = 4
    """Micro-batches per step, on average."""

    def model(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, use_cache=False,
            intermediate_size=self.feedforward, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.key_heads,
            max_position_embeddings=self.micro_batch_tokens, tie_word_embeddings=True,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        with device:
            return AutoModelForCausalLM.from_config(config).to(dtype)


SHAPES: Final[Mapping[str, Shape]] = {
    "8M": Shape(6, 256, 704, 8, 4, 16384, 2048),
    "50M": Shape(8, 640, 1728, 10, 5, 32768, 2048),
    "1B": Shape(16, 2048, 8192, 32, 8, 128256, 4096),
    "3B": Shape(28, 3072, 8192, 24, 8, 128256, 4096),
}
"""Shapes by number of parameters; 1B and 3B have the dimensions of Llama 3.2."""


def documents(count: int, shape: Shape) -> list[TokenSample]:
    """Return instruction-like samples of log-normal lengths (median about 150 tokens, or 300 with
    micro-batches of 4,096). The second half of each is supervised."""
    draw = np.random.default_rng(0)
    mean = 5.0 + np.log(shape.micro_batch_tokens / 2048)
    made = []
    for n in np.clip(draw.lognormal(mean, 0.8, count).astype(int), 16, shape.micro_batch_tokens):
        supervised = np.zeros(n, np.bool_)
        supervised[n // 2 :] = True
        made.append(TokenSample(draw.integers(3, shape.vocabulary, n).astype(np.int32), supervised))
    return made


class Ours:
    """The project's feed and optimizer step, on one or several processes."""

    def __init__(self, method: str, data: list[TokenSample], shape: Shape, **training: Any) -> None:
        lengths = np.array([len(s.ids) for s in data])
        supervised = np.array([int(s.supervised.sum()) for s in data])
        batch = round(shape.micro_batch_tokens * shape.micro_batches / lengths.mean())
        spec = parse_spec(
            {
                "model": {"source": "s3://bucket/model"},
                "data": {"train": [{"source": "s3://bucket/data"}]},
                "output": {"destination": "s3://bucket/out"},
                "method": {"type": method},
                "training": {"batchSize": batch, **training},
            }
        )
        packed.install()
        self._world = world = join(spec)
        precision = precision_of(spec, world.device.type == "cuda")
        halved = precision.bf16 and spec.method.kind.freezes
        base = shape.model(torch.bfloat16 if halved else torch.float32, world.device)
        base.set_attn_implementation(packed.ATTENTION)
        plain_head = has_plain_head(base)
        if precision.bf16 and not spec.training.compile:
            use_liger(base, world.device)
        tuned = apply_method(base, spec)
        self.work: Work = work_of(tuned, base)
        loss = TokenLoss(tuned, plain_head=plain_head).train()
        if spec.training.compile:
            compile_blocks(tuned)
        self.plan = Plan(
            lengths,
            supervised,
            batch_size=batch,
            seed=0,
            micro_batch_tokens=shape.micro_batch_tokens,
            ranks=world.size,
        )
        self._shape: StaticShape | None = None
        if spec.training.compile:
            self.plan.micro_batch_tokens = uniform_micro_batch(self.plan, -(-len(lengths) // batch))
            self._shape = StaticShape(self.plan.micro_batch_tokens, int(lengths.max()))
        self._session: Any = SimpleNamespace(
            world=world, plan=self.plan, spec=spec,
            module=distribute(loss, world, "NoShard", precision),
            trained=[p for p in tuned.parameters() if p.requires_grad],
            optimizers=make_optimizers(tuned, spec),
            output_anchor=None, weight_anchor=None,
            guard=Guard(spec.training.guard, world.device),
        )  # fmt: skip
        self._data = data
        self._next = 0

    def turn(self, steps: int) -> float:
        """Train ``steps`` steps after a warm-up step. Returns tokens per second of all ranks."""
        read = lambda positions: [self._data[p] for p in positions]  # noqa: E731
        end = self._next + steps + 1
        tokens, began = 0, 0.0
        with Feed(
            self.plan, read, rank=self._world.rank, start=self._next, end=end,
            device=self._world.device, build=partial(build_packed, shape=self._shape),
        ) as feed:  # fmt: skip
            for i, batch in enumerate(feed):
                optimizer_step(self._session, batch, 1e-4)
                if i == 0:
                    wait()
                    began = time.perf_counter()
                else:
                    tokens += batch.plan.tokens
        wait()
        self._next = end
        return tokens / (time.perf_counter() - began)

    def operations(self) -> float:
        """Return the floating-point operations per token, of the plan's first step."""
        positions = self.plan.step(0).samples
        lengths = self.plan.lengths[list(positions)]
        supervised = int(self.plan.supervised[list(positions)].sum())
        return self.work.training(lengths, supervised) / float(lengths.sum())


@dataclass
class StepTimes(TrainerCallback):
    """End times of TRL's steps."""

    ends: list[float] = field(default_factory=list)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        wait()
        self.ends.append(time.perf_counter())


class Trl:
    """SFTTrainer with completion-only loss, with packing (its default strategy) or padding."""

    def __init__(
        self, method: str, precision: str, data: list[TokenSample], shape: Shape, *,
        packing: bool, attention: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        from datasets import Dataset
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        samples = Dataset.from_list(
            [
                {"input_ids": s.ids.tolist(), "completion_mask": s.supervised.astype(int).tolist()}
                for s in data
            ]
        )
        mean = statistics.mean(len(s.ids) for s in data)
        each, parts = 1, shape.micro_batches
        if not packing:  # 8 documents per forward pass, TRL's default
            each, parts = (
                8,
                max(1, round(shape.micro_batch_tokens * shape.micro_batches / mean / 8)),
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._folder = tempfile.TemporaryDirectory()
        config = SFTConfig(
            output_dir=self._folder.name, max_length=shape.micro_batch_tokens, packing=packing,
            completion_only_loss=True, per_device_train_batch_size=each,
            gradient_accumulation_steps=parts, max_steps=1, learning_rate=1e-4,
            lr_scheduler_type="constant", logging_strategy="no", save_strategy="no", report_to=[],
            bf16=precision == "BF16", seed=0, use_cpu=device.type == "cpu", disable_tqdm=True,
            optim="adamw_torch_fused", **{"gradient_checkpointing": False, **options},
        )  # fmt: skip
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        frozen = torch.bfloat16 if method == "LoRA" and precision == "BF16" else torch.float32
        self._times = StepTimes()
        model = shape.model(frozen, device)
        if attention is not None:
            model.set_attn_implementation(attention)
        self._trainer = SFTTrainer(
            model=model, args=config, train_dataset=samples,
            processing_class=_tokenizer(shape.vocabulary), callbacks=[self._times],
            peft_config=lora if method == "LoRA" else None,
        )  # fmt: skip
        self._trainer.remove_callback(PrinterCallback)
        lengths = [len(x) for x in self._trainer.train_dataset["input_ids"]]
        self._tokens_per_step = statistics.mean(lengths) * each * parts

    def turn(self, steps: int) -> float:
        """As ``Ours.turn``, with tokens computed from the mean length of TRL's rows."""
        self._times.ends.clear()
        self._trainer.args.max_steps = steps + 1
        self._trainer.train()
        ends = self._times.ends
        return steps * self._tokens_per_step / (ends[-1] - ends[0])


def _tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")),
        eos_token="t2", pad_token="t0",
    )  # fmt: skip


def wait() -> None:
    """Wait until the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(dtype: torch.dtype, device: torch.device, side: int = 2048) -> float:
    """Return the floating-point operations per second of a product of square matrices, the best of
    five."""
    a = torch.randn(side, side, device=device).to(dtype)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        _ = a @ a
        wait()
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times[1:])
