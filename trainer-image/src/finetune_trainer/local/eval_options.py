"""Options of ``finetune eval``, and the manifests that they stand for: one for each model."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from finetune_api.names import API_VERSION, KIND

_SET_NAME: Final = re.compile(r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)=(.+)$")
_HUB: Final = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
_PATH: Final = ("./", "../", "/", "~")
_MANIFESTS: Final = (".yaml", ".yml", ".json")
DESTINATION: Final = "s3://evaluations"
"""Where results go in the embedded storage of the state folder."""
_EPILOG: Final = """\
examples:
  finetune eval ./base ./tuned --data test.jsonl --metrics Accuracy,F1
  finetune eval org/model s3://models/bot/3-abcde --data faq=faq.jsonl --data builtin://instructions.jsonl
  finetune eval job.yaml

The others are compared with the first model, pairwise on equal samples. Each model is measured by a
local run of a FineTuneJob with method.type None, whose results `finetune report` shows again."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to the parser of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "models", nargs="+", metavar="MODEL",
        help="up to 8: a folder, a model of the hub (org/name), hf://…, s3://… of a model or of a"
        " run's published model; or one FineTuneJob (JOB.yaml) with method.type None",
    )  # fmt: skip
    parser.add_argument(
        "--data", action="append", default=[], metavar="[NAME=]FILE",
        help="test set: a file, s3://… or builtin://instructions.jsonl; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--examples", action="append", default=[], metavar="[NAME=]FILE",
        help="training set from which few-shot examples are drawn; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--shots", type=int, action="append", metavar="N",
        help="also ask behind N examples; may be repeated (default with --examples: 1 and 4)",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", type=lambda text: text.split(","), metavar="A,B",
        help="evaluation.metrics (default: those that fit the data)",
    )  # fmt: skip
    parser.add_argument("--format", help="format of all sets (default: that of the first record)")
    parser.add_argument("--template", metavar="NAME", help="template of the library, for all sets")
    parser.add_argument(
        "--field", action="append", default=[], metavar="document=article",
        help="the template's field and the records' name for it; may be repeated",
    )  # fmt: skip
    parser.add_argument("--task", help="CausalLM (default) or SequenceClassification")
    parser.add_argument(
        "--max-samples", type=int, metavar="N", help="evaluation.maxSamples (default: 1000)"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="evaluation.maxNewTokens")
    parser.add_argument("--max-length", type=int, metavar="N", help="training.maxLength")
    parser.add_argument("--precision", help="training.precision (default: BF16 on GPUs, else FP32)")
    parser.add_argument(
        "--min-effect", type=float, default=2.0, metavar="POINTS",
        help="smallest difference that matters, in hundredths of a share or of a nat (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="S3_URI",
        help=f"where results are published (default, in the embedded storage: {DESTINATION})",
    )  # fmt: skip


def manifest_among(options: argparse.Namespace) -> Path | None:
    """The manifest that was given in place of models; None: models were given.

    Raises:
        ValueError: with what is wrong.
    """
    manifests = [Path(m) for m in options.models if m == "-" or m.endswith(_MANIFESTS)]
    if not manifests:
        return None
    if len(options.models) > 1 or options.data:
        raise ValueError(
            f"{manifests[0]} is a manifest, which names its model and its data: give it alone, or"
            " give models and --data"
        )
    return manifests[0]


def manifests_of(options: argparse.Namespace, gpus: int) -> list[dict[str, Any]]:
    """Return the manifest of each model, in order.

    Args:
        gpus: of this machine; all are used.

    Raises:
        ValueError: with what is wrong.
    """
    models = [_address(model) for model in options.models]
    if twice := next((m for n, m in enumerate(models) if m in models[:n]), None):
        raise ValueError(f"{twice} is given twice; a model is measured once")
    if not options.data:
        raise ValueError("--data: give at least one test set, e.g. --data test.jsonl")
    output = (options.output or DESTINATION).rstrip("/")
    return [
        {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": name},
            "spec": {
                "method": {"type": "None"},
                "model": {"source": model},
                "data": _data(options),
                "evaluation": _evaluation(options),
                "output": {"destination": f"{output}/{name}"},
                "storage": {"workspace": f"{output}/.workspace"},
                "compute": {"gpusPerNode": gpus},
                **_given(task=options.task),
                **_block("training", maxLength=options.max_length, precision=options.precision),
            },
        }
        for model, name in zip(models, map(_job_name, models), strict=True)
    ]


def _address(model: str) -> str:
    """The model's address as a manifest has it."""
    if "://" in model or model.startswith(_PATH):
        return model
    if Path(model).exists():
        return f"./{model}"
    if _HUB.match(model):
        return f"hf://{model}"
    raise ValueError(
        f"{model}: there is no such folder, and a model of the hub is organisation/name; other"
        " addresses begin with s3:// or hf://"
    )


def _job_name(model: str) -> str:
    """``eval-bot-3-abcde-1f2e3d``, from the end of the address; the same for the same address."""
    end = re.sub(r"[^a-z0-9]+", "-", "-".join(model.rstrip("/").split("/")[-2:]).lower())
    digest = hashlib.sha256(model.encode()).hexdigest()[:6]
    return f"eval-{end.strip('-')[-40:].strip('-')}-{digest}"


def _data(options: argparse.Namespace) -> dict[str, Any]:
    lists = {"test": options.data, "train": options.examples}
    return {name: _sets(given, options) for name, given in lists.items() if given}


def _sets(given: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for text in given:
        named = _SET_NAME.match(text)
        source = named[3] if named else text
        name = named[1] if named else _set_name(source)
        if "://" not in source and not source.startswith(_PATH):
            source = f"./{source}"
        found.append(
            _given(source=source, name=name, format=options.format, template=_template(options))
        )
    return found


def _set_name(source: str) -> str | None:
    """Name of a set, from that of its file; None: it has none, or a wildcard."""
    stem = source.rstrip("/").split("/")[-1].split(".")[0]
    name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:63].strip("-")
    return None if "*" in stem or not name else name


def _template(options: argparse.Namespace) -> dict[str, Any] | None:
    if options.template is None:
        return None
    wrong = next((field for field in options.field if "=" not in field), None)
    if wrong is not None:
        raise ValueError(f"--field {wrong}: give the template's field, =, and the records' name")
    fields = dict(field.split("=", 1) for field in options.field)
    return _given(name=options.template, fields=fields or None)


def _evaluation(options: argparse.Namespace) -> dict[str, Any]:
    return _given(
        metrics=options.metrics,
        maxSamples=options.max_samples,
        maxNewTokens=options.max_new_tokens,
        minEffect=f"{options.min_effect:g}",
        **_block("baselines", shots=options.shots),
    )


def _given(**fields: Any) -> dict[str, Any]:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None}


def _block(name: str, **fields: Any) -> dict[str, Any]:
    """A block with the fields that have a value; nothing if none has."""
    given = _given(**fields)
    return {name: given} if given else {}
