"""Prepare for SequenceClassification: texts with special tokens, and classes from the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from classifiers import LABELS, lines, records, tokenizer_of, write_decoder, write_encoder

from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.prepare.tokenizing.texts import Texts
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.manifest import read_manifest
from finetune_trainer.storage.objects import Stores

NO_SPLIT = {"validation": "0", "test": "0"}


@pytest.fixture
def prepared(run_spec_for: Any, bucket: str, s3: Any, tmp_path: Path) -> Any:
    """``prepared({object: records}, model writer, **spec)`` returns the opened prepared data."""
    store = s3.store()

    def make(
        objects: dict[str, list[Any]], write: Any = write_encoder, **spec: Any
    ) -> PreparedData:
        for path in write(tmp_path / "model").iterdir():
            store.upload(path, f"s3://{bucket}/model/{path.name}")
        for name, made in objects.items():
            store.put(f"s3://{bucket}/{name}.jsonl", lines(made))
        train = {"source": f"s3://{bucket}/train.jsonl"}
        spec["data"] = {"train": [train], "split": NO_SPLIT} | spec.get("data", {})
        run_spec = run_spec_for(task="SequenceClassification", **spec)
        summary = prepare(run_spec, Stores(run_spec), tmp_path / "scratch")
        return PreparedData.open(store, summary.uri, tmp_path / "cache")

    return make


def test_a_sample_is_the_text_with_special_tokens_and_its_class_number(prepared: Any) -> None:
    made = [
        {"text": "the film was good", "label": "positive"},
        {"text": "poor book", "label": "negative"},
    ]
    data = prepared({"train": made})
    tokenizer = tokenizer_of()
    for sample, record in zip(data.samples("train", [0, 1]), made, strict=True):
        own = tokenizer(record["text"], padding=False, truncation=False)["input_ids"]
        assert sample.ids.tolist() == own
        assert (sample.ids[0], sample.ids[-1]) == (2, 3)
        assert not sample.supervised.any()
        assert data.manifest.classes[sample.label] == record["label"]
    index = data.index("train")
    assert (index.length.tolist(), index.supervised.tolist()) == ([6, 4], [1, 1])
    assert data.manifest.classes == list(LABELS)
    assert data.manifest.stop_token_ids == []


def test_a_decoder_without_padding_token_has_no_special_tokens(prepared: Any) -> None:
    made = [{"text": "a good trip", "label": 1}, {"text": "a bad trip", "label": 0}]
    data = prepared({"train": made}, write_decoder)
    words = tokenizer_of(marks=False).convert_tokens_to_ids(["a", "good", "trip"])
    assert data.samples("train", [0])[0].ids.tolist() == words
    assert data.manifest.classes == ["0", "1"]


def test_integer_labels_are_ordered_by_value(prepared: Any) -> None:
    made = [{"text": f"the film {'so ' * i}", "label": i} for i in (10, 9, 2, -1)]
    assert prepared({"train": made}).manifest.classes == ["-1", "2", "9", "10"]


def test_a_template_renders_records_with_other_fields(prepared: Any, bucket: str) -> None:
    made = [{"title": "film", "body": f"a {w}", "stars": w} for w in ("good", "bad")]
    template = {"prompt": "{{ title }} {{ body }}", "completion": "{{ stars }}"}
    # Without a format: the task implies Classification.
    train = {"source": f"s3://{bucket}/train.jsonl", "template": template}
    data = prepared({"train": made}, data={"train": [train]})
    assert data.manifest.classes == ["bad", "good"]
    assert (
        data.samples("train", [0])[0].ids.tolist()
        == tokenizer_of()("film a good", padding=False, truncation=False)["input_ids"]
    )


def test_a_long_text_is_cut_at_its_end_and_keeps_special_tokens(prepared: Any) -> None:
    made = [{"text": "good " * 30, "label": "a"}, {"text": "bad film", "label": "b"}]
    data = prepared({"train": made}, training={"maxLength": 12})
    ids = data.samples("train", [0])[0].ids.tolist()
    good = tokenizer_of().convert_tokens_to_ids("good")
    assert ids == [2, *[good] * 10, 3]
    assert b'"textEnd": 1' in data._store.get(f"{data._uri}/report.json")


def test_the_maximum_length_is_that_of_the_tokenizer(prepared: Any) -> None:
    """RoBERTa starts positions above 0: 64 of its 66 positions are usable."""
    made = [{"text": "good " * 90, "label": "a"}, {"text": "bad film", "label": "b"}]
    assert prepared({"train": made}).manifest.max_length == 64


def test_an_unknown_label_of_a_held_out_record_is_named(prepared: Any, bucket: str) -> None:
    test = [*records(4), {"text": "a fine meal", "label": "mixed"}]
    with pytest.raises(
        DataError, match=r"test\.jsonl, line 5: no training sample has .*'mixed'"
    ) as bad:
        prepared(
            {"train": records(20), "test": test},
            data={"test": [{"source": f"s3://{bucket}/test.jsonl"}]},
        )
    assert bad.value.reason == "UnknownLabel"


@pytest.mark.parametrize(
    ("made", "kind", "reason", "message"),
    [
        ([{"text": "a", "label": "x"}, {"text": "the", "label": "x"}], DataError,
         "TooFewClasses", "one label, x"),
        ([{"prompt": "a", "completion": "b"}], UserError, "FormatNotForTask",
         r"train\.jsonl, line 1: .*PromptCompletion.*needs Classification"),
        ([{"text": "good film"}], UserError, "FormatNotForTask", "format Text"),
        ([{"text": "", "label": "x"}], DataError, "EmptyPrompt", "its text has no token"),
        ([{"text": "good", "label": " "}], DataError, "NothingSupervised", "its label is empty"),
    ],
)  # fmt: skip
def test_data_unsuitable_for_classification_is_refused(
    prepared: Any, made: list[Any], kind: type[Exception], reason: str, message: str
) -> None:
    with pytest.raises(kind, match=message) as refused:
        prepared({"train": made})
    assert refused.value.reason == reason  # type: ignore[attr-defined]


def test_the_task_changes_the_digest(prepared: Any, run_spec_for: Any, tmp_path: Path) -> None:
    classes = prepared({"train": records(20)}, write_decoder)
    run_spec = run_spec_for(data={"train": [{"source": run_spec_for().spec.data.train[0].source}],
                            "split": NO_SPLIT}, run="2-abcde")  # fmt: skip
    summary = prepare(run_spec, Stores(run_spec), tmp_path / "scratch-2")
    text = read_manifest(Stores(run_spec).default, summary.uri)
    assert text is not None
    assert (text.digest != classes.manifest.digest, text.classes) == (True, [])


def test_a_model_without_a_classification_head_is_refused_before_its_weights(prepared: Any) -> None:
    def write(folder: Path) -> Path:
        write_encoder(folder)
        config = {"model_type": "bart", "vocab_size": 30, "is_encoder_decoder": True}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    with pytest.raises(UserError, match="which cannot be a text classifier") as refused:
        prepared({"train": records(4)}, write)
    assert refused.value.reason == "UnsupportedModel"


def test_a_tokenizer_without_a_padding_token_is_refused() -> None:
    with pytest.raises(UserError, match="neither pad_token nor eos_token") as refused:
        Texts(tokenizer_of(marks=False), "s3://m", 100)
    assert refused.value.reason == "NoPaddingToken"
