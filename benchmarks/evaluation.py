"""Evaluation compared with lm-evaluation-harness: same model, requests and results.

    pip install lm_eval
    python benchmarks/evaluation.py [--rounds 3] [--prompts 64] [--batches 1 8 32]
                                                    [--model 8M] [--device cpu] [--threads 1]

Multiple choice with labels of several tokens and of one, and greedy answers: behind the same four
examples (few-shot), and to prompts that share nothing. Ours and the harness' HF backend take turns
in one process, tokenizing included; the harness with each of some batch sizes, of which its best
counts. The figure to quote is the ratio of the times (median over the rounds). The results of both
must be equal.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from trainers import SHAPES, Shape
from transformers import PreTrainedTokenizerFast

from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.packing import packed
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.evaluate.measure import Evaluator

NEW_TOKENS: Final = 32
END: Final = 2
SEVERAL: Final = ["11 12", "11 13 14", "15 16", "17 18 19"]
ONE: Final = ["21", "22", "23", "24"]


def tokenizer_of(shape: Shape) -> Any:
    """A tokenizer whose words are the numbers of their tokens."""
    names = ["<pad>", "<s>", "</s>", *map(str, range(3, shape.vocabulary))]
    vocabulary = {name: number for number, name in enumerate(names)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def prompts_of(count: int, shape: Shape, shots: int) -> list[str]:
    """Questions of log-normal lengths, median 60 tokens, behind examples of as many tokens."""
    draw = np.random.default_rng(0)
    examples = draw.integers(100, shape.vocabulary, 60 * shots).tolist()
    lengths = np.clip(draw.lognormal(np.log(60), 0.5, count).astype(int), 10, 300)
    questions = [draw.integers(100, shape.vocabulary, n).tolist() for n in lengths]
    return [" ".join(map(str, examples + question)) for question in questions]


@dataclass(frozen=True)
class Task:
    """Requests, for both."""

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[int], Any]
    """By batch size."""
    alike: Callable[[Any, Any], bool]


def model_of(shape: Shape, device: torch.device) -> Any:
    packed.install()
    model: Any = shape.model(torch.float32, device).eval()
    model.set_attn_implementation(packed.ATTENTION)
    with torch.no_grad():  # some answers end early, as those of trained models
        model.get_input_embeddings().weight[END] *= 2.3
    return model


def tasks_of(model: Any, shape: Shape, count: int, shots: int) -> list[Task]:
    device, kind = model.device, f"{shots}-shot"
    tokenizer, prompts = tokenizer_of(shape), prompts_of(count, shape, shots)
    loss = TokenLoss(model).eval()
    world: Any = SimpleNamespace(
        rank=0, size=1, device=device, autocast=nullcontext, on_all=lambda work: [work()]
    )
    data: Any = SimpleNamespace(manifest=SimpleNamespace(sets=[], stop_token_ids=[END]))
    evaluator = Evaluator(
        world=world, data=data, loss=loss, tokenizer=tokenizer, micro_batch_tokens=2048,
        packing="Concatenated", build=build_packed, max_samples=count, max_new_tokens=NEW_TOKENS,
    )  # fmt: skip
    harness = Harness(model, tokenizer, prompts)

    def tokens() -> list[Any]:
        return [np.array(ids, np.int32) for ids in tokenizer(prompts)["input_ids"]]

    def labels(of: Sequence[str]) -> Callable[[], Any]:
        whole = {label: [*map(int, label.split()), END] for label in of}

        def score() -> Any:
            data.manifest.sets = [SimpleNamespace(labels=whole)]
            found = evaluator.label_scores(0, tokens(), ["LabelAccuracy"])
            assert found is not None, "a metric needs them"
            return found.values

        return score

    def close(ours: Any, theirs: Any) -> bool:
        return bool(np.allclose(ours, theirs, atol=1e-3))

    return [
        Task(
            f"{kind}, labels of several tokens",
            labels(SEVERAL),
            lambda n: harness.score(SEVERAL, n),
            close,
        ),
        Task(f"{kind}, labels of one token", labels(ONE), lambda n: harness.score(ONE, n), close),
        Task(
            f"{kind}, answers of at most {NEW_TOKENS} tokens",
            lambda: [answer.text for answer in evaluator.generate(tokens())],
            harness.generate,
            lambda ours, theirs: ours == theirs,
        ),
    ]


class Harness:
    """The harness' HF backend with the same model object."""

    def __init__(self, model: Any, tokenizer: Any, prompts: Sequence[str]) -> None:
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._prompts = prompts
        self._model = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=False)

    def score(self, labels: Sequence[str], batch: int) -> list[list[float]]:
        requests = [(prompt, f" {label}") for prompt in self._prompts for label in labels]
        self._model.batch_size_per_gpu = batch
        found = self._model.loglikelihood(_instances("loglikelihood", requests), disable_tqdm=True)
        return np.reshape([value for value, _ in found], (-1, len(labels))).tolist()

    def generate(self, batch: int) -> list[str]:
        settings = {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False}
        requests = [(prompt, settings) for prompt in self._prompts]
        self._model.batch_size_per_gpu = batch
        found: list[str] = self._model.generate_until(
            _instances("generate_until", requests), disable_tqdm=True
        )
        return found


def _instances(kind: Any, requests: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(requests)]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor in one thread, which other load of the machine changes little; else
    of the clock."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--model", choices=SHAPES, default="8M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", default="", help="part of the names of the tasks")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "lm_eval"))
    print(f"{args.model}, {args.prompts} prompts, {args.device}; {versions}", flush=True)
    shape = SHAPES[args.model]
    model = model_of(shape, torch.device(args.device))
    for task in [t for shots in (4, 0) for t in tasks_of(model, shape, args.prompts, shots)]:
        if args.only not in task.name:
            continue
        ratios, ours, theirs = [], [], []
        for _ in range(args.rounds):
            seconds, found = timed(task.ours)
            by_batch = {batch: timed(partial(task.theirs, batch)) for batch in args.batches}
            for batch, (_, their) in by_batch.items():
                assert task.alike(found, their), f"{task.name}: other results with batch {batch}"
            best = min(by_batch, key=lambda n: by_batch[n][0])
            ours.append(seconds)
            theirs.append((by_batch[best][0], best))
            ratios.append(by_batch[best][0] / seconds)
        print(
            f"{task.name}: ours {statistics.median(ours):.2f} s, lm_eval"
            f" {statistics.median(t for t, _ in theirs):.2f} s (batches of"
            f" {', '.join(map(str, sorted({n for _, n in theirs})))}),"
            f" ratio {statistics.median(ratios):.2f}"
            f" ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
            flush=True,
        )


if __name__ == "__main__":
    main()
