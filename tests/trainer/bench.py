"""Runs of a tiny model on real storage: prepared in this process, trained by gangs or in it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import tiny_llama
from gangs import RunningGang, start_gang
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune_api.order import RunOrder
from finetune_api.results import TrainSummary
from finetune_trainer.engine.gang import join
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.head import Head, read_head
from finetune_trainer.storage.objects import Stores
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.loop import train
from finetune_trainer.train.session import open_session
from finetune_trainer.train.startup import StartupClock
from finetune_trainer.train.stopping import releasing
from finetune_trainer.train.telemetry import Telemetry

COLOURS = {"rose": "red", "grass": "green", "sky": "blue", "sun": "yellow"}


def write_model(folder: Path, **changes: Any) -> None:
    """A random tiny Llama with a tokenizer of single characters."""
    model = tiny_llama(vocab_size=130, **changes)
    model.save_pretrained(folder)
    vocabulary = {chr(i): i for i in range(128)} | {"<eos>": 128, "<pad>": 129}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)


def records(n: int, spell: Callable[[str], str] = str) -> str:
    things = list(COLOURS)
    return "".join(
        json.dumps(
            {
                "text": spell(f"{i % 17} the {things[i % 4]} is "),
                "label": spell(COLOURS[things[i % 4]]),
            }
        )
        + "\n"
        for i in range(n)
    )


class Bench:
    """One job on one bucket: prepared once, trained by any number of runs."""

    def __init__(self, order_for: Any, s3: Any, bucket: str, model: Path, tmp_path: Path) -> None:
        self.store = s3.store()
        self.tmp_path = tmp_path
        self._order_for = order_for
        for path in model.iterdir():
            self.store.upload(path, f"s3://{bucket}/model/{path.name}")
        self.store.put(f"s3://{bucket}/train.jsonl", records(96).encode())
        self.store.put(f"s3://{bucket}/more.jsonl", records(40, str.upper).encode())

    def order(self, run: str, **spec: Any) -> RunOrder:
        training = {
            "epochs": 2, "batchSize": 8, "learningRate": "5e-3", "precision": "FP32",
            "dropout": "0.1", "weightDecay": "0.01", "microBatchTokens": 64, "maxLength": 64,
        } | spec.pop("training", {})  # fmt: skip
        training = {key: value for key, value in training.items() if value is not None}
        spec = {
            "method": {"type": "LoRA", "lora": {"rank": 4, "dropout": "0.1"}},
            "checkpoint": {"everySteps": 3},
            "data": {
                "train": [{"source": f"{self.bucket}/train.jsonl"}],
                "split": {"validation": "0.1", "test": "0.1"},
                "quality": {"deduplicate": False},
            },
        } | spec
        order: RunOrder = self._order_for(run=run, training=training, **spec)
        prepare(order, Stores(order), self.tmp_path / f"prepare-{run}")
        return order

    @property
    def bucket(self) -> str:
        return str(self._order_for().spec.model.source.rsplit("/", 1)[0])

    def start(
        self, order: RunOrder, size: int, name: str, before: Callable[[], None] | None = None
    ) -> RunningGang:
        path = self.tmp_path / f"order-{name}.json"
        path.write_text(order.to_text())
        environment = dict(os.environ) | {"FINETUNE_ORDER": str(path)}
        return start_gang(environment, size, self.tmp_path / name, before)

    def finish(self, order: RunOrder, size: int, name: str) -> runfiles.RunResult:
        gang = self.start(order, size, name)
        assert gang.wait() == [0] * size, gang.log.read_text()
        return runfiles.read_result(self.store, order.run_uri)

    def total_steps(self, order: RunOrder) -> int:
        return runfiles.read_prepared(self.store, order.run_uri).total_steps

    def head(self, order: RunOrder) -> Head | None:
        found = read_head(self.store, order.run_uri)
        return found[0] if found else None

    def kill_after_commit(self, order: RunOrder, size: int, name: str, step: int) -> None:
        """Train until a commit at or behind a step is real, then lose the node."""
        gang = self.start(order, size, name)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            head = self.head(order)
            if head and head.commits and head.commits[0].step >= step:
                gang.kill()
                return
            assert all(p.is_alive() for p in gang.processes), gang.log.read_text()
            time.sleep(0.02)
        gang.kill()
        raise AssertionError(f"no commit at step {step}: {gang.log.read_text()}")


class Attempt:
    """One attempt of a run, in this process."""

    def __init__(self, order: RunOrder, folder: Path) -> None:
        gang, stores = join(order.spec.training), Stores(order)
        self.checkpoints = Checkpoints.take(gang, stores.default, order, folder)
        head = self.checkpoints.head
        self.telemetry = Telemetry(order.run, head.attempt, head.restarts, StartupClock(None, None))
        self.session = open_session(order, stores, gang, self.checkpoints, self.telemetry, folder)

    def train(self, stop_requested: Callable[[], bool] = lambda: False) -> TrainSummary:
        """Train; a stop that is asked for comes to all of the gang."""
        with releasing(self.session.gang, self.checkpoints, stop_requested):
            return train(self.session, stop_requested)


def curve(result: runfiles.RunResult) -> dict[int, float]:
    return {p.step: p.loss for p in result.curve}
