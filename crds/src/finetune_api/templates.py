"""How the records of a data source become prompts and completions."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from finetune_api.base import FieldName, Fraction, Model, Rule, Text

TemplateName = Literal[
    "Summarize", "Translate", "Classify", "Extract", "Question", "QuestionWithContext", "Rewrite",
    "Chat",
]  # fmt: skip
Role = Literal["system", "user", "assistant", "tool"]

TEMPLATE_FIELDS: Final[dict[TemplateName, tuple[str, ...]]] = {
    "Summarize": ("document", "summary"),
    "Translate": ("source", "target", "language"),
    "Classify": ("text", "label"),
    "Extract": ("document", "wanted", "extracted"),
    "Question": ("question", "answer"),
    "QuestionWithContext": ("context", "question", "answer"),
    "Rewrite": ("text", "rewritten", "manner"),
    "Chat": ("messages", "role", "content", "prompt", "response", "system", "tools"),
}
"""Fields of each template of the trainer's library; `finetune templates` says what they hold."""

_FIELDS_IN_WORDS: Final = "; ".join(
    f"{name}: {', '.join(fields)}" for name, fields in TEMPLATE_FIELDS.items()
)


class Template(Model):
    """How a record becomes a prompt and the completion that is learned: a template of the library
    by its name, or one of your own (Jinja)."""

    name: TemplateName | None = None
    """A template of the library: `finetune templates` lists them, `finetune templates NAME` shows
    what one makes of records."""
    fields: Annotated[dict[FieldName, FieldName], Field(max_length=16)] | None = None
    """Where the records have other names for the fields of a template of the library: its name,
    then theirs, e.g. `{document: article}`, or of Chat `{messages: conversations, role: from,
    content: value}`. Absent: its own names."""
    roles: Annotated[dict[FieldName, Role], Field(max_length=16)] | None = None
    """Of Chat: names that the records have for roles and what they mean, e.g. `{bot: assistant}`,
    beside system, user, human, assistant, gpt and tool, which are known. Any other is a fault of
    its record."""
    phrasings: Literal["Varied", "First"] | None = None
    """Wordings that a template of the library gives the prompts of training records. Varied: drawn
    by the record and the split's seed. First: one for all, as held-out records always have it.
    Absent: Varied. Not of Chat, whose prompts the model's chat template writes."""
    prompt: Text | None = None
    """The part that is read, e.g. `"Review: {{ sentence }}\\nSentiment:"`. Fields of the record
    are variables, and `{{ record["Review Text"] }}` is one whose name is no word. Lists, objects
    and booleans are written as JSON."""
    completion: Text | None = None
    """The part that is learned, e.g. `" {{ label }}"`. The end-of-sequence token follows it."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.name) || (has(self.prompt) && has(self.completion))",
            "a template needs a name, or prompt and completion",
            lambda t: bool(t.name or (t.prompt and t.completion)),
            (),
        ),
        Rule(
            "!has(self.name) || !(has(self.prompt) || has(self.completion))",
            "a template with a name has its prompt and completion from the library: leave name out,"
            " or these",
            lambda t: not (t.name and (t.prompt or t.completion)),
            ("name",),
        ),
        Rule(
            "has(self.name) || !(has(self.fields) || has(self.phrasings))",
            "fields and phrasings are for a template with a name",
            lambda t: bool(t.name or (t.fields is None and t.phrasings is None)),
            (),
        ),
        Rule(
            "!has(self.roles) || (has(self.name) && self.name == 'Chat')",
            "roles are for the template Chat",
            lambda t: t.roles is None or t.name == "Chat",
            ("name",),
        ),
        Rule(
            "!has(self.phrasings) || !has(self.name) || self.name != 'Chat'",
            "the template Chat has no phrasings: the model's chat template writes its prompts",
            lambda t: t.phrasings is None or t.name != "Chat",
            ("name",),
        ),
        Rule(
            "!has(self.name) || !has(self.fields) || self.fields.all(field,"
            f" field in {json.dumps(TEMPLATE_FIELDS)}[self.name])",
            f"fields must name the template's own before ':' ({_FIELDS_IN_WORDS})",
            lambda t: t.name is None or all(f in TEMPLATE_FIELDS[t.name] for f in t.fields or ()),
            ("name",),
        ),
    )


class Retrieval(Model):
    """Passages in the prompts of format Retrieval (RAFT, arXiv:2403.10131). They are numbered in an
    order drawn by the record and the split's seed; a citation of the answer becomes that number. A
    prompt that is cut (see `quality.overlength`) loses its first passages: Drop is safer."""

    distractors: Annotated[int, Field(ge=0, le=64)] | None = None
    """Passages shown beside the oracle, drawn from the record's. Absent: all that it has."""
    oracle_share: Fraction = "0.8"
    """Share of the training records that show the oracle. The others learn the same answer without
    it, and without its citations. Held-out records always show it."""
