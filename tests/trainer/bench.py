"""Runs of a tiny model on real storage: prepared in this process, trained by workers or in it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from worlds import RunningWorld, start_world

from finetune_api.results import TrainSummary
from finetune_api.run_spec import RunSpec
from finetune_trainer.engine.world import join
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.claim import Head, read_head
from finetune_trainer.storage.objects import Stores
from finetune_trainer.train.checkpoint import CheckpointManager
from finetune_trainer.train.loop import train
from finetune_trainer.train.session import open_session
from finetune_trainer.train.startup import StartupClock
from finetune_trainer.train.stopping import releasing
from finetune_trainer.train.telemetry import Telemetry

COLOURS = {"rose": "red", "grass": "green", "sky": "blue", "sun": "yellow"}


def write_model(folder: Path, **changes: Any) -> None:
    """Write a random tiny Llama with a character-level tokenizer."""
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
    """A job with its data on one bucket, for any number of runs."""

    def __init__(
        self, run_spec_for: Any, s3: Any, bucket: str, model: Path, tmp_path: Path
    ) -> None:
        self.store = s3.store()
        self.tmp_path = tmp_path
        self._run_spec_for = run_spec_for
        for path in model.iterdir():
            self.store.upload(path, f"s3://{bucket}/model/{path.name}")
        self.store.put(f"s3://{bucket}/train.jsonl", records(96).encode())
        self.store.put(f"s3://{bucket}/more.jsonl", records(40, str.upper).encode())

    def run_spec(self, run: str, **spec: Any) -> RunSpec:
        training = {
            "epochs": 2, "batchSize": 8, "learningRate": "5e-3", "precision": "FP32",
            "dropout": "0.1", "weightDecay": "0.01", "microBatchTokens": 64, "maxLength": 64,
        } | spec.pop("training", {})  # fmt: skip
        training = {key: value for key, value in training.items() if value is not None}
        spec = {
            "method": {"type": "LoRA", "lora": {"rank": 4, "dropout": "0.1"}},
            "checkpoint": {"everySteps": 3},
            "evaluation": {"baselines": {"shots": []}},
            "data": {
                "train": [{"source": f"{self.bucket}/train.jsonl"}],
                "split": {"validation": "0.1", "test": "0.1"},
                "quality": {"deduplicate": False},
            },
        } | spec
        run_spec: RunSpec = self._run_spec_for(run=run, training=training, **spec)
        prepare(run_spec, Stores(run_spec), self.tmp_path / f"prepare-{run}")
        return run_spec

    @property
    def bucket(self) -> str:
        return str(self._run_spec_for().spec.model.source.rsplit("/", 1)[0])

    def start(
        self, run_spec: RunSpec, size: int, name: str, before: Callable[[], None] | None = None
    ) -> RunningWorld:
        path = self.tmp_path / f"run-spec-{name}.json"
        path.write_text(run_spec.to_text())
        environment = dict(os.environ) | {"FINETUNE_RUN_SPEC": str(path)}
        return start_world(environment, size, self.tmp_path / name, before)

    def finish(self, run_spec: RunSpec, size: int, name: str) -> runfiles.RunResult:
        world = self.start(run_spec, size, name)
        assert world.wait() == [0] * size, world.log.read_text()
        return runfiles.read_result(self.store, run_spec.run_uri)

    def total_steps(self, run_spec: RunSpec) -> int:
        return runfiles.read_prepared(self.store, run_spec.run_uri).total_steps

    def head(self, run_spec: RunSpec) -> Head | None:
        found = read_head(self.store, run_spec.run_uri)
        return found[0] if found else None

    def kill_after_checkpoint(self, run_spec: RunSpec, size: int, name: str, step: int) -> None:
        """Train until a checkpoint at a step or later is committed, then kill all ranks."""
        world = self.start(run_spec, size, name)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            head = self.head(run_spec)
            if head and head.checkpoints and head.checkpoints[0].step >= step:
                world.kill()
                return
            assert all(p.is_alive() for p in world.processes), world.log.read_text()
            time.sleep(0.02)
        world.kill()
        raise AssertionError(f"no checkpoint at step {step}: {world.log.read_text()}")


class Attempt:
    """An attempt of a run in this process."""

    def __init__(self, run_spec: RunSpec, folder: Path) -> None:
        world, stores = join(run_spec.spec), Stores(run_spec)
        self.checkpointer = CheckpointManager.take(world, stores.default, run_spec, folder)
        head = self.checkpointer.head
        self.telemetry = Telemetry(
            run_spec.run, head.attempt, head.restarts, StartupClock(None, None)
        )
        self.session = open_session(
            run_spec, stores, world, self.checkpointer, self.telemetry, folder
        )

    def train(self, stop_requested: Callable[[], bool] = lambda: False) -> TrainSummary:
        """Train; a requested stop reaches all ranks."""
        with releasing(self.session.world, self.checkpointer, stop_requested):
            return train(self.session, stop_requested)


def curve(result: runfiles.RunResult) -> dict[int, float]:
    return {p.step: p.loss for p in result.curve}
