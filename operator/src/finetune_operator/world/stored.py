"""Reading of stored documents (spec, run spec, status), which a user or another release may have
written. A document that this release's models refuse is read as absent, with the reasons."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from finetune_api.base import InvalidSpec, explain, read_known
from finetune_api.run_spec import RunSpec
from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_api.status import FineTuneJobStatus


def read_spec(raw: Any) -> tuple[FineTuneJobSpec | None, list[str]]:
    """The spec of a FineTuneJob; None and the problems if this release's models refuse it."""
    try:
        return parse_spec(raw), []
    except InvalidSpec as error:
        return None, error.problems


def read_run_spec(text: str) -> tuple[RunSpec | None, list[str]]:
    """The run spec in a ConfigMap, of any contract version: a run spec of an older release still
    defines its run. None and the problems if this release's models refuse it."""
    try:
        return RunSpec.model_validate(json.loads(text)), []
    except ValidationError as error:
        return None, explain(error, RunSpec, "runSpec")
    except ValueError as error:
        return None, [f"runSpec: not JSON ({error})"]


def read_status(raw: Any) -> FineTuneJobStatus:
    """The status of a FineTuneJob, without what this release does not know: a newer release may
    have written it before it was rolled back."""
    try:
        return read_known(FineTuneJobStatus, raw or {})
    except ValidationError:
        return FineTuneJobStatus()
