"""Runs on the quickstart's tiny base that learn to classify messages, for tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file
from worlds import start_world

from finetune_api.results import PublishSummary
from finetune_api.run_spec import RunSpec
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.publish.pipeline import publish
from finetune_trainer.quickstart.language import draw_ticket, message, reply
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import Stores
from finetune_trainer.storage.run_head import Head, read_head

GATE = {"dataSet": "reply", "metric": "Loss", "operator": "WorsensAtMost", "value": "1"}
REMEDY = {"scan": "Interpolation", "points": ["0.75", "0.5", "0.25", "0.1"]}


def conversations(count: int, seed: int = 7) -> str:
    """What the base model can do: answer customers."""
    random, lines = Random(seed), []
    for _ in range(count):
        ticket = draw_ticket(random)
        turns = (("user", message(ticket, random)), ("assistant", reply(ticket, random)))
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines)


class Runs:
    """Runs that learn to classify messages at a high rate, and forget to answer customers."""

    def __init__(self, run_spec_for: Any, bucket: str, base: Path, folder: Path) -> None:
        self.run_spec_for, self.bucket, self.folder = run_spec_for, bucket, folder
        self.reply = f"s3://{bucket}/reply.jsonl"
        self.stores = Stores(run_spec_for())
        self.store = self.stores.default
        for path in (base / "model").iterdir():
            self.store.upload(path, f"s3://{bucket}/model/{path.name}")
        for name in ("intent-train", "intent-test"):
            self.store.upload(base / "data" / f"{name}.jsonl", f"s3://{bucket}/{name}.jsonl")
        self.store.put(self.reply, conversations(80).encode())
        self.store.put(f"s3://{bucket}/earlier.jsonl", conversations(120, seed=8).encode())

    def prepared(
        self,
        run: str,
        evaluation: dict[str, Any],
        validation: str = "0.1",
        replay: bool = False,
        **spec: Any,
    ) -> RunSpec:
        """Prepare a run.

        Args:
            replay: whether it also trains on other conversations, as replay.
        """

        def source(name: str, of: str) -> dict[str, Any]:
            return {"name": name, "source": f"s3://{self.bucket}/{of}.jsonl"}

        earlier = [source("earlier", "earlier") | {"replay": True}] if replay else []

        run_spec: RunSpec = self.run_spec_for(
            run=run,
            data={
                "train": [source("intent", "intent-train"), *earlier],
                "test": [source("intent", "intent-test")],
                "retention": [source("reply", "reply")],
                "split": {"validation": validation}, "quality": {"contamination": "Ignore"},
            },
            evaluation={
                "maxNewTokens": 4, "maxSamples": 8, "baselines": {"shots": []}, "gates": [GATE],
                **evaluation,
            },
            **{
                "training": {
                    "maxSteps": 30, "batchSize": 8, "learningRate": "4e-3", "precision": "FP32",
                },
                "output": {"destination": self.destination, "format": "Both"},
            } | spec,
        )  # fmt: skip
        prepare(run_spec, self.stores, self.folder / f"prepare-{run}")
        return run_spec

    def train(
        self, run_spec: RunSpec, size: int = 1, lost_at: str = "",
        before: Callable[[], None] | None = None,
    ) -> runfiles.RunResult:  # fmt: skip
        """Train in a world of processes.

        Args:
            lost_at: text in the log at which the processes are killed, and then started again.
            before: as in ``start_world``.
        """
        path = self.folder / f"run-spec-{run_spec.run}.json"
        path.write_text(run_spec.to_text())
        environment = dict(os.environ) | {"FINETUNE_RUN_SPEC": str(path)}
        for attempt in range(2 if lost_at else 1):
            folder = self.folder / f"{run_spec.run}-{size}-{attempt}"
            world = start_world(environment, size, folder, before)
            if lost_at and attempt == 0:
                world.wait_for_log(lost_at)
                world.kill()
                continue
            assert world.wait() == [0] * size, world.log.read_text()
        return self.result(run_spec)

    def result(self, run_spec: RunSpec) -> runfiles.RunResult:
        return runfiles.read_result(self.store, run_spec.run_uri)

    def publish(self, run_spec: RunSpec) -> PublishSummary:
        return publish(run_spec, self.stores, self.folder / f"publish-{run_spec.run}")

    @property
    def destination(self) -> str:
        return f"s3://{self.bucket}/out"

    def head(self, run_spec: RunSpec) -> Head:
        found = read_head(self.store, run_spec.run_uri)
        assert found is not None
        return found[0]

    def weights(
        self, run_spec: RunSpec, file: str = "adapter/adapter_model"
    ) -> dict[str, torch.Tensor]:
        """Return the weights of a published model.

        Args:
            file: with them, without its suffix.
        """
        path = self.folder / f"{run_spec.run}.safetensors"
        self.store.download(f"{run_spec.output_uri}/{file}.safetensors", path)
        return load_file(path)
