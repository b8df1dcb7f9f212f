"""The table of specs on a real API server: it agrees with pydantic on every row."""

from __future__ import annotations

import re

import pytest

from crds.conftest import Create
from crds.spec_rows import Row, changed
from crds.spec_table import BAD, GOOD
from finetune_api.spec import SELF_REFERENCE, parse_spec, refers_to_itself


@pytest.mark.parametrize("row", GOOD, ids=lambda row: row.name)
def test_good(row: Row, create: Create) -> None:
    """The stored spec, with the API server's defaults, equals pydantic's for the same manifest."""
    stored = create(row.spec)
    parsed = parse_spec(row.spec)
    assert parse_spec(stored) == parsed
    if not row.stored:
        assert stored == parsed.to_json()


@pytest.mark.parametrize("row", [row for row in GOOD if row.stored], ids=lambda row: row.name)
def test_normalised(row: Row, create: Create) -> None:
    """If pydantic normalizes a value, the API server stores it as given."""
    assert create(row.spec) == create(changed({**row.change, **row.stored}))


@pytest.mark.parametrize("row", BAD, ids=lambda row: row.name)
def test_bad(row: Row, create: Create) -> None:
    with pytest.raises(ValueError) as refused:
        create(row.spec)
    message = re.sub(r"\[([^]\d\s:]+)\]", r".\1", str(refused.value))
    assert re.search(rf"(?<![\w.]){re.escape(row.path or '')}(?![\w.\[])", message), message
    assert row.allowed.lower() in message.lower()
    if row.got is not None:
        assert row.got in message


def test_a_job_that_refers_to_itself_is_refused(create: Create) -> None:
    """The rule is on the whole object (named job here): a spec does not know its job's name."""
    spec = changed({"model": {"fineTuneJobRef": {"name": "job"}}})
    assert refers_to_itself("job", parse_spec(spec))
    assert not refers_to_itself("other", parse_spec(spec))
    with pytest.raises(ValueError) as refused:
        create(spec)
    assert SELF_REFERENCE in str(refused.value)
