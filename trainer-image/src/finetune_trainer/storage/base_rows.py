"""Rows of the base model that jobs of a workspace share: ``base-rows/<key>.json``.

An entry is one object, so it is there as a whole or not at all. Of two runs that measure the same
row, the later one replaces the other's, which has the same content. An entry that is damaged, or of
another form, is no entry: the run measures the row, and writes it again.
"""

from __future__ import annotations

import hashlib
import json

from pydantic import ValidationError

from finetune_api.base import Record
from finetune_api.identity import base_row_uri
from finetune_trainer.storage.objects import ObjectNotFound, ObjectStore
from finetune_trainer.storage.runfiles import RowAnswers


class SharedRow(Record):
    """An entry."""

    key: str
    """Of the row: see ``evaluate.base_row_key``."""
    run: str
    """Job and run that have measured it."""
    sha256: str
    """Of the answers, hexadecimal."""
    answers: RowAnswers
    """Without metrics."""


def read_shared_row(store: ObjectStore, workspace: str, key: str) -> SharedRow | None:
    """Return an entry; None: there is none that can be used."""
    try:
        found = SharedRow.model_validate_json(store.get(base_row_uri(workspace, key)))
    except (ObjectNotFound, ValidationError):
        return None
    whole = (found.key, found.sha256) == (key, _digest(found.answers))
    return found if whole else None


def write_shared_row(
    store: ObjectStore, workspace: str, key: str, run: str, answers: RowAnswers
) -> None:
    """Write an entry.

    Args:
        run: job and run that have measured the row.
    """
    sets = [each.model_copy(update={"metrics": {}}) for each in answers.sets]
    plain = answers.model_copy(update={"sets": sets})
    entry = SharedRow(key=key, run=run, sha256=_digest(plain), answers=plain)
    text = json.dumps(entry.to_json(), ensure_ascii=False) + "\n"
    store.put(base_row_uri(workspace, key), text.encode())


def _digest(answers: RowAnswers) -> str:
    text = json.dumps(answers.to_json(), ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
