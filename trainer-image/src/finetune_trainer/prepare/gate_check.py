"""Refuses gates on what will not be measured, before GPUs are held for it."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.gates import Gate
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.evaluate.gates import kind_of_prompt
from finetune_trainer.evaluate.metric_selection import measured_on
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.manifest import DataManifest, DataSet
from finetune_trainer.prepared.questions import Questions
from finetune_trainer.prepared.split import TESTED


def check_gates(spec: FineTuneJobSpec, manifest: DataManifest, questions: Questions) -> None:
    """Check that each gate's set, metric and row will be measured.

    Raises:
        UserError: 'GateNotMeasured', with the path, what it names and what there is.
    """
    sets = [each for each in manifest.sets if each.split in TESTED]
    if spec.output.current is not None and not any(s.split == "test" for s in sets):
        raise _refused("spec.output.current", "there is no test set, by which models are compared")
    for number, gate in enumerate(spec.evaluation.gates):
        path = f"spec.evaluation.gates[{number}]"
        for each in _sets_of(spec, gate, sets, path):
            rows = {"Base", "Current"} | {
                kind_of_prompt(prompting.prompt)
                for prompting, asked in questions.items()
                if any(manifest.sets[question.set] is each for question in asked)
            }
            if gate.effective_row is not None and gate.effective_row not in rows:
                raise _refused(
                    f"{path}.row",
                    f"set {each.name} has no row {gate.effective_row}, only"
                    f" {', '.join(sorted(rows))}; its prompts with what stands in front may not fit"
                    " into the model's context, or it is a retention set",
                )


def _sets_of(
    spec: FineTuneJobSpec, gate: Gate, sets: Sequence[DataSet], path: str
) -> list[DataSet]:
    """The sets that a gate is about.

    Raises:
        UserError: 'GateNotMeasured'.
    """
    measured = [s for s in sets if gate.metric in measured_on(s, spec)]
    having = ", ".join(s.name for s in measured) or "none"
    if gate.data_set is None:
        found = [s for s in measured if s.split == "test"]
        if not found:
            raise _refused(
                f"{path}.metric",
                f"{gate.metric} is measured on no test set; sets that have it: {having}",
            )
        return found
    if gate.data_set not in {s.name for s in sets}:
        there = ", ".join(s.name for s in sets) or "none"
        raise _refused(
            f"{path}.dataSet",
            f"{gate.data_set} is the name of no test or retention set; there are: {there}",
        )
    found = [s for s in measured if s.name == gate.data_set]
    if not found:
        raise _refused(
            f"{path}.metric",
            f"{gate.metric} is not measured on {gate.data_set}; sets that have it: {having}",
        )
    return found


def _refused(path: str, why: str) -> UserError:
    return UserError("GateNotMeasured", f"{path}: {why}. Correct the manifest, or give such data")
