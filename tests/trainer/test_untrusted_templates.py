"""Templates of users and of models are untrusted programs: whatever one does ends in text or in a
named failure, within limits of time, memory and length."""

from __future__ import annotations

from typing import Any, Final

import pytest

from finetune_api.sources import Data, DataSource
from finetune_api.templates import Template
from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepare.mapping.pool import Pool
from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering import limits
from finetune_trainer.prepare.rendering.chat import ChatTemplate
from finetune_trainer.prepare.rendering.examples import renderer
from finetune_trainer.prepare.rendering.limits import LimitExceeded, has_power, limited_work
from trainer import untrusted
from trainer.prepare_helpers import CHATML, make_tokenizer

MESSAGES: Final = {
    "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
}
LOOPS: Final = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

ATTACKS: Final = {
    "a range of a billion": ("{% for i in range(1000000000) %}x{% endfor %}", "Range too big"),
    "nested loops": (LOOPS, "more than 0.2 s of CPU time"),
    "nested loops that write": (LOOPS.replace("{% endfor %}", "x{% endfor %}", 1), "more than"),
    "a repeated text": ("{{ 'x' * 2000000000 }}", "more than 64 MiB of memory"),
    "a repeated list": ("{{ [0] * 2000000000 }}", "more than 64 MiB of memory"),
    "a centred text": ("{{ 'x' | center(2000000000) }}", "more than 64 MiB of memory"),
    "a padded number": ("{{ '%2000000000d' | format(1) }}", "more than 64 MiB of memory"),
    "an indented text": ("{{ 'x\ny' | indent(2000000000) }}", "more than 64 MiB of memory"),
    "a doubled text": (
        "{% set n = namespace(t='x') %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}"
        "{% endfor %}{{ n.t }}",
        "more than 64 MiB of memory",
    ),
    "a long text": ("{{ 'x' * 16800000 }}", "writes 16,80"),
    "a power": ("{{ 10 ** 10 ** 9 }}", "to a power (**)"),
    "a recursive macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion depth"),
    "nested blocks": ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "nest"),
    "an attribute": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "a number of many digits": ("{{ 10000000000 * 9999999999 | int }}", ""),
}


def in_user(text: str) -> None:
    template = Template(prompt=f"{text}{{{{ q }}}}", completion=" a")
    spec = DataSource(source="s3://b/a.jsonl", template=template)
    data = Data.model_validate({"train": [spec.to_json()]})
    render = renderer(Source("train", "a", spec, []), "PromptCompletion", data, None)
    render(Record({"q": "q"}, "s3://b/a.jsonl", "line 1"))


def in_model(text: str) -> None:
    chat = ChatTemplate(make_tokenizer(chat=f"{text}{CHATML}"), "s3://m")
    spec = DataSource(source="s3://b/a.jsonl")
    data = Data.model_validate({"train": [spec.to_json()]})
    render = renderer(Source("train", "a", spec, []), "Messages", data, chat)
    render(Record(MESSAGES, "s3://b/a.jsonl", "line 1"))


@pytest.mark.parametrize("render", [in_user, in_model])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_template_ends_in_a_named_failure(
    attack: str, render: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "loops" in attack:
        monkeypatch.setattr(limits, "SECONDS", 0.2)
    monkeypatch.setattr(limits, "BYTES", 64 << 20)
    text, words = ATTACKS[attack]
    if not words:
        render(text)
        return
    with pytest.raises((DataError, UserError, LimitExceeded)) as caught, limited_work():
        render(text)
    assert words in str(caught.value), caught.value


def test_keywords_are_no_powers() -> None:
    assert not has_power("{{ f(**x) }} {{ f(1, ** x) }} 2 ** 3 {# 2 ** 3 #}{{ '**' }}")
    assert has_power("{{ 2 ** 3 }}") and has_power("{% set a = x**y %}")


def test_an_operation_that_cannot_be_interrupted_ends_its_process_with_a_named_failure() -> None:
    with (
        pytest.raises(UserError) as caught,
        Pool(2, untrusted.lower_limits, None) as pool,
    ):
        for _, result in pool.in_order(untrusted.compare_for_ever, [(0, 0)]):
            result()
    assert caught.value.reason == "TemplateTooCostly"
    assert "in one operation" in caught.value.message
