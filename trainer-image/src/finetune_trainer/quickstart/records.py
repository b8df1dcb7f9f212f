"""The quickstart's labelled data: two tasks on messages that are new to the base model.

``intent`` classifies a message (``text``, ``label``); ``note`` summarizes what the customer wants
(``message``, ``note``; rendered by a template in the manifest).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from finetune_trainer.quickstart.language import Ticket, draw_ticket, message, note


def make_data(folder: Path, seen: set[str], train: int, test: int, seed: int = 2) -> None:
    """Write ``<task>-train.jsonl`` and ``<task>-test.jsonl`` for both tasks.

    Args:
        seen: messages of the pre-training, which are not used.
        train, test: records per file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fresh = _fresh(set(seen), Random(seed))
    for name, count in (("train", train), ("test", test)):
        intents = [next(fresh) for _ in range(count)]
        notes = [next(fresh) for _ in range(count)]
        _write(
            folder / f"intent-{name}.jsonl",
            [{"text": text, "label": ticket.intent} for ticket, text in intents],
        )
        _write(
            folder / f"note-{name}.jsonl",
            [{"message": text, "note": note(ticket)} for ticket, text in notes],
        )


def _fresh(seen: set[str], random: Random) -> Iterator[tuple[Ticket, str]]:
    """Yield tickets with messages that are not in ``seen``, each message once."""
    while True:
        ticket = draw_ticket(random)
        text = message(ticket, random)
        if text not in seen:
            seen.add(text)
            yield ticket, text


def _write(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
