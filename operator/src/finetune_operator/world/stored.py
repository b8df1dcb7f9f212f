"""Reading what an earlier pass, or another release, has stored: status."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from finetune_api.status import FineTuneJobStatus


def read_status(raw: Any) -> FineTuneJobStatus:
    """The status of a stored object. One that was edited by hand, or written by another release,
    and cannot be read counts as absent: it is rebuilt from what is there."""
    try:
        return FineTuneJobStatus.model_validate(raw or {})
    except ValidationError:
        return FineTuneJobStatus()
