"""Conversations through the tokenizer's chat template, with exact borders of what is learned.

Chat templates rarely mark the assistant's words ({% generation %}), so the borders are found by
rendering prefixes of the conversation:

    render(messages[:i], add_generation_prompt=True)  ends where turn i's answer begins
    render(messages[:i+1])                            ends behind turn i's answer

The answer is learned together with its end-of-turn token (else the model never learns to stop) and
without the white space behind it (which no generation reaches). Some templates render a turn in
another way once others follow it (they drop its reasoning): such a conversation becomes one sample
a turn, each exactly as it stands when that turn is generated. Whatever does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2

from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepare.formats import Message


class Turn(NamedTuple):
    """An answer of the assistant in the rendered text."""

    before: str
    """Text between the answer before and this one."""
    answer: str
    stop: str
    """Text of the end-of-turn token."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        UserError: 'NoChatTemplate' where the tokenizer has none.
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

    def render(self, where: str, messages: Sequence[Message]) -> list[list[Turn]]:
        """The conversation as one row of turns, or as several (one a turn, each with its prefix)
        where the template renders earlier turns in another way. What follows the last answer is
        left out: nothing is learned from it.

        Raises:
            DataError: 'NothingSupervised', 'TemplateFailed', 'PrefixMismatch' or 'NoEndOfTurn',
                naming the record.
        """
        # An answer that opens the conversation has no prompt: it is read, not learned.
        ends = [i for i, m in enumerate(messages) if i and m["role"] == "assistant"]
        if not ends:
            raise DataError(
                "NothingSupervised",
                f"{where}: no token of this record would be learned: no message after the first has"
                f" the role 'assistant' (roles: {', '.join(m['role'] for m in messages[:8])})",
            )
        spans = [self._turn(where, messages, i) for i in ends]
        whole = "".join(spans[-1])
        row: list[Turn] = []
        position = 0
        for before, answer, stop in spans:
            if len(before) < position or not whole.startswith(before + answer + stop):
                return [[turn] for turn in spans]
            row.append(Turn(before[position:], answer, stop))
            position = len(before) + len(answer) + len(stop)
        return [row]

    def _turn(self, where: str, messages: Sequence[Message], i: int) -> Turn:
        """Turn i with all that precedes it as ``before``."""
        before = self._text(where, messages[:i], generate=True)
        through = self._text(where, messages[: i + 1], generate=False).rstrip()
        if not through.startswith(before):
            raise DataError(
                "PrefixMismatch",
                f"{where}: the chat template does not continue its own generation prompt at"
                f" message {i}, so what the assistant says cannot be told apart. Give prompt and"
                " completion, or a model folder with another chat_template.jinja",
            )
        learned = through[len(before) :]
        stop = next((text for text in self._stops if learned.endswith(text)), None)
        if stop is None:
            raise DataError(
                "NoEndOfTurn",
                f"{where}: the chat template ends message {i} with {learned[-20:]!r}, which is no"
                " special token of the tokenizer: the model would never learn to stop. Give a"
                " model folder with another chat_template.jinja",
            )
        if learned == stop:
            raise DataError(
                "NothingSupervised",
                f"{where}: no word of message {i} would be learned: it is empty, or the chat"
                " template writes nothing for it",
            )
        return Turn(before, learned[: -len(stop)], stop)

    def _text(self, where: str, messages: Sequence[Message], generate: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generate
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(
                "TemplateFailed",
                f"{where}: the tokenizer's chat template refuses the conversation: {error}",
            ) from None
        return str(text)
