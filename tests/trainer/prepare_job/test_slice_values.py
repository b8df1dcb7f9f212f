"""Values of ``evaluation.slices``, from the test records to the prepared data."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.slices import NONE
from trainer.map_reduce_helpers import PrepareJob
from trainer.prepare_helpers import Workplace, lines, pairs

pytestmark = pytest.mark.slow


def test_values_stay_with_their_samples_at_any_number_of_pods(job: PrepareJob) -> None:
    """Of a held-out share, and of a set of its own."""
    made = [
        {**record, "number": i, "kind": "even" if i % 2 == 0 else "odd"}
        for i, record in enumerate(pairs(60))
    ]
    held = [{**record, "number": i} for i, record in enumerate(pairs(25, start=100), start=100)]
    source = {"source": job.put("a.jsonl", lines(*made))}
    given = [{"source": job.put("held.jsonl", lines(*held))}]
    for field, data in (("kind", {"split": {"test": "0.4"}}), ("number", {"test": given})):
        written = []
        for pods in (1, 3):
            spec = {"train": [source], **data}
            summary = job.prepare(job.run_spec(spec, pods, evaluation={"slices": [field]}))
            read = PreparedData.open(job.store, summary.uri, next(job.scratch))
            prompts = [r.prompt for r in read.references("test", range(summary.test_samples))]
            numbers = [int(p.split()[-1].rstrip("?")) for p in prompts]
            wanted = {"number": str, "kind": lambda n: "odd" if n % 2 else "even"}[field]
            assert read.slices() == {field: [wanted(n) for n in numbers]}
            written.append(job.files(f"{summary.uri}/"))
            job.clear()
        assert len(numbers) > 15 and written[0] == written[1]


def test_fields_are_part_of_the_data_and_checked_when_it_is_reused(at: Workplace) -> None:
    data = {"split": {"test": "0.3", "validation": "0"}}
    records = [{**r, "a": i % 3} if i % 2 else r for i, r in enumerate(pairs(40))]

    def prepared(slices: list[str]) -> Any:
        run_spec = at.run_spec(lines(*records), data=data, evaluation={"slices": slices})
        return at.prepare(run_spec)

    without, plain = prepared([])
    assert not any("slices" in file.name for file in plain.manifest.files)
    summary, found = prepared(["a"])
    assert summary.digest != without.digest
    assert NONE in found.slices()["a"] and len(set(found.slices()["a"])) > 2
    for _ in range(2):
        with pytest.raises(UserError, match=r"spec.evaluation.slices\[1\]: b: no test") as caught:
            prepared(["a", "b"])
        assert caught.value.reason == "SliceFieldMissing"
