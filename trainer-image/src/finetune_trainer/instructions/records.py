"""The records of ``builtin://instructions.jsonl``: prompts with verifiable instructions, each with
an answer that follows them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Final

from finetune_trainer.instructions.checks import HARMFUL, KINDS

RECORDS: Final = 300
"""Number of records."""
_SEED: Final = 1

_TOPICS: Final[dict[str, tuple[str, ...]]] = {
    "rain": (
        "Rain falls when drops grow heavy", "Warm air carries water up high",
        "Cold air turns it into clouds", "Rivers bring the water back", "Fields need it in spring",
    ),
    "bread": (
        "Bread needs flour and warm water", "Yeast lets the dough rise",
        "A hot oven makes the crust", "Salt gives it taste", "It keeps for some days",
    ),
    "bees": (
        "Bees carry pollen from flower to flower", "A hive has one queen",
        "Workers gather food in summer", "They dance to show the way", "Honey feeds them in winter",
    ),
    "bridges": (
        "A bridge leads a road over water", "Stone arches press to the sides",
        "Steel cables hold long spans", "Wind makes light decks swing", "Engineers test every part",
    ),
    "sleep": (
        "Sleep gives the body a rest", "The brain sorts the day at night",
        "Children sleep longer than parents", "Dark rooms make it easy", "Tea late keeps us awake",
    ),
    "maps": (
        "A map shows land from above", "Colours stand for height and water",
        "A scale tells the distances", "North is mostly at the top", "Sailors drew the coasts",
    ),
    "trains": (
        "Trains run on two steel rails", "An engine pulls many wagons",
        "Signals keep them apart", "Stations lie in every town", "Night trains have beds",
    ),
    "glass": (
        "Glass is made of hot sand", "It cools without crystals", "Thin sheets close our windows",
        "Old panes have small waves", "Broken pieces melt again",
    ),
    "tea": (
        "Tea comes from the leaves of a bush", "Black tea is dried for long",
        "Green tea is heated at once", "Hot water draws the taste", "Many drink it with milk",
    ),
    "clocks": (
        "A clock counts equal swings", "A spring or a weight drives it",
        "Wheels turn the two hands", "Sailors needed exact ones", "Quartz replaced the pendulum",
    ),
    "snow": (
        "Snow forms high in cold clouds", "Each flake grows six arms",
        "Fresh snow swallows sound", "Warm ground melts it soon", "Mountains keep it in summer",
    ),
    "paper": (
        "Paper is made of wood or rags", "Water turns them into pulp",
        "A sieve lets the water run off", "Rollers press the sheet dry", "Old paper is used again",
    ),
}  # fmt: skip
"""Topics with five sentences each, of at most eight words, without commas and full stops."""

_WORDS: Final = ("lantern", "garden", "seven", "window", "copper", "river")
_PLAIN: Final = ("very", "good", "thing", "people", "always")
_FIELDS: Final = (("title", "text"), ("name", "reason"), ("topic", "summary"))
_OPENINGS: Final = ("In short", "As you may know", "Here is what I know")
_ENDINGS: Final = ("That is all", "So much for today", "I hope this helps")
_FOREIGN: Final = {
    "German": "Das ist ein schönes Thema, und ich erkläre es gern mit einfachen Worten.",
    "French": "C'est un beau sujet, et je vais vous l'expliquer avec des mots simples.",
    "Spanish": "Es un tema bonito, y con mucho gusto lo explico con palabras sencillas.",
    "Italian": "È un bel tema, e lo spiego volentieri con parole semplici e un esempio.",
}

Answer = tuple[str, str]
"""An instruction, and an answer that follows it."""
Way = Callable[[random.Random, str], Answer]
"""Makes an instruction, from a topic or about an answer."""


def _sentences(topic: str, count: int) -> list[str]:
    return [f"{sentence}." for sentence in _TOPICS[topic][:count]]


def _short(draw: random.Random, topic: str) -> Answer:
    return KINDS["MostWords"].say(draw.choice((30, 40, 50))), " ".join(_sentences(topic, 2))


def _long(draw: random.Random, topic: str) -> Answer:
    return KINDS["LeastWords"].say(draw.choice((12, 15, 18))), " ".join(_sentences(topic, 5))


def _in_lines(draw: random.Random, topic: str) -> Answer:
    count = draw.choice((2, 3, 4))
    return KINDS["Lines"].say(count), "\n".join(_sentences(topic, count))


def _points(draw: random.Random, topic: str) -> Answer:
    count = draw.choice((2, 3, 4, 5))
    return KINDS["Points"].say(count), "\n".join(f"- {s}" for s in _sentences(topic, count))


def _object(draw: random.Random, topic: str) -> Answer:
    fields = draw.choice(_FIELDS)
    values = (topic, _sentences(topic, 1)[0])
    return KINDS["Object"].say(*fields), json.dumps(dict(zip(fields, values, strict=True)))


def _with_word(draw: random.Random, answer: str) -> Answer:
    word = draw.choice(_WORDS)
    return KINDS["Word"].say(word), f"{answer} Think of a {word}."


def _without_word(draw: random.Random, answer: str) -> Answer:
    return KINDS["NoWord"].say(draw.choice(_PLAIN)), answer


def _capitals(_draw: random.Random, answer: str) -> Answer:
    return KINDS["Capitals"].say(), answer.upper()


def _small(_draw: random.Random, answer: str) -> Answer:
    return KINDS["Small"].say(), answer.lower()


def _opening(draw: random.Random, answer: str) -> Answer:
    words = draw.choice(_OPENINGS)
    return KINDS["Begin"].say(words), f"{words}: {answer}"


def _ending(draw: random.Random, answer: str) -> Answer:
    words = draw.choice(_ENDINGS)
    return KINDS["End"].say(words), f"{answer} {words}."


def _no_commas(_draw: random.Random, answer: str) -> Answer:
    return KINDS["NoCommas"].say(), answer


_FORMS: Final[tuple[Way, ...]] = (
    _short, _long, _in_lines, _points, _object,
)  # fmt: skip
_STYLES: Final[tuple[Way, ...]] = (
    _with_word, _without_word, _capitals, _small, _opening, _ending, _no_commas,
)  # fmt: skip
_KEEPS_FORM: Final[dict[Way, tuple[Way, ...]]] = {
    _points: (_with_word, _without_word, _capitals, _small, _ending, _no_commas),
    _object: (_without_word,),
}
"""Styles that keep the form of an answer, where not all do."""


def records() -> Iterator[dict[str, object]]:
    """Yield the records, always the same: each is a conversation (``messages``), and the same as
    ``prompt`` and ``completion``."""
    draw = random.Random(_SEED)
    for prompt, answer in _pairs(draw):
        yield {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ],
            "prompt": f"{prompt}\n",
            "completion": answer,
        }


def _pairs(draw: random.Random) -> Iterator[tuple[str, str]]:
    for request in HARMFUL:
        yield request, "I'm sorry, but I can't help with that."
    seen: set[str] = set()
    while len(seen) < RECORDS - len(HARMFUL):
        topic = draw.choice(sorted(_TOPICS))
        if draw.random() < 0.1:
            name = draw.choice(sorted(_FOREIGN))
            asked, answer = KINDS["Language"].say(name), _FOREIGN[name]
        else:
            form = draw.choice(_FORMS)
            asked, answer = form(draw, topic)
            if draw.random() < 0.7:
                style, answer = draw.choice(_KEEPS_FORM.get(form, _STYLES))(draw, answer)
                asked = f"{asked} {style}"
        prompt = f"Tell me something about {topic}. {asked}"
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, answer


@cache
def as_json_lines() -> bytes:
    """The records as JSON Lines."""
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records()).encode()
