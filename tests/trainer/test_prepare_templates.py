"""The template library: its texts, the draw of a phrasing, and the command that shows it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import jinja2
import jinja2.meta
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.sources import Data, DataSource
from finetune_api.templates import TEMPLATE_FIELDS, Template, TemplateName
from finetune_trainer.cli import main
from finetune_trainer.failures import DataError
from finetune_trainer.prepare import digest
from finetune_trainer.prepare.digest import content_digest
from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering.catalogue import CATALOGUE, Entry
from finetune_trainer.prepare.rendering.examples import RenderedExample, renderer
from finetune_trainer.prepare.task_formats import format_of
from finetune_trainer.prepared.split import Side
from trainer.prepare_helpers import lines

PAIRS = [name for name, entry in CATALOGUE.items() if entry.prompts]
"""Chat has no phrasings: see test_prepare_turns."""
ENTRIES = [pytest.param(CATALOGUE[name], id=name) for name in PAIRS]
HALF = {"validation": "0.25", "test": "0.25"}


def variables(text: str) -> set[str]:
    return jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(text))


def source(side: Side = "train", **template: Any) -> Source:
    spec = DataSource(source="s3://bucket/a.jsonl", template=Template.model_validate(template))
    return Source(side, "a", spec, [])


def examples(
    records: list[dict[str, Any]], side: Side = "train", seed: int = 0, **template: Any
) -> list[RenderedExample]:
    found = source(side, **template)
    data = Data.model_validate({"train": [found.spec.to_json()], "split": {**HALF, "seed": seed}})
    made = [Record(fields, "s3://b/a.jsonl", f"line {i}") for i, fields in enumerate(records)]
    make = renderer(found, format_of(found.spec, made[0], "CausalLM"), data, None)
    return [example for record in made for example in make(record)]


def fault(record: dict[str, Any], **template: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        examples([record], **template)
    return caught.value


# --- texts ---------------------------------------------------------------------------------------


def test_the_api_and_the_library_have_the_same_templates_and_fields() -> None:
    assert get_args(TemplateName) == tuple(TEMPLATE_FIELDS)
    assert {name: tuple(entry.fields) for name, entry in CATALOGUE.items()} == TEMPLATE_FIELDS


@pytest.mark.parametrize("entry", ENTRIES)
def test_prompts_hold_all_required_fields_except_those_of_the_completion(entry: Entry) -> None:
    learned = variables(entry.completion)
    needed = {name for name, field in entry.fields.items() if not field.optional}
    assert learned and learned <= needed
    assert len(set(entry.prompts)) == len(entry.prompts) > 1
    for prompt in entry.prompts:
        assert needed - learned <= variables(prompt) <= set(entry.fields) - learned
        assert prompt.endswith(":") and entry.completion.startswith(" ")


@pytest.mark.parametrize("name", PAIRS)
def test_every_phrasing_of_a_template_holds_the_records_values(name: TemplateName) -> None:
    entry = CATALOGUE[name]
    shown = [f for f in entry.fields if f not in variables(entry.completion)]
    records = [{field: f"<{field} {i}>" for field in entry.fields} for i in range(60)]
    made = examples(records, name=name)
    for i, example in enumerate(made):
        assert all(example.prompt.count(f"<{field} {i}>") == 1 for field in shown)
        assert (
            example.completion.startswith(" <") and example.completion.strip() not in example.prompt
        )
    frames = {d.prompt.replace(f" {i}>", ">") for i, d in enumerate(made)}
    assert len(frames) == len(entry.prompts)


# --- the draw ------------------------------------------------------------------------------------

QUESTIONS = [{"question": f"number {i}?", "answer": i} for i in range(200)]
FIRST = "Question: number "


@given(st.permutations(range(30)), st.integers(0, 2**31 - 1))
def test_a_phrasing_is_independent_of_the_records_position(order: list[int], seed: int) -> None:
    straight = examples(QUESTIONS[:30], seed=seed, name="Question")
    mixed = examples([QUESTIONS[i] for i in order], seed=seed, name="Question")
    assert [d.segments for d in mixed] == [straight[i].segments for i in order]


def test_held_out_records_use_the_first_phrasing_and_training_records_all() -> None:
    made = examples(QUESTIONS, name="Question")
    assert {d.side for d in made} == {"train", "validation", "test"}
    held_out = [d.prompt.startswith(FIRST) for d in made if d.side != "train"]
    train = [d.prompt.startswith(FIRST) for d in made if d.side == "train"]
    assert all(held_out) and 0 < sum(train) < len(train) / 2
    given = examples(QUESTIONS, "validation", name="Question")
    assert all(d.prompt.startswith(FIRST) and d.side == "validation" for d in given)


def test_phrasings_first_uses_the_first_phrasing_for_all_records() -> None:
    made = examples(QUESTIONS, name="Question", phrasings="First")
    assert all(d.prompt.startswith(FIRST) for d in made)


def test_the_draw_depends_on_the_seed_and_groups_do_not() -> None:
    one = examples(QUESTIONS, name="Question")
    other = examples(QUESTIONS, seed=1, name="Question")
    assert [d.prompt for d in one] != [d.prompt for d in other]
    assert [d.group for d in one] == [d.group for d in other]
    assert [d.group for d in one] == [
        d.prompt for d in examples(QUESTIONS, "test", name="Question")
    ]


def test_records_with_the_same_question_have_one_phrasing_and_one_group() -> None:
    same = examples([{"question": "why?", "answer": i} for i in range(40)], name="Question")
    assert len({(d.prompt, d.group, d.side) for d in same}) == 1


# --- fields --------------------------------------------------------------------------------------


def test_template_fields_are_mapped_to_the_records_names() -> None:
    record = {"article": "a text", "summary": "short", "document": "not this"}
    (made,) = examples([record], "test", name="Summarize", fields={"document": "article"})
    assert made.prompt == "Summarize the document.\n\na text\n\nSummary:"
    assert made.completion == " short"


@pytest.mark.parametrize("fields", [{}, {"summary": None}])
def test_a_missing_field_is_named_by_the_records_name(
    fields: dict[str, Any],
) -> None:
    error = fault({"document": "a", **fields}, name="Summarize")
    assert error.reason == "MissingField" and "line 0: field 'summary' is" in error.message
    error = fault({"document": "a"}, name="Summarize", fields={"summary": "gist"})
    assert "field 'gist' is missing" in error.message and "as summary" in error.message


def test_an_optional_field_is_required_once_the_spec_maps_it() -> None:
    record = {"source": "Haus", "target": "house"}
    (bare,) = examples([record], "test", name="Translate")
    (named,) = examples([{**record, "language": "English"}], "test", name="Translate")
    assert bare.prompt.startswith("Translate the text.\n")
    assert named.prompt.startswith("Translate the text into English.\n")
    assert "'to'" in fault(record, name="Translate", fields={"language": "to"}).message


def test_values_other_than_text_are_written_as_json() -> None:
    record = {"document": "é <b>", "wanted": ["name", "age"], "extracted": {"name": "é", "age": 3}}
    (made,) = examples([record], "test", name="Extract")
    assert made.prompt == 'é <b>\n\nExtract from the document: ["name", "age"]\n\nExtracted:'
    assert made.completion == ' {"name": "é", "age": 3}'


@pytest.mark.parametrize(("value", "label"), [("good", "good"), (0, "0"), (True, "true")])
def test_template_classify_has_format_classification(value: Any, label: str) -> None:
    (made,) = examples([{"text": "fine", "label": value}], name="Classify")
    assert made.label == label and made.completion == f" {label}"


def test_the_digest_covers_the_librarys_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = source(name="Question")

    def made() -> str:
        return content_digest(Data(train=[found.spec]), [found], {}, 128, "CausalLM")

    before = made()
    changed = dataclasses.replace(CATALOGUE["Question"], completion="\n{{ answer }}")
    monkeypatch.setattr(digest, "CATALOGUE", {**CATALOGUE, "Question": changed})
    assert made() != before


# --- command -------------------------------------------------------------------------------------


def test_the_command_lists_shows_and_renders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a long path would be cut
    assert main(["templates"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in CATALOGUE)
    assert main(["templates", "Rewrite"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("⟦ {{ rewritten }}⟧") == len(CATALOGUE["Rewrite"].prompts)
    data = tmp_path / "a.jsonl"
    data.write_bytes(lines({"article": "a [b]", "summary": "short"}))
    arguments = ["--data", str(data), "--field", "document=article"]
    assert main(["templates", "Summarize", *arguments]) == 0
    rendered = capsys.readouterr().out
    assert "a [b]" in rendered and "⟦ short⟧" in rendered and "line 1" in rendered


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["Sing"], 2, "template.name"),
        (["Summarize", "--field", "article=document"], 2, "Summarize: document, summary"),
        (["Summarize", "--field", "document"], 2, "template.fields.document"),
        (["Summarize", "--data", "nowhere.jsonl"], 2, "nowhere.jsonl"),
    ],
)
def test_the_command_reports_errors(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["templates", *arguments]) == code
    assert said in capsys.readouterr().err
