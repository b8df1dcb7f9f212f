"""The run spec: the one file that the operator hands to the trainer (``run-spec.json``).

It holds the run's whole spec as it was when the run began, so that nothing that changes in the
cluster later (a new default, a new operator) reaches a run that has begun. The trainer refuses a
contract version that it does not speak.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, Final

from pydantic import ValidationError

from finetune_api.base import InvalidSpec, Model, Record, explain
from finetune_api.identity import merged_uri, output_uri, run_uri
from finetune_api.sources import ModelLocation, StorageAccess
from finetune_api.spec import FineTuneJobSpec

CONTRACT_VERSION: Final = 1
"""Raised with every change of run-spec.json or of what the trainer says that an older trainer or
operator would misread."""


class JobIdentity(Model):
    """Which FineTuneJob a run belongs to."""

    namespace: str
    """Namespace of the job."""
    name: str
    """Name of the job."""
    uid: str
    """UID of the job's object."""


class TunedBase(Record):
    """The published model that `spec.model.fineTuneJobRef` stood for when the run began: what the
    other job does later does not reach the run."""

    job: str
    """Name of the job that published it."""
    run: str
    """Its run."""
    uri: str
    """Address of what the run has published."""
    digest: str | None = None
    """sha256 of its manifest; None where it is not known any more."""
    storage: StorageAccess | None = None
    """Access to it where it differs from `spec.storage`."""
    beneath: ModelLocation | None = None
    """The model that a published adapter is loaded on; None where a whole model was published."""


class RunSpec(Model):
    """What a run does, complete."""

    version: int
    """Contract version of this file."""
    job: JobIdentity
    """The job."""
    run: str
    """Identity of the run, ``<number>-<uid5>``."""
    spec: FineTuneJobSpec
    """The spec of the run, with every default filled in."""
    base: TunedBase | None = None
    """What `spec.model.fineTuneJobRef` stands for."""
    revision: int = 1
    """Gang of the run: another one follows where a field of class Resume was changed."""
    restarts: int = 0
    """Incidents of the gangs before this one: from here on HEAD.json counts."""

    @property
    def base_model(self) -> ModelLocation:
        """Where the model is that the run starts from, given by address or by reference."""
        if self.base is not None:
            return ModelLocation(source=self.base.uri, storage=self.base.storage)
        assert self.spec.model.source is not None, "a rule asks for it; a reference has a base"
        return ModelLocation(source=self.spec.model.source, storage=self.spec.model.storage)

    @cached_property
    def storage_profiles(self) -> tuple[StorageAccess, ...]:
        """The different ways in which this run reaches object storage; 0 is ``spec.storage``."""
        data = self.spec.data
        given = [self.spec.model.storage]
        if self.base is not None:
            given.append(self.base.storage)
            given.append(self.base.beneath.storage if self.base.beneath else None)
        given += [s.storage for s in [*data.train, *(data.validation or []), *(data.test or [])]]
        profiles = [plain_access(self.spec.storage)]
        for access in given:
            if access is not None and plain_access(access) not in profiles:
                profiles.append(plain_access(access))
        return tuple(profiles)

    def profile_of(self, access: StorageAccess | None) -> int:
        """Number of the storage profile of a source (its ``storage`` block, or None)."""
        return 0 if access is None else self.storage_profiles.index(plain_access(access))

    @property
    def run_uri(self) -> str:
        return run_uri(self.spec.effective_workspace, self.job.name, self.run)

    @property
    def output_uri(self) -> str:
        return output_uri(self.spec.output.destination, self.run)

    def to_text(self) -> str:
        """The file's text: stable, so that equal orders are equal bytes."""
        return json.dumps(self.to_json(), sort_keys=True, indent=1) + "\n"


def plain_access(access: StorageAccess) -> StorageAccess:
    """What of a storage block says how the storage is reached."""
    return StorageAccess.model_validate(
        {k: v for k, v in access.to_json().items() if k in {"endpoint", "region", "secretRef"}}
    )


def tuned_base(before: RunSpec, digest: str | None, spec: FineTuneJobSpec) -> TunedBase:
    """The base of a run with ``spec`` that starts from what the run of ``before`` has published.

    Args:
        digest: of the published manifest.
    """
    home = before.spec.storage
    uri = before.output_uri
    beneath = None
    if before.spec.effective_output_format == "Adapter":
        beneath = before.base_model
        if before.base is not None and before.base.beneath is not None:
            beneath = before.base.beneath
        elif before.base is not None:
            beneath = beneath.model_copy(update={"source": merged_uri(beneath.source)})
        beneath = ModelLocation(
            source=beneath.source, storage=_as_seen(beneath.storage or home, spec.storage)
        )
    return TunedBase(
        job=before.job.name,
        run=before.run,
        uri=uri,
        digest=digest,
        storage=spec.model.storage or _as_seen(home, spec.storage),
        beneath=beneath,
    )


def _as_seen(access: StorageAccess, own: StorageAccess) -> StorageAccess | None:
    """A storage as a run with storage of its ``own`` names it: not at all where it is that."""
    return None if plain_access(access) == plain_access(own) else plain_access(access)


def parse_run_spec(text: str | bytes) -> RunSpec:
    """The run spec in a file's text.

    Raises:
        InvalidSpec: where the text is no run spec, or one of another contract version.
    """
    raw: Any = json.loads(text)
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != CONTRACT_VERSION:
        raise InvalidSpec(
            [
                f"runSpec.version: this trainer image speaks contract version {CONTRACT_VERSION};"
                f" got {version!r}. Use the trainer image of the operator's release, or leave"
                " spec.compute.image out"
            ]
        )
    try:
        run_spec = RunSpec.model_validate(raw)
    except ValidationError as error:
        raise InvalidSpec(explain(error, RunSpec, "runSpec")) from None
    if run_spec.spec.model.fine_tune_job_ref is not None and run_spec.base is None:
        raise InvalidSpec(["runSpec.base: required with spec.model.fineTuneJobRef, but absent"])
    return run_spec
