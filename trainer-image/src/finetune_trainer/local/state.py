"""The state folder: which run a manifest continues or begins, and where its files are.

jobs/<name>.json            uid of the job, its runs and the spec of each
runs/<name>/<run>/          run-spec.json, logs, scratch of the stages, report.html
claims/<claim>              links in place of mounted volumes
s3/                         the embedded object storage
models/<name>/<run>/        copy of a model published to the embedded storage
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from pydantic import Field

from finetune_api.base import Record
from finetune_api.classes import changed_classes
from finetune_api.identity import run_id
from finetune_api.run_spec import TunedBase
from finetune_trainer.failures import UserError
from finetune_trainer.local.manifest import LocalJob
from finetune_trainer.supervise.worker_files import write_whole


class LocalRun(Record):
    """One run of a job on this machine."""

    number: int
    """From 1."""
    spec: dict[str, Any]
    """The run's current spec, with every default filled in."""
    complete: bool = False
    """Whether its model was published."""
    base: TunedBase | None = None
    """Published model of another job that the run starts from."""
    digest: str | None = None
    """sha256 of its published manifest.json."""
    held: str | None = None
    """Which gates its model missed."""
    embedded: bool = False
    """Whether the model was published to the embedded storage."""
    endpoint: str | None = None
    """Server that the model was published to; None for Amazon S3."""


class JobState(Record):
    """Stored state of a job, by its name."""

    uid: str
    """Generated at the first run of that name."""
    runs: list[LocalRun] = Field(default=[])
    """Oldest first."""


class StateFolder:
    """Paths and job states of ``finetune run``."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def storage(self) -> Path:
        return self.root / "s3"

    @property
    def claims(self) -> Path:
        return self.root / "claims"

    def run_folder(self, job: str, run: str) -> Path:
        return self.root / "runs" / job / run

    def model_folder(self, job: str, run: str) -> Path:
        return self.root / "models" / job / run

    def read(self, job: str) -> JobState:
        """Return the state of a job; a new uid and no runs for an unknown job.

        Raises:
            UserError: 'StateUnreadable'.
        """
        path = self._job_file(job)
        if not path.exists():
            return JobState(uid=uuid.uuid4().hex)
        try:
            return JobState.model_validate_json(path.read_text())
        except ValueError as error:
            raise UserError(
                "StateUnreadable", f"{path} is damaged ({error}); remove it to begin anew"
            ) from None

    def write(self, job: str, state: JobState) -> None:
        write_whole(self._job_file(job), json.dumps(state.to_json(), indent=1) + "\n")

    def link_claims(self, claims: dict[str, Path]) -> None:
        """Link every claim to its folder."""
        self.claims.mkdir(parents=True, exist_ok=True)
        for name, folder in claims.items():
            link = self.claims / name
            link.unlink(missing_ok=True)
            link.symlink_to(folder, target_is_directory=True)

    def _job_file(self, job: str) -> Path:
        return self.root / "jobs" / f"{job}.json"


def choose_run(state: JobState, job: LocalJob) -> tuple[JobState, str, bool]:
    """Return the state with the run to execute as its last, the run's identity, and whether that
    run continues an earlier start. The rule is the cluster's: an incomplete run continues unless a
    field of class NewRun has changed."""
    spec = job.spec.to_json()
    last = state.runs[-1] if state.runs else None
    if last is not None and not last.complete and "NewRun" not in changed_classes(last.spec, spec):
        kept = [*state.runs[:-1], last.model_copy(update={"spec": spec})]
        return state.model_copy(update={"runs": kept}), run_id(last.number, state.uid), True
    number = last.number + 1 if last else 1
    runs = [*state.runs, LocalRun(number=number, spec=spec)]
    return state.model_copy(update={"runs": runs}), run_id(number, state.uid), False


def changed(state: JobState, **fields: Any) -> JobState:
    """Return the state with fields of the last run changed."""
    last = state.runs[-1].model_copy(update=fields)
    return state.model_copy(update={"runs": [*state.runs[:-1], last]})
