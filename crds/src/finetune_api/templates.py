"""Spec blocks for converting records to prompts and completions."""

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
"""Fields of each template of the trainer's library; `finetune templates` describes them."""

_FIELDS_IN_WORDS: Final = "; ".join(
    f"{name}: {', '.join(fields)}" for name, fields in TEMPLATE_FIELDS.items()
)


class Template(Model):
    """Conversion of a record to a prompt and a completion: a library template by name, or a custom
    one (Jinja)."""

    name: TemplateName | None = None
    """A library template: `finetune templates` lists them, `finetune templates NAME` shows example
    output."""
    fields: Annotated[dict[FieldName, FieldName], Field(max_length=16)] | None = None
    """For a library template: maps its field names to those of the records, e.g.
    `{document: article}`, or for Chat `{messages: conversations, role: from, content: value}`.
    Absent: the template's own names."""
    roles: Annotated[dict[FieldName, Role], Field(max_length=16)] | None = None
    """For Chat: maps role names of the records to roles, e.g. `{bot: assistant}`, in addition to
    system, user, human, assistant, gpt and tool, which are known. A record with any other role is
    faulty."""
    phrasings: Literal["Varied", "First"] | None = None
    """Prompt wordings of a library template for training records. Varied: drawn by the record and
    the split's seed. First: one wording for all, which held-out records always have. Absent:
    Varied. Not for Chat, whose prompts the model's chat template writes."""
    prompt: Text | None = None
    """Template of the prompt, e.g. `"Review: {{ sentence }}\\nSentiment:"`. Fields of the record
    are variables; a name that is not an identifier is written `{{ record["Review Text"] }}`. Lists,
    objects and booleans are written as JSON."""
    completion: Text | None = None
    """Template of the completion, which is trained on, e.g. `" {{ label }}"`. The end-of-sequence
    token follows it."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.name) || (has(self.prompt) && has(self.completion))",
            "a template needs a name, or prompt and completion",
            lambda t: bool(t.name or (t.prompt and t.completion)),
            (),
        ),
        Rule(
            "!has(self.name) || !(has(self.prompt) || has(self.completion))",
            "a template with a name has its own prompt and completion: leave name out, or prompt"
            " and completion",
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
            f"the keys of fields must be fields of the template ({_FIELDS_IN_WORDS})",
            lambda t: t.name is None or all(f in TEMPLATE_FIELDS[t.name] for f in t.fields or ()),
            ("name",),
        ),
    )


class Retrieval(Model):
    """Passages in the prompts of format Retrieval (RAFT, arXiv:2403.10131). They are numbered in an
    order drawn by the record and the split's seed, and citations in the answer become these
    numbers. Truncating a prompt (see `quality.overlength`) removes its first passages: prefer
    Drop."""

    distractors: Annotated[int, Field(ge=0, le=64)] | None = None
    """Number of passages shown besides the oracle, drawn from the record's distractors. Absent: all
    of them."""
    oracle_share: Fraction = "0.8"
    """Share of the training records whose prompts show the oracle. The others train the same answer
    without the oracle and without its citations. Held-out records always show it."""
