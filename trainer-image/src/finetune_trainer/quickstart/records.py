"""The quickstart's labelled data: two tasks on messages that are new to the base model.

``intent`` classifies a message (``text``, ``label``); ``note`` summarizes what the customer wants
(``message``, ``note``; rendered by a template in the manifest). ``reply`` has conversations as the
base model was trained on: what tuning must not lose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from finetune_trainer.quickstart.language import Ticket, draw_ticket, message, note, reply


def make_data(folder: Path, seen: set[str], train: int, test: int, seed: int = 2) -> None:
    """Write ``<task>-train.jsonl`` and ``<task>-test.jsonl`` for both tasks, and
    ``reply-test.jsonl``.

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
    random = Random(seed + 1)
    _write(folder / "reply-test.jsonl", [_conversation(*next(fresh), random) for _ in range(test)])


def _conversation(ticket: Ticket, text: str, random: Random) -> dict[str, Any]:
    turns = (("user", text), ("assistant", reply(ticket, random)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _fresh(seen: set[str], random: Random) -> Iterator[tuple[Ticket, str]]:
    """Yield tickets with messages that are not in ``seen``, each message once."""
    while True:
        ticket = draw_ticket(random)
        text = message(ticket, random)
        if text not in seen:
            seen.add(text)
            yield ticket, text


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
