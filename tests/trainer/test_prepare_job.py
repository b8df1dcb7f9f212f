"""The prepare stage against a real S3 server: what later stages read, and how it fails."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.order import RunOrder
from finetune_api.results import PreparedSummary
from finetune_api.sources import StorageAccess
from finetune_trainer.failures import DataError, TrainerError, UserError
from finetune_trainer.prepare import facts, parts, writer
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.prepare.reader import Reading
from finetune_trainer.prepare.tokens import Tokens
from finetune_trainer.prepared.shards import PreparedData
from finetune_trainer.prepared.split import SIDES
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.storage.runfiles import read_prepared
from finetune_trainer.storage.s3server import EmbeddedS3
from trainer.prepare_helpers import CHATML, lines, make_tokenizer, pairs, save_model

ALL = {"split": {"validation": "0", "test": "0"}}
"""A data block's part that holds nothing out."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), make_tokenizer(bos=True, chat=CHATML))


@pytest.fixture(scope="module")
def store(s3: EmbeddedS3) -> ObjectStore:
    return s3.store()


@pytest.fixture(scope="module")
def bucket(s3: EmbeddedS3, store: ObjectStore, model_folder: Path) -> str:
    """One bucket for all tests (a new one takes the server a while), with the model in it."""
    s3.ensure_bucket("test-prepare")
    for path in model_folder.iterdir():
        store.upload(path, f"s3://test-prepare/model/{path.name}")
    return "test-prepare"


class OneStore(Stores):
    """Stores that share a client: making one takes longer than a small job."""

    def __init__(self, order: RunOrder, store: ObjectStore) -> None:
        super().__init__(order)
        self._store = store

    def of(self, access: StorageAccess | None) -> ObjectStore:
        return self._store


@dataclass
class Workplace:
    """A folder of the bucket, and prepare on orders of it."""

    root: str
    store: ObjectStore
    order_for: Callable[..., RunOrder]
    scratch: Iterator[Path]

    def put(self, name: str, data: bytes) -> str:
        uri = f"{self.root}/{name}"
        self.store.put(uri, data)
        return uri

    def order(self, *train: bytes, **spec: Any) -> RunOrder:
        """An order over objects of JSON Lines."""
        for i, data in enumerate(train):
            self.put(f"data/{i}.jsonl", data)
        data_block = {"train": [{"source": f"{self.root}/data/"}], **spec.pop("data", {})}
        output = {"destination": f"{self.root}/out"}
        return self.order_for(data=data_block, output=output, **spec)

    def prepare(self, order: RunOrder) -> tuple[PreparedSummary, PreparedData]:
        summary = prepare(order, OneStore(order, self.store), next(self.scratch))
        assert summary is not None
        return summary, PreparedData.open(self.store, summary.uri, next(self.scratch))

    def fault(self, *train: bytes, **spec: Any) -> TrainerError:
        order = self.order(*train, **spec)
        with pytest.raises(TrainerError) as caught:
            prepare(order, OneStore(order, self.store), next(self.scratch))
        left = [o.uri for o in self.store.list(f"{self.root}/out/")]
        assert not [uri for uri in left if uri.endswith(("manifest.json", "prepared.json"))]
        return caught.value


@pytest.fixture
def at(
    store: ObjectStore, bucket: str, order_for: Callable[..., RunOrder], tmp_path: Path
) -> Workplace:
    root = f"s3://{bucket}/{uuid.uuid4().hex[:8]}"
    return Workplace(root, store, order_for, (tmp_path / str(i) for i in range(99)))


def texts(data: PreparedData, split: Any) -> list[str]:
    """Decoded samples of a split."""
    tokenizer = make_tokenizer(bos=True)
    found = data.samples(split, range(len(data.index(split))))
    return [tokenizer.decode(s.ids, skip_special_tokens=True) for s in found]


# --- what is written -----------------------------------------------------------------------------


def test_every_record_is_found_again_on_one_side_with_its_mask(at: Workplace) -> None:
    records = pairs(200)
    split = {"validation": "0.1", "test": "0.2"}
    order = at.order(lines(*records[:120]), lines(*records[120:]), data={"split": split})
    said: list[Reading] = []
    summary = prepare(order, OneStore(order, at.store), next(at.scratch), said.append)
    assert summary is not None
    data = PreparedData.open(at.store, summary.uri, next(at.scratch))

    found = [text for split in SIDES for text in texts(data, split)]
    assert sorted(found) == sorted(r["prompt"] + r["completion"] for r in records)
    counts = [len(data.index(split)) for split in SIDES]
    assert counts == [summary.train_samples, summary.validation_samples, summary.test_samples]
    assert 5 < counts[1] < 40 < counts[0] and 20 < counts[2] < 65
    tokenizer = make_tokenizer(bos=True)
    for split in SIDES:
        index = data.index(split)
        samples = data.samples(split, range(len(index)))
        assert index.length.tolist() == [len(s.ids) for s in samples]
        assert index.supervised.tolist() == [int(s.supervised.sum()) for s in samples]
        for s in samples:
            answer = tokenizer.decode(s.ids[s.supervised])
            assert answer.startswith(" It is ") and answer.endswith("</s>")
    for reference in data.references("test", range(counts[2])):
        assert reference.prompt_ids.tolist() == tokenizer(reference.prompt)["input_ids"]
        number = reference.prompt.split()[-1].rstrip("?")
        assert reference.completion == f" It is {number}." and reference.label is None
    train = data.index("train")
    assert summary.train_tokens == train.length.sum()
    assert summary.supervised_tokens == train.supervised.sum()
    assert summary.total_steps == -(-3 * counts[0] // 32)
    assert data.manifest.stop_token_ids == [tokenizer.eos_token_id]
    assert data.manifest.max_completion_tokens == train.supervised.max()
    assert read_prepared(at.store, order.run_uri) == summary
    assert (said[-1].records, said[-1].bytes) == (200, said[-1].total_bytes)


def test_all_formats_and_containers_together(at: Workplace) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"text": "The cat", "label": i % 2} for i in range(3)]),
                   sink)  # fmt: skip
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The bird"}]
    sources = {
        "pairs": at.put("a/x.jsonl", lines(*pairs(3))),
        "tasks": at.put("b/x.json.gz", gzip.compress(lines({"instruction": "a", "output": "b"}))),
        "labels": at.put("c/x.parquet", sink.getvalue()),
        "chats": at.put("d/x.jsonl", lines({"messages": chat})),
        "texts": at.put("e/x.json", lines({"text": "The tree"}, {"text": "The mat"})),
    }
    listed = [{"name": name, "source": uri} for name, uri in sources.items()]
    order = at.order(data={"train": listed, **ALL, "quality": {"deduplicate": False}})
    summary, data = at.prepare(order)
    assert {s.name: (s.format, s.samples) for s in data.manifest.sets} == {
        "pairs": ("PromptCompletion", 3),
        "tasks": ("Instruction", 1),
        "labels": ("Classification", 3),
        "chats": ("Messages", 1),
        "texts": ("Text", 2),
    }
    assert [name for _, name in data.set_names("train")] == list(sources)
    index = data.index("train")
    assert np.bincount(index.set).tolist() == [3, 1, 3, 1, 2]
    tokenizer = make_tokenizer(bos=True)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert data.manifest.stop_token_ids == sorted(stops)
    report = json.loads(at.store.get(f"{summary.uri}/report.json"))
    labels = next(s for s in report["sources"] if s["name"] == "labels")
    assert labels["splits"]["train"]["labels"] == {"0": 2, "1": 1}
    page = data.manifest.file("report.html")
    written = at.store.get(f"{summary.uri}/report.html")
    assert len(written) == page.bytes and all(name.encode() in written for name in sources)
    preview = report["sources"][0]["splits"]["train"]["previews"][0]
    assert preview["where"] == f"{sources['pairs']}, line 1"
    assert [p["learned"] for p in preview["parts"]] == [False, True]


def test_held_out_prompts_are_those_of_the_first_phrasing_and_show_the_oracle(
    at: Workplace,
) -> None:
    asked = at.put("q.jsonl", lines(*({"ask": f"no {i}?", "answer": i} for i in range(120))))
    found = at.put(
        "r.jsonl",
        lines(
            *(
                {
                    "question": f"{i}?",
                    "oracle": f"<{i}>",
                    "distractors": ["a"],
                    "answer": "[oracle]",
                }
                for i in range(120)
            )
        ),
    )
    template = {"name": "Question", "fields": {"question": "ask"}}
    order = at.order(
        data={
            "train": [
                {"name": "asked", "source": asked, "template": template},
                {
                    "name": "found", "source": found, "format": "Retrieval",
                    "retrieval": {"oracleShare": "1"},
                },
            ],
            "split": {"validation": "0", "test": "0.3"},
        }
    )  # fmt: skip
    _, data = at.prepare(order)
    formats = {(s.split, s.name): s.format for s in data.manifest.sets}
    assert (
        formats["test", "asked"] == "PromptCompletion" and formats["test", "found"] == "Retrieval"
    )
    tests = data.references("test", range(len(data.index("test"))))
    asked_prompts = [t.prompt for t in tests if " no " in t.prompt]
    assert asked_prompts and all(p.startswith("Question: no ") for p in asked_prompts)
    for cited in (t for t in tests if " no " not in t.prompt):
        number = cited.prompt.split("Question: ")[1].split("?")[0]
        assert f"{cited.completion.strip()} <{number}>" in cited.prompt
    train = [text for text in texts(data, "train") if "no " in text]
    assert 0 < sum(not text.startswith("Question: no ") for text in train) < len(train)


def test_given_validation_and_test_sets_take_the_place_of_the_split(at: Workplace) -> None:
    held = at.put("held.jsonl", lines(*({"text": "fine", "label": x} for x in ("good", "bad"))))
    order = at.order(
        lines(*pairs(100)),
        data={"validation": [{"source": held}], "test": [{"name": "final", "source": held}]},
    )
    summary, data = at.prepare(order)
    assert (summary.train_samples, summary.validation_samples, summary.test_samples) == (100, 2, 2)
    assert data.set_names("validation") == [(1, "validation-0")]
    assert data.set_names("test") == [(2, "final")]
    assert [r.label for r in data.references("test", [0, 1])] == ["good", "bad"]


def test_equal_prompts_and_equal_groups_stay_on_one_side(at: Workplace) -> None:
    records = [{**r, "completion": f" {n}", "by": i % 40}
               for i, r in enumerate(pairs(120)) for n in range(4)]  # fmt: skip
    split: dict[str, Any] = {"validation": "0.2", "test": "0.3"}
    _, data = at.prepare(at.order(lines(*records), data={"split": split}))
    prompts = [{t.split("?")[0] for t in texts(data, side)} for side in SIDES]
    assert all(prompts) and sum(map(len, prompts)) == 120

    split["groupBy"] = "by"
    _, data = at.prepare(at.order(lines(*records), data={"split": split}))
    groups = [{int(t.split("?")[0].split()[-1]) % 40 for t in texts(data, s)} for s in SIDES]
    assert all(groups) and sum(map(len, groups)) == 40


def test_records_keep_their_side_as_the_data_grows(at: Workplace) -> None:
    split = {"split": {"validation": "0.2", "test": "0.2"}}
    _, small = at.prepare(at.order(lines(*pairs(60)), data=split))
    _, large = at.prepare(at.order(lines(*pairs(60, start=500)), lines(*pairs(60)), data=split))
    for side in SIDES:
        assert set(texts(small, side)) <= set(texts(large, side))


def test_duplicates_are_dropped_once_over_all_training_sources(at: Workplace) -> None:
    order = at.order(lines(*pairs(20), *pairs(5)), lines(*pairs(10)), data=ALL)
    summary, _ = at.prepare(order)
    assert summary.train_samples == 20 and summary.dropped == {"Duplicate": 15}
    kept = {**ALL, "quality": {"deduplicate": False}}
    summary, data = at.prepare(at.order(data=kept))
    assert summary.train_samples == 35
    assert len(data.index("test")) == 0 and data.index("test").length.max(initial=1) == 1


def test_samples_are_found_over_many_shards(at: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_TOKENS", 200)
    _, data = at.prepare(at.order(lines(*pairs(100)), data=ALL))
    names = data.manifest.shards["train"]
    assert len(names) > 5 and names[1] == "shards/train-train-0-00000-01.arrow"
    whole = texts(data, "train")
    assert whole == [r["prompt"] + r["completion"] for r in pairs(100)]
    tokenizer = make_tokenizer(bos=True)
    some = data.samples("train", [99, 3, 50, 3])
    assert [tokenizer.decode(s.ids, skip_special_tokens=True) for s in some] == [
        whole[i] for i in (99, 3, 50, 3)
    ]


def test_memory_does_not_grow_with_the_data(at: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_TOKENS", 4000)
    monkeypatch.setattr(facts, "ROWS", 256)
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)

    def peak(order: RunOrder) -> int:
        tracemalloc.start()
        try:
            at.prepare(order)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    at.prepare(at.order(lines(*pairs(600)), data=ALL))  # imports and caches
    once = peak(at.order(lines(*pairs(1000)), data=ALL))
    eightfold = peak(at.order(lines(*pairs(8000)), data=ALL))
    # What stays of a sample: 16 bytes of its digest and a few of the length counts.
    assert eightfold - once < 7000 * 64


# --- overlength ----------------------------------------------------------------------------------

LONG = {"prompt": "The cat sat. " * 30 + "End:", "completion": " yes"}


def test_overlength_is_cut_or_dropped_and_counted(at: Workplace) -> None:
    short = {"training": {"maxLength": 32}}
    summary, data = at.prepare(at.order(lines(LONG, *pairs(3)), data=ALL, **short))
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

    dropping = {**ALL, "quality": {"overlength": "Drop"}}
    summary, _ = at.prepare(at.order(data=dropping, **short))
    assert (summary.train_samples, summary.dropped) == (3, {"Overlength": 1})


def test_overlength_fail_names_the_record(at: Workplace) -> None:
    error = at.fault(
        lines(*pairs(3), LONG),
        data={"quality": {"overlength": "Fail"}},
        training={"maxLength": 32},
    )
    assert isinstance(error, DataError) and error.reason == "Overlength"
    assert f"{at.root}/data/0.jsonl, line 4:" in error.message
    assert "training.maxLength is 32" in error.message


def test_a_length_above_the_models_maximum_is_refused(at: Workplace) -> None:
    error = at.fault(lines(*pairs(3)), training={"maxLength": 257})
    assert isinstance(error, UserError) and error.reason == "MaxLengthTooLong"
    assert "257" in error.message and "256" in error.message


def test_without_a_length_the_models_maximum_is_used(at: Workplace) -> None:
    assert at.prepare(at.order(lines(*pairs(9))))[1].manifest.max_length == 256


# --- near duplicates -----------------------------------------------------------------------------

STORY = " ".join(f"word{i}" for i in range(80))
ALIKE = [{"prompt": STORY + end, "completion": " yes"} for end in ("!", " more", " else")]


def test_near_duplicates_are_dropped_on_request(at: Workplace) -> None:
    order = at.order(lines(*pairs(5), ALIKE[0], *pairs(3)), lines(*ALIKE[1:]), data=ALL)
    assert at.prepare(order)[0].dropped == {"Duplicate": 3}
    drop = {**ALL, "quality": {"nearDuplicates": "Drop"}}
    summary, _ = at.prepare(at.order(data=drop))
    assert summary.dropped == {"Duplicate": 3, "NearDuplicate": 2} and summary.train_samples == 6


def test_more_duplicates_than_allowed_fail_the_job(at: Workplace) -> None:
    quality = {"nearDuplicates": "Drop", "maxDuplicateFraction": "0.45"}
    data = {**ALL, "quality": quality}
    error = at.fault(lines(*pairs(4), *ALIKE, *pairs(3)), data=data)
    assert isinstance(error, DataError) and error.reason == "TooManyDuplicates"
    assert "5 of 10 training records (50.0%)" in error.message and "0.45" in error.message
    quality["maxDuplicateFraction"] = "0.5"
    assert at.prepare(at.order(data=data))[0].train_samples == 5


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
    order = at.order(**contaminated(at, "Warn", OTHERS, [*OTHERS[:3], LEAKED, *pairs(1)]))
    summary, data = at.prepare(order)
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


def test_contaminated_samples_are_left_out_of_the_index(
    at: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD_TOKENS", 60)
    train = [[LEAKED, *OTHERS], [*pairs(2, 50), *pairs(1), OTHERS[0]]]
    summary, data = at.prepare(at.order(**contaminated(at, "Drop", *train)))
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


def test_a_set_of_which_nothing_would_be_left_fails_the_job(at: Workplace) -> None:
    error = at.fault(**contaminated(at, "Drop", OTHERS, [LEAKED]))
    assert error.reason == "Contaminated" and "nothing of the set" in error.message


def test_contamination_may_be_ignored(at: Workplace) -> None:
    summary, _ = at.prepare(at.order(**contaminated(at, "Ignore", [*OTHERS, LEAKED])))
    assert json.loads(at.store.get(f"{summary.uri}/report.json"))["contamination"] is None


# --- personal data -------------------------------------------------------------------------------

MAIL = {"prompt": "Who is it?", "completion": " It is a@example.org."}


def test_personal_data_is_counted_and_shown_nowhere(at: Workplace) -> None:
    summary, data = at.prepare(at.order(lines(*pairs(3), MAIL), data=ALL))
    assert texts(data, "train")[-1] == "Who is it? It is a@example.org."
    text = at.store.get(f"{summary.uri}/report.json").decode()
    (side,) = json.loads(text)["sources"][0]["splits"].values()
    place = f"{at.root}/data/0.jsonl, line 4"
    assert side["personalData"] == {"EMAIL": {"samples": 1, "occurrences": 1, "places": [place]}}

    shown, _ = at.prepare(at.order(lines(MAIL), data=ALL))
    report = at.store.get(f"{shown.uri}/report.json").decode()
    assert "It is [EMAIL]." in report and "example.org" not in text + report


def test_personal_data_is_redacted_before_duplicates_are_looked_for(at: Workplace) -> None:
    other = {**MAIL, "completion": " It is b@example.org."}
    quality = {"personalData": "Redact"}
    order = at.order(lines(*pairs(3), MAIL, other), data={**ALL, "quality": quality})
    summary, data = at.prepare(order)
    assert texts(data, "train")[-1] == "Who is it? It is [EMAIL]."
    assert summary.dropped == {"Duplicate": 1}


# --- reuse ---------------------------------------------------------------------------------------


def test_a_second_job_reuses_the_data_and_writes_nothing_of_it(at: Workplace) -> None:
    first, _ = at.prepare(at.order(lines(*pairs(30))))
    before = {o.uri: o.etag for o in at.store.list(f"{first.uri}/")}
    order = at.order(job="other", run="2-zzzzz", training={"batchSize": 4, "epochs": 1})
    second, _ = at.prepare(order)
    assert (first.reused, second.reused) == (False, True)
    assert second.digest == first.digest and second.train_samples == first.train_samples
    assert second.total_steps == -(-second.train_samples // 4)
    assert {o.uri: o.etag for o in at.store.list(f"{first.uri}/")} == before
    assert read_prepared(at.store, order.run_uri) == second


@pytest.mark.parametrize("gone", ["manifest.json", "index-train.arrow"])
def test_incomplete_data_is_prepared_again(at: Workplace, gone: str) -> None:
    order = at.order(lines(*pairs(30)))
    first, _ = at.prepare(order)
    at.store.delete([f"{first.uri}/{gone}"])
    second, data = at.prepare(order)
    assert not second.reused and second.digest == first.digest
    assert len(texts(data, "train")) == first.train_samples


def test_the_digest_changes_with_all_that_matters(at: Workplace, model_folder: Path) -> None:
    base = lines(*pairs(30))
    uri = f"{at.root}/data/"
    template = {"prompt": "{{ prompt }}", "completion": "{{ completion }}"}
    digests = [
        at.prepare(at.order(base, **spec))[0].digest
        for spec in (
            {},
            {"training": {"maxLength": 64}},
            {"data": {"split": {"seed": 1}}},
            {"data": {"quality": {"deduplicate": False}}},
            {"data": {"train": [{"source": uri, "name": "other"}]}},
            {"data": {"train": [{"source": uri, "template": template}]}},
        )
    ]
    digests.append(at.prepare(at.order(lines(*pairs(31))))[0].digest)
    for path in model_folder.iterdir():
        at.put(f"model/{path.name}", path.read_bytes())
    moved = at.prepare(at.order(model={"source": f"{at.root}/model"}))[0]
    assert moved.digest == digests[-1]
    at.put("model/chat_template.jinja", (CHATML + "{# other #}").encode())
    digests.append(at.prepare(at.order(model={"source": f"{at.root}/model"}))[0].digest)
    assert len(set(digests)) == len(digests)


def test_damaged_data_is_noticed(at: Workplace) -> None:
    summary, _ = at.prepare(at.order(lines(*pairs(30))))
    name = "shards/train-train-0-00000-00.arrow"
    shard = bytearray(at.store.get(f"{summary.uri}/{name}"))
    shard[len(shard) // 2] ^= 1
    at.store.put(f"{summary.uri}/{name}", bytes(shard))
    data = PreparedData.open(at.store, summary.uri, next(at.scratch))
    with pytest.raises(DataError, match=name) as caught:
        data.samples("train", [0])
    assert caught.value.reason == "PreparedDataDamaged"


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_an_empty_data_set_is_refused(at: Workplace, data: bytes) -> None:
    error = at.fault(data)
    assert isinstance(error, DataError) and error.reason == "EmptyDataSet"
    assert "train-0" in error.message and f"{at.root}/data/" in error.message


def test_data_of_which_nothing_is_left_to_train_on_is_refused(at: Workplace) -> None:
    error = at.fault(
        lines(LONG),
        data={**ALL, "quality": {"overlength": "Drop"}},
        training={"maxLength": 16},
    )
    assert error.reason == "EmptyDataSet" and "Overlength 1" in error.message


def test_a_test_set_of_which_nothing_is_left_is_refused(at: Workplace) -> None:
    held = at.put("held.jsonl", lines(LONG))
    data = {"test": [{"source": held}], "quality": {"overlength": "Drop"}}
    error = at.fault(lines(*pairs(9)), data=data, training={"maxLength": 32})
    assert error.reason == "EmptyDataSet" and "'test-0'" in error.message
    assert "all 1 records were left out (Overlength 1)" in error.message


def test_a_malformed_line_fails_the_job_with_file_line_and_text(at: Workplace) -> None:
    error = at.fault(lines(*pairs(700)), lines(*pairs(600, 700)) + b'{"prompt": "x" oops}\n')
    assert isinstance(error, DataError) and error.reason == "MalformedRecord"
    assert f"{at.root}/data/1.jsonl, line 601, column 16" in error.message
    assert "oops" in error.message


def test_a_record_without_the_needed_field_fails_the_job(at: Workplace) -> None:
    error = at.fault(lines(*pairs(3), {"prompt": "x", "answer": "y"}))
    assert error.reason == "MissingField"
    assert "data/0.jsonl, line 4: field 'completion' is missing" in error.message
    assert "prompt, answer" in error.message


FAULTY = [
    b"oops\n",
    lines({"prompt": "x", "answer": "y"}, {"prompt": "x", "completion": 7}),
    lines({"prompt": "x", "completion": ""}),
]
DROP = {**ALL, "quality": {"faultyRecords": "Drop"}}


def test_faulty_records_are_dropped_and_counted_by_reason(at: Workplace) -> None:
    data = FAULTY[0] + lines(*pairs(2)) + b"\n" + FAULTY[1] + lines(*pairs(3, 2)) + FAULTY[2]
    summary, prepared = at.prepare(at.order(data, data=DROP))
    assert texts(prepared, "train") == [r["prompt"] + r["completion"] for r in pairs(5)]
    counts = {"MalformedRecord": 1, "MissingField": 1, "WrongType": 1, "NothingSupervised": 1}
    assert summary.dropped == counts
    (source,) = json.loads(at.store.get(f"{summary.uri}/report.json"))["sources"]
    assert source["records"] == 9
    assert [f["reason"] for f in source["faults"]] == list(counts)
    assert "data/0.jsonl, line 5: field 'completion'" in source["faults"][1]["message"]


def test_a_record_whose_answer_has_no_token_is_dropped_too(
    at: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokens._encode
    monkeypatch.setattr(
        Tokens,
        "_encode",
        lambda self, texts: [
            [] if text == "\u200b" else ids
            for text, ids in zip(texts, encode(self, texts), strict=True)
        ],
    )
    faulty = {"prompt": "x", "completion": "\u200b"}
    summary, prepared = at.prepare(at.order(lines(*pairs(2), faulty, *pairs(2, 2)), data=DROP))
    assert texts(prepared, "train") == [r["prompt"] + r["completion"] for r in pairs(4)]
    assert summary.dropped == {"NothingSupervised": 1}


@pytest.mark.parametrize("data", [lines(*pairs(2)) + FAULTY[0] * 3, FAULTY[0]])
def test_a_set_that_is_mostly_faulty_fails_the_job(at: Workplace, data: bytes) -> None:
    error = at.fault(data, data=DROP)
    assert isinstance(error, DataError) and error.reason == "MostRecordsFaulty"
    assert "(60%)" in error.message or "1 of 1 records (100%)" in error.message
    assert "data/0.jsonl, line " in error.message and "'oops'" in error.message


def test_half_of_a_set_may_be_faulty(at: Workplace) -> None:
    summary, _ = at.prepare(at.order(lines(*pairs(2)) + FAULTY[0] * 2, data=DROP))
    assert summary.train_samples == 2 and summary.dropped == {"MalformedRecord": 2}


def test_a_group_field_that_a_record_lacks_fails_the_job(at: Workplace) -> None:
    error = at.fault(lines(*pairs(3)), data={"split": {"groupBy": "customer"}})
    assert error.reason == "MissingField" and "'customer'" in error.message


def test_a_template_that_leaves_nothing_to_learn_fails_the_job(at: Workplace) -> None:
    template = {"prompt": "{{ prompt }}", "completion": "{% if false %}x{% endif %}"}
    source = {"source": f"{at.root}/data/", "template": template}
    error = at.fault(lines(*pairs(3)), data={"train": [source]})
    assert error.reason == "NothingSupervised" and "line 1" in error.message


def test_a_default_name_that_is_taken_is_refused(at: Workplace) -> None:
    uri = at.put("data/0.jsonl", lines(*pairs(3)))
    error = at.fault(data={"train": [{"source": uri, "name": "train-1"}, {"source": uri}]})
    assert isinstance(error, UserError) and error.reason == "DuplicateName"


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"evaluation": {"metrics": ["Loss", "F1"]}}, "evaluation.metrics"),
        ({"checkpoint": {"metric": "Accuracy"}}, "checkpoint.metric"),
        ({"training": {"earlyStopping": {}}, "data": {"split": {"validation": "0.0001"}}},
         "training.earlyStopping.metric"),
    ],
)  # fmt: skip
def test_a_metric_that_no_set_can_have_is_refused(
    at: Workplace, spec: dict[str, Any], field: str
) -> None:
    order = at.order(lines(*pairs(30)), **spec)
    with pytest.raises(UserError, match=field) as caught:
        at.prepare(order)
    assert caught.value.reason == "MetricWithoutData"
    assert not at.store.head(f"{order.run_uri}/prepared.json")


# --- memory --------------------------------------------------------------------------------------


def test_the_summary_says_what_the_training_takes(at: Workplace) -> None:
    order = at.order(lines(*pairs(30)), compute={"gpuMemory": "16Gi"}, data=ALL)
    summary, _ = at.prepare(order)
    found = summary.memory
    assert found is not None and found == read_prepared(at.store, order.run_uri).memory
    assert found.available == 16 << 30 > found.needed == sum(found.parts.values())
    assert (found.sharding, found.gradient_checkpointing) == ("NoShard", False)
    assert found.parts["parameters"] < found.parts["reserve"]


def test_a_training_that_cannot_fit_is_refused_with_what_would(at: Workplace) -> None:
    never = {"gradientCheckpointing": "Never", "batchSize": 1024}
    data = lines(*pairs(2000))
    summary, _ = at.prepare(at.order(data, training=never, data=ALL))
    assert summary.memory is not None
    less = {"gpuMemory": str(summary.memory.needed - 1)}
    order = at.order(data, training=never, compute=less, data=ALL, run="2-abcde")
    with pytest.raises(
        UserError, match=r"What fits: training\.gradientCheckpointing: Auto"
    ) as error:
        at.prepare(order)
    assert error.value.reason == "DoesNotFit"
    assert not at.store.head(f"{order.run_uri}/prepared.json")
    auto = {**never, "gradientCheckpointing": "Auto"}
    summary, _ = at.prepare(at.order(data, training=auto, compute=less, data=ALL))
    assert summary.memory is not None and summary.memory.gradient_checkpointing


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"method": {"type": "LoRA", "lora": {"targetModules": ["nope"]}}}, "NoTargetModules"),
        ({"method": {"type": "Partial", "partial": {"parameters": ["nope"]}}}, "NoSuchParameters"),
        ({"training": {"routerAuxLossCoefficient": "0.1"}}, "NoRouter"),
        ({"method": {"type": "Partial", "partial": {"norms": True}},
          "training": {"optimizer": "Muon"}}, "NoMatrices"),
    ],
)  # fmt: skip
def test_what_does_not_suit_the_model_is_refused_before_the_data_is_read(
    at: Workplace, spec: dict[str, Any], reason: str
) -> None:
    error = at.fault(b"no record\n", **spec)
    assert isinstance(error, UserError) and error.reason == reason
