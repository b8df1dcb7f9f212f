"""The base model of a run whose ``spec.model.fineTuneJobRef`` names another job, and the reason to
wait while that job has no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from finetune_api.run_spec import TunedBase, tuned_base
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.world.models import ModelJob

MESSAGE_MAX: Final = 500
"""Maximum length, in characters, of another job's failure message."""


@dataclass(frozen=True)
class Wait:
    """Why a run cannot begin yet."""

    reason: str
    message: str
    stuck: bool = False
    """Whether the wait ends only when a user changes a job."""


def find_base(
    name: str, namespace: str, spec: FineTuneJobSpec, chain: tuple[ModelJob, ...]
) -> TunedBase | Wait | None:
    """The model that a job starts from; None if its spec has a source address.

    Args:
        name: of the job, in ``namespace``.
        chain: the job that it refers to, the job that that job refers to, and so on, up to a job
            that is missing, has a source address, or is already in the chain.
    """
    if spec.model.fine_tune_job_ref is None:
        return None
    referred = spec.model.fine_tune_job_ref.name
    if chain and chain[0].settled and chain[0].evaluates:
        text = (
            f"spec.model.fineTuneJobRef: FineTuneJob {referred} evaluates a model, and publishes"
            " none (its spec.method trains nothing); name the job that trained the model, or give"
            " spec.model.source"
        )
        return Wait("NoModelPublished", text, stuck=True)
    if chain and chain[0].complete and chain[0].run_spec is not None:
        output = chain[0].status.output
        if output is not None and output.held is not None:
            text = (
                f"spec.model.fineTuneJobRef: the model of FineTuneJob {referred} is held"
                f" ({output.held[:MESSAGE_MAX]}); the run begins once a run of that job passes its"
                f" gates. To start from the held model: spec.model.source: {output.uri}"
            )
            return Wait("ModelHeld", text, stuck=True)
        return tuned_base(chain[0].run_spec, output.digest if output else None, spec)
    cycle = _cycle(name, referred, chain)
    if cycle:
        text = (
            f"spec.model.fineTuneJobRef: the jobs wait for each other's models"
            f" ({' → '.join(cycle)}); one of them must start from spec.model.source"
        )
        return Wait("ReferenceCycle", text, stuck=True)
    if not chain:
        text = (
            f"spec.model.fineTuneJobRef: there is no FineTuneJob {referred} in namespace"
            f" {namespace}; the run begins once it exists and is Complete"
        )
        return Wait("WaitingForModel", text)
    return _wait_for(chain[0])


def _cycle(name: str, referred: str, chain: tuple[ModelJob, ...]) -> list[str]:
    """Names along a cycle of references in which no job has a published model; empty if there is no
    cycle."""
    if any(job.complete for job in chain):
        return []
    path = [name, *(job.name for job in chain)]
    back = chain[-1].refers_to if chain else referred
    return [*path[path.index(back) :], back] if back in path else []


def _wait_for(job: ModelJob) -> Wait:
    """Why a job has no model yet, according to its status."""
    status = job.status
    begins = "; the run begins once it is Complete"
    true = {c.type: c for c in status.conditions if c.status == "True"}
    if "Stalled" in true and status.failure is None:
        text = f"{true['Stalled'].reason}: {true['Stalled'].message[:MESSAGE_MAX]}"
        return _stuck(job.name, f"is stalled ({text})")
    if not job.settled or status.run is None or status.phase is None:
        suspended = status.phase == "Suspended" and job.settled
        what = "is suspended" if suspended else "has not begun a run with its current spec"
        return Wait("WaitingForModel", f"FineTuneJob {job.name} {what}{begins}")
    if status.failure is not None:
        cause = f"{status.failure.reason}: {status.failure.message[:MESSAGE_MAX]}"
        return _stuck(job.name, f"has failed ({cause})")
    text = f"FineTuneJob {job.name} is {status.phase} (run {status.run.id}){begins}"
    return Wait("WaitingForModel", text)


def _stuck(name: str, what: str) -> Wait:
    text = f"FineTuneJob {name} {what}; fix that job: the run begins once it is Complete"
    return Wait("ModelFailed", text, stuck=True)
