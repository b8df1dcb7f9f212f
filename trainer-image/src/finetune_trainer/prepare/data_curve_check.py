"""Refuses a data curve that would measure nothing, before GPUs are held for it."""

from __future__ import annotations

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.dataset import PreparedData


def check_data_curve(spec: FineTuneJobSpec, data: PreparedData) -> None:
    """Check that the trainings on parts of the data would be measured on something.

    Raises:
        UserError: 'DataCurveNotMeasured', with the path and what to do.
    """
    if not spec.evaluation.data_curve:
        return
    if not (data.set_names("test") or data.set_names("validation")):
        raise UserError(
            "DataCurveNotMeasured",
            "spec.evaluation.dataCurve: no test and no validation sample is there to measure it"
            " on; give data.test, data.validation or a larger data.split, or set dataCurve: false",
        )
