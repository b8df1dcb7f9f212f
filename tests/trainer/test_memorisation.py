"""Training answers that the tuned model has learned by heart."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bench import Bench
from classifiers import lines
from engine import spec_of, tiny_llama
from test_publish_papers import DATA_REPORT, about

from finetune_trainer.engine.loss import TokenLoss
from finetune_trainer.engine.packing.feed import build_packed
from finetune_trainer.engine.packing.padded import build_padded_tokens
from finetune_trainer.engine.world import join
from finetune_trainer.evaluate.memorisation import TOKENS, _beginning, reproduced
from finetune_trainer.prepared.dataset import AnsweredPrompt, TokenSample
from finetune_trainer.publish import report, run_facts
from finetune_trainer.publish.memorisation import memorisation_text, memorisation_warning
from finetune_trainer.storage.runfiles import Memorisation, Reproduced


@pytest.mark.parametrize("packing", ["Concatenated", "Padded"])
def test_what_greedy_decoding_would_write_is_reproduced(packing: str) -> None:
    model, draw = tiny_llama(), np.random.default_rng(0)
    samples, expected = [], 0
    for i, length in enumerate([3, 9, 5, 12, 7, 4]):
        ids = draw.integers(0, 97, length).tolist()
        for _ in range(TOKENS):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if i % 3 == 2:
            ids[length + 6 * i] = (ids[length + 6 * i] + 1) % 97
        else:
            expected += 1
        supervised = np.arange(len(ids)) >= length
        samples.append(TokenSample(np.array(ids, np.int32), supervised))
    build: Any = build_packed
    if packing == "Padded":
        build = build_padded_tokens
        model.set_attn_implementation("sdpa")
    evaluator: Any = SimpleNamespace(
        world=join(spec_of({"type": "Full"}, precision="FP32")), loss=TokenLoss(model),
        build=partial(build, keyed=False), packing=packing, virtual_tokens=0,
    )  # fmt: skip
    found = reproduced(evaluator, samples)
    assert (found.samples, found.reproduced) == (6, expected)
    assert reproduced(evaluator, []).samples == 0


@pytest.mark.parametrize(
    ("length", "prompt", "start"), [(50, 10, 10), (41, 10, None), (64, 0, 32), (63, 1, None)]
)
def test_the_beginning_of_the_answer_counts(length: int, prompt: int, start: int | None) -> None:
    """The first tokens of a document are its prompt."""
    found = _beginning(AnsweredPrompt(np.arange(length, dtype=np.int32), prompt, None))
    if start is None:
        assert found is None
        return
    assert found is not None
    assert np.flatnonzero(found.supervised).tolist() == list(range(start, start + TOKENS))
    assert found.ids.tolist() == list(range(start + TOKENS))


def result(training: tuple[int, int], held_out: tuple[int, int]) -> Memorisation:
    counts = (Reproduced(reproduced=n, samples=of) for n, of in (training, held_out))
    return Memorisation(tokens=TOKENS, training=next(counts), held_out=next(counts))


@pytest.mark.parametrize(
    ("training", "held_out", "warned"),
    [
        ((40, 64), (1, 64), True),
        ((40, 64), (38, 64), False),  # answers that follow from their prompts
        ((5, 64), (0, 64), False),  # few
        ((3, 4), (1, 4), False),  # chance
        ((40, 64), (0, 0), False),  # nothing to compare with
    ],
)
def test_more_in_training_than_held_out_is_a_warning(
    training: tuple[int, int], held_out: tuple[int, int], warned: bool
) -> None:
    found = result(training, held_out)
    assert (memorisation_warning(found) is not None) is warned
    assert memorisation_text(found).startswith(f"Of {training[1]} training answers, {training[0]}")


def test_canaries_that_come_out_are_a_warning() -> None:
    none = Reproduced(samples=0, reproduced=0)
    for reproduced_, warned in ((3, True), (0, False)):
        canaries = Reproduced(samples=5, reproduced=reproduced_)
        found = Memorisation(tokens=TOKENS, training=none, held_out=none, canaries=canaries)
        assert memorisation_text(found).startswith(f"Of 5 canaries, {reproduced_} (")
        warning = memorisation_warning(found)
        assert (warning is not None and "gives away 3 of 5 canaries" in warning) is warned


def test_papers_have_the_figures() -> None:
    told = about()
    found = result((40, 64), (1, 64))
    told = dataclasses.replace(told, result=told.result.model_copy(update={"memorisation": found}))
    raw = json.loads(run_facts.metrics_text(told))["memorisation"]
    assert raw["training"] == {"samples": 64, "reproduced": 40} and "by heart" in raw["warning"]
    page = report.render(told, json.dumps(DATA_REPORT).encode())
    assert "<b>Memorisation</b>: the model reproduces" in page and "40 (62%)" in page
    assert json.loads(run_facts.metrics_text(about()))["memorisation"] is None


@pytest.mark.slow
def test_a_model_that_learns_few_answers_by_heart_is_told_from_one_that_does_not(
    bench: Bench,
) -> None:
    draw = np.random.default_rng(0)
    made = [
        {"prompt": f"{chr(65 + i) * 3}: ", "completion": "".join(draw.choice([*"abcd"], 33))}
        for i in range(16)
    ]
    secret = [{"prompt": "The code is ", "completion": "".join(draw.choice([*"abcd"], 9))}]
    for name, part in (("few", made[:8]), ("others", made[8:]), ("secret", secret)):
        bench.store.put(f"{bench.bucket}/{name}.jsonl", lines(part))
    found = []
    for steps in (2, 300):
        run_spec = bench.run_spec(
            f"{steps}-steps", method={"type": "Full"}, checkpoint={"everySteps": 1000},
            data={"train": [{"source": f"{bench.bucket}/few.jsonl"},
                            {"source": f"{bench.bucket}/secret.jsonl", "canaries": True}],
                  "test": [{"source": f"{bench.bucket}/others.jsonl"}],
                  "split": {"validation": "0", "test": "0"},
                  "quality": {"contamination": "Ignore"}},
            training={"epochs": None, "maxSteps": steps, "batchSize": 8, "dropout": "0",
                      "learningRate": "1e-2", "microBatchTokens": 640},
            evaluation={"baselines": {"shots": []}, "metrics": ["Loss"]},
        )  # fmt: skip
        result = bench.finish(run_spec, 1, f"{steps}")
        print(f"{steps} steps: loss {result.summary.loss}, {result.memorisation}")
        assert result.memorisation is not None
        found.append(result.memorisation)
        assert (found[-1].training.samples, found[-1].held_out.samples) == (8, 8)
        assert found[-1].held_out.reproduced == 0
    assert found[0].training.reproduced == 0 and memorisation_warning(found[0]) is None
    assert found[1].training.reproduced >= 5 and memorisation_warning(found[1]) is not None
    assert [each.canaries and each.canaries.reproduced for each in found] == [0, 1]
