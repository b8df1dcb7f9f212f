"""Documents of ours in the cluster, which a user or another release may have written: spec, run
spec and status. A document that today's models refuse is absent, with the reasons."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from finetune_api.base import InvalidSpec, explain
from finetune_api.run_spec import RunSpec
from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_api.status import FineTuneJobStatus


def read_spec(raw: Any) -> tuple[FineTuneJobSpec | None, list[str]]:
    """The spec of a FineTuneJob; None and what is wrong where today's models refuse it."""
    try:
        return parse_spec(raw), []
    except InvalidSpec as error:
        return None, error.problems


def read_run_spec(text: str) -> tuple[RunSpec | None, list[str]]:
    """The run spec in a ConfigMap, of any contract version: an older release's is still the run's
    snapshot. None and what is wrong where today's models refuse it."""
    try:
        return RunSpec.model_validate(json.loads(text)), []
    except ValidationError as error:
        return None, explain(error, RunSpec, "runSpec")
    except ValueError as error:
        return None, [f"run spec: not JSON ({error})"]


def read_status(raw: Any) -> FineTuneJobStatus:
    """The status of a FineTuneJob; an empty one where it cannot be read: the next pass rebuilds
    status from the children."""
    try:
        return FineTuneJobStatus.model_validate(raw or {})
    except ValidationError:
        return FineTuneJobStatus()
