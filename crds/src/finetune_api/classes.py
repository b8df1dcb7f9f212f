"""Effect of a change of each spec field on a run that has begun.

Live: applied directly. Resume: a new gang continues the same run from its last checkpoint. NewRun:
the current run is stopped and the next run begins. The longest matching path prefix decides; a test
checks that every field of the spec is covered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Final, Literal

FieldClass = Literal["Live", "Resume", "NewRun"]

FIELD_CLASSES: Final[dict[str, FieldClass]] = {
    "managedBy": "Live",
    "suspend": "Live",
    "deletionProtection": "Live",
    "childrenTTLSecondsAfterFinished": "Live",
    "failurePolicy": "Live",
    "failurePolicy.progressDeadlineSeconds": "Resume",
    "scheduling": "Resume",
    "scheduling.startDeadlineSeconds": "Live",
    "compute": "Resume",
    "prepare": "Resume",
    "storage": "Resume",
    "storage.endpoint": "NewRun",
    "storage.workspace": "NewRun",
    "checkpoint": "Resume",
    "checkpoint.metric": "NewRun",
    "task": "NewRun",
    "model": "NewRun",
    "model.storage.secretRef": "Resume",
    "data": "NewRun",
    "data.train.storage.secretRef": "Resume",
    "data.validation.storage.secretRef": "Resume",
    "data.test.storage.secretRef": "Resume",
    "data.retention.storage.secretRef": "Resume",
    "method": "NewRun",
    "training": "NewRun",
    "training.microBatchTokens": "Resume",
    "training.gradientCheckpointing": "Resume",
    "training.compile": "Resume",
    "training.guard": "Resume",
    "evaluation": "NewRun",
    "evaluation.artefactCheck": "Resume",
    "evaluation.customMetrics": "Resume",
    "evaluation.judge": "Resume",
    "output": "NewRun",
    "rerunToken": "NewRun",
    "retryToken": "Live",
}


def field_class(path: str) -> FieldClass:
    """Return the class of a dotted field path (without ``spec.`` and list positions).

    Raises:
        KeyError: if no entry covers the path.
    """
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        row = FIELD_CLASSES.get(".".join(parts[:end]))
        if row is not None:
            return row
    raise KeyError(path)


def changed_classes(old: dict[str, Any], new: dict[str, Any]) -> dict[FieldClass, list[str]]:
    """Return the dotted paths of the fields that differ between two defaulted specs, by class."""
    found: dict[FieldClass, list[str]] = {}
    for path in _differences(old, new, ""):
        found.setdefault(field_class(path), []).append(path)
    return found


def class_digest(spec: dict[str, Any], kind: FieldClass) -> str:
    """Digest of a defaulted spec's fields of one class: 16 hexadecimal digits."""
    found = [leaf for leaf in _leaves(spec, "") if field_class(leaf[0]) == kind]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Paths and values of a spec, in a fixed order; items of lists of blocks one after another."""
    if isinstance(value, dict) and value:
        for key in sorted(value):
            yield from _leaves(value[key], f"{path}.{key}" if path else key)
    elif _is_blocks(value) and value:
        for number, item in enumerate(value):
            yield path, number
            yield from _leaves(item, path)
    else:
        yield path, value


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for key in sorted(old.keys() | new.keys())
            for difference in _differences(
                old.get(key), new.get(key), f"{path}.{key}" if path else key
            )
        ]
    if _is_blocks(old) and _is_blocks(new) and len(old) == len(new):
        found = {d: None for a, b in zip(old, new, strict=True) for d in _differences(a, b, path)}
        return list(found)
    return [] if old == new else [path]


def _is_blocks(value: Any) -> bool:
    """Whether a value is a list of blocks, which has the paths of its items' fields."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
