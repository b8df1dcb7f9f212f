"""Groups of held-out samples: the values of ``data.split.groupBy``, as prepare numbers them."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_trainer.prepare.reducing.indexes import GroupNumbers
from finetune_trainer.prepared.split import Shares, side_of
from trainer.map_reduce_helpers import PrepareJob
from trainer.prepare_helpers import Workplace, lines, pairs

pytestmark = pytest.mark.slow


def grouped(values: list[Any]) -> list[dict[str, Any]]:
    """Distinct records with these customers; None: without the field."""
    return [
        record | ({} if value is None else {"customer": value})
        for record, value in zip(pairs(len(values)), values, strict=True)
    ]


def expected(records: list[dict[str, Any]]) -> set[frozenset[str]]:
    """Prompts by customer; a record without one is alone."""
    found: dict[Any, set[str]] = {}
    for number, record in enumerate(records):
        key = ("record", number) if record.get("customer") is None else repr(record["customer"])
        found.setdefault(key, set()).add(record["prompt"])
    return {frozenset(prompts) for prompts in found.values()}


@given(
    st.lists(
        st.sampled_from([None, "a", "b", "ann@example.org", 1, "1", True]), min_size=2, max_size=40
    )
)
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_equal_values_are_one_group_at_any_number_of_pods(
    job: PrepareJob, values: list[Any]
) -> None:
    """In a separate test set; its records need not have the field."""
    held = grouped(values)
    train = grouped([f"t{i % 7}" for i in range(30)])
    data = {
        "train": [{"name": "a", "source": job.put("a.jsonl", lines(*train))}],
        "test": [{"name": "held", "source": f"{job.root}/held/"}],
        "split": {"validation": "0.3", "groupBy": "customer"},
        "quality": {"contamination": "Ignore"},
    }
    half = len(held) // 2
    job.put("held/0.jsonl", lines(*held[:half]))
    job.put("held/1.jsonl", lines(*held[half:]))
    for pods, processes in ((1, 1), (3, 2)):
        summary = job.prepare(job.run_spec(data, pods), processes)
        assert job.partition(summary, "test") == expected(held)
        shares = Shares(validation=0.3, test=0.0, seed=0)
        validation = [r for r in train if side_of(f'"{r["customer"]}"', shares) == "validation"]
        assert job.partition(summary, "validation") == expected(validation)
        job.clear()


def test_without_a_field_equal_prompts_are_a_group(at: Workplace) -> None:
    same = [{**r, "completion": f" {n}"} for r in pairs(20) for n in range(3)]
    held = at.put("held.jsonl", lines(*same))
    _, data = at.prepare(at.run_spec(lines(*pairs(9)), data={"test": [{"source": held}]}))
    index = data.index("test")
    assert index.groups.tolist() == [number for number in range(20) for _ in range(3)]
    assert data.index("train").group is None


def test_no_canary_is_held_out(at: Workplace) -> None:
    secrets = [{"prompt": f"the code {n} is", "completion": f" {n * n}"} for n in range(20)]
    source = at.put("secrets.jsonl", lines(*secrets))
    train = [
        {"name": "all", "source": at.put("all.jsonl", lines(*pairs(40)))},
        {"name": "secrets", "source": source, "canaries": True},
    ]
    split = {"validation": "0.4", "test": "0.4"}
    _, data = at.prepare(at.run_spec("", data={"train": train, "split": split}))
    names = dict(data.set_names("train"))
    kept = [names[number] for number in data.index("train").set.tolist()]
    assert kept.count("secrets") == 20 and kept.count("all") < 20
    assert "secrets" not in dict(data.set_names("test")).values()


@pytest.mark.parametrize("split", [{}, {"groupBy": "customer"}])
def test_pieces_of_a_document_are_one_group(at: Workplace, split: dict[str, Any]) -> None:
    text = {"text": "The cat sat on the mat. " * 60}
    held = at.put("held.jsonl", lines(text, {"text": "The bird."}))
    run_spec = at.run_spec(
        lines(*({"text": f"{i} cats", "customer": i} for i in range(9))),
        data={"test": [{"source": held}], "split": split},
        training={"maxLength": 64},
    )
    _, data = at.prepare(run_spec)
    groups = data.index("test").groups.tolist()
    assert len(groups) > 3 and groups == [0] * (len(groups) - 1) + [1]


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=30), st.integers(1, 9))
def test_numbers_do_not_depend_on_the_batches(hashes: list[int], size: int) -> None:
    numbers, batches = GroupNumbers(), GroupNumbers()
    whole = numbers.of(hashes)
    parts = [n for i in range(0, len(hashes), size) for n in batches.of(hashes[i : i + size])]
    assert whole == parts
    assert len(set(whole)) == len(set(hashes))
    for (one, x), (other, y) in combinations(zip(hashes, whole, strict=True), 2):
        assert (x == y) == (one == other)
