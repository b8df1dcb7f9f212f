"""Previews: they show exactly what is trained."""

from __future__ import annotations

from typing import Any

import pytest
from classifiers import tokenizer_of
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.sources import Data, DataSource, Format
from finetune_trainer.prepare.mapping.previews import PREVIEW_CHARACTERS, preview
from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering.chat import ChatTemplate
from finetune_trainer.prepare.rendering.examples import RenderedExample, renderer
from finetune_trainer.prepare.rendering.formats import labelled_text
from finetune_trainer.prepare.tokenizing.texts import Texts
from finetune_trainer.prepare.tokenizing.tokens import TokenizedSample, Tokenizing, Tokens, fit
from trainer.prepare_helpers import CHATML, LLAMA3, make_tokenizer

PLAIN, BOS = make_tokenizer(), make_tokenizer(bos=True)
SPACED = make_tokenizer(bos=True, metaspace=True)
CHATS = [make_tokenizer(chat=template) for template in (LLAMA3, CHATML)]
WORDS = st.text(st.sampled_from("abc Td.\n"), min_size=1, max_size=40).filter(str.strip)


def example(form: Format, chat: Any = None, **fields: Any) -> RenderedExample:
    spec = DataSource(source="s3://bucket/a.jsonl")
    template = ChatTemplate(chat, "m") if chat else None
    make = renderer(Source("train", "a", spec, []), form, Data(train=[spec]), template)
    (made,) = make(Record(fields, "s3://b/a.jsonl", "line 7"))
    return made


def conversation(chat: Any, *contents: str) -> RenderedExample:
    said = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return example("Messages", chat, messages=said)


def truncated(tokens: Tokenizing, made: RenderedExample, limit: int) -> tuple[TokenizedSample, int]:
    """The truncated sample, and the number of tokens cut off."""
    (whole,) = tokens.samples([made])
    found, _ = fit(whole, limit, "Truncate", tokens.bos_id)
    assert found is not None
    return found, len(whole.ids) - len(found.ids)


def texts(shown: dict[str, Any], supervised: bool) -> str:
    return "".join(part["text"] for part in shown["parts"] if part["supervised"] == supervised)


def lost(shown: dict[str, Any]) -> int:
    return sum(part.get("cut", 0) for part in shown["parts"])


@pytest.mark.parametrize("tokenizer", [PLAIN, BOS, SPACED], ids=["plain", "bos", "spaced"])
@given(prompt=WORDS, completion=WORDS, limit=st.integers(4, 60), document=st.booleans())
def test_marks_of_plain_text_are_the_supervised_tokens(
    tokenizer: Any, prompt: str, completion: str, limit: int, document: bool
) -> None:
    made = (
        example("Text", text=prompt + completion)
        if document
        else example("PromptCompletion", prompt=prompt, completion=completion)
    )
    tokens = Tokens(tokenizer, "m", len(tokenizer))
    found, dropped = truncated(tokens, made, limit)
    shown = preview(found, tokens)
    assert (shown["tokens"], lost(shown)) == (len(found.ids), dropped)
    learned = [
        tokenizer.decode(found.ids[:end]).removeprefix(tokenizer.decode(found.ids[:start]))
        for start, end in found.spans
    ]
    assert bare(texts(shown, supervised=True)) == bare("".join(learned))
    assert bare(texts(shown, supervised=False) + texts(shown, supervised=True)) == bare(
        tokenizer.decode(found.ids)
    )


def bare(text: str) -> str:
    """Without special tokens, and without the space that some tokenizers put before a text."""
    return text.replace("<s>", "").replace("</s>", "").lstrip(" ")


@pytest.mark.parametrize("tokenizer", CHATS, ids=["llama3", "chatml"])
@given(contents=st.lists(WORDS.filter(str.strip), min_size=2, max_size=6), limit=st.integers(4, 90))
def test_marks_of_a_conversation_are_the_supervised_tokens(
    tokenizer: Any, contents: list[str], limit: int
) -> None:
    tokens = Tokens(tokenizer, "m", len(tokenizer))
    found, dropped = truncated(tokens, conversation(tokenizer, *contents), limit)
    shown = preview(found, tokens)
    assert lost(shown) == dropped
    learned = [tokenizer.decode(found.ids[start:end]) for start, end in found.spans]
    assert texts(shown, supervised=True) == "".join(learned)
    assert "".join(part["text"] for part in shown["parts"]) == tokenizer.decode(found.ids)


def test_a_turn_that_is_cut_off_is_not_shown_as_supervised() -> None:
    chat = CHATS[1]
    tokens = Tokens(chat, "m", len(chat))
    made = conversation(chat, "The cat", "sat on the mat", "And the bird?", "in the tree")
    found, dropped = truncated(tokens, made, 20)
    parts = preview(found, tokens)["parts"]
    assert parts[0] == {"text": "", "supervised": False, "cut": dropped} and dropped > 0
    assert [part["text"] for part in parts if part["supervised"]] == ["in the tree<|im_end|>"]
    assert "mat" not in "".join(part["text"] for part in parts)


def test_a_cut_completion_shows_the_rest_and_the_cut() -> None:
    tokens = Tokens(BOS, "m", len(BOS))
    made = example("PromptCompletion", prompt="The cat sat on the", completion=" mat" * 30)
    found, dropped = truncated(tokens, made, 12)
    parts = preview(found, tokens)["parts"]
    assert [("cut" in part, part["supervised"]) for part in parts] == [
        (True, False), (False, False), (False, True), (True, False),
    ]  # fmt: skip
    assert parts[2]["text"] == BOS.decode(found.ids[found.prompt_length :])
    assert parts[0]["cut"] + parts[3]["cut"] == dropped


def test_a_cut_of_the_stop_token_alone_is_shown() -> None:
    tokens = Tokens(PLAIN, "m", len(PLAIN))
    made = example("Text", text="The cat sat on the mat")
    (whole,) = tokens.samples([made])
    found, _ = truncated(tokens, made, len(whole.ids) - 1)
    first, second, last = preview(found, tokens)["parts"]
    assert (first["supervised"], second["supervised"]) == (False, True), (
        "the first token is not supervised"
    )
    assert first["text"] + second["text"] == "The cat sat on the mat"
    assert last == {"text": "", "supervised": False, "cut": 1}


@pytest.mark.parametrize(("limit", "text", "cut"), [(64, "the film was good", 0),
                                                    (4, "the film ", 2)])  # fmt: skip
def test_a_text_to_classify_is_shown_with_its_label_supervised(
    limit: int, text: str, cut: int
) -> None:
    tokenizer = tokenizer_of()
    spec = DataSource(source="s3://bucket/a.jsonl")
    source = Source("train", "a", spec, [])
    make = renderer(source, "Classification", Data(train=[spec]), None, content=labelled_text)
    (made,) = make(Record({"text": "the film was good", "label": "yes"}, "a", "line 1"))
    tokens = Texts(tokenizer, "m", len(tokenizer))
    found, dropped = truncated(tokens, made, limit)
    shown = preview(found, tokens)
    assert (shown["tokens"], lost(shown)) == (len(found.ids), dropped) == (6 - cut, cut)
    assert texts(shown, supervised=False) == text
    assert shown["parts"][-1]["text"].strip() == "yes" and shown["parts"][-1]["supervised"]


@given(limit=st.integers(4, 60))
def test_a_partial_address_is_masked(limit: int) -> None:
    tokens = Tokens(BOS, "m", len(BOS))
    made = example("PromptCompletion", prompt="Who? jo@example.org sat. Who is it?",
                 completion=" It is ann@example.org")  # fmt: skip
    found, _ = truncated(tokens, made, limit)
    shown = preview(found, tokens)
    text = "".join(part["text"] for part in shown["parts"])
    for piece in ("jo@", "ann", "@", "xample", "org"):
        assert piece not in text
    assert "[EMAIL]" in texts(shown, supervised=True) or limit < 12


def test_a_long_prompt_does_not_hide_the_answer() -> None:
    tokens = Tokens(BOS, "m", len(BOS))
    long = example("PromptCompletion", prompt="The cat. " * 900, completion=" It sat.")
    (found,) = tokens.samples([long])
    read, learned = preview(found, tokens)["parts"]
    assert learned == {"text": " It sat.", "supervised": True}
    assert read["text"].endswith(" …")
    assert PREVIEW_CHARACTERS - 20 < len(read["text"]) <= PREVIEW_CHARACTERS


class Slow:
    """A slow tokenizer, without token offsets."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert not kwargs.get("return_offsets_mapping")
        return self._tokenizer(*args, **kwargs)


def test_a_slow_tokenizer_gives_approximate_parts_and_exact_counts() -> None:
    tokens = Tokens(Slow(BOS), "m", len(BOS))
    made = example("PromptCompletion", prompt="The cat sat on the mat. " * 9, completion=" It sat.")
    found, dropped = truncated(tokens, made, 20)
    cut, read, learned = preview(found, tokens)["parts"]
    assert cut["cut"] == dropped
    assert made.prompt.endswith(read["text"]) and 0 < len(read["text"]) < 100
    assert learned == {"text": " It sat.", "supervised": True}
