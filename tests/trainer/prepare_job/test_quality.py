"""Prepare jobs with overlength, duplicate and contaminated samples, and with personal data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepare.mapping import reader, writer
from trainer.prepare_helpers import (
    ALL,
    LONG,
    Workplace,
    lines,
    make_tokenizer,
    pairs,
    texts,
)

# --- overlength ----------------------------------------------------------------------------------


def test_overlength_is_cut_or_dropped_and_counted(at: Workplace) -> None:
    short = {"training": {"maxLength": 32}}
    summary, data = at.prepare(at.run_spec(lines(LONG, *pairs(3)), data=ALL, **short))
    sample = data.samples("train", [0])[0]
    tokenizer = make_tokenizer(bos=True)
    assert len(sample.ids) == 32 and tokenizer.decode(sample.ids).endswith("End: yes</s>")
    assert sample.ids[0] == tokenizer.bos_token_id
    report = json.loads(at.store.get(f"{summary.uri}/report.json"))
    assert report["sources"][0]["truncated"] == {
        "promptBeginning": 1,
        "completionEnd": 0,
        "textEnd": 0,
    }
    first, second, *_ = report["sources"][0]["splits"]["train"]["previews"]
    whole = tokenizer(LONG["prompt"])["input_ids"]
    shown = tokenizer.decode(sample.ids[~sample.supervised], skip_special_tokens=True)
    assert first["parts"] == [
        {"text": "", "supervised": False, "cut": len(whole) - sum(~sample.supervised)},
        {"text": shown, "supervised": False},
        {"text": " yes", "supervised": True},
    ]
    assert [part["text"] for part in second["parts"]] == list(pairs(1)[0].values())
    page = at.store.get(f"{summary.uri}/report.html").decode()
    assert f"[{first['parts'][0]['cut']} tokens cut off]</span>{shown}<mark" in page

    dropping = {**ALL, "quality": {"overlength": "Drop"}}
    summary, _ = at.prepare(at.run_spec(data=dropping, **short))
    assert (summary.train_samples, summary.dropped) == (3, {"Overlength": 1})


def test_long_documents_are_split_without_loss(at: Workplace) -> None:
    """A repeated document is kept once, and only its last piece has the end token."""
    text = "\n".join(f"{i}. The cat sat on mat {i * i}." for i in range(40))
    records = lines({"text": text}, {"text": "A short one."}, {"text": text})
    spec: dict[str, Any] = {"training": {"maxLength": 48}}
    run_spec = at.run_spec(
        records, data={**ALL, "quality": {"maxDuplicateFraction": "0.6"}}, **spec
    )
    summary, data = at.prepare(run_spec)
    samples = data.samples("train", range(summary.train_samples))
    tokenizer = make_tokenizer(bos=True)
    read = [tokenizer.decode(sample.ids, skip_special_tokens=True) for sample in samples]
    assert len(read) > 5 and "".join(read[:-1]) == text and read[-1] == "A short one."
    assert max(len(sample.ids) for sample in samples) <= 48
    ends = [sample.ids[-1] == tokenizer.eos_token_id for sample in samples]
    assert ends == [False] * (len(samples) - 2) + [True, True]
    assert data.manifest.stop_token_ids == [tokenizer.eos_token_id]
    assert summary.dropped == {"Duplicate": len(samples) - 1}
    report = json.loads(at.store.get(f"{summary.uri}/report.json"))["sources"][0]
    assert report["documentsSplit"] == 2 and not sum(report["truncated"].values())
    shown = report["splits"]["train"]["previews"][1]
    assert shown["where"].endswith(f"line 1, piece 2 of {len(samples) - 1}")
    assert "".join(part["text"] for part in shown["parts"]) == read[1]

    cut = {**ALL, "quality": {"overlength": "Truncate"}}
    summary, data = at.prepare(at.run_spec(data=cut, **spec))
    assert (summary.train_samples, summary.dropped) == (2, {"Duplicate": 1})
    assert len(data.samples("train", [0])[0].ids) == 48


def test_overlength_fail_names_the_record(at: Workplace) -> None:
    error = at.fault(
        lines(*pairs(3), LONG),
        data={"quality": {"overlength": "Fail"}},
        training={"maxLength": 32},
    )
    assert isinstance(error, DataError) and error.reason == "Overlength"
    assert f"{at.root}/data/0.jsonl, line 4:" in error.message
    assert "training.maxLength is 32" in error.message


def test_a_max_length_above_the_models_positions_is_refused(at: Workplace) -> None:
    error = at.fault(lines(*pairs(3)), training={"maxLength": 257})
    assert isinstance(error, UserError) and error.reason == "MaxLengthTooLong"
    assert "257" in error.message and "256" in error.message


def test_without_a_max_length_the_models_positions_are_used(at: Workplace) -> None:
    assert at.prepare(at.run_spec(lines(*pairs(9))))[1].manifest.max_length == 256


# --- near duplicates -----------------------------------------------------------------------------

STORY = " ".join(f"word{i}" for i in range(80))
ALIKE = [{"prompt": STORY + end, "completion": " yes"} for end in ("!", " more", " else")]


def test_near_duplicates_are_dropped_on_request(at: Workplace) -> None:
    run_spec = at.run_spec(lines(*pairs(5), ALIKE[0], *pairs(3)), lines(*ALIKE[1:]), data=ALL)
    assert at.prepare(run_spec)[0].dropped == {"Duplicate": 3}
    drop = {**ALL, "quality": {"nearDuplicates": "Drop"}}
    summary, _ = at.prepare(at.run_spec(data=drop))
    assert summary.dropped == {"Duplicate": 3, "NearDuplicate": 2} and summary.train_samples == 6


def varied(seed: int) -> str:
    return " ".join(random.Random(seed).choices([f"w{i}" for i in range(999)], k=40))


SHARED = STORY * 5
"""Text that all records of a set share."""


def conversation(seed: int) -> dict[str, Any]:
    said = (("system", SHARED), ("user", varied(seed)), ("assistant", "yes"))
    return {"messages": [{"role": role, "content": content} for role, content in said]}


@pytest.mark.parametrize(
    ("record", "template"),
    [
        (conversation, None),
        (
            lambda seed: {"text": varied(seed), "label": "yes"},
            {"prompt": SHARED + "{{ text }}", "completion": " {{ label }}"},
        ),
    ],
)
def test_shared_text_does_not_make_near_duplicates(
    at: Workplace, record: Callable[[int], dict[str, Any]], template: dict[str, str] | None
) -> None:
    records = [record(seed) for seed in range(20)]
    alike = json.loads(json.dumps(records[3]).replace("yes", "no"))
    source = {"source": at.put("a.jsonl", lines(*records, alike)), "template": template}
    data = {**ALL, "train": [source], "quality": {"nearDuplicates": "Drop"}}
    summary, _ = at.prepare(at.run_spec(data=data))
    assert summary.dropped == {"NearDuplicate": 1} and summary.train_samples == 20


def test_more_duplicates_than_allowed_fail_the_job(at: Workplace) -> None:
    quality = {"nearDuplicates": "Drop", "maxDuplicateFraction": "0.45"}
    data = {**ALL, "quality": quality}
    error = at.fault(lines(*pairs(4), *ALIKE, *pairs(3)), data=data)
    assert isinstance(error, DataError) and error.reason == "TooManyDuplicates"
    assert "5 of 10 training samples (50.0%)" in error.message and "0.45" in error.message
    quality["maxDuplicateFraction"] = "0.5"
    assert at.prepare(at.run_spec(data=data))[0].train_samples == 5


# --- contamination -------------------------------------------------------------------------------

PASSAGE = "The bird in the tree looked at the small town by the sea and sat on the mat."
LEAKED = {"prompt": f"Once. {PASSAGE}", "completion": " a@example.org"}
OTHERS = [{"prompt": f"{i} {i} {i}", "completion": f" {i}"} for i in range(6)]


def contaminated(at: Workplace, policy: str, *train: Any) -> dict[str, Any]:
    held = at.put("held.jsonl", lines({"prompt": PASSAGE, "completion": " no"}, *pairs(2)))
    listed = [{"name": f"set-{i}", "source": at.put(f"t{i}.jsonl", lines(*records))}
              for i, records in enumerate(train)]  # fmt: skip
    data = {"train": listed, "test": [{"source": held}], "split": {"validation": "0"}}
    return {"data": {**data, "quality": {"contamination": policy}}}


def test_contamination_is_counted_with_places_and_text(at: Workplace) -> None:
    run_spec = at.run_spec(**contaminated(at, "Warn", OTHERS, [*OTHERS[:3], LEAKED, *pairs(1)]))
    summary, data = at.prepare(run_spec)
    assert summary.train_samples == 8 and len(data.index("train")) == 8
    text = at.store.get(f"{summary.uri}/report.json").decode()
    found = json.loads(text)["contamination"]
    assert (found["heldOutSamples"], found["comparedSamples"]) == (3, 3)
    assert list(found["sets"]) == ["set-1"]
    first, second = found["sets"]["set-1"]["examples"]
    assert first["where"] == f"{at.root}/t1.jsonl, line 4"
    assert second["where"] == f"{at.root}/t1.jsonl, line 5"
    assert first["shared"].strip() in PASSAGE and len(first["shared"]) > 10
    assert "example.org" not in text


def test_contaminated_samples_are_removed_from_the_index(
    at: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD_TOKENS", 60)
    monkeypatch.setattr(reader, "BATCH_RECORDS", 2)
    train = [[LEAKED, *OTHERS], [*pairs(2, 50), *pairs(1), OTHERS[0]]]
    summary, data = at.prepare(at.run_spec(**contaminated(at, "Drop", *train)))
    kept = [*OTHERS, *pairs(2, 50)]
    assert texts(data, "train") == [r["prompt"] + r["completion"] for r in kept]
    assert summary.dropped == {"Contaminated": 2, "Duplicate": 1}
    index = data.index("train")
    assert summary.train_samples == len(index) == 8
    assert summary.train_tokens == index.length.sum()
    assert summary.supervised_tokens == index.supervised.sum()
    assert np.bincount(index.set).tolist() == [6, 2]
    assert [s.samples for s in data.manifest.sets if s.split == "train"] == [6, 2]
    assert len(data.references("test", [0, 1, 2])) == 3


def test_contamination_fails_the_job_on_request(at: Workplace) -> None:
    error = at.fault(**contaminated(at, "Fail", [*OTHERS, LEAKED]))
    assert isinstance(error, DataError) and error.reason == "Contaminated"
    assert "1 of 7 samples of training set 'set-0'" in error.message
    assert f"{at.root}/t0.jsonl, line 7" in error.message


def test_a_fully_contaminated_set_fails_the_job(at: Workplace) -> None:
    error = at.fault(**contaminated(at, "Drop", OTHERS, [LEAKED]))
    assert error.reason == "Contaminated" and "no sample of the set" in error.message


def test_contamination_may_be_ignored(at: Workplace) -> None:
    summary, _ = at.prepare(at.run_spec(**contaminated(at, "Ignore", [*OTHERS, LEAKED])))
    assert json.loads(at.store.get(f"{summary.uri}/report.json"))["contamination"] is None


# --- personal data -------------------------------------------------------------------------------

MAIL = {"prompt": "Who is it?", "completion": " It is a@example.org."}


def test_personal_data_is_counted_and_masked_in_the_report(at: Workplace) -> None:
    summary, data = at.prepare(at.run_spec(lines(*pairs(3), MAIL), data=ALL))
    assert texts(data, "train")[-1] == "Who is it? It is a@example.org."
    text = at.store.get(f"{summary.uri}/report.json").decode()
    (side,) = json.loads(text)["sources"][0]["splits"].values()
    place = f"{at.root}/data/0.jsonl, line 4"
    assert side["personalData"] == {"EMAIL": {"samples": 1, "occurrences": 1, "places": [place]}}

    shown, _ = at.prepare(at.run_spec(lines(MAIL), data=ALL))
    report = at.store.get(f"{shown.uri}/report.json").decode()
    assert "It is [EMAIL]." in report and "example.org" not in text + report


def test_personal_data_is_redacted_before_deduplication(at: Workplace) -> None:
    other = {**MAIL, "completion": " It is b@example.org."}
    quality = {"personalData": "Redact"}
    run_spec = at.run_spec(lines(*pairs(3), MAIL, other), data={**ALL, "quality": quality})
    summary, data = at.prepare(run_spec)
    assert texts(data, "train")[-1] == "Who is it? It is [EMAIL]."
    assert summary.dropped == {"Duplicate": 1}
