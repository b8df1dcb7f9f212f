"""Template Chat: conversations of other shapes give the same tokens as format Messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.sources import Data, DataSource
from finetune_api.templates import Template
from finetune_trainer.cli import main
from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepare import digest
from finetune_trainer.prepare.digest import content_digest
from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering.catalogue import CATALOGUE, CHAT_ROLES
from finetune_trainer.prepare.rendering.chat import ChatTemplate
from finetune_trainer.prepare.rendering.examples import RenderedExample, renderer
from finetune_trainer.prepare.task_formats import format_of
from finetune_trainer.prepare.tokenizing.tokens import Tokens
from trainer.chat_templates import CHATML_TOOLS
from trainer.prepare_helpers import CHATML, lines, make_tokenizer

SHARE = {"messages": "conversations", "role": "from", "content": "value"}
PLAIN = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "no"},
]
ALIAS = {"system": "system", "user": "human", "assistant": "gpt"}
SHARED = [{"from": ALIAS[m["role"]], "value": m["content"]} for m in PLAIN]
PAIRED = [{"prompt": "one?", "response": "yes"}, {"prompt": "two?", "response": "no"}]

Record_ = dict[str, Any]


def examples(
    record: Record_, template: Record_ | None, chat: str = CHATML
) -> list[RenderedExample]:
    made = None if template is None else Template.model_validate({"name": "Chat", **template})
    spec = DataSource(source="s3://bucket/a.jsonl", template=made)
    found = Record(record, "s3://b/a.jsonl", "line 7")
    form = format_of(spec, found, "CausalLM")
    model = ChatTemplate(make_tokenizer(chat=chat), "m")
    return renderer(Source("train", "a", spec, []), form, Data(train=[spec]), model)(found)


def fault(record: Record_, **template: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        examples(record, template)
    assert caught.value.message.startswith("s3://b/a.jsonl, line 7: ")
    return caught.value


@pytest.mark.parametrize(
    ("fields", "template"),
    [
        pytest.param({"messages": PLAIN}, {}, id="its own names"),
        pytest.param({"conversations": SHARED}, {"fields": SHARE}, id="ShareGPT"),
        pytest.param(
            {"conversations": SHARED[1:], "system": "be kind"}, {"fields": SHARE}, id="system apart"
        ),
        pytest.param({"messages": PAIRED, "system": "be kind"}, {}, id="prompt and response"),
        pytest.param(
            {"history": [["one?", "yes"], ["two?", "no"]], "preamble": "be kind"},
            {"fields": {"messages": "history", "system": "preamble"}},
            id="pairs",
        ),
        pytest.param(
            {"messages": [{**m, "role": {"user": "1", "assistant": "2"}.get(m["role"], "system")}
                          for m in PLAIN]},
            {"roles": {"1": "user", "2": "assistant"}},
            id="roles of the manifest",
        ),
    ],
)  # fmt: skip
def test_conversations_of_other_shapes_equal_those_of_format_messages(
    fields: Record_, template: Record_
) -> None:
    found, plain = examples(fields, template), examples({"messages": PLAIN}, None)
    assert found == plain
    tokenizer = make_tokenizer(chat=CHATML)
    (sample,) = Tokens(tokenizer, "m", len(tokenizer)).samples(found)
    learned = [tokenizer.decode(sample.ids[start:end]) for start, end in sample.spans]
    assert learned == ["yes<|im_end|>", "no<|im_end|>"]


def test_tools_and_tool_calls_are_kept_under_other_names() -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    call = {"function": {"name": "look_up", "arguments": '{"q": "a"}'}}
    shared = [
        {"from": "human", "value": "what is a?"},
        {"from": "gpt", "value": None, "tool_calls": [call]},
        {"from": "observation", "value": "a letter"},
        {"from": "gpt", "value": "a letter"},
    ]
    template = {"fields": {**SHARE, "tools": "functions"}, "roles": {"observation": "tool"}}
    record = {"conversations": shared, "functions": json.dumps(tools)}
    (example,) = examples(record, template, CHATML_TOOLS)
    learned = [part.text for part in example.segments if part.supervised]
    assert len(learned) == 2 and "look_up" in learned[0] and learned[1].startswith("a letter")
    assert "look_up" in example.segments[0].text, "tools are in the prompt"


@pytest.mark.parametrize(
    ("fields", "reason", "said"),
    [
        ({"messages": PLAIN}, "MissingField", "'conversations' is missing"),
        ({"conversations": []}, "WrongType", "at least one turn"),
        ({"conversations": "hello"}, "WrongType", "at least one turn"),
        ({"conversations": ["hello"]}, "WrongType", "'conversations[0]' must be an object of from"),
        ({"conversations": [{"value": "x"}]}, "MissingField", "'conversations[0].from'"),
        ({"conversations": [{"from": "human"}]}, "MissingField", "'conversations[0].value'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "WrongType",
         "'conversations[0].value'"),
        ({"conversations": [SHARED[0], {"from": "bot", "value": "x"}]}, "UnknownRole",
         "'conversations[1].from' must be one of system, user, human"),
        ({"conversations": [{"from": 1, "value": "x"}]}, "UnknownRole", "got 1"),
        ({"conversations": [{"prompt": "x"}]}, "MissingField", "'conversations[0].response'"),
        ({"conversations": [["x", None]]}, "MissingField", "'conversations[0][1]'"),
        ({"conversations": [["x", 3]]}, "WrongType", "'conversations[0][1]'"),
        ({"conversations": SHARED, "system": "again"}, "WrongType", "'system'"),
        ({"conversations": SHARED[:2]}, "NothingSupervised", "no supervised tokens"),
    ],
)  # fmt: skip
def test_an_invalid_conversation_is_refused_with_the_records_field_names(
    fields: Record_, reason: str, said: str
) -> None:
    error = fault(fields, fields=SHARE)
    assert error.reason == reason and said in error.message


def test_an_optional_field_that_the_manifest_maps_is_required() -> None:
    error = fault({"messages": PLAIN}, fields={"system": "preamble"})
    assert error.reason == "MissingField" and "'preamble'" in error.message


def test_classification_refuses_conversations() -> None:
    template = Template(name="Chat")
    spec = DataSource(source="s3://bucket/a.jsonl", template=template)
    with pytest.raises(UserError, match="of format Messages"):
        format_of(spec, Record({}, "u", "line 1"), "SequenceClassification")


def test_the_digest_covers_the_known_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DataSource(source="s3://bucket/a.jsonl", template=Template(name="Chat"))

    def made() -> str:
        source = Source("train", "a", spec, [])
        return content_digest(Data(train=[spec]), [source], {}, 128, "CausalLM")

    before = made()
    monkeypatch.setattr(digest, "CHAT_ROLES", {**CHAT_ROLES, "bot": "assistant"})
    assert made() != before


def test_the_command_shows_fields_and_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["templates", "Chat"]) == 0
    shown = capsys.readouterr().out
    assert all(field in shown for field in CATALOGUE["Chat"].fields)
    data = tmp_path / "a.jsonl"
    turns = [{"from": "human", "value": "one?"}, {"from": "bot", "value": "yes [b]"}]
    data.write_bytes(lines({"conversations": turns}))
    renamed = [a for own, theirs in SHARE.items() for a in ("--field", f"{own}={theirs}")]
    assert main(["templates", "Chat", "--data", str(data), *renamed]) != 0
    assert "bot" in capsys.readouterr().err
    arguments = ["--data", str(data), *renamed, "--role", "bot=assistant"]
    assert main(["templates", "Chat", *arguments]) == 0
    assert "user: one?\nassistant: ⟦yes [b]⟧" in capsys.readouterr().out
