"""Conversations with tools: for chat templates of several shapes, exactly the tokens of the
assistant's answers and calls are supervised, with their stop tokens."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.sources import Data, DataSource
from finetune_trainer.failures import DataError
from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering.chat import ChatTemplate
from finetune_trainer.prepare.rendering.examples import RenderedExample, renderer
from finetune_trainer.prepare.tokenizing.tokens import Tokens
from trainer.chat_templates import CHATML_TOOLS, MARKED, SHAPES
from trainer.prepare_helpers import CHATML, make_tokenizer

Messages = list[dict[str, Any]]

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look_up", "add_up")
]
WORDS = st.text(st.sampled_from("abc Td.\n▁é"), min_size=1, max_size=12).filter(str.strip)


@st.composite
def calls(draw: st.DrawFn, most: int) -> list[dict[str, Any]]:
    names = draw(st.lists(st.sampled_from(["look_up", "add_up"]), min_size=1, max_size=most))
    return [{"function": {"name": name, "arguments": {"q": draw(WORDS)}}} for name in names]


@st.composite
def conversations(draw: st.DrawFn, most_calls: int) -> Messages:
    """Rounds of a question, tool calls with their results, and an answer."""
    messages: Messages = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(WORDS)})
        for made in draw(st.lists(calls(most_calls), max_size=2)):
            content = draw(st.none() | WORDS)
            messages.append({"role": "assistant", "content": content, "tool_calls": made})
            messages += [{"role": "tool", "content": draw(WORDS)} for _ in made]
        messages.append({"role": "assistant", "content": draw(WORDS)})
        if draw(st.booleans()):
            messages[-1]["reasoning_content"] = draw(WORDS)
    return messages


def examples(tokenizer: Any, messages: Any, **fields: Any) -> list[RenderedExample]:
    spec = DataSource(source="s3://bucket/a.jsonl", format="Messages")
    source = Source("train", "a", spec, [])
    make = renderer(source, "Messages", Data(train=[spec]), ChatTemplate(tokenizer, "m"))
    return make(Record({"messages": messages, **fields}, "s3://b/a.jsonl", "line 7"))


def fault(template: str, messages: Any, **fields: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        examples(make_tokenizer(chat=template), messages, **fields)
    assert "s3://b/a.jsonl, line 7" in caught.value.message
    return caught.value


def learned(tokenizer: Any, example: RenderedExample) -> list[str]:
    (found,) = Tokens(tokenizer, "m", len(tokenizer)).samples([example])
    return [tokenizer.decode(found.ids[start:end]) for start, end in found.spans]


@cache
def tokenizer_of(shape: str) -> Any:
    return make_tokenizer(chat=SHAPES[shape].template)


CLOSING = ("closed", "tight")
"""Shapes that end a conversation with a separate token."""


@pytest.mark.parametrize("name", SHAPES)
@given(data=st.data())
def test_exactly_the_tokens_of_assistant_turns_are_supervised(
    name: str, data: st.DataObject
) -> None:
    shape, tokenizer = SHAPES[name], tokenizer_of(name)
    messages = data.draw(conversations(shape.calls))
    tools = data.draw(st.sampled_from([None, TOOLS]))
    made = examples(tokenizer, messages, tools=tools)
    ends = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    expected = [shape.learned(messages[i]) for i in ends]
    rows = [expected] if len(made) == 1 else [[turn] for turn in expected]
    assert [learned(tokenizer, example) for example in made] == rows

    def rendered(until: int, generate: bool) -> str:
        text = tokenizer.apply_chat_template(
            messages[:until], tools=tools, tokenize=False, add_generation_prompt=generate
        )
        return str(text)

    # Each sample is the conversation up to its last answer, and starts with the generation prompt.
    for example, end in zip(made, ends[-1:] if len(made) == 1 else ends, strict=True):
        whole = rendered(end + 1, False).rstrip()
        if name in CLOSING:
            assert example.segments[-1].text.endswith("<|im_end|>") and len(made) == 1
            whole = whole.removesuffix("</s>").rstrip()
        assert "".join(part.text for part in example.segments) == whole
        assert example.prompt.startswith(rendered(end, True))


def test_answers_of_weight_0_are_not_supervised() -> None:
    said = [QUESTION, {**ANSWER, "weight": 0}, QUESTION, {**ANSWER, "content": "c", "weight": 1}]
    tokenizer = tokenizer_of("chatml")
    (example,) = examples(
        tokenizer, [*said, {"role": "user", "content": "d", "weight": 0}, said[1]]
    )
    assert learned(tokenizer, example) == ["c<|im_end|>"] and "assistant\nb<" in example.prompt
    error = fault(CHATML_TOOLS, said[:2])
    assert error.reason == "NothingSupervised" and "weight other than 0" in error.message


@pytest.mark.parametrize("name", SHAPES)
def test_a_round_of_calls_is_one_sample(name: str) -> None:
    made = {"function": {"name": "look_up", "arguments": {"q": "a"}}}
    messages = [
        {"role": "user", "content": "b"},
        {"role": "assistant", "tool_calls": [made]},
        {"role": "tool", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    (example,) = examples(tokenizer_of(name), messages, tools=TOOLS)
    assert [part.supervised for part in example.segments] == [False, True, False, True]


QUESTION = {"role": "user", "content": "a"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add_up", "arguments": {}}}]}
ANSWER = {"role": "assistant", "content": "b"}


def text(example: RenderedExample) -> str:
    return "".join(part.text for part in example.segments)


@pytest.mark.parametrize("given", [TOOLS, json.dumps(TOOLS)], ids=["list", "text"])
def test_tools_are_read_from_the_record_or_a_message_as_list_or_json(given: Any) -> None:
    tokenizer = tokenizer_of("chatml")
    (of_record,) = examples(tokenizer, [QUESTION, ANSWER], tools=given)
    (of_message,) = examples(tokenizer, [{**QUESTION, "tools": given}, ANSWER])
    assert text(of_record) == text(of_message)
    assert text(of_record).startswith(f"<|im_start|>system\nTools: {json.dumps(TOOLS)}<|im_end|>")


def test_arguments_in_json_strings_are_written_as_objects() -> None:
    def made(arguments: Any) -> str:
        function = {"name": "add_up", "arguments": arguments}
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
        return text(*examples(tokenizer_of("chatml"), [QUESTION, call]))

    assert made('{"x": [1, 2]}') == made({"x": [1, 2]})
    assert '"arguments": {"x": [1, 2]}' in made('{"x": [1, 2]}')
    assert '"arguments": {}' in made(None)


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    (example,) = examples(tokenizer_of("chatml"), [{"role": "user", "content": parts}, ANSWER])
    assert "<|im_start|>user\na b<|im_end|>" in text(example)


def test_a_tokenizers_tool_use_template_is_used_with_tools_only() -> None:
    tokenizer = make_tokenizer(chat=CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML_TOOLS}
    (with_tools,) = examples(tokenizer, [QUESTION, ANSWER], tools=TOOLS)
    (without,) = examples(tokenizer, [QUESTION, ANSWER])
    assert "Tools: " in text(with_tools) and "Tools: " not in text(without)


@pytest.mark.parametrize(
    ("messages", "tools"), [([QUESTION, CALL], None), ([QUESTION, ANSWER], TOOLS)]
)
def test_a_template_without_tool_support_is_refused(messages: Messages, tools: Any) -> None:
    error = fault(CHATML, messages, tools=tools)
    # If the template does not write a call, the turn has no supervised text.
    assert error.reason == ("ToolsNotWritten" if tools else "NothingSupervised")


def test_an_unwritten_call_beside_content_is_refused() -> None:
    error = fault(CHATML, [QUESTION, {**CALL, "content": "b"}])
    assert error.reason == "ToolsNotWritten" and "'add_up'" in error.message


def test_a_template_that_does_not_mark_one_part_per_answer_is_refused() -> None:
    twice = MARKED.replace("{{ m.content }}", "b{% endgeneration %} and {% generation %}c", 1)
    assert fault(twice, [QUESTION, ANSWER]).reason == "MarkMismatch"
    none = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    none += "{% generation %}{% endgeneration %}"
    assert fault(none, [QUESTION, ANSWER]).reason == "MarkMismatch"


@pytest.mark.parametrize(
    ("message", "reason", "field"),
    [
        ({"content": None}, "MissingField", "messages[1].content"),
        ({"content": None, "tool_calls": []}, "MissingField", "messages[1].content"),
        ({"content": [{"type": "image"}]}, "WrongType", "messages[1].content"),
        ({"content": "b", "role": 3}, "WrongType", "messages[1].role"),
        ({"content": "b", "weight": 0.5}, "WrongType", "messages[1].weight"),
        ({"tool_calls": "add_up"}, "WrongType", "messages[1].tool_calls"),
        ({"tool_calls": [{"function": {}}]}, "WrongType", "messages[1].tool_calls"),
        (
            {"tool_calls": [{"function": {"name": "add_up", "arguments": "x=1"}}]},
            "WrongType",
            "messages[1].tool_calls[0].arguments",
        ),
        ({"content": "b", "tools": "add_up"}, "WrongType", "messages[1].tools"),
    ],
)
def test_a_faulty_message_is_named(message: dict[str, Any], reason: str, field: str) -> None:
    error = fault(CHATML_TOOLS, [QUESTION, {"role": "assistant", **message}])
    assert error.reason == reason and f"field '{field}'" in error.message


def test_faulty_tools_are_named() -> None:
    error = fault(CHATML_TOOLS, [QUESTION, ANSWER], tools=[{"type": "function"}])
    assert error.reason == "WrongType" and "field 'tools'" in error.message
