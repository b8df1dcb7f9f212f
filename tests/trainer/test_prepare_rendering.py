"""Records to tokens: prompts, completions, and exactly the supervised tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.sources import Data, DataSource, Format
from finetune_api.templates import Template
from finetune_trainer.failures import DataError, TrainerError, UserError
from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering.chat import ChatTemplate
from finetune_trainer.prepare.rendering.examples import RenderedExample, Renderer, renderer
from finetune_trainer.prepare.rendering.formats import detect_format
from finetune_trainer.prepare.tokenizing.tokens import TokenizedSample, Tokens
from trainer.chat_templates import CHATML_TOOLS
from trainer.prepare_helpers import CHATML, GEMMA, LLAMA3, THINKING, make_tokenizer

PLAIN = make_tokenizer()
BOS = make_tokenizer(bos=True)
SPACED = make_tokenizer(bos=True, metaspace=True)
WORDS = st.text(st.sampled_from("abc Td.\n▁é"), min_size=1, max_size=20)


def record(**fields: Any) -> Record:
    return Record(fields, "s3://b/a.jsonl", "line 7")


def example(
    fields: dict[str, Any], form: Format, template: Template | None = None, chat: Any = None
) -> RenderedExample:
    made = drafter_of(form, template, chat)(record(**fields))
    assert len(made) == 1
    return made[0]


def drafter_of(form: Format, template: Template | None = None, chat: Any = None) -> Renderer:
    spec = DataSource(source="s3://bucket/a.jsonl", template=template)
    source = Source("train", "a", spec, [])
    return renderer(source, form, Data(train=[spec]), ChatTemplate(chat, "m") if chat else None)


def sample(tokenizer: Any, made: RenderedExample) -> TokenizedSample:
    return Tokens(tokenizer, "m", len(tokenizer)).samples([made])[0]


def learned(tokenizer: Any, found: TokenizedSample) -> list[str]:
    """Text of each supervised span."""
    return [tokenizer.decode(found.ids[start:end]) for start, end in found.spans]


def fault(*args: Any, **kwargs: Any) -> TrainerError:
    with pytest.raises(TrainerError) as caught:
        example(*args, **kwargs)
    return caught.value


# --- formats -------------------------------------------------------------------------------------

FORMATS: list[tuple[Format, dict[str, Any], str, str, str | None]] = [
    ("PromptCompletion", {"prompt": "a b", "completion": " c"}, "a b", " c", None),
    ("Instruction", {"instruction": "add", "output": "d"}, "add\n\n", "d", None),
    ("Instruction", {"instruction": "a", "input": "b", "output": "d"}, "a\n\nb\n\n", "d", None),
    ("Classification", {"text": "fine", "label": "good"}, "fine\nLabel:", " good", "good"),
    ("Classification", {"text": "fine", "label": 0}, "fine\nLabel:", " 0", "0"),
    ("Classification", {"text": "fine", "label": True}, "fine\nLabel:", " true", "true"),
    ("Text", {"text": "The cat"}, "", "The cat", None),
]


@pytest.mark.parametrize(("form", "fields", "prompt", "completion", "label"), FORMATS)
def test_each_format_has_its_prompt_and_completion(
    form: Format, fields: dict[str, Any], prompt: str, completion: str, label: str | None
) -> None:
    assert detect_format(record(**fields)) == form
    made = example(fields, form)
    assert (made.prompt, made.completion, made.label) == (prompt, completion, label)


def test_messages_are_detected_and_an_unknown_record_is_refused() -> None:
    assert detect_format(record(messages=[{"role": "user", "content": "a"}])) == "Messages"
    with pytest.raises(DataError, match=r"line 7: its fields \(question, answer\)") as caught:
        detect_format(record(question="a", answer="b"))
    assert caught.value.reason == "UnknownFormat"


MISSING: list[tuple[Format, dict[str, Any], str]] = [
    ("PromptCompletion", {"prompt": "a", "response": "b"}, "completion"),
    ("PromptCompletion", {"prompt": None, "completion": "b"}, "prompt"),
    ("Instruction", {"instruction": "a"}, "output"),
    ("Classification", {"text": "a"}, "label"),
    ("Text", {"body": "a"}, "text"),
    ("Messages", {"turns": []}, "messages"),
    ("Messages", {"messages": [{"role": "user"}]}, "messages[0].content"),
]


@pytest.mark.parametrize(("form", "fields", "field"), MISSING)
def test_a_missing_field_is_named_with_the_existing_ones(
    form: Format, fields: dict[str, Any], field: str
) -> None:
    error = fault(fields, form, chat=make_tokenizer(chat=CHATML))
    assert error.reason == "MissingField"
    assert f"s3://b/a.jsonl, line 7: field '{field}'" in error.message
    assert f"the record has {', '.join(fields)}" in error.message


@pytest.mark.parametrize(
    ("form", "fields", "field"),
    [
        ("PromptCompletion", {"prompt": 3, "completion": "b"}, "prompt"),
        ("Classification", {"text": "a", "label": 0.5}, "label"),
        ("Messages", {"messages": "hello"}, "messages"),
        ("Messages", {"messages": []}, "messages"),
        ("Messages", {"messages": ["hello"]}, "messages[0]"),
        ("Messages", {"messages": [{"role": "user", "content": [1]}]}, "messages[0].content"),
    ],
)
def test_a_field_of_another_type_is_named(form: Format, fields: dict[str, Any], field: str) -> None:
    error = fault(fields, form, chat=make_tokenizer(chat=CHATML))
    assert error.reason == "WrongType" and f"line 7: field '{field}' must be" in error.message


# --- templates -----------------------------------------------------------------------------------

REVIEW = Template(prompt="Review: {{ sentence }}\nSentiment:", completion=" {{ mood }}\n")


def test_a_template_renders_fields_and_keeps_white_space() -> None:
    made = example({"sentence": "a {{ b }}", "mood": "good"}, "Classification", REVIEW)
    assert made.prompt == "Review: a {{ b }}\nSentiment:"
    assert (made.completion, made.label) == (" good\n", "good")


def test_a_template_writes_json_and_reaches_fields_of_any_name() -> None:
    template = Template(prompt="{{ record['Review Text'] }} {{ names }}", completion=" {{ good }}")
    fields = {"Review Text": "fine", "names": ["é", 1], "good": True}
    made = example(fields, "PromptCompletion", template)
    assert (made.prompt, made.completion) == ('fine ["é", 1]', " true")
    error = fault({**fields, "Review Text": None}, "PromptCompletion", template)
    assert error.reason == "MissingField" and "field 'Review Text' is null" in error.message
    del fields["Review Text"]
    error = fault(fields, "PromptCompletion", template)
    assert error.reason == "MissingField" and "'Review Text'" in error.message


def test_a_wrong_value_is_shown_masked() -> None:
    error = fault({"prompt": ["jo@b.org"], "completion": "b"}, "PromptCompletion")
    assert "[EMAIL]" in error.message and "jo@" not in error.message


@pytest.mark.parametrize("fields", [{"sentence": "a"}, {"sentence": "a", "mood": None}])
def test_a_missing_template_field_is_named(fields: dict[str, Any]) -> None:
    error = fault(fields, "PromptCompletion", REVIEW)
    assert error.reason == "MissingField"
    assert "line 7: field 'mood'" in error.message and "template.completion" in error.message


def test_a_missing_nested_field_is_an_error() -> None:
    template = Template(prompt="{{ a.b }}", completion="c")
    assert "no attribute 'b'" in fault({"a": {}}, "PromptCompletion", template).message


@pytest.mark.parametrize(
    "text", ["{{ a", "{% for %}", "{{ a.__class__.__mro__[1].__subclasses__() }}"]
)
def test_an_invalid_template_is_a_user_error(text: str) -> None:
    error = fault({"a": "b"}, "PromptCompletion", Template(prompt=text, completion="c"))
    assert isinstance(error, UserError) and error.reason == "BadTemplate"
    assert "template.prompt" in error.message


def test_a_template_that_fails_names_the_record() -> None:
    template = Template(prompt="{{ a / 0 }}", completion="c")
    error = fault({"a": 1}, "PromptCompletion", template)
    assert error.reason == "TemplateFailed" and "line 7" in error.message


@pytest.mark.parametrize(
    ("form", "fields", "template"),
    [
        ("PromptCompletion", {"a": "b"}, Template(prompt="{{ a }}", completion="{{ '' }}")),
        ("PromptCompletion", {"prompt": "a", "completion": ""}, None),
        ("PromptCompletion", {"prompt": "a", "completion": " \n"}, None),
        ("PromptCompletion", {"document": "a", "summary": ""}, Template(name="Summarize")),
        ("Classification", {"text": "a", "label": ""}, None),
        ("Text", {"text": ""}, None),
        ("Text", {"text": " \n"}, None),
        ("Messages", {"messages": [{"role": "user", "content": "a"}]}, None),
        (
            "Messages",
            {"messages": [{"role": r, "content": ""} for r in ("user", "assistant")]},
            None,
        ),
    ],
)
def test_a_record_without_supervised_tokens_is_refused(
    form: Format, fields: dict[str, Any], template: Template | None
) -> None:
    error = fault(fields, form, template, make_tokenizer(chat=CHATML))
    assert isinstance(error, DataError) and error.reason == "NothingSupervised"
    assert "s3://b/a.jsonl, line 7" in error.message


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [PLAIN, BOS, SPACED], ids=["plain", "bos", "spaced"])
@given(prompt=WORDS, completion=WORDS.filter(str.strip))
def test_exactly_the_completion_and_the_end_token_are_supervised(
    tokenizer: Any, prompt: str, completion: str
) -> None:
    made = example({"prompt": prompt, "completion": completion}, "PromptCompletion")
    found = sample(tokenizer, made)
    # The prompt's tokens equal those of the prompt in generation.
    assert found.ids[: found.prompt_length].tolist() == tokenizer(prompt)["input_ids"]
    assert found.spans == ((found.prompt_length, len(found.ids)),)
    assert found.ids[-1] == tokenizer.eos_token_id
    answer = found.ids[found.prompt_length : -1]
    whole = tokenizer.decode(found.ids, skip_special_tokens=True)
    if tokenizer is not SPACED:
        assert tokenizer.decode(answer) == completion
        assert whole == prompt + completion
    else:  # the tokenizer adds a space before the text, not before the completion
        assert whole.replace("▁", " ").lstrip(" ") == (
            (prompt + completion).replace("▁", " ").lstrip(" ")
        )


def test_a_completion_is_tokenized_as_a_continuation() -> None:
    made = example({"prompt": "cat", "completion": "bird"}, "PromptCompletion")
    found = sample(SPACED, made)
    assert SPACED.decode(found.ids, skip_special_tokens=True).strip() == "catbird"


def test_text_is_supervised_except_its_first_token() -> None:
    made = example({"text": "The cat sat"}, "Text")
    plain, bos = sample(PLAIN, made), sample(BOS, made)
    assert plain.spans == ((1, len(plain.ids)),) and plain.prompt_length == 0
    assert bos.spans == ((1, len(bos.ids)),) and bos.ids[0] == BOS.bos_token_id
    assert bos.ids[1:].tolist() == plain.ids.tolist()
    assert plain.supervised == len(plain.ids) - 1


def test_an_empty_prompt_needs_a_bos_token() -> None:
    made = example({"prompt": "", "completion": "The cat"}, "PromptCompletion")
    assert sample(BOS, made).prompt_length == 1
    with pytest.raises(DataError, match="line 7: the prompt is empty") as caught:
        sample(PLAIN, made)
    assert caught.value.reason == "EmptyPrompt"


def test_a_batch_is_tokenized_like_single_examples() -> None:
    examples = [
        example({"prompt": f"{i} a", "completion": f" b{i}"}, "PromptCompletion") for i in "123"
    ]
    together = Tokens(BOS, "m", len(BOS)).samples(examples)
    assert [s.ids.tolist() for s in together] == [sample(BOS, d).ids.tolist() for d in examples]


def test_a_token_outside_the_models_vocabulary_is_refused() -> None:
    made = example({"prompt": "The cat", "completion": " sat"}, "PromptCompletion")
    with pytest.raises(UserError, match="vocab_size") as caught:
        Tokens(PLAIN, "m", 20).samples([made])
    assert caught.value.reason == "VocabularyMismatch"


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        Tokens(tokenizer, "m", 400)


# --- own text ------------------------------------------------------------------------------------


def test_a_records_own_text_excludes_template_text() -> None:
    question = {"question": "why?", "answer": ["so", 1]}
    (library,) = drafter_of("PromptCompletion", Template(name="Question"))(record(**question))
    assert library.own == 'why?\n["so", 1]'
    mine = Template(prompt="Long. {% if question %}Asked: {{ question }}{% endif %}\nA:",
                    completion=" {{ answer[0] }}\n")  # fmt: skip
    assert example(question, "PromptCompletion", mine).own.split() == ["why?", "so"]
    assert example({"prompt": "a", "completion": "b"}, "PromptCompletion").own == "a\nb"
    assert example({"text": "a b"}, "Text").own == "a b"


def test_a_conversations_own_text_excludes_system_turns_and_tools() -> None:
    tokenizer = make_tokenizer(chat=CHATML_TOOLS)
    call = {"function": {"name": "find", "arguments": '{"q": "é"}'}}
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "three"},
    ]
    fields = {"messages": messages, "tools": [{"function": {"name": "find"}}]}
    own = example(fields, "Messages", chat=tokenizer).own
    assert own.split("\n") == ["one", "", 'find {"q": "é"}', "two", "three"]


# --- conversations -------------------------------------------------------------------------------

CHATS = [
    pytest.param(LLAMA3, "<|eot_id|>", True, id="llama3"),
    pytest.param(CHATML, "<|im_end|>", False, id="chatml"),
    pytest.param(GEMMA, "<end_of_turn>", True, id="gemma"),
]


def turns(*contents: str) -> list[dict[str, str]]:
    """Alternating turns of user and assistant."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]


@pytest.mark.parametrize(("template", "stop", "trims"), CHATS)
@given(contents=st.lists(WORDS.filter(str.strip), min_size=2, max_size=7))
def test_exactly_the_answers_with_their_end_tokens_are_supervised(
    template: str, stop: str, trims: bool, contents: list[str]
) -> None:
    tokenizer = make_tokenizer_cached(template)
    messages = turns(*contents)
    found = sample(tokenizer, example({"messages": messages}, "Messages", chat=tokenizer))
    last = len(contents) - len(contents) % 2
    answers = [c.strip() if trims else c for c in contents[1:last:2]]
    assert learned(tokenizer, found) == [answer + stop for answer in answers]
    # The prompt equals the generation prompt of transformers for the last answer ...
    prompt = tokenizer.apply_chat_template(
        messages[: last - 1], add_generation_prompt=True, return_dict=False
    )
    assert found.ids[: found.prompt_length].tolist() == prompt
    # ... and the sample is the conversation up to the end of that answer.
    whole = tokenizer.apply_chat_template(messages[:last], tokenize=False)
    assert tokenizer.decode(found.ids) == whole.rstrip()


_made: dict[str, Any] = {}


def make_tokenizer_cached(template: str) -> Any:
    if template not in _made:
        _made[template] = make_tokenizer(chat=template)
    return _made[template]


def test_an_answer_that_opens_the_conversation_is_not_supervised() -> None:
    tokenizer = make_tokenizer(chat=CHATML)
    messages = [{"role": "assistant", "content": "Hello"}, *turns("a", "b")]
    found = sample(tokenizer, example({"messages": messages}, "Messages", chat=tokenizer))
    assert learned(tokenizer, found) == ["b<|im_end|>"]


def test_turns_that_are_rendered_differently_later_become_separate_samples() -> None:
    tokenizer = make_tokenizer(chat=THINKING)
    examples = drafter_of("Messages", chat=tokenizer)(record(messages=turns("a", "b", "c", "d")))
    found = Tokens(tokenizer, "m", len(tokenizer)).samples(examples)
    assert [learned(tokenizer, s) for s in found] == [
        ["<think></think>\nb<|im_end|>"],
        ["<think></think>\nd<|im_end|>"],
    ]
    assert "assistant\nb<|im_end|>" in examples[1].prompt
    assert len({d.group for d in examples}) == 1
    assert {d.own for d in examples} == {"a\nb\nc\nd"}


def test_conversations_with_the_same_beginning_are_one_group() -> None:
    tokenizer = make_tokenizer(chat=CHATML)
    long = example({"messages": turns("a", "b", "c", "d")}, "Messages", chat=tokenizer)
    short = example({"messages": turns("a", "e")}, "Messages", chat=tokenizer)
    other = example({"messages": turns("f", "b")}, "Messages", chat=tokenizer)
    assert long.group == short.group != other.group


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "NoEndOfTurn"),
        (
            "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}answer:{% endif %}",
            "PrefixMismatch",
        ),
        ("{{ raise_exception('roles must alternate') }}", "TemplateFailed"),
    ],
)
def test_an_unsupported_chat_template_is_refused(template: str, reason: str) -> None:
    tokenizer = make_tokenizer(chat=template)
    error = fault({"messages": turns("a", "b")}, "Messages", chat=tokenizer)
    assert isinstance(error, DataError) and error.reason == reason
    assert "s3://b/a.jsonl, line 7" in error.message


def test_a_tokenizer_without_chat_template_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"chat_template\.jinja") as caught:
        ChatTemplate(PLAIN, "s3://b/model")
    assert caught.value.reason == "NoChatTemplate"
