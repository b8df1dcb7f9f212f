"""One table of good and bad specs, for pydantic and for the API server alike.

A row changes a minimal good spec at dotted paths. A bad row names the path that both must complain
of, a fragment that both messages have (what is allowed), and the value that both show.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

MINIMAL: dict[str, Any] = {
    "model": {"source": "s3://models/base"},
    "data": {"train": [{"source": "s3://data/train/*.jsonl"}]},
    "output": {"destination": "s3://models/tuned"},
}

ABSENT = object()
"""As a value of a change: the field is taken out."""


@dataclass(frozen=True)
class Row:
    """One spec; ``path`` is None where it is good."""

    name: str
    change: dict[str, Any]
    path: str | None = None
    allowed: str = ""
    """Fragment of both messages, in any case."""
    got: str | None = None
    """Value as both messages show it; None where the API server shows none (a field that is
    absent, unknown, too long or of another type)."""
    stored: dict[str, Any] = field(default_factory=dict)
    """What pydantic normalises, as the API server keeps it."""

    @property
    def spec(self) -> dict[str, Any]:
        return changed(self.change)


def changed(change: dict[str, Any]) -> dict[str, Any]:
    """The minimal spec with values set at dotted paths."""
    spec = copy.deepcopy(MINIMAL)
    for path, value in change.items():
        *parents, last = path.split(".")
        block = spec
        for parent in parents:
            block = block.setdefault(parent, {})
        if value is ABSENT:
            del block[last]
        else:
            block[last] = value
    return spec


def good(name: str, change: dict[str, Any], stored: dict[str, Any] | None = None) -> Row:
    return Row(name, change, stored=stored or {})


def bad(name: str, change: dict[str, Any], path: str, allowed: str, got: str | None) -> Row:
    return Row(name, change, f"spec.{path}".rstrip("."), allowed, got)


def sources(*extra: dict[str, Any]) -> list[dict[str, Any]]:
    """Training sets that differ in what matters to a row."""
    return [{"source": "s3://data/a.jsonl", **fields} for fields in extra]


TEMPLATE = {"prompt": "{{ question }}", "completion": " {{ answer }}"}
SECRET = {"name": "s3-credentials"}
MEMORY = {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"nvidia.com/mig-1g.5gb": "1"}}

GOOD = [
    good("minimal", {}),
    good("model on the hub", {"model.source": "hf://org/name@main"}),
    good("model on a claim", {"model.source": "pvc://claim/models/base"}),
    good("model of another job", {"model": {"fineTuneJobRef": {"name": "first.stage"}}}),
    good("model of another job, reached otherwise", {"model": {
        "fineTuneJobRef": {"name": "first"}, "storage": {"endpoint": "http://s3.local:8333"}}}),
    good("source of its own storage", {"model.storage": {"endpoint": "http://s3.local:8333"}}),
    good("data on a claim", {"data.train": [{"source": "pvc://claim/train.parquet"}]}),
    good("address in unicode", {"data.train": [{"source": "s3://data/données/ü.jsonl"}]}),
    good("no-break space in an address", {"data.train": [{"source": "s3://data/a\u00a0b"}]}),
    good("several sets", {"data.train": sources({"name": "a"}, {"name": "b"}, {}, {})}),
    good("64 sets", {"data.train": sources(*[{}] * 64)}),
    good("same name in train and test", {
        "data.train": sources({"name": "a"}), "data.test": sources({"name": "a"}),
    }),
    good("template", {"data.train": sources({"template": TEMPLATE})}),
    good("template of the library", {
        "data.train": sources(*[{"template": {
            "name": "Summarize", "fields": {"document": "article"}, "phrasings": "First",
        }}] * 64),
        "data.test": sources({"template": {"name": "Classify"}}),
    }),
    good("retrieval", {"data.train": sources({
        "format": "Retrieval", "retrieval": {"distractors": 4, "oracleShare": "0.6"}})}),
    good("retrieval with its defaults", {"data.test": sources({"format": "Retrieval"})}),
    good("template of instructions", {
        "data.train": sources({"format": "Instruction", "template": TEMPLATE}),
    }),
    good("no split", {"data.split": {"validation": "0", "test": "0.0"}}),
    good("validation of its own", {
        "data.validation": sources({}), "training.earlyStopping": {"metric": "Accuracy"},
    }),
    good("early stopping on a split", {"training.earlyStopping": {}}),
    good("full", {"method.type": "Full"}),
    good("full and merged", {"method.type": "Full", "output.format": "Merged"}),
    good("adapter and merged", {"output.format": "Both"}),
    good("lora by default", {"method.lora": {}}),
    good("lora in full", {
        "method": {"type": "LoRA", "lora": {
            "rank": 8, "alpha": 32, "dropout": "0.1", "targetModules": ["q_proj", "v_proj"],
        }},
    }),
    good("variants of lora", {"method.lora": {
        "useRslora": True, "useDora": True, "loraPlusRatio": "1.6e1",
    }}),
    good("principal part", {"method.lora": {"initialization": "PiSSA", "useRslora": True}}),
    good("small ratio", {"method.lora": {"loraPlusRatio": "0.05"}}),
    good("experts", {
        "method.lora": {"dropout": "0.00", "targetParameters": ["mlp.experts.down_proj"]},
        "training.routerAuxLossCoefficient": "0.001",
    }),
    good("4 bits", {"method": {"type": "QLoRA", "lora": {"rank": 8}}, "output.format": "Both"}),
    good("scales", {"method.type": "IA3", "output.format": "Both"}),
    good("scales of chosen modules", {"method": {"type": "IA3", "ia3": {
        "targetModules": ["k_proj", "down_proj"], "feedforwardModules": ["down_proj"],
    }}}),
    good("virtual tokens", {"method": {"type": "PromptTuning", "prompt": {"virtualTokens": 8}}}),
    good("prefixes", {"method.type": "PrefixTuning", "output.format": "Adapter"}),
    good("last layers", {"method": {"type": "Partial", "partial": {"lastLayers": 2}}}),
    good("chosen parameters", {"method": {"type": "Partial", "partial": {
        "parameters": ["lm_head.*"], "biases": True, "norms": True,
    }}}),
    good("epochs", {"training.epochs": 10}),
    good("whole number with a fraction", {"training.epochs": 3.0}, {"training.epochs": 3}),
    good("steps", {"training.maxSteps": 100}),
    good("exponent", {"training.learningRate": "2e-4", "training.maxGradNorm": "1E+1"}),
    good("schedule and precision", {"training": {"schedule": "Linear", "precision": "FP32"}}),
    good("metrics", {"evaluation.metrics": ["Loss", "F1", "Bleu"]}),
    good("commits by steps", {"checkpoint": {"everySteps": 5, "keepLast": 1}}),
    good("commits by seconds", {"checkpoint": {"everySeconds": 60}}),
    good("on the CPU", {"compute": {"gpusPerNode": 0, "processesPerNode": 4}}),
    good("fewer processes than GPUs", {"compute": {"gpusPerNode": 8, "processesPerNode": 4}}),
    good("resources", {"compute.resources": MEMORY}),
    good(
        "quantity as a number",
        {"compute.resources": {"requests": {"cpu": 4}}, "compute.sharedMemory": 0},
        {"compute.resources": {"requests": {"cpu": 4}}, "compute.sharedMemory": 0},
    ),
    good("pod template", {
        "compute.podTemplate": {"spec": {"nodeSelector": {"a": "b"}, "x": [1, None, {"y": 0.5}]}},
    }),
    good("workers of prepare", {"prepare.workers": 256}),
    good("toleration of everything", {"prepare.tolerations": [{"operator": "Exists"}]}),
    good("node selector", {"prepare.nodeSelector": {"example.com/pool": "cpu", "empty": ""}}),
    good("queue", {"scheduling": {"queueName": "team-a", "priorityClassName": "low.prio"}}),
    good("no restarts", {"failurePolicy.maxRestarts": 0}),
    good("secret", {"storage.secretRef": SECRET}),
    good("workload identity", {"storage.serviceAccountName": "trainer"}),
    good("workspace", {"storage": {"workspace": "s3://scratch", "region": "eu-central-1"}}),
    good("endpoint with a slash", {"storage.endpoint": "https://s3.example.com/"}),
    good("suspended", {"suspend": True, "rerunToken": "", "childrenTTLSecondsAfterFinished": 0}),
    good("quality", {"data.quality": {"personalData": "Redact", "faultyRecords": "Drop",
        "contamination": "Fail"}}),
    good("duplicates", {"data.quality": {"nearDuplicates": "Drop",
        "nearDuplicateSimilarity": "1.0", "maxDuplicateFraction": "0"}}),
    good("null is absent", {"method": None, "training.epochs": None, "output.format": None}),
    good("sharding", {"compute.sharding": "HybridShard"}),
    good("shared rows", {"compute": {"gpusPerNode": 8, "contextParallel": 4}}),
    good("8 bits", {"training.precision": "FP8", "method.type": "Full"}),
    good("compiled", {"training.compile": True}),
    good("8-bit optimizer", {"method.type": "Full", "training.optimizer": "AdamW8bit"}),
    good("optimizer of matrices in shards",
         {"training.optimizer": "Muon", "compute.sharding": "FullShard"}),
    good("factored optimizer", {"method.type": "IA3", "training.optimizer": "Adafactor"}),
    good("anchors", {"method.type": "Full", "data.train": sources({}, {"replay": True}),
         "training.anchor": {"klCoefficient": "0.1", "l2Coefficient": "1e-2"}}),
    good("anchor of an adapter", {"data.train": sources({"replay": True}),
         "training.anchor": {"klCoefficient": "1", "l2Coefficient": "0.0e1"}}),
    good("replay without an anchor", {"data.train": sources({}, {"replay": True})}),
    good("regularisation",
         {"training": {"labelSmoothing": "0.1", "neftuneAlpha": "5", "layerDecay": "0.9"}}),
    good("classes", {"task": "SequenceClassification", "method.type": "IA3",
        "data.train": sources({"format": "Classification", "template": TEMPLATE}, {}),
        "evaluation.metrics": ["Loss", "F1"], "checkpoint.metric": "Accuracy",
        "training.earlyStopping": {"metric": "Recall"}, "training.routerAuxLossCoefficient": "0"}),
]  # fmt: skip

BAD = [
    # --- absent, unknown, of another type
    bad("no model", {"model": ABSENT}, "model", "required", None),
    bad("null model", {"model": None}, "model", "required", None),
    bad("no source", {"model": {}}, "model",
        "give source (an address) or fineTuneJobRef (another FineTuneJob)", None),
    bad("two models", {"model.fineTuneJobRef": {"name": "first"}}, "model",
        "source and fineTuneJobRef exclude each other: give one of them",
        "source s3://models/base, fineTuneJobRef.name first"),
    bad("job without a name", {"model": {"fineTuneJobRef": {}}}, "model.fineTuneJobRef.name",
        "required", None),
    bad("job of another namespace", {"model": {"fineTuneJobRef": {"name": "team/first"}}},
        "model.fineTuneJobRef.name", "the name of a Kubernetes object", "team/first"),
    bad("no destination", {"output": {}}, "output.destination", "required", None),
    bad("no data", {"data": {}}, "data.train", "required", None),
    bad("set without source", {"data.train": [{}]}, "data.train[0].source", "required", None),
    bad("secret without name", {"storage.secretRef": {}}, "storage.secretRef.name", "required",
        None),
    bad("unknown block", {"trainning": {}}, "trainning", "unknown field", None),
    bad("unknown field", {"training.epoch": 3}, "training.epoch", "unknown field", None),
    bad("unknown field of a set", {"data.train": sources({"colour": "1"})},
        "data.train[0].colour", "unknown field", None),
    bad("snake case", {"training.max_steps": 3}, "training.max_steps", "unknown field", None),
    bad("text for a number", {"training.epochs": "3"}, "training.epochs", "integer", None),
    bad("fraction for a whole number", {"training.epochs": 2.5}, "training.epochs", "integer",
        None),
    bad("number for text", {"training.learningRate": 2e-4}, "training.learningRate", "string",
        None),
    bad("text for a truth", {"suspend": "yes"}, "suspend", "boolean", None),
    bad("number for a truth", {"suspend": 1}, "suspend", "boolean", None),
    bad("text for a list", {"data.train": "s3://data/a"}, "data.train", "type array", None),
    bad("null in a list", {"data.train": [None]}, "data.train[0]", "type object", None),
    bad("text for a block", {"method": "LoRA"}, "method", "type object", None),
    bad("fraction for a quantity", {"compute.resources": {"requests": {"cpu": 0.5}}},
        "compute.resources.requests.cpu", "string", None),
    # --- words
    bad("unknown method", {"method.type": "Lora"}, "method.type", "LoRA", "Lora"),
    bad("unknown format", {"data.train": sources({"format": "messages"})},
        "data.train[0].format", "Messages", "messages"),
    bad("unknown metric", {"evaluation.metrics": ["Loss", "BLEU"]}, "evaluation.metrics[1]",
        "Bleu", "BLEU"),
    bad("unknown schedule", {"training.schedule": "cosine"}, "training.schedule", "Cosine",
        "cosine"),
    bad("unknown overlength", {"data.quality": {"overlength": "Skip"}},
        "data.quality.overlength", "Truncate", "Skip"),
    bad("unknown treatment of faults", {"data.quality": {"faultyRecords": "Skip"}},
        "data.quality.faultyRecords", "Drop", "Skip"),
    bad("unknown treatment of near duplicates", {"data.quality": {"nearDuplicates": "Fail"}},
        "data.quality.nearDuplicates", "Keep", "Fail"),
    bad("similarity above one", {"data.quality": {"nearDuplicateSimilarity": "85"}},
        "data.quality.nearDuplicateSimilarity", "a number from 0 to 1", "85"),
    bad("most duplicates above one", {"data.quality": {"maxDuplicateFraction": "1.5"}},
        "data.quality.maxDuplicateFraction", "a number from 0 to 1", "1.5"),
    bad("little similarity", {"data.quality": {"nearDuplicateSimilarity": "0.49"}},
        "data.quality", "nearDuplicateSimilarity must be at least 0.5", "0.49"),
    bad("unknown treatment of contamination", {"data.quality": {"contamination": "Redact"}},
        "data.quality.contamination", "Warn", "Redact"),
    bad("unknown treatment of personal data", {"data.quality": {"personalData": "Mask"}},
        "data.quality.personalData", "Redact", "Mask"),
    bad("unknown effect", {"prepare.tolerations": [{"key": "a", "effect": "Never"}]},
        "prepare.tolerations[0].effect", "NoSchedule", "Never"),
    # --- bounds
    bad("no epoch", {"training.epochs": 0}, "training.epochs", "greater than or equal to 1", "0"),
    bad("negative seed", {"training.seed": -1}, "training.seed", "greater than or equal to 0",
        "-1"),
    bad("batch of nothing", {"training.batchSize": 0}, "training.batchSize",
        "greater than or equal to 1", "0"),
    bad("short samples", {"training.maxLength": 4}, "training.maxLength",
        "greater than or equal to 8", "4"),
    bad("no node", {"compute.nodes": 0}, "compute.nodes", "greater than or equal to 1", "0"),
    bad("too many nodes", {"compute.nodes": 1025}, "compute.nodes", "less than or equal to 1024",
        "1025"),
    bad("no worker", {"prepare.workers": 0}, "prepare.workers", "greater than or equal to 1", "0"),
    bad("too many workers", {"prepare.workers": 257}, "prepare.workers",
        "less than or equal to 256", "257"),
    bad("rank", {"method.lora": {"rank": 2048}}, "method.lora.rank", "less than or equal to 1024",
        "2048"),
    bad("keep nothing", {"checkpoint.keepLast": 0}, "checkpoint.keepLast",
        "greater than or equal to 1", "0"),
    bad("negative restarts", {"failurePolicy.maxRestarts": -1}, "failurePolicy.maxRestarts",
        "greater than or equal to 0", "-1"),
    bad("no set", {"data.train": []}, "data.train", "at least 1 item", None),
    bad("too many sets", {"data.train": sources(*[{}] * 65)}, "data.train", "64", None),
    bad("no metric", {"evaluation.metrics": []}, "evaluation.metrics", "at least 1 item", None),
    bad("long token", {"rerunToken": "x" * 129}, "rerunToken", "128", None),
    bad("long name", {"data.train": sources({"name": "x" * 64})}, "data.train[0].name", "63",
        None),
    bad("empty prompt", {"data.train": sources({"template": {"prompt": "", "completion": "x"}})},
        "data.train[0].template.prompt", "at least 1 char", None),
    bad("empty key", {"prepare.nodeSelector": {"": "x"}}, "prepare.nodeSelector", "1", None),
    # --- forms
    bad("model on the disk", {"model.source": "/models/base"}, "model.source",
        "s3://bucket/prefix, hf://organisation/name@revision or pvc://claim/path", "/models/base"),
    bad("data on the web", {"data.train": [{"source": "https://data/a"}]}, "data.train[0].source",
        "s3://bucket/prefix/*.jsonl or pvc://claim/path", "https://data/a"),
    bad("data with a space", {"data.train": [{"source": "s3://data/a b"}]},
        "data.train[0].source", "must be s3://", "s3://data/a b"),
    bad("destination on a claim", {"output.destination": "pvc://claim/out"}, "output.destination",
        "an address in object storage: s3://bucket/prefix", "pvc://claim/out"),
    bad("short bucket", {"output.destination": "s3://ab/out"}, "output.destination",
        "s3://bucket/prefix", "s3://ab/out"),
    bad("capital bucket", {"storage.workspace": "s3://Scratch/x"}, "storage.workspace",
        "s3://bucket/prefix", "s3://Scratch/x"),
    bad("endpoint without scheme", {"storage.endpoint": "s3.example.com"}, "storage.endpoint",
        "the URL of a server", "s3.example.com"),
    bad("endpoint with a path", {"storage.endpoint": "https://s3.example.com/x"},
        "storage.endpoint", "without a path", "https://s3.example.com/x"),
    bad("region in capitals", {"storage.region": "EU"}, "storage.region", "us-east-1", "EU"),
    bad("secret name", {"storage.secretRef": {"name": "S3_secret"}}, "storage.secretRef.name",
        "lower-case letters", "S3_secret"),
    bad("name of a set", {"data.train": sources({"name": "My set"})}, "data.train[0].name",
        "lower-case letters, digits and '-'", "My set"),
    bad("queue name", {"scheduling.queueName": "team/a"}, "scheduling.queueName",
        "lower-case letters", "team/a"),
    bad("share above one", {"data.split": {"validation": "1.5"}}, "data.split.validation",
        "a number from 0 to 1", "1.5"),
    bad("share in words", {"data.split": {"test": "half"}}, "data.split.test",
        "a number from 0 to 1", "half"),
    bad("negative rate", {"training.learningRate": "-1e-4"}, "training.learningRate",
        "a number of zero or more", "-1e-4"),
    bad("rate in words", {"training.learningRate": "small"}, "training.learningRate",
        "a number of zero or more", "small"),
    bad("dropout above one", {"training.dropout": "2"}, "training.dropout",
        "a number from 0 to 1", "2"),
    bad("quantity with a space", {"compute.sharedMemory": "2 Gi"}, "compute.sharedMemory",
        "a quantity of Kubernetes", "2 Gi"),
    bad("negative quantity", {"compute.resources": {"requests": {"cpu": -4}}},
        "compute.resources.requests.cpu", "a quantity of Kubernetes", "-4"),
    bad("unit of a quantity", {"prepare.resources": {"limits": {"memory": "16GB"}}},
        "prepare.resources.limits.memory", "a quantity of Kubernetes", "16GB"),
    # --- rules across fields
    bad("epochs and steps", {"training": {"epochs": 3, "maxSteps": 100}}, "training",
        "epochs and maxSteps exclude each other", "100"),
    bad("commits by steps and seconds", {"checkpoint": {"everySteps": 7, "everySeconds": 60}},
        "checkpoint", "everySteps and everySeconds exclude each other", "7"),
    bad("secret and identity", {"storage": {"secretRef": SECRET, "serviceAccountName": "x"}},
        "storage", "secretRef and serviceAccountName exclude each other", "s3-credentials"),
    bad("lora of full", {"method": {"type": "Full", "lora": {}}}, "method",
        "lora goes with type LoRA or QLoRA only", "Full"),
    bad("B matrices that stay zero", {"method.lora": {"loraPlusRatio": "0.0e5"}}, "method.lora",
        "loraPlusRatio must be above 0", "0.0e5"),
    bad("scales of the input of other modules",
        {"method": {"type": "IA3", "ia3": {"feedforwardModules": ["down_proj"]}}}, "method.ia3",
        "feedforwardModules must be among targetModules", "down_proj"),
    bad("4 bits on the CPU", {"method.type": "QLoRA", "compute.gpusPerNode": 0}, "",
        "method.type QLoRA needs a GPU: set compute.gpusPerNode", "QLoRA"),
    bad("dropout of parameters",
        {"method.lora": {"targetParameters": ["experts.down_proj"], "dropout": "0.1"}},
        "method.lora", "targetParameters go with neither dropout nor useDora", "0.1"),
    bad("magnitudes of parameters",
        {"method.lora": {"targetParameters": ["experts.down_proj"], "useDora": True}},
        "method.lora", "targetParameters go with neither dropout nor useDora", "true"),
    bad("principal part of directions",
        {"method.lora": {"initialization": "PiSSA", "useDora": True}}, "method.lora",
        "initialization PiSSA goes with neither useDora nor targetParameters", "PiSSA"),
    bad("principal part of parameters",
        {"method.lora": {"initialization": "PiSSA", "targetParameters": ["experts.down_proj"]}},
        "method.lora", "initialization PiSSA goes with neither", "PiSSA"),
    bad("principal part of 4 bits",
        {"method": {"type": "QLoRA", "lora": {"initialization": "PiSSA"}}}, "method",
        "initialization PiSSA splits weights that type QLoRA holds in 4 bits", "QLoRA"),
    bad("unknown initialization", {"method.lora": {"initialization": "pissa"}},
        "method.lora.initialization", "PiSSA", "pissa"),
    bad("prompt of lora", {"method.prompt": {}}, "method",
        "prompt goes with type PromptTuning or PrefixTuning only", "LoRA"),
    bad("merged prompt", {"method.type": "PromptTuning", "output.format": "Merged"}, "",
        "output.format Merged and Both need method.type Full, Partial, LoRA, QLoRA",
        "PromptTuning"),
    bad("both of a prefix", {"method.type": "PrefixTuning", "output.format": "Both"}, "",
        "output.format Merged and Both need method.type", "PrefixTuning"),
    bad("checkpointed prefixes", {"method.type": "PrefixTuning",
        "training.gradientCheckpointing": True}, "",
        "training.gradientCheckpointing does not go with method.type PrefixTuning",
        "PrefixTuning"),
    bad("partial of lora", {"method": {"partial": {"biases": True}}}, "method",
        "partial goes with type Partial only", "LoRA"),
    bad("partial without its block", {"method.type": "Partial"}, "method",
        "type Partial needs method.partial", "Partial"),
    bad("partial of nothing", {"method": {"type": "Partial", "partial": {}}}, "method.partial",
        "give lastLayers, parameters, biases or norms", "false"),
    bad("adapter of partial", {"method": {"type": "Partial", "partial": {"norms": True}},
        "output.format": "Adapter"}, "", "output.format Adapter and Both need method.type LoRA",
        "Partial"),
    bad("adapter of full", {"method.type": "Full", "output.format": "Adapter"}, "",
        "output.format Adapter and Both need method.type LoRA", "Adapter"),
    bad("both of full", {"method.type": "Full", "output.format": "Both"}, "",
        "output.format Adapter and Both need method.type LoRA", "Both"),
    bad("nothing left to train on", {"data.split": {"validation": "0.5", "test": "0.5"}},
        "data.split", "validation and test together must be below 1", "0.5"),
    bad("early stopping without validation",
        {"training.earlyStopping": {}, "data.split": {"validation": "0.00"}}, "",
        "training.earlyStopping needs a validation set", "0.00"),
    bad("more processes than GPUs", {"compute": {"gpusPerNode": 2, "processesPerNode": 3}},
        "compute", "processesPerNode must not exceed gpusPerNode", "3"),
    bad("template of messages",
        {"data.train": sources({"format": "Messages", "template": TEMPLATE})}, "data.train[0]",
        "template does not go with format Messages, Retrieval or Text", "Messages"),
    bad("template without completion", {"data.train": sources({"template": {"prompt": "x"}})},
        "data.train[0].template", "a template needs a name, or prompt and completion", None),
    bad("unknown template", {"data.train": sources({"template": {"name": "Sing"}})},
        "data.train[0].template.name", "Summarize", "Sing"),
    bad("template of both kinds",
        {"data.train": sources({"template": {"name": "Classify", "prompt": "x"}})},
        "data.train[0].template", "leave name out", "Classify"),
    bad("fields of a template of one's own",
        {"data.train": sources({"template": {**TEMPLATE, "fields": {"document": "article"}}})},
        "data.train[0].template", "fields and phrasings are for a template with a name", None),
    bad("phrasings of a template of one's own",
        {"data.train": sources({"template": {**TEMPLATE, "phrasings": "First"}})},
        "data.train[0].template", "fields and phrasings are for a template with a name", None),
    bad("field of another template",
        {"data.train": sources({"template": {"name": "Rewrite", "fields": {"label": "a"}}})},
        "data.train[0].template", "Rewrite: text, rewritten, manner", "name Rewrite"),
    bad("too many fields", {"data.train": sources({"template": {
        "name": "Rewrite", "fields": {str(i): "a" for i in range(17)}}})},
        "data.train[0].template.fields", "16", None),
    bad("field without a name",
        {"data.train": sources({"template": {"name": "Rewrite", "fields": {"text": ""}}})},
        "data.train[0].template.fields.text", "at least 1 char", None),
    bad("template of the library with a format", {"data.train": sources(
        {"format": "Classification", "template": {"name": "Classify"}})},
        "data.train[0]", "leave format out", "Classification"),
    bad("template of retrieval",
        {"data.train": sources({"format": "Retrieval", "template": TEMPLATE})}, "data.train[0]",
        "template does not go with format Messages, Retrieval or Text", "Retrieval"),
    bad("retrieval of another format",
        {"data.train": sources({"format": "Instruction", "retrieval": {}})}, "data.train[0]",
        "retrieval needs format: Retrieval", None),
    bad("retrieval without format", {"data.train": sources({"retrieval": {"distractors": 1}})},
        "data.train[0]", "retrieval needs format: Retrieval", None),
    bad("too many distractors", {"data.train": sources(
        {"format": "Retrieval", "retrieval": {"distractors": 65}})},
        "data.train[0].retrieval.distractors", "64", "65"),
    bad("more than every oracle", {"data.train": sources(
        {"format": "Retrieval", "retrieval": {"oracleShare": "1.5"}})},
        "data.train[0].retrieval.oracleShare", "from 0 to 1", "1.5"),
    bad("one name twice", {"data.train": sources({"name": "a-set"}, {}, {"name": "a-set"})},
        "data", "names in train must differ", "a-set"),
    bad("one name twice in test", {"data.test": sources({"name": "b-set"}, {"name": "b-set"})},
        "data", "names in test must differ", "b-set"),
    bad("some sets with weights", {"data.train": sources({"weight": "1"}, {})}, "data",
        "give every training set a weight, or none", "(none)"),
    bad("no weight above zero", {"data.train": sources({"weight": "0"}, {"weight": "0.0e3"})},
        "data", "a training set needs a weight above 0", "0.0e3"),
    bad("weights and a temperature",
        {"data.train": sources({"weight": "3"}), "data.mixingTemperature": "2"}, "data",
        "mixingTemperature and weights exclude each other", "2"),
    bad("temperature below one", {"data.mixingTemperature": "0.5"}, "data.mixingTemperature",
        "a number of at least 1", "0.5"),
    bad("weight of a test set", {"data.test": sources({"weight": "7"})}, "data",
        "weight is for training sets", "7"),
    bad("stage without steps", {"data.stages": [{"name": "a-stage", "steps": "0.0"}]},
        "data.stages[0].steps", "a number above zero", "0.0"),
    bad("stage of an unknown set", {"data.train": sources({"name": "known"}), "data.stages":
        [{"name": "a", "steps": "1", "weights": [{"name": "unknown", "weight": "1"}]}]}, "data",
        "weights of a stage must name sets of data.train", "known"),
    bad("stage that names a set twice", {"data.train": sources({"name": "known"}), "data.stages":
        [{"name": "a", "steps": "1", "weights": [{"name": "known", "weight": "1"}] * 2}]},
        "data.stages[0]", "a stage names each training set once", "known"),
    bad("stage without a weight", {"data.train": sources({"name": "known"}), "data.stages":
        [{"name": "a", "steps": "1", "weights": [{"name": "known", "weight": "0"}]}]},
        "data.stages[0]", "a stage needs a weight above 0", "0"),
    bad("unknown sharding", {"compute.sharding": "Zero3"}, "compute.sharding", "FullShard",
        "Zero3"),
    bad("4 bits in shards",
        {"method.type": "QLoRA", "compute.sharding": "FullShard"}, "",
        "method.type QLoRA cannot be sharded", "FullShard"),
    bad("rows shared by more processes than there are", {"compute.contextParallel": 2},
        "compute", "contextParallel must divide the processes of a node", "contextParallel 2"),
    bad("prompts before shared rows",
        {"method.type": "PromptTuning", "compute": {"gpusPerNode": 2, "contextParallel": 2}}, "",
        "method.type PromptTuning, PrefixTuning needs every sample whole", "PromptTuning"),
    bad("8 bits beside an adapter", {"training.precision": "FP8"}, "",
        "training.precision FP8 goes with method.type Full", "LoRA"),
    bad("unknown optimizer", {"training.optimizer": "Lion"}, "training.optimizer", "Adafactor",
        "Lion"),
    bad("8-bit optimizer on the CPU",
        {"training.optimizer": "AdamW8bit", "compute.gpusPerNode": 0}, "",
        "training.optimizer AdamW8bit needs a GPU", "AdamW8bit"),
    bad("8-bit optimizer in shards",
        {"training.optimizer": "AdamW8bit", "compute.sharding": "FullShard"}, "",
        "training.optimizer AdamW8bit, Adafactor cannot be sharded", "AdamW8bit"),
    bad("factored optimizer in shards",
        {"training.optimizer": "Adafactor", "compute.sharding": "HybridShard"}, "",
        "training.optimizer AdamW8bit, Adafactor cannot be sharded", "HybridShard"),
    bad("factored optimizer beside copies of weights",
        {"training": {"optimizer": "Adafactor", "precision": "PureBF16"}}, "",
        "does not go with copies of weights", "PureBF16"),
    bad("optimizer of matrices without any",
        {"training.optimizer": "Muon", "method.type": "PromptTuning"}, "",
        "method.type to one of Full, Partial, LoRA, QLoRA", "PromptTuning"),
    bad("anchor without replay", {"training.anchor": {"klCoefficient": "0.05"}}, "",
        "training.anchor.klCoefficient needs general data", "0.05"),
    bad("anchor of weights that an adapter leaves", {"training.anchor": {"l2Coefficient": "0.02"}},
        "", "training.anchor.l2Coefficient is for method.type Full, Partial", "0.02"),
    bad("anchor below zero", {"training.anchor": {"klCoefficient": "-1"}},
        "training.anchor.klCoefficient", "a number of zero or more", "-1"),
    bad("replay of a test set", {"data.test": sources({"replay": True})}, "data",
        "replay is for training sets", "s3://data/a.jsonl"),
    bad("all of the label smoothed away", {"training.labelSmoothing": "1.5"},
        "training.labelSmoothing", "a number from 0 to 1", "1.5"),
    bad("toleration of nothing", {"prepare.tolerations": [{"effect": "NoExecute"}]},
        "prepare.tolerations[0]", "a toleration without key needs operator: Exists", "Equal"),
    bad("unknown task", {"task": "TokenClassification"}, "task", "SequenceClassification",
        "TokenClassification"),
    bad("classes by a method for text",
        {"task": "SequenceClassification", "method.type": "PromptTuning"}, "",
        "task SequenceClassification needs method.type Full, Partial, LoRA, IA3", "PromptTuning"),
    bad("classes of other data", {"task": "SequenceClassification",
        "data.test": sources({"format": "Instruction"})}, "",
        "task SequenceClassification needs data of format Classification", None),
    bad("classes by a metric of text", {"task": "SequenceClassification",
        "evaluation.metrics": ["F1", "Bleu"]}, "",
        "measured by Loss, Accuracy, Precision, Recall, F1", "Bleu"),
    bad("best commit of classes by a metric of text", {"task": "SequenceClassification",
        "checkpoint.metric": "ExactMatch"}, "", "correct checkpoint.metric", "ExactMatch"),
    bad("classes stopped by a metric of text", {"task": "SequenceClassification",
        "training.earlyStopping": {"metric": "Perplexity"}}, "",
        "correct training.earlyStopping.metric", "Perplexity"),
    bad("classes with generated text",
        {"task": "SequenceClassification", "evaluation.maxNewTokens": 17}, "",
        "generates no text: remove evaluation.maxNewTokens", "17"),
    bad("classes with a router loss",
        {"task": "SequenceClassification", "training.routerAuxLossCoefficient": "0.02"}, "",
        "remove training.routerAuxLossCoefficient", "0.02"),
    bad("classes with PiSSA", {"task": "SequenceClassification",
        "method.lora": {"initialization": "PiSSA"}}, "",
        "needs method.lora.initialization Default", "PiSSA"),
]  # fmt: skip

ROWS = [*GOOD, *BAD]
