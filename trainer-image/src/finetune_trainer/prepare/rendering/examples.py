"""Rendered examples: what a record becomes before the tokenizer sees it.

An example is a row of segments of text, each read or learned. Cutting the text there, and
tokenizing each by itself, makes two things exact that tokenizing the whole text would leave to
chance: which tokens are learned (no token lies across a border), and that the tokens before a
learned segment are those that a prompt of that text has when text is generated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
)
from finetune_trainer.prepare.rendering.retrieval import RetrievalPrompts
from finetune_trainer.prepare.rendering.templates import LibraryTemplate, PairTemplate
from finetune_trainer.prepare.rendering.turns import ChatTurns
from finetune_trainer.prepared.split import Side, shares_of, side_of

_INSTRUCTING: Final = ("system", "developer")
"""Roles of turns that say how to answer, in many conversations alike."""


class Segment(NamedTuple):
    """A stretch of an example's text."""

    text: str
    learned: bool


@dataclass(frozen=True, slots=True)
class RenderedExample:
    """One sample as text."""

    where: str
    """Object and line that it came from."""
    segments: tuple[Segment, ...]
    """The text; the last part is a learned one."""
    prompt: str
    """What is read before the last learned part."""
    completion: str
    """What an answer is compared with."""
    label: str | None
    """The right label, for Classification."""
    group: str
    """Examples of equal groups stay on one side of the split."""
    framed: bool
    """Whether the tokenizer's beginning and end marks are to be added; a chat template has its
    own."""
    side: Side
    """The side that the group is on."""
    own: str
    """The record's own words, by which it is compared with others: without what many records share
    (system turns, tools, the texts of templates). Of all samples of a conversation the same."""
    goes_on: bool = False
    """Whether its text goes on in another example: it has no end mark then."""
    personal: Mapping[str, int] = field(default_factory=dict)
    """How often each kind of personal data was found in it (see ``personal``)."""


Renderer = Callable[[Record], list[RenderedExample]]
Render = Callable[[Record], Content]


def renderer(
    source: Source,
    form: Format,
    data: Data,
    chat: ChatTemplate | None,
    redact: Callable[[str], str] = str,
    content: Callable[[Record, Format], Content] = content_of,
) -> Renderer:
    """The function that makes examples of a source's records: one each, or one a turn for some
    conversations (see ``chat``).

    Args:
        redact: takes out of a group what will be taken out of the examples: prompts that differ in
            nothing else stay together.
        content: content of a record of a plain format that has no template.

    Raises (the function):
        DataError: naming object, line and field, where a record cannot be used.
    """
    held_out, training = _renders(source.spec, form, data.split.seed, content)
    shares = shares_of(data, source.side)
    group_by = data.split.group_by if source.side == "train" else None

    def example(record: Record) -> list[RenderedExample]:
        content = held_out(record)
        group = group_value(record, group_by) if group_by else redact(_group_of(content))
        side = side_of(group, shares) if shares else source.side
        if side == "train" and training is not None:
            content = training(record)
        if isinstance(content, Conversation):
            assert chat is not None, "a Messages source is read with a chat template"
            return _chat_examples(record, content, group, side, chat)
        if isinstance(content, Document):
            return [_document_example(record, content, group, side)]
        return [_pair_example(record, content, group, side, form)]

    return example


def _renders(
    spec: DataSource, form: Format, seed: int, content: Callable[[Record, Format], Content]
) -> tuple[Render, Render | None]:
    """How held-out records are rendered, and how training records are where that differs."""
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


def nothing_learned(where: str, why: str) -> DataError:
    """The error of a record that leaves nothing to learn."""
    return DataError(
        "NothingSupervised",
        f"{where}: no token of this record would be learned: {why}. Correct the record or the"
        " template",
    )


def _group_of(content: Content) -> str:
    """Records with equal prompts stay together. Of a conversation it is what precedes the first
    answer: conversations that begin alike share the prompts of their first turns."""
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
        raise nothing_learned(record.where, f"its {learned} is empty, or white space")
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
        raise nothing_learned(record.where, "its text is empty, or white space")
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
