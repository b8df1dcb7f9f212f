"""The order: the one file that the operator hands to the trainer (``order.json``).

It holds the run's whole spec as it was when the run began, so that nothing that changes in the
cluster later (a new default, a new operator) reaches a run that has begun. The trainer refuses a
contract version that it does not speak.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, ClassVar, Final

from pydantic import ValidationError

from finetune_api.base import InvalidSpec, Model, explain
from finetune_api.identity import output_uri, run_uri
from finetune_api.sources import BaseModelSource, DataSource, StorageAccess
from finetune_api.spec import FineTuneJobSpec

CONTRACT_VERSION: Final = 1
"""Raised with every change of order.json or of what the trainer says that an older trainer or
operator would misread."""


class JobIdentity(Model):
    """Which FineTuneJob a run belongs to."""

    namespace: str
    """Namespace of the job."""
    name: str
    """Name of the job."""
    uid: str
    """UID of the job's object."""


class RunOrder(Model):
    """What a run does, complete."""

    version: int
    """Contract version of this file."""
    job: JobIdentity
    """The job."""
    run: str
    """Identity of the run, ``<number>-<uid5>``."""
    spec: FineTuneJobSpec
    """The spec of the run, with every default filled in."""

    CURRENT: ClassVar[int] = CONTRACT_VERSION

    @cached_property
    def storage_profiles(self) -> tuple[StorageAccess, ...]:
        """The different ways in which this run reaches object storage; 0 is ``spec.storage``."""
        profiles = [_plain(self.spec.storage)]
        sources: list[BaseModelSource | DataSource] = [self.spec.model, *self.spec.data.train]
        sources += [*(self.spec.data.validation or []), *(self.spec.data.test or [])]
        for source in sources:
            if source.storage is not None and _plain(source.storage) not in profiles:
                profiles.append(_plain(source.storage))
        return tuple(profiles)

    def profile_of(self, access: StorageAccess | None) -> int:
        """Number of the storage profile of a source (its ``storage`` block, or None)."""
        return 0 if access is None else self.storage_profiles.index(_plain(access))

    @property
    def run_uri(self) -> str:
        return run_uri(self.spec.effective_workspace, self.job.name, self.run)

    @property
    def output_uri(self) -> str:
        return output_uri(self.spec.output.destination, self.run)

    def to_text(self) -> str:
        """The file's text: stable, so that equal orders are equal bytes."""
        return json.dumps(self.to_json(), sort_keys=True, indent=1) + "\n"


def _plain(access: StorageAccess) -> StorageAccess:
    return StorageAccess.model_validate(
        {k: v for k, v in access.to_json().items() if k in {"endpoint", "region", "secretRef"}}
    )


def parse_order(text: str | bytes) -> RunOrder:
    """The order in a file's text.

    Raises:
        InvalidSpec: where the text is no order, or one of another contract version.
    """
    raw: Any = json.loads(text)
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != CONTRACT_VERSION:
        raise InvalidSpec(
            [
                f"order.version: this trainer image speaks contract version {CONTRACT_VERSION}; got"
                f" {version!r}. Use the trainer image of the operator's release, or leave"
                " spec.compute.image out"
            ]
        )
    try:
        return RunOrder.model_validate(raw)
    except ValidationError as error:
        raise InvalidSpec(explain(error, root="order")) from None
