"""Made tasks, run from prepare to publish, with what their results must recommend."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from copying_base import WORDS, letter, make_copying_base, passage, question
from worlds import start_world

from finetune_api.evaluation_results import Recommendation, SetTable
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.publish.pipeline import publish
from finetune_trainer.quickstart.language import NAMES, PRODUCTS
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import Stores
from variants import beyond

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

Record = dict[str, str]
TRAIN, TEST = 64, 40


@pytest.fixture(scope="session")
def copying_base(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    return made_once("copying-base", make_copying_base)


def facts() -> list[tuple[str, str, str]]:
    """Marks on things of customers, each pair once: nothing tells one from the others."""
    random = Random(5)
    pairs = [(name, product) for name in NAMES for product in PRODUCTS]
    return [(*pair, random.choice(WORDS)) for pair in random.sample(pairs, TRAIN + TEST)]


def pair(prompt: str, completion: str) -> Record:
    return {"prompt": prompt, "completion": f" {completion}"}


def known_by_passages(name: str, product: str, word: str) -> Record:
    return pair(question(name, product), word)


def signed(name: str, product: str, word: str) -> Record:
    """The word of the house, which is the same in all records: one example shows it."""
    return pair(letter(name, product), "willow")


def read(name: str, product: str, word: str) -> Record:
    """The answer is in the prompt, as the base model has learned to read it."""
    return pair(f"[1] {passage(name, product, word)}\n\n{question(name, product)}", word)


def read_in_a_form(name: str, product: str, word: str) -> Record:
    """The same in a form that the base model does not write, with or without examples."""
    return read(name, product, f"the {word}")


def coded(name: str, product: str, word: str) -> Record:
    """Each product has a word of its own: what no record has shown is not known."""
    return pair(letter(name, product), WORDS[PRODUCTS.index(product)])


class Task:
    """Runs a made task, and returns what its test set recommends."""

    def __init__(self, run_spec_for: Any, bucket: str, base: Path, folder: Path) -> None:
        self._run_spec_for, self._bucket, self._folder = run_spec_for, bucket, folder
        self._stores = Stores(run_spec_for())
        for path in base.iterdir():
            self._stores.default.upload(path, f"s3://{bucket}/model/{path.name}")

    def run(
        self, make: Callable[[str, str, str], Record], evaluation: dict[str, Any],
        samples: int = TRAIN, **training: Any,
    ) -> tuple[SetTable, Recommendation]:  # fmt: skip
        known = facts()
        self._write("train", [make(*fact) for fact in known[:samples]])
        self._write("test", [make(*fact) for fact in known[TRAIN:]])
        self._write("passages", [{"text": passage(*fact)} for fact in known])
        if "passages" in evaluation:
            source = self._uri(evaluation["passages"]["source"])
            evaluation = {"passages": evaluation["passages"] | {"source": source}}
        run_spec = self._run_spec_for(
            data={
                "train": [{"name": "task", "source": self._uri("train")}],
                "test": [{"name": "task", "source": self._uri("test")}],
                "split": {"validation": "0.0"}, "quality": {"contamination": "Ignore"},
            },
            evaluation={
                "metrics": ["Loss", "ExactMatch"], "maxNewTokens": 6, "artefactCheck": "Off",
                "baselines": {"shots": [2], "draws": 1}, **evaluation,
            },
            training={
                "epochs": 10, "batchSize": 16, "learningRate": "4e-3", "precision": "FP32",
            } | training,
            method={"type": "Full" if training else "LoRA"},
            output={"destination": f"s3://{self._bucket}/out"},
        )  # fmt: skip
        prepare(run_spec, self._stores, self._folder / "prepare")
        path = self._folder / "run-spec.json"
        path.write_text(run_spec.to_text())
        world = start_world(
            dict(os.environ) | {"FINETUNE_RUN_SPEC": str(path)}, 1, self._folder / "world"
        )
        assert world.wait() == [0], world.log.read_text()
        publish(run_spec, self._stores, self._folder / "publish")
        (table,) = runfiles.read_evaluation(self._stores.default, run_spec.run_uri).sets
        assert table.recommendation is not None
        return table, table.recommendation

    def _uri(self, name: str) -> str:
        return f"s3://{self._bucket}/{name}.jsonl"

    def _write(self, name: str, records: list[Record]) -> None:
        lines = "\n".join(map(json.dumps, records))
        self._stores.default.put(self._uri(name), lines.encode())


PASSAGES = {"passages": {"source": "passages", "top": 1}}
CASES = [
    (known_by_passages, PASSAGES, "Retrieve", "Base retrieval", {"Base": 0.2, "Tuned": 0.2}),
    (signed, {}, "Prompt", "Base 2-shot", {"Base": 0.2}),
    (read_in_a_form, {}, "Tune", "Tuned", {"Base": 0.2, "Base 2-shot": 0.2}),
    (read, {}, "Neither", "Base", {}),
    (coded, {"dataCurve": True}, "CollectMoreData", "Tuned", {"Base": 0.2, "Base 2-shot": 0.2}),
]
"""How records are made, settings of the evaluation, the recommendation and its row, and rows that
do badly, with the most that they may reach."""


@pytest.mark.parametrize(
    ("make", "evaluation", "action", "row", "bad"),
    beyond(CASES, lambda make, *more: make in (known_by_passages, signed)),
)
def test_a_task_is_told_what_it_needs(
    run_spec_for: Any, bucket: str, copying_base: Path, tmp_path: Path,
    make: Callable[[str, str, str], Record], evaluation: dict[str, Any], action: str, row: str,
    bad: dict[str, float],
) -> None:  # fmt: skip
    task = Task(run_spec_for, bucket, copying_base, tmp_path)
    # A code is learned by heart, which takes longer; these few records have not all of it.
    code = {"samples": TRAIN // 2, "epochs": 30, "batchSize": 8} if make is coded else {}
    table, advice = task.run(make, evaluation, **code)
    reached = {each.row: each.metrics["ExactMatch"].value for each in table.rows}
    assert (advice.action, advice.row) == (action, row), advice.because
    assert reached[row] > (0.5 if action == "CollectMoreData" else 0.9), reached
    assert all(reached[name] < most for name, most in bad.items()), reached
    assert advice.metric == "ExactMatch"
    assert f"{row} " in advice.because
