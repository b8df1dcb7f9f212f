"""Output of the prepare stage, its reuse, and the memory estimate."""

from __future__ import annotations

import gc
import gzip
import io
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.run_spec import RunSpec
from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepare import pipeline
from finetune_trainer.prepare.mapping import reader, writer
from finetune_trainer.prepare.mapping.progress import ReadProgress
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.prepare.reading import inputsplits
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.split import SIDES
from finetune_trainer.storage.runfiles import read_prepared
from trainer.prepare_helpers import (
    ALL,
    CHATML,
    OneStore,
    Workplace,
    lines,
    make_tokenizer,
    pairs,
    texts,
)

# --- output --------------------------------------------------------------------------------------

_SPLIT = SIDES[:3]
"""Sides that the training records are split into."""


def test_every_record_is_on_one_side_with_its_supervised_mask(at: Workplace) -> None:
    records = pairs(200)
    split = {"validation": "0.1", "test": "0.2"}
    run_spec = at.run_spec(lines(*records[:120]), lines(*records[120:]), data={"split": split})
    progress: list[ReadProgress] = []
    summary = prepare(run_spec, OneStore(run_spec, at.store), next(at.scratch), progress.append)
    assert summary is not None
    data = PreparedData.open(at.store, summary.uri, next(at.scratch))

    found = [text for split in SIDES for text in texts(data, split)]
    assert sorted(found) == sorted(r["prompt"] + r["completion"] for r in records)
    counts = [len(data.index(split)) for split in _SPLIT]
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
    assert read_prepared(at.store, run_spec.run_uri) == summary
    last = progress[-1]
    assert (last.records, last.bytes) == (200, last.total_bytes)


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
    run_spec = at.run_spec(data={"train": listed, **ALL, "quality": {"deduplicate": False}})
    summary, data = at.prepare(run_spec)
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
    assert [p["supervised"] for p in preview["parts"]] == [False, True]


def test_held_out_prompts_use_the_first_phrasing_and_show_the_oracle(
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
    run_spec = at.run_spec(
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
    _, data = at.prepare(run_spec)
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


def test_given_validation_and_test_sets_replace_the_split(at: Workplace) -> None:
    held = at.put("held.jsonl", lines(*({"text": "fine", "label": x} for x in ("good", "bad"))))
    run_spec = at.run_spec(
        lines(*pairs(100)),
        data={"validation": [{"source": held}], "test": [{"name": "final", "source": held}]},
    )
    summary, data = at.prepare(run_spec)
    assert (summary.train_samples, summary.validation_samples, summary.test_samples) == (100, 2, 2)
    assert data.set_names("validation") == [(1, "validation-0")]
    assert data.set_names("test") == [(2, "final")]
    assert [r.label for r in data.references("test", [0, 1])] == ["good", "bad"]


def test_equal_prompts_and_equal_groups_stay_on_one_side(at: Workplace) -> None:
    records = [{**r, "completion": f" {n}", "by": i % 40}
               for i, r in enumerate(pairs(120)) for n in range(4)]  # fmt: skip
    split: dict[str, Any] = {"validation": "0.2", "test": "0.3"}
    _, data = at.prepare(at.run_spec(lines(*records), data={"split": split}))
    prompts = [{t.split("?")[0] for t in texts(data, side)} for side in _SPLIT]
    assert all(prompts) and sum(map(len, prompts)) == 120

    split["groupBy"] = "by"
    _, data = at.prepare(at.run_spec(lines(*records), data={"split": split}))
    groups = [{int(t.split("?")[0].split()[-1]) % 40 for t in texts(data, s)} for s in _SPLIT]
    assert all(groups) and sum(map(len, groups)) == 40


def test_records_keep_their_side_as_the_data_grows(at: Workplace) -> None:
    split = {"split": {"validation": "0.2", "test": "0.2"}}
    _, small = at.prepare(at.run_spec(lines(*pairs(60)), data=split))
    _, large = at.prepare(at.run_spec(lines(*pairs(60, start=500)), lines(*pairs(60)), data=split))
    for side in SIDES:
        assert set(texts(small, side)) <= set(texts(large, side))


def test_duplicates_are_dropped_across_training_sources(at: Workplace) -> None:
    run_spec = at.run_spec(lines(*pairs(20), *pairs(5)), lines(*pairs(10)), data=ALL)
    summary, _ = at.prepare(run_spec)
    assert summary.train_samples == 20 and summary.dropped == {"Duplicate": 15}
    kept = {**ALL, "quality": {"deduplicate": False}}
    summary, data = at.prepare(at.run_spec(data=kept))
    assert summary.train_samples == 35
    assert len(data.index("test")) == 0 and data.index("test").length.max(initial=1) == 1


def test_samples_are_read_across_shards(at: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_TOKENS", 200)
    monkeypatch.setattr(reader, "BATCH_RECORDS", 7)
    _, data = at.prepare(at.run_spec(lines(*pairs(100)), data=ALL))
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
    monkeypatch.setattr(reader, "BATCH_RECORDS", 128)
    monkeypatch.setattr(inputsplits, "SPLIT_BYTES", 20_000)

    def peak(run_spec: RunSpec) -> int:
        writing = pipeline.write_data

        def measured(*args: Any, **kwargs: Any) -> Any:
            # Measure write_data only: profiling of the model before and after it would count too.
            gc.collect()
            tracemalloc.start()
            try:
                manifest = writing(*args, **kwargs)
                peaks.append(tracemalloc.get_traced_memory()[1])
                return manifest
            finally:
                tracemalloc.stop()

        peaks: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "write_data", measured)
            at.prepare(run_spec)
        return peaks[0]

    at.prepare(at.run_spec(lines(*pairs(600)), data=ALL))  # imports and caches
    once = peak(at.run_spec(lines(*pairs(1000)), data=ALL))
    eightfold = peak(at.run_spec(lines(*pairs(8000)), data=ALL))
    # Per sample, 16 bytes of digest and some bytes of length counts remain.
    assert eightfold - once < 7000 * 64


def test_conversations_with_other_fields_are_prepared_and_shown(at: Workplace) -> None:
    def shared(*turns: tuple[str, str]) -> dict[str, Any]:
        return {"conversations": [{"from": who, "value": text} for who, text in turns]}

    records = [shared(("human", f"What is {i}?"), ("bot", f"It is {i}.")) for i in range(6)]
    path = at.put("shared.jsonl", lines(*records, shared(("human", "x"), ("robot", "y"))))
    template = {
        "name": "Chat",
        "fields": {"messages": "conversations", "role": "from", "content": "value"},
        "roles": {"bot": "assistant"},
    }
    data = {**ALL, "train": [{"source": path, "template": template}]}
    run_spec = at.run_spec(data={**data, "quality": {"faultyRecords": "Drop"}})
    summary, prepared = at.prepare(run_spec)
    assert summary.train_samples == 6 and summary.dropped == {"UnknownRole": 1}
    assert prepared.manifest.sets[0].format == "Messages"
    report = json.loads(at.store.get(f"{summary.uri}/report.json"))
    (source,) = report["sources"]
    assert "'conversations[1].from' must be one of" in source["faults"][0]["message"]
    parts = source["splits"]["train"]["previews"][0]["parts"]
    learned = [part["text"] for part in parts if part["supervised"]]
    assert len(learned) == 1 and learned[0].startswith("It is ") and "<|im_end|>" in learned[0]


def test_the_stage_plan_is_logged(at: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    listed = [{"name": n, "source": at.put(f"{n}.jsonl", lines(*pairs(30, i)))}
              for i, n in ((0, "notes"), (90, "code"))]  # fmt: skip
    weights = [{"name": "notes", "weight": "3"}, {"name": "code", "weight": "1"}]
    stages = [{"name": "both", "steps": "3", "weights": weights},
              {"name": "end", "steps": "1", "weights": weights[1:]}]  # fmt: skip
    data = {**ALL, "train": listed, "stages": stages}
    run_spec = at.run_spec(data=data, training={"maxSteps": 12})
    summary, _ = at.prepare(run_spec)
    assert [(s.name, s.steps, s.mixture) for s in summary.stages] == [
        ("both", 9, {"notes": 0.75, "code": 0.25}), ("end", 3, {"code": 1.0}),
    ]  # fmt: skip
    assert read_prepared(at.store, run_spec.run_uri).stages == summary.stages
    said = [record.getMessage() for record in caplog.records]
    assert "stage both: 9 steps, notes 75 %, code 25 %" in said
    assert "stage end: 3 steps, code 100 %" in said


# --- reuse ---------------------------------------------------------------------------------------


def test_a_second_job_reuses_the_data_without_writes(at: Workplace) -> None:
    first, _ = at.prepare(at.run_spec(lines(*pairs(30))))
    before = {o.uri: o.etag for o in at.store.list(f"{first.uri}/")}
    run_spec = at.run_spec(job="other", run="2-zzzzz", training={"batchSize": 4, "epochs": 1})
    second, _ = at.prepare(run_spec)
    assert (first.reused, second.reused) == (False, True)
    assert second.digest == first.digest and second.train_samples == first.train_samples
    assert second.total_steps == -(-second.train_samples // 4)
    assert {o.uri: o.etag for o in at.store.list(f"{first.uri}/")} == before
    assert read_prepared(at.store, run_spec.run_uri) == second


@pytest.mark.parametrize("gone", ["manifest.json", "index-train.arrow"])
def test_incomplete_data_is_prepared_again(at: Workplace, gone: str) -> None:
    run_spec = at.run_spec(lines(*pairs(30)))
    first, _ = at.prepare(run_spec)
    at.store.delete([f"{first.uri}/{gone}"])
    second, data = at.prepare(run_spec)
    assert not second.reused and second.digest == first.digest
    assert len(texts(data, "train")) == first.train_samples


def test_the_digest_changes_with_every_input(at: Workplace, model_folder: Path) -> None:
    base = lines(*pairs(30))
    uri = f"{at.root}/data/"
    template = {"prompt": "{{ prompt }}", "completion": "{{ completion }}"}
    digests = [
        at.prepare(at.run_spec(base, **spec))[0].digest
        for spec in (
            {},
            {"training": {"maxLength": 64}},
            {"data": {"split": {"seed": 1}}},
            {"data": {"quality": {"deduplicate": False}}},
            {"data": {"train": [{"source": uri, "name": "other"}]}},
            {"data": {"train": [{"source": uri, "template": template}]}},
        )
    ]
    digests.append(at.prepare(at.run_spec(lines(*pairs(31))))[0].digest)
    for path in model_folder.iterdir():
        at.put(f"model/{path.name}", path.read_bytes())
    moved = at.prepare(at.run_spec(model={"source": f"{at.root}/model"}))[0]
    assert moved.digest == digests[-1]
    at.put("model/chat_template.jinja", (CHATML + "{# other #}").encode())
    digests.append(at.prepare(at.run_spec(model={"source": f"{at.root}/model"}))[0].digest)
    assert len(set(digests)) == len(digests)


def test_a_damaged_shard_is_detected(at: Workplace) -> None:
    summary, _ = at.prepare(at.run_spec(lines(*pairs(30))))
    name = "shards/train-train-0-00000-00.arrow"
    shard = bytearray(at.store.get(f"{summary.uri}/{name}"))
    shard[len(shard) // 2] ^= 1
    at.store.put(f"{summary.uri}/{name}", bytes(shard))
    data = PreparedData.open(at.store, summary.uri, next(at.scratch))
    with pytest.raises(DataError, match=name) as caught:
        data.samples("train", [0])
    assert caught.value.reason == "PreparedDataDamaged"


# --- memory --------------------------------------------------------------------------------------


def test_the_summary_has_the_memory_estimate(at: Workplace) -> None:
    run_spec = at.run_spec(lines(*pairs(30)), compute={"gpuMemory": "16Gi"}, data=ALL)
    summary, _ = at.prepare(run_spec)
    found = summary.memory
    assert found is not None and found == read_prepared(at.store, run_spec.run_uri).memory
    assert found.available == 16 << 30 > found.needed == sum(found.parts.values())
    assert (found.sharding, found.gradient_checkpointing) == ("NoShard", False)
    assert found.parts["parameters"] < found.parts["reserve"]


def test_memory_that_may_not_fit_warns_and_certain_excess_is_refused(
    at: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    never = {"gradientCheckpointing": "Never", "batchSize": 1024}
    data = lines(*pairs(2000))
    summary, _ = at.prepare(at.run_spec(data, training=never, data=ALL))
    assert summary.memory is not None
    less = {"gpuMemory": str(summary.memory.needed - 1)}
    run_spec = at.run_spec(data, training=never, compute=less, data=ALL, run="2-abcde")
    found = at.prepare(run_spec)[0].memory
    what_fits = r"What fits: training\.gradientCheckpointing: Auto"
    assert found is not None and re.search(what_fits, found.warning or "")
    (told,) = [r.getMessage() for r in caplog.records if "memory of a" in r.getMessage()
               and r.levelname == "WARNING"]  # fmt: skip
    assert re.search(what_fits, told)
    least = {"gpuMemory": str(found.parts["parameters"])}
    run_spec = at.run_spec(data, training=never, compute=least, data=ALL, run="3-abcde")
    with pytest.raises(UserError, match="alone take") as error:
        at.prepare(run_spec)
    assert error.value.reason == "DoesNotFit"
    assert not at.store.head(f"{run_spec.run_uri}/prepared.json")
    auto = {**never, "gradientCheckpointing": "Auto"}
    summary, _ = at.prepare(at.run_spec(data, training=auto, compute=less, data=ALL))
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
def test_settings_unsuitable_for_the_model_are_refused_before_reading_data(
    at: Workplace, spec: dict[str, Any], reason: str
) -> None:
    error = at.fault(b"no record\n", **spec)
    assert isinstance(error, UserError) and error.reason == reason
