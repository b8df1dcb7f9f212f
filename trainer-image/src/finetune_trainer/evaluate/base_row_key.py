"""The key of a row of the base model, by which another run finds it.

    weights, configuration, tokenizer ──► model ┐
    precision, libraries ──► computation ───────┼──► key
    tokens of the samples ──► sets ─────────────┘

Rows of equal keys have equal losses and answers, up to the rounding of other batches. Metrics are
not part of a row that is shared: they are computed from its answers. What figures do not depend on
does not change the key: training data and settings, batch sizes, the number of processes, the
addresses of model and data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Final

import numpy as np

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.engine.memory.profiling import frozen_dtype
from finetune_trainer.engine.precision import precision_of
from finetune_trainer.evaluate.answering import HeldOutSet, held_out_sets, metrics_of_sets
from finetune_trainer.evaluate.measure import OF_LABELS, Evaluator
from finetune_trainer.evaluate.scores import need_answers
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.halves import Halves
from finetune_trainer.prepared.questions import Question
from finetune_trainer.storage.modelfiles import small_files, weight_files
from finetune_trainer.storage.objects import file_info

ROW_VERSION: Final = 1
"""Incremented when the same model gets other losses or answers for the same samples."""
_LIBRARIES: Final = ("torch", "transformers", "tokenizers")
_AT_ONCE: Final = 1000
"""Samples in memory for their digest."""
_PARALLEL_FILES: Final = 4


@dataclass(frozen=True)
class AskedSet:
    """What a row asks of one set."""

    name: str
    samples: str
    """Digest of the tokens of all samples, in order."""
    answers: int
    """Samples that are answered: the first ones."""
    labels: Mapping[str, Sequence[int]]
    """Labels whose log-likelihoods are measured, with their tokens."""


def row_key(model: str, computation: Mapping[str, Any], sets: Sequence[AskedSet]) -> str:
    """Return the key of a row: 32 hexadecimal digits.

    Args:
        model: see ``model_digest``.
        computation: see ``computation_of``.
        sets: in order.
    """
    content = {
        "version": ROW_VERSION,
        "model": model,
        "computation": dict(computation),
        "sets": [asdict(each) for each in sets],
    }
    return _digest(content)


def model_digest(files: BaseFiles) -> str:
    """Return a digest of a base model's weights, configuration and tokenizer. Weights in object
    storage are known by their ETags; files are read."""
    if files.objects:
        weights = [[info.uri.rpartition("/")[2], info.etag, info.size] for info in files.objects]
    else:
        paths = weight_files(files.folder)
        with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
            found = pool.map(file_info, paths)
        weights = [
            [path.name, info.sha256, info.bytes] for path, info in zip(paths, found, strict=True)
        ]
    small = {
        path.relative_to(files.folder).as_posix(): file_info(path).sha256
        for path in small_files(files.folder)
    }
    return _digest({"weights": weights, "files": small})


def computation_of(spec: FineTuneJobSpec, evaluator: Evaluator) -> dict[str, Any]:
    """Return what figures of the base model depend on besides model and samples."""
    device = evaluator.world.device.type
    precision, quantized = precision_of(spec, device == "cuda"), spec.method.kind.quantizes
    # An image for other methods has no bitsandbytes.
    libraries = (*_LIBRARIES, "bitsandbytes") if quantized else _LIBRARIES
    return {
        "task": spec.task,
        "device": device,
        "bf16": precision.bf16,
        "fp8": precision.fp8,
        "weights": str(frozen_dtype(spec, precision)),
        "quantized": quantized,
        "newTokens": evaluator.max_new_tokens,
        "virtualTokens": evaluator.virtual_tokens,
        "stops": sorted(evaluator.data.manifest.stop_token_ids),
        "libraries": {name: version(name) for name in libraries},
    }


def sets_as_they_are(
    evaluator: Evaluator, spec: FineTuneJobSpec, halves: Halves | None
) -> list[AskedSet]:
    """Return what ``answer_sets`` asks."""
    found, data = [], evaluator.data
    for of in held_out_sets(data, halves):
        wanted = metrics_of_sets(data, spec, of.side)[of.name]
        generated = need_answers(wanted)
        answers = min(evaluator.max_samples, len(of.positions)) if generated else 0
        labels = _labels(data, of.number, wanted) if answers else {}
        found.append(AskedSet(of.name, _samples_digest(data, of, answers), answers, labels))
    return found


def sets_of_questions(
    evaluator: Evaluator, spec: FineTuneJobSpec, questions: Sequence[Question]
) -> list[AskedSet]:
    """Return what ``answer_questions`` asks."""
    found, data = [], evaluator.data
    wanted = metrics_of_sets(data, spec, "test")
    for number, name in data.set_names("test"):
        of_set = [question for question in questions if question.set == number]
        arrays = (part for q in of_set for part in (np.array([q.position]), q.ids))
        labels = _labels(data, number, wanted[name])
        found.append(AskedSet(name, _arrays_digest(arrays), len(of_set), labels))
    return found


def _labels(data: PreparedData, number: int, wanted: Sequence[str]) -> Mapping[str, Sequence[int]]:
    scored = not OF_LABELS.isdisjoint(wanted)
    return data.manifest.sets[number].labels if scored else {}


def _samples_digest(data: PreparedData, of: HeldOutSet, answers: int) -> str:
    def arrays() -> Iterable[np.ndarray]:
        for start in range(0, len(of.positions), _AT_ONCE):
            some = of.positions[start : start + _AT_ONCE].tolist()
            for sample in data.samples(of.side, some):
                yield sample.ids
                yield sample.supervised
        for reference in data.references(of.side, of.positions[:answers].tolist()):
            yield reference.prompt_ids

    return _arrays_digest(arrays())


def _arrays_digest(arrays: Iterable[np.ndarray]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
