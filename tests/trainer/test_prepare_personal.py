"""Personal data: detection by form, false positives, and redaction."""

from __future__ import annotations

import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.sources import Data, DataSource
from finetune_trainer.failures import DataError
from finetune_trainer.personal import (
    EXCERPT,
    covered,
    excerpt,
    redacted,
    scan,
    uncovered,
)
from finetune_trainer.prepare.mapping.batch import inspect
from finetune_trainer.prepare.reading.records import Record
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering.examples import RenderedExample, Segment, renderer

KEY = "a9Zk3QpX7vLm2RtY8cBn"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\nq+/=\n-----END RSA PRIVATE KEY-----"
ENCRYPTED = PEM.replace("KEY-----\nM", "KEY-----\nDEK-Info: AES-128-CBC,3F17F5316E2BAC89\n\nM")
PGP = (
    "-----BEGIN PGP PRIVATE KEY BLOCK-----\nComment: GPGTools - https://gpgtools.org\n\nlQ\n=9a2b\n"
    "-----END PGP PRIVATE KEY BLOCK-----"
)

FOUND = [
    ("EMAIL", "write to jo+x@mail.example.co.uk."),
    ("EMAIL", "<a_b@example.org>"),
    ("EMAIL", "mailto:a@b-c.de, thanks"),
    ("EMAIL", "an jörg@example.de"),
    ("EMAIL", "anna@müller.de"),
    ("EMAIL", "联系jo@example.com谢谢"),
    ("CARD", "4111 1111 1111 1111 12/27"),
    ("CARD", "4111 1111 1111 1111 123"),
    ("CARD", "card 4111 1111 1111 1111 exp"),
    ("CARD", "5500-0000-0000-0004"),
    ("CARD", "378282246310005"),
    ("PHONE", "call +49 (0)30 1234567 today"),
    ("PHONE", "+14155552671"),
    ("PHONE", "(415) 555-2671"),
    ("PHONE", "tel. 415-555-2671."),
    ("PHONE", "030 / 1234567"),
    ("PHONE", "020 7946 0958"),
    ("PHONE", "+33 6 12 34 56 78"),
    ("PHONE", "06 12 34 56 78"),
    ("PHONE", "06.12.34.56.78"),
    ("PHONE", "1-415-555-2671"),
    ("PHONE", "1.415.555.2671"),
    ("PHONE", "1 (415) 555-2671"),
    ("PHONE", "0049 30 1234567"),
    ("SECRET", f"before {PEM} behind"),
    ("SECRET", ENCRYPTED),
    ("SECRET", PGP),
    ("SECRET", "AKIAIOSFODNN7EXAMPLE"),
    ("SECRET", f"OPENAI_KEY=sk-proj-{KEY}"),
    ("SECRET", f"'sk-{KEY}'"),
    ("SECRET", f"ghp_{KEY}{KEY[:16]}"),
    ("SECRET", f"hf_{KEY}{KEY[:14]}"),
    ("SECRET", f"Bearer eyJ{KEY}.eyJ{KEY}.{KEY}"),
]

NOT_FOUND = [
    "4111 1111 1111 1112",  # the check digit
    "0000 0000 0000 0000",
    "20080830172159 and 48146308100036",  # one in ten numbers has the right check digit
    "Boston, MA 02110-1301",
    "clause 252.227-7013",
    "a change of +1.12345679",
    "2024-05-01 12:30:45, 10:15-11:45",
    "12.05.2024 and 05/01/2024",
    "1,000,000.50 and 3.14159265358979",
    "version 1.2.3.4567 at 192.168.100.200",
    "ISBN 978-3-16-148410-0",
    "order 12345678",
    "icon@2x.png and logo@3x.webp",
    "0012 0034 and 001 002 003",
    "12-05-11-30-45",
    "user@localhost, @mention, a @ b.com",
    "sk-xxxxxxxxxxxxxxxxxxxxxxxx",
    "sk-learn and risk-assessment-of-the-whole-company",
    "-----BEGIN PUBLIC KEY-----",
    "3f2b8c1e-9a4d-4e6f-8b7a-123456789012",
]


@given(st.lists(st.sampled_from([text for _, text in FOUND] + NOT_FOUND)).map(" | ".join))
def test_covering_keeps_offsets(text: str) -> None:
    hidden = covered(text)
    assert uncovered(hidden) == redacted(text)
    for was, shown in zip(text, hidden, strict=True):
        assert shown in (was, *"\ufdd0\ufdd1\ufdd2\ufdd3")


@pytest.mark.parametrize(("kind", "text"), FOUND)
def test_found(kind: str, text: str) -> None:
    redacted, kinds = scan(text)
    assert dict(kinds) == {kind: 1}
    assert redacted.count(f"[{kind}]") == 1
    assert sum(c.isdigit() for c in redacted) <= 4, "digits of an expiry date may stay"
    assert "@" not in redacted and "-----" not in redacted and "jö" not in redacted


@pytest.mark.parametrize("text", NOT_FOUND)
def test_not_found(text: str) -> None:
    assert scan(text) == (text, {})


def test_surrounding_text_is_kept() -> None:
    text = f"Mail a@b.org or b@c.org,\ncall +49 30 1234567! {PEM} Bye."
    assert scan(text)[0] == "Mail [EMAIL] or [EMAIL],\ncall [PHONE]! [SECRET] Bye."


@pytest.mark.parametrize("behind", ["12/27", "123", "x"])
def test_text_after_a_card_number_is_kept(behind: str) -> None:
    assert redacted(f"4111 1111 1111 1111 {behind}") == f"[CARD] {behind}"


@given(st.integers(0, 120), st.integers(0, 200))
def test_an_excerpt_shows_no_personal_data(before: int, position: int) -> None:
    text = "x " * before + "jo.doe@example.org\\n4111 1111 1111 1111 " + "y " * 60
    shown = excerpt(text, min(position, len(text) - 1))
    assert "doe" not in shown and "exam" not in shown and "11" not in shown
    assert len(shown) < EXCERPT + 20


@given(
    st.text(st.sampled_from(string.ascii_letters + " .,\n"), max_size=40),
    st.from_regex(r"[a-z]{1,8}\.[a-z]{1,8}@[a-z]{1,8}\.(com|org|de)", fullmatch=True),
    st.text(st.sampled_from(string.ascii_letters + " .,\n"), max_size=40),
)
def test_every_email_address_is_redacted(before: str, address: str, behind: str) -> None:
    redacted, kinds = scan(f"{before} {address} {behind}")
    assert redacted == f"{before} [EMAIL] {behind}" and kinds == {"EMAIL": 1}


@pytest.mark.parametrize(
    "text",
    [
        "a" * 200_000,
        "a." * 100_000 + "@",
        "1 " * 100_000,
        "-----BEGIN " + "A " * 50_000,
        "-----BEGIN PRIVATE KEY-----\n-" * 10_000,
        "sk-" + "a-" * 100_000,
        "+1" + " 1" * 100_000,
        ("+1" + "1" * 80 + "a ") * 2000,
        "a@" + "b." * 100_000,
    ],
)
def test_scan_time_is_linear_for_hostile_text(text: str) -> None:
    begun = time.process_time()
    scan(text)
    assert time.process_time() - begun < 2


def example(prompt: str, completion: str, group: str | None = None) -> RenderedExample:
    parts = (Segment(prompt, False), Segment(completion, True))
    group = prompt if group is None else group
    return RenderedExample(
        "s3://b/x.jsonl, line 3", parts, prompt, completion, None, group,
        framed=True, side="train", own=prompt + completion,
    )  # fmt: skip


def test_redact_covers_all_text_of_an_example_and_its_group() -> None:
    given = example("Who is a@b.org?", " See a@b.org, b@c.org")
    found = inspect(given, "Redact", own_group=True)
    assert found.prompt == found.group == found.segments[0].text == "Who is [EMAIL]?"
    assert found.completion == found.segments[1].text == " See [EMAIL], [EMAIL]"
    assert found.own == found.prompt + found.completion
    assert found.personal == {"EMAIL": 3}
    kept = inspect(example("Who is a@b.org?", "x", "a@b.org"), "Redact", own_group=False)
    assert kept.group == "a@b.org"


def test_warn_counts_without_changes() -> None:
    given = example("Who is a@b.org?", " x")
    warned = inspect(given, "Warn", own_group=True)
    assert warned.segments == given.segments and warned.personal == {"EMAIL": 1}
    assert inspect(given, "Ignore", own_group=True) is given


@pytest.mark.parametrize(
    ("prompt", "completion", "side"),
    [("a@b.org", "x", "its prompt"), ("x", "a@b.org", "its supervised text")],
)
def test_fail_names_record_side_and_kind_but_not_the_value(
    prompt: str, completion: str, side: str
) -> None:
    with pytest.raises(DataError, match=side) as caught:
        inspect(example(prompt, completion), "Fail", own_group=True)
    assert caught.value.reason == "PersonalData"
    assert "s3://b/x.jsonl, line 3: " in caught.value.message
    assert "an e-mail address" in caught.value.message and "a@b.org" not in caught.value.message


def test_prompts_equal_after_redaction_are_one_group() -> None:
    spec = DataSource(source="s3://bucket/a.jsonl")
    data = Data.model_validate(
        {"train": [spec.to_json()], "split": {"validation": "0.3", "test": "0.3"}}
    )
    make = renderer(Source("train", "a", spec, []), "PromptCompletion", data, None, redacted)
    records = [{"prompt": f"Who is a{i}@b.org?", "completion": "x"} for i in range(30)]
    made = [make(Record(fields, "s3://b/x.jsonl", "line 1"))[0] for fields in records]
    assert len({(example.group, example.side) for example in made}) == 1
