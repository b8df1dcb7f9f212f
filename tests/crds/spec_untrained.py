"""Specs with method.type None, which evaluates a model as it is."""

from __future__ import annotations

import copy
from typing import Any

from crds.spec_rows import ABSENT, Row, bad, good, sources

ONLY = {"method.type": "None", "data": {"test": sources({})}}
"""Evaluation on a test set, without training sets."""


def evaluated(name: str, change: dict[str, Any]) -> Row:
    return good(f"evaluation alone, {name}", copy.deepcopy(ONLY) | change)


def refused(name: str, change: dict[str, Any], allowed: str, got: str | None = None) -> Row:
    return bad(f"evaluation alone, {name}", copy.deepcopy(ONLY) | change, "", allowed, got)


GOOD_UNTRAINED = [
    evaluated("test sets", {}),
    evaluated("retention sets", {"data": {"retention": [{"source": "builtin://instructions.jsonl"}]}}),
    evaluated("what the split holds out", {"data": {"train": sources({})}}),
    evaluated("examples of training sets", {
        "data.train": sources({}),
        "evaluation.baselines": {"shots": [1], "prompts": [{"name": "a", "text": "b", "shots": 2}]},
    }),
    evaluated("no examples", {
        "evaluation.baselines": {"shots": [], "prompts": [{"name": "a", "text": "b"}]},
    }),
    evaluated("what it reads", {
        "model": {"fineTuneJobRef": {"name": "first"}}, "task": "SequenceClassification",
        "training": {"maxLength": 512, "microBatchTokens": 4096, "precision": "FP32"},
        "evaluation": {"metrics": ["Accuracy"], "minEffect": "1", "slices": ["language"], "gates": [
            {"metric": "Accuracy", "operator": "AtLeast", "value": "0.8"}]},
        "compute": {"nodes": 2, "sharding": "FullShard"},
    }),
    evaluated("defaults that are written out", {"training": {"batchSize": 32, "seed": 42}}),
]  # fmt: skip
STEPS = "method.type None takes no step, and reads of training only training.maxLength"
BAD_UNTRAINED = [
    bad("no training set", {"data.train": ABSENT, "data.test": sources({})}, "",
        "there is nothing to train on: give data.train, or set method.type: None", "LoRA"),
    refused("nothing to measure", {"data": {}}, "has nothing to measure: give data.test"),
    refused("nothing held out", {"data": {"train": sources({}), "split": {"test": "0.0"}}},
        "has nothing to measure"),
    refused("shots without examples", {"evaluation.baselines": {"shots": [4]}},
        "draws examples (evaluation.baselines: shots) from training sets: give data.train"),
    refused("prompt with shots without examples",
        {"evaluation.baselines": {"prompts": [{"name": "a", "text": "b", "shots": 1}]}},
        "draws examples (evaluation.baselines: shots) from training sets: give data.train"),
    refused("validation", {"data.validation": sources({})},
        "neither trains nor validates: remove data.validation"),
    refused("weights", {"data.train": sources({"weight": "1"})},
        "neither trains nor validates: remove data.validation"),
    refused("replay", {"data.train": sources({"replay": True})},
        "neither trains nor validates: remove data.validation"),
    refused("stages", {"data.train": sources({}), "data.stages": [{"name": "a", "steps": "1"}]},
        "neither trains nor validates: remove data.validation"),
    *(
        refused(f"training.{path}", {f"training.{path}": value}, STEPS)
        for path, value in {
            "epochs": 1, "maxSteps": 9, "batchSize": 8, "learningRate": "1e-4",
            "schedule": "Linear", "warmupRatio": "0.5", "optimizer": "Adafactor",
            "weightDecay": "0.1", "dropout": "0.1", "labelSmoothing": "0.1",
            "tokenWeighting": "Entropy", "neftuneAlpha": "5", "layerDecay": "0.9",
            "maxGradNorm": "2", "gradientCheckpointing": "Always", "compile": True, "seed": 1,
            "routerAuxLossCoefficient": "0.1",
            "guard": {"maxRollbacks": 1},
        }.items()
    ),
    refused("early stopping", {"data": {"train": sources({})}, "training.earlyStopping": {}},
        STEPS),
    *(
        refused(f"checkpoint.{name}", {f"checkpoint.{name}": value},
            "has no training state to save: remove checkpoint")
        for name, value in {"everySteps": 1, "keepBest": 2, "metric": "Accuracy",
                            "staging": "Disk"}.items()
    ),
    refused("evaluation steps", {"evaluation.everySteps": 5},
        "takes no step and publishes no model: remove evaluation.everySteps"),
    refused("artefact check", {"evaluation.artefactCheck": "Full"},
        "takes no step and publishes no model: remove evaluation.everySteps and artefactCheck"),
    refused("gate against the base", {"evaluation.gates": [
        {"metric": "Loss", "operator": "BetterThan"}]},
        "has no tuned model that gates could compare: use AtLeast or AtMost", "BetterThan"),
    refused("pointer", {"output.current": {}},
        "publishes no model that could come into use: remove output.current"),
    refused("context parallelism", {"compute": {"contextParallel": 2, "gpusPerNode": 2}},
        "runs each sample in one process: set compute.contextParallel: 1", "2"),
    refused("output format", {"output.format": "Merged"},
        "output.format Merged and Both need method.type Full", "Merged"),
    refused("remedy", {
        "data": {"test": sources({}), "retention": sources({"name": "r"}), "train": sources({})},
        "evaluation.remedy": {"scan": "Interpolation"}},
        "evaluation.remedy goes with method.type Full, Partial, LoRA, QLoRA, IA3:", "None"),
    bad("lora with None", {"method": {"type": "None", "lora": {}}}, "method",
        "lora goes with type LoRA or QLoRA only", "None"),
    refused("null, which is the default and not the string None", {"method.type": None},
        "there is nothing to train on: give data.train, or set method.type: None", "LoRA"),
]  # fmt: skip
