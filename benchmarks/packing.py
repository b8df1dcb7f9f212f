"""How full micro-batches are, and how evenly ranks are loaded, over an epoch of real data.

    python benchmarks/packing.py [data.jsonl …] [--micro-batch-tokens 2048] [--vocabulary 8192]

The texts of a record's fields are concatenated to a document. A byte-level BPE is trained on the
data itself. Without data, lengths are drawn as for the other benchmarks.

"compiled" is the share of real tokens where micro-batches have one static size
(training.compile), followed by the share in micro-batches of `--micro-batch-tokens`. Without
compile a micro-batch is as long as its documents, and only real tokens are computed. "even" is the
mean cost of the ranks divided by the cost of the costliest rank, which the others wait for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from trainers import SHAPES, documents

from finetune_trainer.engine.planning.mixture import Ints
from finetune_trainer.engine.planning.plan import Plan, cost, uniform_micro_batch


def texts(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield "\n".join(str(value) for value in json.loads(line).values())


def lengths_of(path: Path, vocabulary: int) -> Ints:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = BpeTrainer(vocab_size=vocabulary, show_progress=False)
    documents = list(texts(path))
    tokenizer.train_from_iterator(documents, trainer)
    return np.array([len(e.ids) + 1 for e in tokenizer.encode_batch(documents)])


def figures(lengths: Ints, batch: int, micro_batch: int, ranks: int) -> tuple[float, float, float]:
    """Return the fill of compiled micro-batches at the chosen static size, their fill at the
    largest size, and the evenness of the ranks: means over an epoch."""
    plan = Plan(
        lengths, lengths // 2, batch_size=batch, seed=0, micro_batch_tokens=micro_batch,
        ranks=ranks, visits=len(lengths),
    )  # fmt: skip
    steps = -(-len(lengths) // batch)
    widest = fill(plan, steps)
    plan.micro_batch_tokens = uniform_micro_batch(plan, steps)
    worked = waited = 0.0
    for step in map(plan.step, range(steps)):
        costs = [
            sum(cost(int(lengths[i])) for r in micro_batches for i in r)
            for micro_batches in step.micro_batches
        ]
        worked += sum(costs)
        waited += max(costs) * ranks
    return fill(plan, steps), widest, worked / waited


def fill(plan: Plan, steps: int) -> float:
    """Return the share of real tokens in an epoch, if every micro-batch has the largest size."""
    done = [plan.step(i) for i in range(steps)]
    micro_batches = sum(len(micro_batches) for step in done for micro_batches in step.micro_batches)
    return sum(step.tokens for step in done) / (micro_batches * plan.micro_batch_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*", type=Path)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=8192)
    options = parser.parse_args()
    drawn = np.array([len(sample.ids) for sample in documents(4000, SHAPES["8M"])])
    sets = {str(path): lengths_of(path, options.vocabulary) for path in options.data}
    for name, lengths in (sets or {"drawn": drawn}).items():
        median, longest = int(np.median(lengths)), lengths.max()
        print(f"{name}: {len(lengths)} documents, median {median} tokens, longest {longest}")
        for ranks in (1, 8):
            for batch in (32, 128, 512):
                compiled, widest, even = figures(lengths, batch, options.micro_batch_tokens, ranks)
                print(
                    f"  {ranks} ranks, {batch} a step: compiled {compiled:.1%}"
                    f" (at {options.micro_batch_tokens} tokens: {widest:.1%}), even {even:.2%}"
                )


if __name__ == "__main__":
    main()
