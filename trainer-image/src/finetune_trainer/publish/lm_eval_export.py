"""Results in the files of lm-evaluation-harness (``--output_path``, ``--log_samples``), for tools
that read those.

PublishedResults + lines of predictions.jsonl ──► results.json, samples_<set>.jsonl of each model
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from finetune_api.evaluation_results import BASE, TUNED, Estimate, RowModel, SetTable, TableRow
from finetune_api.tasks import Kinds
from finetune_trainer.evaluate.scores import BY_SAMPLE, Answers
from finetune_trainer.publish.predictions import Prediction, label_scores_of, scores_given
from finetune_trainer.publish.published_results import PublishedResults

_NAMES: Final[dict[str, str]] = {"Accuracy": "acc", "Rouge": "rougeL"}
"""Names of metrics in the harness, where they are not ours in snake case."""
_FILTER: Final = "none"
"""The harness' name for answers as they are."""
_WIDTH: Final = 2 * 1.959964
"""Standard errors in a 95 % interval."""


def export(results: PublishedResults, lines: Sequence[Prediction], folder: Path) -> list[Path]:
    """Write the files of the base and the tuned model, each to a folder of its own; return them.
    An evaluation alone has the base model's.

    Standard errors are those of our intervals. Prompts of other rows (few-shot, retrieval) are not
    in predictions.jsonl, so only the test prompts as they are have samples.
    """
    written = []
    for row in (BASE, TUNED):
        if not any(_row_of(table, row.model) for table in results.evaluation.sets):
            continue
        own = folder / row.model.lower()
        own.mkdir(parents=True, exist_ok=True)
        written.append(own / "results.json")
        written[-1].write_text(_text(_results(results, row.model)) + "\n", encoding="utf-8")
        for table in results.evaluation.sets:
            metrics = [m for m in results.kinds if m in _metrics_of(table, row.model)]
            about = [x for x in lines if x.data_set == table.name and row.name in x.answers]
            if about:
                written.append(own / f"samples_{_file_name(table.name)}.jsonl")
                text = "".join(f"{_text(s)}\n" for s in _samples(about, row.name, metrics))
                written[-1].write_text(text, encoding="utf-8")
    return written


def _text(raw: Any) -> str:
    return json.dumps(raw, ensure_ascii=False, allow_nan=False)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)


def _name(metric: str) -> str:
    """Name of a metric in the harness: ``exact_match``, ``acc``."""
    return _NAMES.get(metric) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", metric).lower()


def _row_of(table: SetTable, model: RowModel) -> TableRow | None:
    return next((row for row in table.rows if row.row == model), None)


def _metrics_of(table: SetTable, model: RowModel) -> dict[str, Estimate]:
    row = _row_of(table, model)
    return row.metrics if row else {}


def _results(results: PublishedResults, model: RowModel) -> dict[str, Any]:
    manifest, tables = results.manifest, results.evaluation.sets
    tuned = model == "Tuned"
    where = f"pretrained={manifest.base_model}" + (f",peft={results.uri}/adapter" if tuned else "")
    if tuned and "adapter" not in manifest.formats:
        where = f"pretrained={results.uri}/merged"
    name = results.uri if tuned else manifest.base_model
    if results.judged == BASE.name and (measured := manifest.lineage[-1]).formats:  # of a run
        name = measured.uri
        where = f"pretrained={name}/merged"
        if "merged" not in measured.formats:
            where = f"pretrained={manifest.base_model},peft={name}/adapter"
    return {
        "results": {table.name: _figures(table, model) for table in tables},
        "group_subtasks": {},
        "configs": {table.name: _config(table, model, results.kinds) for table in tables},
        "versions": {table.name: 1.0 for table in tables},
        "n-shot": {table.name: 0 for table in tables},
        "higher_is_better": {
            table.name: {
                _name(m): kind.higher_is_better
                for m, kind in results.kinds.items()
                if m in _metrics_of(table, model)
            }
            for table in tables
        },
        "n-samples": {
            table.name: {"original": row.samples, "effective": row.samples}
            for table in tables
            if (row := _row_of(table, model)) is not None
        },
        "config": {"model": "hf", "model_args": where},
        "model_source": "hf",
        "model_name": name,
        "model_name_sanitized": _file_name(name),
    }


def _figures(table: SetTable, model: RowModel) -> dict[str, Any]:
    found: dict[str, Any] = {"alias": table.name}
    for metric, estimate in _metrics_of(table, model).items():
        found[f"{_name(metric)},{_FILTER}"] = estimate.value
        low, high = estimate.low, estimate.high
        error = "N/A" if low is None or high is None else (high - low) / _WIDTH
        found[f"{_name(metric)}_stderr,{_FILTER}"] = error
    return found


def _config(table: SetTable, model: RowModel, kinds: Kinds) -> dict[str, Any]:
    means = {m for m, kind in kinds.items() if m in BY_SAMPLE or kind.source in ("Loss", "Scores")}
    return {
        "task": table.name,
        "output_type": "generate_until",
        "num_fewshot": 0,
        "metric_list": [
            {
                "metric": _name(m),
                "aggregation": "mean" if m in means else _name(m),
                "higher_is_better": kind.higher_is_better,
            }
            for m, kind in kinds.items()
            if m in _metrics_of(table, model)
        ],
        "generation_kwargs": {"do_sample": False},
        "metadata": {"version": 1.0},
    }


def _samples(
    lines: Sequence[Prediction], row: str, metrics: Sequence[str]
) -> Iterator[dict[str, Any]]:
    said = [line.answers[row] for line in lines]
    labels = [line.label for line in lines]
    wanted = [line.reference or "" for line in lines]
    known = all(label is not None for label in labels)
    prompts = [line.prompt or "" for line in lines]
    names = sorted(lines[0].label_tokens or ())
    scores = label_scores_of(lines, names, row) if names else None
    answers = Answers(
        said,
        wanted,
        [label or "" for label in labels] if known else None,
        prompts,
        scores,
        scores_given(lines, metrics, row),
    )
    values = {
        _name(m): answers.scores[m] if m in answers.scores else BY_SAMPLE[m](answers)
        for m in metrics
        if answers.allow(m) and (m in answers.scores or m in BY_SAMPLE)
    }
    for number, line in enumerate(lines):
        doc = {"prompt": line.prompt, "reference": line.reference, "label": line.label}
        target = line.label if line.label is not None else wanted[number]
        yield {
            "doc_id": number,
            "doc": doc,
            "target": target,
            "arguments": {"gen_args_0": {"arg_0": line.prompt, "arg_1": {"do_sample": False}}},
            "resps": [[said[number]]],
            "filtered_resps": [said[number]],
            "filter": _FILTER,
            "metrics": list(values),
            "doc_hash": _hash(json.dumps(doc, ensure_ascii=False)),
            "prompt_hash": _hash(line.prompt or ""),
            "target_hash": _hash(target),
            **{name: of_samples[number] for name, of_samples in values.items()},
        }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
