"""Questions: test prompts as they are put to a model, beside the prompts as they are.

Prepare writes them, in one Arrow file for a run; the gang answers them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune_trainer.storage.objects import ObjectNotFound, ObjectStore

_SCHEMA: Final = pa.schema(
    [
        ("prompt", pa.string()),
        ("draw", pa.uint8()),
        ("set", pa.uint16()),
        ("position", pa.uint32()),
        ("input_ids", pa.list_(pa.int32())),
        ("tuned", pa.bool_()),
    ]
)


def few_shot(shots: int) -> str:
    """Name of the test prompts behind some examples."""
    return f"{shots}-shot"


@dataclass(frozen=True)
class Prompting:
    """A way to put test prompts to a model."""

    prompt: str
    """``few_shot(n)``, RETRIEVAL, or the name of a prompt in evaluation.baselines."""
    draw: int = 0
    """Which draw of the examples, from 0; 0 without examples."""
    tuned: bool = False
    """Whether the tuned model answers such questions, too."""


@dataclass(frozen=True)
class Question:
    """One test prompt as it is put to a model."""

    set: int
    """Index of its set in the manifest of the prepared data."""
    position: int
    """Position of its sample in the index of the test split."""
    ids: npt.NDArray[np.int32]
    """Tokens, shape [tokens]."""


Questions = dict[Prompting, list[Question]]


def write_questions(store: ObjectStore, run_uri: str, questions: Questions) -> None:
    """Write the questions of a run."""
    rows = [(p, q) for p, asked in questions.items() for q in asked]
    columns: dict[str, Iterable[Any]] = {
        "prompt": [p.prompt for p, _ in rows],
        "draw": [p.draw for p, _ in rows],
        "set": [q.set for _, q in rows],
        "position": [q.position for _, q in rows],
        "input_ids": [q.ids for _, q in rows],
        "tuned": [p.tuned for p, _ in rows],
    }
    table = pa.table({f.name: pa.array(columns[f.name], f.type) for f in _SCHEMA}, _SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_table(table)
    store.put(_uri(run_uri), sink.getvalue().to_pybytes())


def read_questions(store: ObjectStore, run_uri: str) -> Questions:
    """Return the questions of a run; none for a run that an earlier trainer has prepared."""
    try:
        data = store.get(_uri(run_uri))
    except ObjectNotFound:
        return {}
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all().combine_chunks()
    if not len(table):
        return {}
    prompts, draws, tuned, sets, positions = (
        table[name].to_pylist() for name in ("prompt", "draw", "tuned", "set", "position")
    )
    (listed,) = table["input_ids"].chunks
    ids, starts = listed.values.to_numpy(), listed.offsets.to_numpy()
    found: Questions = {}
    for i, (prompt, draw, too) in enumerate(zip(prompts, draws, tuned, strict=True)):
        question = Question(sets[i], positions[i], ids[starts[i] : starts[i + 1]])
        found.setdefault(Prompting(prompt, draw, too), []).append(question)
    return found


def _uri(run_uri: str) -> str:
    return f"{run_uri}/questions.arrow"
