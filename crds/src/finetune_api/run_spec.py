"""The run spec: the file that the operator passes to the trainer (``run-spec.json``).

It holds the run's full spec as of the start of the run, so that later changes in the cluster (a new
default, a new operator) do not affect a run that has begun. The trainer refuses an unknown contract
version.
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
"""Incremented with every change of run-spec.json or of the trainer's reports that an older trainer
or operator would misread."""


class JobIdentity(Model):
    """The FineTuneJob of a run."""

    namespace: str
    """Namespace of the job."""
    name: str
    """Name of the job."""
    uid: str
    """UID of the job's object."""


class TunedBase(Record):
    """The published model that `spec.model.fineTuneJobRef` referred to when the run began; later
    runs of the other job do not affect this run."""

    job: str
    """Name of the job that published the model."""
    run: str
    """Run that published the model."""
    uri: str
    """URI of the published model."""
    digest: str | None = None
    """sha256 of the model's manifest; None if no longer known."""
    storage: StorageAccess | None = None
    """Access to the model if it differs from `spec.storage`."""
    beneath: ModelLocation | None = None
    """Base model of a published adapter; None if a full model was published."""


class RunSpec(Model):
    """The complete specification of a run."""

    version: int
    """Contract version of this file."""
    job: JobIdentity
    """The job."""
    run: str
    """ID of the run, ``<number>-<uid5>``."""
    spec: FineTuneJobSpec
    """The spec of the run, with every default filled in."""
    base: TunedBase | None = None
    """The model that `spec.model.fineTuneJobRef` refers to."""
    revision: int = 1
    """Number of the run's gang; a change of a field of class Resume starts the next one."""
    restarts: int = 0
    """Restarts of the earlier gangs; HEAD.json counts on from here."""

    @property
    def base_model(self) -> ModelLocation:
        """Location of the model that the run starts from, given by address or by reference."""
        if self.base is not None:
            return ModelLocation(source=self.base.uri, storage=self.base.storage)
        assert self.spec.model.source is not None, "a rule requires source or a reference"
        return ModelLocation(source=self.spec.model.source, storage=self.spec.model.storage)

    @cached_property
    def storage_profiles(self) -> tuple[StorageAccess, ...]:
        """The distinct storage access settings of this run; index 0 is ``spec.storage``."""
        given = [self.spec.model.storage]
        if self.base is not None:
            given.append(self.base.storage)
            given.append(self.base.beneath.storage if self.base.beneath else None)
        given += [source.storage for source in self.spec.data.sources()]
        profiles = [plain_access(self.spec.storage)]
        for access in given:
            if access is not None and plain_access(access) not in profiles:
                profiles.append(plain_access(access))
        return tuple(profiles)

    def profile_of(self, access: StorageAccess | None) -> int:
        """Return the index of the storage profile of a source's ``storage`` block."""
        return 0 if access is None else self.storage_profiles.index(plain_access(access))

    @property
    def run_uri(self) -> str:
        return run_uri(self.spec.effective_workspace, self.job.name, self.run)

    @property
    def output_uri(self) -> str:
        return output_uri(self.spec.output.destination, self.run)

    def to_text(self) -> str:
        """Return the file's text; equal run specs give equal bytes."""
        return json.dumps(self.to_json(), sort_keys=True, indent=1) + "\n"


def plain_access(access: StorageAccess) -> StorageAccess:
    """Return only the access settings (endpoint, region, secret) of a storage block."""
    return StorageAccess.model_validate(
        {k: v for k, v in access.to_json().items() if k in {"endpoint", "region", "secretRef"}}
    )


def tuned_base(before: RunSpec, digest: str | None, spec: FineTuneJobSpec) -> TunedBase:
    """Return the base of a run with ``spec`` that starts from the published model of the run
    ``before``.

    Args:
        digest: sha256 of the published manifest.
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
    """Return the access settings for a run whose default storage is ``own``; None if they are
    equal."""
    return None if plain_access(access) == plain_access(own) else plain_access(access)


def parse_run_spec(text: str | bytes) -> RunSpec:
    """Parse the text of a run spec file.

    Raises:
        InvalidSpec: if the text is not a run spec, or has another contract version.
    """
    raw: Any = json.loads(text)
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != CONTRACT_VERSION:
        raise InvalidSpec(
            [
                f"runSpec.version: this trainer image supports contract version {CONTRACT_VERSION};"
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
