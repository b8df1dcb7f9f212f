"""Renders conversations with the tokenizer's chat template, with exact bounds of the supervised
text.

The bounds are found by rendering prefixes of the conversation:

    render(messages[:i], add_generation_prompt=True)  ends where turn i's answer begins
    render(messages[:i+1])                            ends after turn i's answer

Few chat templates mark the assistant's text ({% generation %}); such marks narrow the answer
further. The supervised text is the answer with its end-of-turn token (else the model never learns
to stop), without the text after it, which generation never reaches: white space, and text that some
templates write at the end of a conversation. Tool calls are answers too. Tools, their results and
answers of weight 0 are not supervised. Some templates render a turn differently once others follow
it (they drop its reasoning): such a conversation becomes one sample per turn, each exactly as when
that turn is generated. Everything else is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from finetune_trainer.failures import DataError, UserError
from finetune_trainer.personal import redacted
from finetune_trainer.prepare.rendering.conversations import function_of
from finetune_trainer.prepare.rendering.formats import Conversation, Message
from finetune_trainer.prepare.rendering.limits import RENDER_ERRORS, check_length, has_power

Mark = tuple[int, int]
"""Start and end of a text range, in characters."""

Tools = list[dict[str, Any]] | None

_GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Turn(NamedTuple):
    """An answer of the assistant in the rendered text."""

    before: str
    """Text between the previous answer and this one."""
    answer: str
    stop: str
    """Text of the end-of-turn token."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        UserError: 'NoChatTemplate', the tokenizer has none.

    Chat templates are untrusted: render within ``limits.limited_work``.
    """

    def __init__(self, tokenizer: Any, model: str) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "NoChatTemplate",
                f"{model}: its tokenizer has no chat template, which format Messages needs; use an"
                " instruction-tuned model, add chat_template.jinja to the model's folder, or give"
                " prompt and completion",
            )
        self._tokenizer = tokenizer
        special = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._stops = tuple(sorted(special, key=len, reverse=True))
        self._checked: set[str] = set()

    def render(self, where: str, conversation: Conversation) -> list[list[Turn]]:
        """Render a conversation to one list of turns, or to several (one per turn, each with its
        prefix) where the template renders earlier turns differently. Text after the last answer is
        dropped, as it is not supervised.

        Raises:
            DataError: 'NothingSupervised', 'TemplateFailed', 'ToolsNotWritten', 'PrefixMismatch',
                'MarkMismatch' or 'NoEndOfTurn', with the record.
        """
        messages = conversation.messages
        # An answer that opens the conversation has no prompt, so it is not supervised.
        ends = [i for i, m in enumerate(messages) if i and _is_learned(m)]
        if not ends:
            raise DataError(
                "NothingSupervised",
                f"{where}: this record has no supervised tokens: no message after the first has the"
                " role 'assistant' and a weight other than 0 (roles:"
                f" {', '.join(m['role'] for m in messages[:8])})",
            )
        spans = [self._turn(where, conversation, i) for i in ends]
        _must_write(where, conversation.tools or (), spans[0].before, "the field 'tools'")
        whole = "".join(spans[-1])
        row: list[Turn] = []
        position = 0
        for before, answer, stop in spans:
            if len(before) < position or not whole.startswith(before + answer + stop):
                return [[turn] for turn in spans]
            row.append(Turn(before[position:], answer, stop))
            position = len(before) + len(answer) + len(stop)
        return [row]

    def system_turn(self, text: str) -> str:
        """Return the text of a conversation that has a system turn alone.

        Raises:
            DataError: 'TemplateFailed', the template knows no such conversation.
        """
        message = {"role": "system", "content": text}
        return self._text("a system turn", [message], None, generate=False)[0]

    def _turn(self, where: str, conversation: Conversation, i: int) -> Turn:
        """Return turn i, with the whole text that precedes its answer as ``before``."""
        messages, tools = conversation.messages, conversation.tools
        prompt, _ = self._text(where, messages[:i], tools, generate=True)
        text, marks = self._text(where, messages[: i + 1], tools, generate=False)
        through = text.rstrip()
        if not through.startswith(prompt):
            raise DataError(
                "PrefixMismatch",
                f"{where}: the chat template does not continue its own generation prompt at"
                f" message {i}, so the assistant's text cannot be located. Give prompt and"
                " completion, or a model folder with another chat_template.jinja",
            )
        start, end = len(prompt), len(through)
        if marks is not None:
            start, end = self._marked(where, through, start, marks, i)
        learned = through[start:end]
        ends = self._ends(learned)
        if len(ends) > 1:  # some may end the conversation, not the turn
            more, _ = self._text(where, messages[: i + 1], tools, generate=True)
            on = [end for end in ends if more.startswith(text[: start + end[0]])]
            ends = on or ends
        if not ends:
            last = redacted(learned)[-20:]
            raise DataError(
                "NoEndOfTurn",
                f"{where}: the chat template ends message {i} with {last!r}, which is not a"
                " special token of the tokenizer: the model would never learn to stop. Give a"
                " model folder with another chat_template.jinja",
            )
        end, stop = ends[0]
        learned = learned[:end]
        if not learned[: -len(stop)].strip():
            raise DataError(
                "NothingSupervised",
                f"{where}: message {i} has no supervised text: it is empty, or the chat template"
                " writes nothing for it",
            )
        _must_write(where, messages[i].get("tool_calls", ()), learned, f"calls of message {i}")
        return Turn(through[:start], learned[: -len(stop)], stop)

    def _ends(self, text: str) -> list[tuple[int, str]]:
        """Return the special tokens at the end of a text: end offset and text of each, the last
        token first."""
        ends: list[tuple[int, str]] = []
        text = text.rstrip()
        while stop := next((stop for stop in self._stops if text.endswith(stop)), None):
            ends.append((len(text), stop))
            text = text.removesuffix(stop).rstrip()
        return ends

    def _marked(self, where: str, text: str, prompt: int, marks: list[Mark], i: int) -> Mark:
        """Return the range of message i's supervised text by the template's own marks. The marks
        may exclude text after the generation prompt (an empty thought), and the stop token. The
        model generates the stop token, so it is supervised too."""
        own = [(start, end) for start, end in marks if end > max(start, prompt)]
        if len(own) != 1:
            raise DataError(
                "MarkMismatch",
                f"{where}: the chat template marks {len(own)} parts of message {i} by"
                " {% generation %}, but must mark one. Give a model folder with another"
                " chat_template.jinja",
            )
        start, end = max(own[0][0], prompt), len(text[: own[0][1]].rstrip())
        if not text[start:end].endswith(self._stops):
            behind = text[end:].lstrip()
            stop = next((stop for stop in self._stops if behind.startswith(stop)), "")
            end = len(text) - len(behind) + len(stop) if stop else end
        return start, end

    def _text(
        self, where: str, messages: Sequence[Message], tools: Tools, *, generate: bool
    ) -> tuple[str, list[Mark] | None]:
        """Render messages to text, with the ranges that the template marks (None for a template
        without marks)."""
        try:
            template = self._template(tools)
            marked = _GENERATION.search(template) is not None
            rendered: Any = render_jinja_template(
                [list(messages)],
                tools=[*tools] if tools else None,
                chat_template=template,
                add_generation_prompt=generate,
                return_assistant_tokens_mask=marked,
                **self._tokenizer.special_tokens_map,
            )
        except RENDER_ERRORS as error:
            raise DataError(
                "TemplateFailed",
                f"{where}: the tokenizer's chat template refuses the conversation:"
                f" {redacted(str(error))}",
            ) from None
        texts, marks = rendered
        check_length(where, len(texts[0]))
        return texts[0], marks[0] if marked else None

    def _template(self, tools: Tools) -> str:
        """Return the template's text: a tokenizer may have another one for tools."""
        template: str = self._tokenizer.get_chat_template(None, tools)
        if template not in self._checked:
            if has_power(template):
                raise jinja2.TemplateError("templates must not raise to a power (**)")
            self._checked.add(template)
        return template


def _is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _must_write(where: str, calls: Sequence[Any], text: str, what: str) -> None:
    """Reject a template that ignores tools or tool calls: many templates do not support them."""
    for name in (function_of(call)["name"] for call in calls):
        if name not in text:
            raise DataError(
                "ToolsNotWritten",
                f"{where}: {what}: the tokenizer's chat template does not write {name!r}: it does"
                " not support tools, and the model would train without them. Give a model folder"
                " with another chat_template.jinja",
            )
