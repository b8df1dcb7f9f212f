"""The model card: ``README.md`` of a published model, with front matter for model hubs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import yaml

from finetune_api.tasks import TaskName

if TYPE_CHECKING:
    from finetune_trainer.publish.run_facts import About


@dataclass(frozen=True)
class Loading:
    """Hub tag and loading code of a task's models."""

    pipeline: str
    """The hub's pipeline tag."""
    merged: str
    """Code that loads the merged model."""
    adapter: str
    """Code that loads the adapter, with a ``{base}`` field for the base model."""


LOADING: Final[dict[TaskName, Loading]] = {
    "CausalLM": Loading(
        "text-generation",
        """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("merged")
tokenizer = AutoTokenizer.from_pretrained("merged")
```""",
        """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "adapter")
model.generation_config = GenerationConfig.from_pretrained("adapter")  # with its stop tokens
tokenizer = AutoTokenizer.from_pretrained("adapter")
```""",
    ),
    "SequenceClassification": Loading(
        "text-classification",
        """\
```python
from transformers import pipeline

classify = pipeline("text-classification", model="merged")
classify("…")
```""",
        """\
```python
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

# The configuration beside the adapter names the classes; the adapter holds the head.
config = AutoConfig.from_pretrained("adapter/config.json")
base = AutoModelForSequenceClassification.from_pretrained(
    {base}, config=config, ignore_mismatched_sizes=True
)
model = PeftModel.from_pretrained(base, "adapter")
tokenizer = AutoTokenizer.from_pretrained("adapter")
classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
classify("…")
```""",
    ),
}


def render(about: About) -> str:
    """Return the card in Markdown."""
    # Imported here, so that importing the card does not import run_facts.
    from finetune_trainer.publish.judge_texts import judge_texts
    from finetune_trainer.publish.results import remedy_text
    from finetune_trainer.publish.run_facts import DRAWN_HEAD, artefact_text, settings

    run_spec, result = about.run_spec, about.result
    front = yaml.safe_dump(front_matter(about), sort_keys=False, allow_unicode=True)
    scores = [
        (
            s.data_set,
            s.metric,
            s.show(s.base),
            s.show(s.tuned),
            s.show(s.gain, signed=True),
            s.interval,
            s.verdict,
        )
        for s in about.scores
    ]
    parts = [
        f"---\n{front}---",
        f"# {run_spec.job.name}",
        f"`{run_spec.base_model.source}`, tuned with {about.spec.method.type} by finetune-operator"
        f" (run `{run_spec.run}`). `report.html` beside this file has the loss curve, the data and"
        " samples; `metrics.json` has every figure.",
        "## Test metrics",
        _table(("Data set", "Metric", "Base", "Tuned", "Gain", "95 % interval", "Verdict"), scores)
        if scores
        else "The run had no test set.",
        *([DRAWN_HEAD] if about.drawn_head else []),
        *([checked] if (checked := artefact_text(about.evaluation.artefact)) else []),
        *judge_texts(about.evaluation.judge),
        *([f"Remedy: {remedy}."] if (remedy := remedy_text(about.evaluation.remedy)) else []),
        "## How to load it",
        *(_load(about, name) for name in about.formats),
        *_lineage(about),
        "## Training",
        _table(("Setting", "Value"), settings(about)),
        "Versions: " + ", ".join(f"{k} {v}" for k, v in result.versions.items()) + ".",
        "## Data",
        _table(
            ("Set", "Side", "Format", "Samples", "Tokens"),
            [
                (s.name, s.split, s.format, f"{s.samples:,}", f"{s.tokens:,}")
                for s in about.data.sets
            ],
        ),
        f"Content digest of the prepared data: `{about.prepared.digest}`.",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(about: About) -> dict[str, Any]:
    """Return the card's metadata (Hugging Face model card specification)."""
    source = about.result.lineage[0].uri
    adapter_only = about.formats == ["adapter"]
    front: dict[str, Any] = {
        "library_name": "peft" if adapter_only else "transformers",
        "pipeline_tag": LOADING[about.spec.task].pipeline,
        "tags": ["finetune-operator", about.spec.method.type.lower()],
    }
    if source.startswith("hf://"):
        front["base_model"] = source.removeprefix("hf://").partition("@")[0]
        on_it = about.base.source == source
        front["base_model_relation"] = "adapter" if adapter_only and on_it else "finetune"
    sets: dict[str, list[dict[str, Any]]] = {}
    for score in about.scores:
        if not math.isfinite(score.value):
            continue
        entry = {"type": score.metric.lower(), "name": score.metric, "value": score.value}
        sets.setdefault(score.data_set, []).append(entry)
    if sets:
        results = [
            {
                "task": {"type": LOADING[about.spec.task].pipeline},
                "dataset": {"name": name, "type": name, "split": "test"},
                "metrics": metrics,
            }
            for name, metrics in sets.items()
        ]
        front["model-index"] = [{"name": about.run_spec.job.name, "results": results}]
    return front


def _load(about: About, name: str) -> str:
    loading = LOADING[about.spec.task]
    if name == "merged":
        return loading.merged
    source = about.base.source
    if not source.startswith("hf://"):
        return f"`base` is a copy of `{source}`.\n\n" + loading.adapter.format(base='"base"')
    base, _, revision = source.removeprefix("hf://").partition("@")
    return loading.adapter.format(
        base=f'"{base}", revision="{revision}"' if revision else f'"{base}"'
    )


def _lineage(about: About) -> list[str]:
    """Return the lineage section; nothing if the model was tuned only once."""
    first, *tuned = about.result.lineage
    if not tuned:
        return []
    rows = [("1", f"`{first.uri}`", "", "", "")]
    rows += [
        (str(number), f"`{a.uri}`", f"{a.job} {a.run}", a.method or "", " and ".join(a.formats))
        for number, a in enumerate(tuned, 2)
    ]
    run, formats = about.run_spec.run, " and ".join(about.formats)
    here = (str(len(rows) + 1), "this model", f"{about.run_spec.job.name} {run}",
            about.spec.method.type, formats)  # fmt: skip
    note = "The base of the test metrics is the model before this one."
    adds_up = (
        " `adapter` holds the adapters of the runs before too: it is loaded on"
        f" `{about.base.source}` alone."
    )
    carries = "adapter" in about.formats and tuned[-1].formats == ["adapter"]
    return [
        "## Lineage",
        _table(("", "Model", "Run", "Method", "Published"), [*rows, here]),
        note + (adds_up if carries else ""),
    ]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(c) for c in row)} |" for row in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
