"""Refuses, of a run that trains nothing, what would leave nothing to measure."""

from __future__ import annotations

from transformers import PreTrainedConfig

from finetune_api.run_spec import RunSpec
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.classification import has_head
from finetune_trainer.failures import DataError, UserError
from finetune_trainer.prepared.manifest import DataManifest
from finetune_trainer.prepared.split import TESTED


def check_measured(spec: FineTuneJobSpec, manifest: DataManifest) -> None:
    """Refuse a run that neither trains nor measures.

    Raises:
        DataError: 'EmptyDataSet'.
    """
    if spec.method.kind.trains or any(manifest.samples(side) for side in TESTED):
        return
    raise DataError(
        "EmptyDataSet",
        f"spec.method.type {spec.method.type}: data.split.test {spec.data.split.test} holds no"
        " record of data.train out, so there is nothing to measure; raise it, or give data.test",
    )


def head_of(run_spec: RunSpec, config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the classes of the model's classification head, for a run that does not train one; ()
    for a task without classes.

    Raises:
        UserError: 'UnsupportedModel', the model has no head.
    """
    if run_spec.spec.kind.generates:
        return ()
    classes = tuple(dict(config.id2label or {}).values())
    if not has_head(config, classes):
        raise UserError(
            "UnsupportedModel",
            f"spec.model: {run_spec.base_model.source} has no classification head that spec.task"
            f" {run_spec.spec.task} could measure; evaluate the model of a run that trained one",
        )
    return classes
