"""Untrusted templates and models in whole prepare jobs: a named failure, and nothing is written."""

from __future__ import annotations

import pytest

from finetune_trainer.failures import UserError
from finetune_trainer.prepare.rendering import limits
from trainer.prepare_helpers import Workplace, lines
from trainer.test_untrusted_templates import LOOPS


def test_prepare_names_the_record(at: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    loop = "{% if q == '2' %}" + LOOPS + "{% endif %}{{ q }}"
    template = {"template": {"prompt": loop, "completion": "{{ q }}"}}
    records = lines(*({"q": str(i)} for i in range(9)))
    train = [{"source": at.put("data/0.jsonl", records), **template}]
    error = at.fault(data={"train": train})
    assert isinstance(error, UserError) and error.reason == "TemplateTooCostly"
    assert "/data/0.jsonl, line 3: rendering with its template takes more" in error.message
