"""Joins tokens of an instruction, examples, passages and a test prompt to one question.

    text            <bos> instruction ¶ example 1 ¶ example 2 ¶ passages ¶ prompt
    conversation    <bos> system turn, turns of example 1, turns of example 2, turns of the prompt

Tokens of examples and prompts are taken as training has them, so few-shot differs from zero-shot by
what stands in front alone. An empty line (¶) divides texts; conversations have their own marks of
turns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from finetune_trainer.prepare.questions.examples import Ids
from finetune_trainer.prepared.dataset import AnsweredPrompt

DIVIDER: Final = "\n\n"


@dataclass(frozen=True)
class Joint:
    """How the parts of a question are joined."""

    encode: Callable[[str], list[int]]
    """Tokens of a text, without special tokens."""
    system: Callable[[str], str] | None
    """Text of a system turn with some content, for conversations; None for texts."""
    bos_id: int | None
    """First token of samples, if fixed."""
    stops: Collection[int]
    """Tokens that end an answer."""

    def question(
        self, before: Sequence[str], examples: Sequence[AnsweredPrompt], prompt: Ids
    ) -> Ids:
        """Return the tokens of a prompt behind texts (an instruction, passages) and examples.

        Args:
            before: texts; in a conversation, one system turn.
            examples: in order.
            prompt: tokens of the test prompt, shape [tokens].

        Returns:
            Tokens, shape [tokens].
        """
        parts = self._texts(before) + [self._answered(e) for e in examples] + [prompt.tolist()]
        whole = parts[0]
        for part in parts[1:]:
            whole = whole + self._divider() + self._continued(parts[0], part)
        return np.array(whole, np.int32)

    def _texts(self, before: Sequence[str]) -> list[list[int]]:
        if not before:
            return []
        text = DIVIDER.join(before)
        ids = self.encode(self.system(text) if self.system else text)
        first = [] if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id]
        return [first + ids]

    def _answered(self, example: AnsweredPrompt) -> list[int]:
        """Tokens of an example; a text without the token at its end, behind which nothing comes."""
        ids: list[int] = example.ids.tolist()
        return ids[:-1] if self.system is None and ids[-1] in self.stops else ids

    def _divider(self) -> list[int]:
        return self.encode(DIVIDER) if self.system is None else []

    def _continued(self, first: Sequence[int], part: Sequence[int]) -> list[int]:
        """Tokens of a further part, without its beginning-of-sequence token; of a conversation,
        without the turns that all begin with (a system turn)."""
        start = 1 if self.bos_id is not None and part[:1] == [self.bos_id] else 0
        if self.system is not None:
            for at, (ours, theirs) in enumerate(zip(part, first, strict=False)):
                if ours != theirs:
                    break
                if ours in self.stops:
                    start = at + 1
        return list(part[start:])
