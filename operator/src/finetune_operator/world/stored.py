"""Reading of stored documents (spec, run spec, status), which a user or another release may have
written. A document that this release's models refuse is read as absent, with the reasons."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from finetune_api.base import InvalidSpec, explain, read_known
from finetune_api.run_spec import RunSpec
from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.world.objects import Object


class StoredJob:
    """A FineTuneJob as stored, whose spec and status are parsed at most once."""

    def __init__(self, raw: Object, before: StoredJob | None = None) -> None:
        """``before`` is an earlier version of the same job: its spec, if parsed, is kept as long as
        ``metadata.generation`` is the same."""
        self.raw = raw
        generation = raw["metadata"].get("generation")
        if before is not None and generation == before.metadata.get("generation", -1):
            self.__dict__ |= {k: v for k, v in before.__dict__.items() if k == "_spec"}

    @property
    def metadata(self) -> Any:
        return self.raw["metadata"]

    @property
    def raw_spec(self) -> Any:
        return self.raw.get("spec")

    @property
    def raw_status(self) -> Any:
        return self.raw.get("status")

    @cached_property
    def _spec(self) -> tuple[FineTuneJobSpec | None, list[str]]:
        return read_spec(self.raw_spec)

    @property
    def spec(self) -> FineTuneJobSpec | None:
        """The spec; None if this release's models refuse it."""
        return self._spec[0]

    @property
    def problems(self) -> list[str]:
        """Why this release's models refuse the spec."""
        return self._spec[1]

    @cached_property
    def status(self) -> FineTuneJobStatus:
        """The status, without what this release does not know."""
        return read_status(self.raw_status)


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
