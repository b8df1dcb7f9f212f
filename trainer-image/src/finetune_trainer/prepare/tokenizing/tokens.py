"""Tokenizes examples to samples: token ids and supervised spans.

Every segment of an example is tokenized separately (for the reason see ``examples``). Segments
after the first are tokenized as a continuation: some tokenizers add a space at the beginning of a
text, which would be in the middle of the sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from finetune_api.tasks import TaskName
from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepare.reading.faults import Complain, refuse
from finetune_trainer.prepare.rendering.examples import RenderedExample, nothing_supervised

Ids = npt.NDArray[np.int32]
Span = tuple[int, int]
"""Start and end of a token range."""

Cut = Literal["None", "Prompt", "Completion", "Text", "Dropped"]
"""What was cut off: nothing; the beginning of the prompt; also the end of the completion; the end
of a text to classify; the whole sample."""

CUTS: Final[tuple[Cut, ...]] = get_args(Cut)

_PROBE: Final = "a b"


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """A tokenized example."""

    example: RenderedExample
    ids: Ids
    """Token ids, shape [tokens]."""
    spans: tuple[Span, ...]
    """Supervised tokens, ascending. Position 0 is never supervised, as no token precedes it to
    predict it from. Counts of supervised tokens are therefore exact denominators of the loss."""
    prompt_length: int
    """Tokens before the last supervised span: the prompt for generation."""
    gaps: tuple[Span, ...] = field(default=(), kw_only=True)
    """Ranges cut off, in positions of the uncut sample, ascending."""

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(end - start for start, end in self.spans)

    def shortened(self, limit: int, bos: int | None) -> tuple[TokenizedSample, Cut]:
        """Shorten a longer sample to ``limit`` tokens.

        The cut is between the beginning-of-sequence token, which stays, and the last supervised
        span. If that span alone is too long, one token of the prompt stays (the answer needs a
        token to be predicted from) and the end of the span is cut off.
        """
        length = len(self.ids)
        keep = 1 if bos is not None and self.prompt_length and self.ids[0] == bos else 0
        least = min(self.prompt_length, keep + 1)
        answer = length - self.prompt_length
        prompt = max(least, limit - answer)
        dropped = self.prompt_length - prompt
        ids = np.concatenate([self.ids[:keep], self.ids[keep + dropped :]])[:limit]
        spans = tuple(
            (max(keep, 1, start - dropped), min(end - dropped, limit))
            for start, end in self.spans
            if end - dropped > max(keep, 1)
        )
        cut: Cut = "Prompt" if prompt + answer <= limit else "Completion"
        gaps = _filled((keep, keep + dropped), (dropped + len(ids), length))
        return replace(self, ids=ids, spans=spans, prompt_length=prompt, gaps=gaps), cut


def fit(
    sample: TokenizedSample, limit: int, policy: str, bos: int | None
) -> tuple[TokenizedSample | None, Cut]:
    """Return the sample in at most ``limit`` tokens (None: dropped), and what was cut off.
    Documents have been split before (see ``documents``).

    Raises:
        DataError: 'Overlength' under policy Fail, with record, length and limit.
    """
    length = len(sample.ids)
    if length <= limit:
        return sample, "None"
    if policy == "Fail":
        raise DataError(
            "Overlength",
            f"{sample.example.where}: {length} tokens, but training.maxLength is {limit}; shorten"
            " the record, raise training.maxLength, or set data.quality.overlength to Split,"
            " Truncate or Drop",
        )
    if policy == "Drop":
        return None, "Dropped"
    return sample.shortened(limit, bos)


def _filled(*spans: Span) -> tuple[Span, ...]:
    return tuple((start, end) for start, end in spans if start < end)


class Placed(NamedTuple):
    """Positions of the tokens of a segment."""

    first: int
    """Position of its first token among all tokens of the example."""
    begins: list[int]
    """Start of each token, in characters of the segment's text."""


class Tokenizing(Protocol):
    """Interface: tokenizes examples to samples."""

    bos_id: int | None
    """First token of samples, if fixed."""
    longest: int | None
    """Maximum tokens of a sample by the tokenizer's own settings; None: no bound."""

    def samples(
        self, examples: Sequence[RenderedExample], complain: Complain = refuse
    ) -> list[TokenizedSample]:
        """Tokenize a batch of examples; ``complain`` is called with faults of records."""

    def placed(self, example: RenderedExample) -> list[Placed]:
        """Positions of the tokens of an example's segments, without trailing segments that have no
        tokens (a label)."""


class Tokens:
    """Tokenizes examples of causal language modeling.

    Args:
        tokenizer: a transformers tokenizer.
        model: the model's address, for messages.
        vocabulary: rows of the model's embedding.

    Raises:
        UserError: 'NoEndToken', the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, model: str, vocabulary: int) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "NoEndToken",
                f"{model}: its tokenizer has no eos_token, so the model could not learn to stop;"
                " set eos_token in tokenizer_config.json",
            )
        self._tokenizer = tokenizer
        self._model = model
        self._vocabulary = vocabulary
        self._fast = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        self.eos_id: Final[int] = tokenizer.eos_token_id
        self.prefix: Final[tuple[int, ...]] = self._marks_at_start()
        """Tokens that the tokenizer puts before a text (beginning-of-sequence), mostly one or
        none."""
        self.bos_id: int | None = self.prefix[0] if self.prefix else tokenizer.bos_token_id
        """First token of samples, if fixed; a chat template writes it itself."""
        self.longest: int | None = None
        self._lead = self._lead_of_continuation()

    def samples(
        self, examples: Sequence[RenderedExample], complain: Complain = refuse
    ) -> list[TokenizedSample]:
        """Tokenize a batch of examples.

        Args:
            complain: called with 'NothingSupervised' or 'EmptyPrompt' errors, which name the
                record.

        Raises:
            DataError: from ``complain``.
            UserError: 'VocabularyMismatch', the model has no embedding for a token.
        """
        texts = [
            self._lead + part.text if i else part.text
            for example in examples
            for i, part in enumerate(example.segments)
        ]
        ids = iter(self._encode(texts))
        samples = []
        for example in examples:
            try:
                samples.append(self._assemble(example, ids))
            except DataError as error:
                complain(error)
        return samples

    def placed(self, example: RenderedExample) -> list[Placed]:
        """Positions of the tokens of an example's segments."""
        first = len(self.prefix) if example.framed else 0
        found = []
        for i, part in enumerate(example.segments):
            lead = self._lead if i else ""
            begins = begins_of(self._tokenizer, lead + part.text)[1 if lead else 0 :]
            found.append(Placed(first, [max(0, begin - len(lead)) for begin in begins]))
            first += len(begins)
        return found

    def _assemble(self, example: RenderedExample, encoded: Iterable[list[int]]) -> TokenizedSample:
        ids = list(self.prefix) if example.framed else []
        spans: list[Span] = []
        source = iter(encoded)
        for i, part in enumerate(example.segments):
            tokens = next(source)
            start = len(ids)
            ids += tokens[1:] if i and self._lead else tokens
            if part.supervised:
                spans.append((start, len(ids)))
        start, end = spans[-1]
        if start == end:
            raise nothing_supervised(example.where, "its completion has no token")
        if example.framed and not example.continues:
            ids.append(self.eos_id)
            spans[-1] = (start, end + 1)
        if start == 0 and example.prompt == "" and len(example.segments) > 1:
            raise DataError(
                "EmptyPrompt",
                f"{example.where}: the prompt is empty, and the tokenizer has no"
                " beginning-of-sequence token, so generation has no first token; give a prompt, or"
                " use format Text",
            )
        check_vocabulary(ids, self._vocabulary, self._model)
        exact = tuple((max(1, start), end) for start, end in spans)
        return TokenizedSample(example, np.array(ids, np.int32), exact, start)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._fast is not None:
            return [e.ids for e in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        return list(self._tokenizer(texts, add_special_tokens=False)["input_ids"])

    def _marks_at_start(self) -> tuple[int, ...]:
        (plain,) = self._encode([_PROBE])
        marked = list(self._tokenizer(_PROBE)["input_ids"])
        for start in range(len(marked) - len(plain) + 1):
            if marked[start : start + len(plain)] == plain:
                return tuple(marked[:start])
        return ()

    def _lead_of_continuation(self) -> str:
        """Return the text to prepend so that a segment is tokenized as a continuation; its single
        token is removed again. Empty where the tokenizer does not treat beginnings specially."""
        eos = str(self._tokenizer.eos_token)
        beginning, behind = self._encode([_PROBE, eos + _PROBE])
        return eos if behind[:1] == [self.eos_id] and behind[1:] != beginning else ""


def begins_of(tokenizer: Any, text: str) -> list[int]:
    """Return the start character of each token of a text, without special tokens. Estimates for a
    slow tokenizer, which has no offsets: as if all tokens had equal lengths."""
    encoded = tokenizer(
        text, add_special_tokens=False, padding=False, truncation=False, verbose=False,
        return_offsets_mapping=tokenizer.is_fast,
    )  # fmt: skip
    if tokenizer.is_fast:
        return [begin for begin, _ in encoded["offset_mapping"]]
    count = len(encoded["input_ids"])
    return [len(text) * i // count for i in range(count)]


def check_vocabulary(ids: Sequence[int], vocabulary: int, model: str) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        UserError: 'VocabularyMismatch'.
    """
    if max(ids) >= vocabulary:
        raise UserError(
            "VocabularyMismatch",
            f"{model}: the tokenizer makes token {max(ids)}, but the model's vocabulary (vocab_size"
            f" in config.json) has {vocabulary}; give model and tokenizer that belong together",
        )


@dataclass(frozen=True)
class Model:
    """Tokenizer and limits of the base model."""

    source: str
    """Its address, for messages."""
    tokenizer: Any
    """Its transformers tokenizer."""
    tokens: Tokenizing
    task: TaskName
    """Task of the run."""
    max_length: int
    """Maximum tokens of a sample."""
    positions: int | None
    """Positions of the model that samples can take; None: no bound."""
    head: tuple[str, ...] = ()
    """Classes of its classification head, if that is not trained."""
