"""Training speed beside TRL's SFTTrainer: same model, data, tokens a step and precision.

    python benchmarks/tokens_per_second.py [--rounds 3] [--steps 6] [--precision bf16 fp32]

The two train in turn, in one process, so that a machine that is slow for a while is slow for both;
the figure to quote is the ratio (median over the rounds). TRL packs (its default strategy) with
completion-only loss; tokens are counted without padding on both sides. The first step of each
turn warms up and is not counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, TrainerCallback

from finetune_api.spec import parse_spec
from finetune_trainer.engine import packed
from finetune_trainer.engine.feed import Feed
from finetune_trainer.engine.gang import join
from finetune_trainer.engine.guard import Guard
from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.methods import apply_method
from finetune_trainer.engine.optimizers import make_optimizers
from finetune_trainer.engine.plan import Plan
from finetune_trainer.prepared.shards import TokenSample
from finetune_trainer.train.step import optimizer_step

ROW = 2048
ROWS_PER_STEP = 4
VOCABULARY = 16384


def model(method: str, precision: str) -> PreTrainedModel:
    """An 8.5 M parameter Llama with random weights; the base of LoRA in bf16 where bf16 is run."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=ROW,
        tie_word_embeddings=True, use_cache=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config)
    return made.to(torch.bfloat16) if method == "LoRA" and precision == "bf16" else made


def documents(count: int) -> list[TokenSample]:
    """Instruction-like samples: log-normal lengths (median about 150 tokens), the second half
    supervised."""
    draw = np.random.default_rng(0)
    made = []
    for n in np.clip(draw.lognormal(5.0, 0.8, count).astype(int), 16, ROW):
        supervised = np.zeros(n, np.bool_)
        supervised[n // 2 :] = True
        made.append(TokenSample(draw.integers(3, VOCABULARY, n).astype(np.int32), supervised))
    return made


def specification(method: str, precision: str, batch: int) -> Any:
    return parse_spec(
        {
            "model": {"source": "s3://bucket/model"},
            "data": {"train": [{"source": "s3://bucket/data"}]},
            "output": {"destination": "s3://bucket/out"},
            "method": {"type": method},
            "training": {"precision": precision.upper(), "batchSize": batch},
        }
    )


class Ours:
    """The project's feed and step."""

    name = "finetune-operator"

    def __init__(self, method: str, precision: str, data: list[TokenSample]) -> None:
        lengths = np.array([len(s.ids) for s in data])
        batch = round(ROW * ROWS_PER_STEP / lengths.mean())
        spec = specification(method, precision, batch)
        packed.install()
        base = model(method, precision)
        base.set_attn_implementation(packed.ATTENTION)
        tuned = apply_method(base, spec)
        self._gang = join(spec.training)
        loss = TokenLoss(tuned.to(self._gang.device)).train()
        trained = [p for p in tuned.parameters() if p.requires_grad]
        supervised = np.array([int(s.supervised.sum()) for s in data])
        self._plan = Plan(lengths, supervised, batch_size=batch, seed=0, row_tokens=ROW, ranks=1)
        self._session: Any = SimpleNamespace(
            gang=self._gang,
            plan=self._plan,
            module=loss,
            trained=trained,
            optimizers=make_optimizers(tuned, spec),
            output_anchor=None,
            weight_anchor=None,
            spec=spec,
            guard=Guard(spec.training.guard, self._gang.device),
        )
        self._data = data
        self._next = 0

    def turn(self, steps: int) -> float:
        """Tokens per second over so many steps behind a first one."""
        read = lambda positions: [self._data[p] for p in positions]  # noqa: E731
        end = self._next + steps + 1
        tokens, began = 0, 0.0
        with Feed(
            self._plan, read, rank=0, start=self._next, end=end, device=self._gang.device
        ) as feed:
            for i, batch in enumerate(feed):
                optimizer_step(self._session, batch, 1e-4)
                if i == 0:
                    _wait()
                    began = time.perf_counter()
                else:
                    tokens += batch.plan.tokens
        _wait()
        self._next = end
        return tokens / (time.perf_counter() - began)


@dataclass
class StepTimes(TrainerCallback):
    """When each step of TRL ended."""

    ends: list[float] = field(default_factory=list)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _wait()
        self.ends.append(time.perf_counter())


class Trl:
    """SFTTrainer with packing."""

    name = "TRL"

    def __init__(self, method: str, precision: str, data: list[TokenSample]) -> None:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        rows = Dataset.from_list(
            [
                {"input_ids": s.ids.tolist(), "completion_mask": s.supervised.astype(int).tolist()}
                for s in data
            ]
        )
        self._folder = tempfile.TemporaryDirectory()
        self._config = SFTConfig(
            output_dir=self._folder.name, max_length=ROW, packing=True, completion_only_loss=True,
            per_device_train_batch_size=1, gradient_accumulation_steps=ROWS_PER_STEP, max_steps=1,
            learning_rate=1e-4, lr_scheduler_type="constant", logging_strategy="no",
            save_strategy="no", report_to=[], bf16=precision == "bf16", seed=0,
            gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True, optim="adamw_torch_fused",
        )  # fmt: skip
        peft = None
        if method == "LoRA":
            peft = LoraConfig(
                task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"
            )
        self._times = StepTimes()
        self._trainer = SFTTrainer(
            model=model(method, precision), args=self._config, train_dataset=rows,
            processing_class=_tokenizer(), peft_config=peft, callbacks=[self._times],
        )  # fmt: skip
        lengths = [len(x) for x in self._trainer.train_dataset["input_ids"]]
        self._tokens_per_step = statistics.mean(lengths) * ROWS_PER_STEP

    def turn(self, steps: int) -> float:
        """As ``Ours.turn``; tokens by the mean size of its packed rows."""
        self._times.ends.clear()
        self._trainer.args.max_steps = steps + 1
        self._trainer.train()
        ends = self._times.ends
        return steps * self._tokens_per_step / (ends[-1] - ends[0])


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")),
        eos_token="t2", pad_token="t0",
    )  # fmt: skip


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rounds(method: str, precision: str, count: int, steps: int) -> list[tuple[float, float]]:
    """Tokens per second of the two, by round."""
    data = documents(2000)
    ours, trl = Ours(method, precision, data), Trl(method, precision, data)
    return [(ours.turn(steps), trl.turn(steps)) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--method", nargs="+", default=["Full", "LoRA"])
    options = parser.parse_args()
    packages = ("torch", "transformers", "trl", "peft")
    print(", ".join(f"{p} {version(p)}" for p in packages), f"; {torch.get_num_threads()} threads")
    print(f"{'method':8}{'precision':11}{'ours tok/s':>12}{'TRL tok/s':>12}{'ratio':>8}   by round")
    for precision in options.precision:
        for method in options.method:
            # A process of its own: precision is a state of the process, in accelerate.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                pairs = alone.submit(rounds, method, precision, options.rounds, options.steps)
            show(method, precision, pairs.result())


def show(method: str, precision: str, pairs: list[tuple[float, float]]) -> None:
    ratios = [a / b for a, b in pairs]
    ours, trl = (statistics.median(x) for x in zip(*pairs, strict=True))
    line = f"{method:8}{precision:11}{ours:12.0f}{trl:12.0f}{statistics.median(ratios):8.2f}   "
    print(line + " ".join(f"{r:.2f}" for r in ratios), flush=True)


if __name__ == "__main__":
    main()
