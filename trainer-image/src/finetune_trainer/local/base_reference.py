"""Resolve ``spec.model.fineTuneJobRef`` on one machine: the model that an earlier ``finetune run``
of that job published with the same state folder."""

from __future__ import annotations

from finetune_api.identity import run_id
from finetune_api.run_spec import CONTRACT_VERSION, JobIdentity, RunSpec, TunedBase, tuned_base
from finetune_api.spec import parse_spec
from finetune_trainer.failures import UserError
from finetune_trainer.local.state import JobState, LocalRun, StateFolder
from finetune_trainer.local.storage import Where, reached_at


def find_tuned(state: StateFolder, namespace: str, where: Where) -> TunedBase | None:
    """Return the published model that a new run starts from; None if the spec gives an address.

    Raises:
        UserError: 'ModelNotReady', naming the job to run first; 'NoModelPublished'; 'ModelHeld';
            'ModelElsewhere' if the model is in storage that this run does not use.
    """
    reference = where.spec.model.fine_tune_job_ref
    if reference is None:
        return None
    name, known = reference.name, state.read(reference.name)
    last = known.runs[-1] if known.runs else None
    if last is not None and not parse_spec(last.spec).method.kind.trains:
        raise UserError(
            "NoModelPublished",
            f"spec.model.fineTuneJobRef: job {name} evaluates a model, and publishes none; name the"
            " job that trained the model, or give spec.model.source",
        )
    if last is None or not last.complete:
        run = f"its run {run_id(last.number, known.uid)} has not ended" if last else "it never ran"
        raise UserError(
            "ModelNotReady",
            f"spec.model.fineTuneJobRef: job {name} has published no model ({run} with state folder"
            f" {state.root}); first: finetune run MANIFEST of {name}, to its end",
        )
    if last.held is not None:
        raise UserError(
            "ModelHeld",
            f"spec.model.fineTuneJobRef: the model of job {name} is held ({last.held}); run it"
            " again until it passes its gates, or start from the held model by spec.model.source",
        )
    if last.embedded and where.embedded is None:
        raise UserError(
            "ModelElsewhere",
            f"spec.model.fineTuneJobRef: job {name} has published to the embedded storage of"
            f" {state.root}, and this run uses other storage; add --local-storage to one of them,"
            f" or start from its copy: spec.model.source:"
            f" {state.model_folder(name, run_id(last.number, known.uid))}",
        )
    return tuned_base(_run_spec(name, namespace, known, last, where), last.digest, where.spec)


def _run_spec(name: str, namespace: str, known: JobState, run: LocalRun, where: Where) -> RunSpec:
    """Return the run spec of the referenced run, with the endpoint at which this run reaches its
    output: the embedded server has a new address at every start."""
    endpoint = where.spec.storage.endpoint if run.embedded else run.endpoint
    return RunSpec(
        version=CONTRACT_VERSION,
        job=JobIdentity(namespace=namespace, name=name, uid=known.uid),
        run=run_id(run.number, known.uid),
        spec=reached_at(parse_spec(run.spec), endpoint),
        base=run.base,
    )
