"""Renders records to examples, the input of the tokenizer.

An example is a sequence of text segments, each supervised or not. Segments are tokenized
separately, which makes two things exact: the supervised tokens (no token spans a border), and the
tokens before a supervised segment, which equal those of the same prompt in generation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from finetune_api.sources import Data, DataSource, Format
from finetune_api.templates import Retrieval
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering.chat import ChatTemplate
from finetune_trainer.prepare.rendering.conversations import conversation_of, function_of
from finetune_trainer.prepare.rendering.formats import (
    Content,
    Conversation,
    Document,
    Pair,
    content_of,
    group_value,
    slice_values,
)
from finetune_trainer.prepare.rendering.retrieval import RetrievalPrompts
from finetune_trainer.prepare.rendering.templates import LibraryTemplate, PairTemplate
from finetune_trainer.prepare.rendering.turns import ChatTurns
from finetune_trainer.prepared.split import Side, shares_of, side_of

_INSTRUCTING: Final = ("system", "developer")
"""Roles of turns with instructions, which many conversations share."""


class Segment(NamedTuple):
    """A part of an example's text."""

    text: str
    supervised: bool
    """Whether the segment is supervised."""


@dataclass(frozen=True, slots=True)
class RenderedExample:
    """One sample as text."""

    where: str
    """Object and line of its record."""
    segments: tuple[Segment, ...]
    """The text; the last segment is supervised."""
    prompt: str
    """Text before the last supervised segment."""
    completion: str
    """The reference that a generated answer is compared with."""
    label: str | None
    """The reference label, for Classification."""
    group: str
    """Examples of equal groups stay on one side of the split; with ``groupBy``, those of held-out
    sides are one unit of the test statistics."""
    framed: bool
    """Whether to add the tokenizer's begin and end tokens; a chat template writes its own."""
    side: Side
    """Side of the split, by the group."""
    own: str
    """The record's own text, for comparison with other records: without text that many records
    share (system turns, tools, template texts). Equal for all samples of a conversation."""
    continues: bool = False
    """Whether its text continues in another example: it has no end token then."""
    slices: tuple[str, ...] = ()
    """Values of the fields of ``evaluation.slices``, of a test sample."""
    personal: Mapping[str, int] = field(default_factory=dict)
    """Number of findings of each kind of personal data (see ``personal``)."""


Renderer = Callable[[Record], list[RenderedExample]]
Render = Callable[[Record], Content]


def renderer(
    source: Source,
    form: Format,
    data: Data,
    chat: ChatTemplate | None,
    redact: Callable[[str], str] = str,
    content: Callable[[Record, Format], Content] = content_of,
    slices: Sequence[str] = (),
) -> Renderer:
    """Return the function that renders a source's records: to one example each, or one per turn for
    some conversations (see ``chat``).

    Args:
        redact: redacts groups as the examples will be redacted: prompts that become equal stay
            together.
        content: reads a record of a plain format without a template.
        slices: fields of ``evaluation.slices``.

    Raises (the function):
        DataError: for an unusable record, with object, line and field.
    """
    held_out, training = _renders(source.spec, form, data.split.seed, content)
    shares = shares_of(data, source.side, source.spec.canaries)
    group_of = _grouping(source, data, redact)

    def examples(record: Record) -> list[RenderedExample]:
        content = held_out(record)
        group = group_of(record, content)
        side = side_of(group, shares) if shares else source.side
        if side == "train" and training is not None:
            content = training(record)
        if isinstance(content, Conversation):
            assert chat is not None, "a Messages source is read with a chat template"
            found = _chat_examples(record, content, group, side, chat)
        elif isinstance(content, Document):
            found = [_document_example(record, content, group, side)]
        else:
            found = [_pair_example(record, content, group, side, form)]
        if slices and side == "test":
            values = slice_values(record, slices)
            found = [replace(example, slices=values) for example in found]
        return found

    return examples


def _grouping(
    source: Source, data: Data, redact: Callable[[str], str]
) -> Callable[[Record, Content], str]:
    """Return the function that tells the group of a record. With ``groupBy``, a record of a
    separate held-out set without the field is a group of its own, named by its place."""
    field = data.split.group_by
    if field is None:
        return lambda _, content: redact(_group_of(content))
    if source.side == "train":
        return lambda record, _: group_value(record, field)
    return lambda record, _: (
        record.where if record.fields.get(field) is None else group_value(record, field)
    )


def _renders(
    spec: DataSource, form: Format, seed: int, content: Callable[[Record, Format], Content]
) -> tuple[Render, Render | None]:
    """Return the render function of held-out records, and that of training records if it
    differs."""
    if form == "Messages":
        return ChatTurns(spec.template).read if spec.template else conversation_of, None
    if form == "Retrieval":
        prompts = RetrievalPrompts(spec.retrieval or Retrieval(), seed)
        return prompts.with_oracle, prompts.drawn
    if spec.template is None:
        return (lambda record: content(record, form)), None
    if spec.template.name is None:
        return PairTemplate(spec.template).render, None
    template = LibraryTemplate(spec.template, seed)
    return template.first, None if spec.template.phrasings == "First" else template.varied


def nothing_supervised(where: str, why: str) -> DataError:
    """Return the error of a record without supervised tokens."""
    return DataError(
        "NothingSupervised",
        f"{where}: this record has no supervised tokens: {why}. Correct the record or the template",
    )


def _group_of(content: Content) -> str:
    """Return the group of a record: records with equal prompts stay together. The group of a
    conversation is the text before the first answer, as conversations with the same beginning share
    the prompts of their first turns."""
    if isinstance(content, Pair):
        return content.prompt if content.subject is None else content.subject
    if isinstance(content, Document):
        return content.text
    roles = [message["role"] for message in content.messages]
    opening = roles.index("assistant") if "assistant" in roles else len(roles)
    return json.dumps(
        [[m["role"], m.get("content")] for m in content.messages[:opening]], ensure_ascii=False
    )


def _own_words(content: Content) -> str:
    if isinstance(content, Pair):
        asked = content.prompt if content.subject is None else content.subject
        return f"{asked}\n{content.completion}" if content.own is None else content.own
    if isinstance(content, Document):
        return content.text
    said: list[str] = []
    for message in content.messages:
        if message["role"] not in _INSTRUCTING:
            said.append(message.get("content") or "")
            calls = map(function_of, message.get("tool_calls", ()))
            said += (f"{c['name']} {json.dumps(c['arguments'], ensure_ascii=False)}" for c in calls)
    return "\n".join(said)


def _pair_example(
    record: Record, pair: Pair, group: str, side: Side, form: Format
) -> RenderedExample:
    if not pair.completion.strip():
        learned = "label" if form == "Classification" else "completion"
        raise nothing_supervised(record.where, f"its {learned} is empty, or white space")
    label = pair.completion.strip() if form == "Classification" else None
    return RenderedExample(
        where=record.where,
        segments=(Segment(pair.prompt, False), Segment(pair.completion, True)),
        prompt=pair.prompt,
        completion=pair.completion,
        label=label,
        group=group,
        framed=True,
        side=side,
        own=_own_words(pair),
    )


def _document_example(
    record: Record, document: Document, group: str, side: Side
) -> RenderedExample:
    if not document.text.strip():
        raise nothing_supervised(record.where, "its text is empty, or white space")
    return RenderedExample(
        where=record.where,
        segments=(Segment(document.text, True),),
        prompt="",
        completion=document.text,
        label=None,
        group=group,
        framed=True,
        side=side,
        own=_own_words(document),
    )


def _chat_examples(
    record: Record, conversation: Conversation, group: str, side: Side, chat: ChatTemplate
) -> list[RenderedExample]:
    own = _own_words(conversation)
    examples = []
    for rendered in chat.render(record.where, conversation):
        segments: list[Segment] = []
        for turn in rendered:
            segments += [Segment(turn.before, False), Segment(turn.answer + turn.stop, True)]
        prompt = "".join(segment.text for segment in segments[:-1])
        examples.append(
            RenderedExample(
                where=record.where,
                segments=tuple(segments),
                prompt=prompt,
                completion=rendered[-1].answer,
                label=None,
                group=group,
                framed=False,
                side=side,
                own=own,
            )
        )
    return examples
