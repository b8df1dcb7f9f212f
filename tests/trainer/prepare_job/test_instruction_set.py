"""The set of verifiable instructions that the trainer brings along, prepared."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.sources import BUILT_IN
from finetune_trainer.failures import UserError
from finetune_trainer.instructions.records import RECORDS, records
from finetune_trainer.prepared.dataset import PreparedData
from trainer.map_reduce_helpers import PrepareJob
from trainer.prepare_helpers import Workplace, lines, pairs

pytestmark = pytest.mark.slow
GATE = {"metric": "InstructionFollowing", "operator": "AtLeast", "value": "0.5"}


def test_it_is_prepared_like_other_sets_at_any_number_of_pods(job: PrepareJob) -> None:
    train = [{"source": job.put("a.jsonl", lines(*pairs(30)))}]
    retention = [{"name": "follows", "source": BUILT_IN, "format": "PromptCompletion"}]
    written = []
    for pods in (1, 2):
        summary = job.prepare(job.run_spec({"train": train, "retention": retention}, pods))
        read = PreparedData.open(job.store, summary.uri, next(job.scratch))
        assert [name for _, name in read.set_names("retention")] == ["follows"]
        assert [s.name for s in read.manifest.sets if s.built_in] == ["follows"]
        found = list(read.references("retention", range(RECORDS)))
        assert [r.prompt for r in found] == [r["prompt"] for r in records()]
        assert [r.completion for r in found] == [r["completion"] for r in records()]
        written.append(job.files(f"{summary.uri}/"))
        job.clear()
    assert written[0] == written[1]


def own(count: int) -> list[dict[str, object]]:
    """Records of a user whose prompts have instructions."""
    found = [{key: r[key] for key in ("prompt", "completion")} for r in records()]
    return found[:count]


@pytest.mark.parametrize(
    ("evaluation", "reason", "path"),
    [
        ({}, "MetricWithoutData", "spec.evaluation.metrics: no set has InstructionFollowing"),
        ({"gates": [GATE]}, "GateNotMeasured", r"spec.evaluation.gates\[0\].metric"),
    ],
)
def test_prompts_without_instructions_are_refused(
    at: Workplace, evaluation: Any, reason: str, path: str
) -> None:
    asked = {"metrics": ["Loss", "InstructionFollowing"], "baselines": {"shots": []}, **evaluation}
    held = at.put("held.jsonl", lines(*own(3), *pairs(1)))
    data = {"test": [{"name": "held", "source": held}]}
    with pytest.raises(UserError, match=f"{path}.*held: the prompt of its sample 4") as caught:
        at.prepare(at.run_spec(lines(*pairs(9)), data=data, evaluation=asked))
    assert caught.value.reason == reason
    at.prepare(at.run_spec(lines(*pairs(9)), data=data, evaluation=asked | {"maxSamples": 3}))
