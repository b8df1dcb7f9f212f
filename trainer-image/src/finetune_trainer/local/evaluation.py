"""``finetune eval``: measure models as they are, each by a run of its own, and compare them.

options ──► a manifest a model ──► finetune run of each ──► finetune compare, or report
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune_api.base import InvalidSpec
from finetune_api.names import ExitCode
from finetune_trainer.local.eval_options import manifest_among, manifests_of
from finetune_trainer.local.layout import count_gpus
from finetune_trainer.local.manifest import LocalJob, job_of, read_manifest
from finetune_trainer.local.results import LETTERS, compare, report
from finetune_trainer.local.runner import HELD, MANIFEST_FAULT, RunDone, run_job
from finetune_trainer.local.storage import uses_embedded


def evaluate(
    options: argparse.Namespace, state_dir: Path, *, endpoint: str | None, local_storage: bool
) -> int:
    """Measure and compare the models of the command line, and return the exit code: that of the
    first run that failed, or that is held; 2 for wrong arguments or a refused manifest.

    A model that fails does not keep the others from being measured and compared.
    """
    try:
        jobs = _jobs(options)
        _check_storage(options, jobs, endpoint, local_storage)
    except ValueError as error:
        return _refused([str(error)])
    except InvalidSpec as error:
        return _refused(error.problems)
    console, done = Console(), list[RunDone]()
    again = f"finetune {shlex.join(sys.argv[1:])}"
    for number, job in enumerate(jobs, 1):
        if len(jobs) > 1:
            console.rule(f"{number} of {len(jobs)}: {options.models[number - 1]}", align="left")
        run = run_job(job, state_dir, again, endpoint=endpoint, local_storage=local_storage)
        done.append(run)
        if run.code == ExitCode.INTERRUPTED:
            return run.code
    uris = [run.output_uri for run in done if run.code in (ExitCode.OK, HELD) and run.output_uri]
    where: dict[str, Any] = {
        "claims": {name: folder for job in jobs for name, folder in job.claims.items()},
        "endpoint": endpoint or jobs[0].spec.storage.endpoint,
        "local_storage": _embedded(jobs[0], endpoint, local_storage),
    }
    code = next((run.code for run in done if run.code), 0)
    shown = 0
    if len(uris) > 1:
        shown = compare(uris, state_dir, min_effect=options.min_effect, **where)
    elif uris:
        shown = report(uris[0], state_dir, **where)
    return code or shown


def _jobs(options: argparse.Namespace) -> list[LocalJob]:
    """Raises:
    ValueError, InvalidSpec: with what is wrong.
    """
    path = manifest_among(options)
    if path is None:
        if (count := len(options.models)) > len(LETTERS):
            raise ValueError(f"{count} models given; 1 to {len(LETTERS)} can be compared")
        found = manifests_of(options, count_gpus())
        return [job_of(raw, Path.cwd()) for raw in found]
    job = read_manifest(path)
    if job.spec.method.kind.trains:
        raise InvalidSpec(
            [
                f"spec.method.type: {job.spec.method.type} trains a model: finetune run {path}; to"
                " evaluate its base model as it is, set method.type: None"
            ]
        )
    return [job]


def _check_storage(
    options: argparse.Namespace, jobs: list[LocalJob], endpoint: str | None, local_storage: bool
) -> None:
    """Raises:
    ValueError: results would go to a bucket that nobody has named.
    """
    named = options.output or manifest_among(options)
    if not named and not _embedded(jobs[0], endpoint, local_storage):
        raise ValueError(
            "--output: s3:// is a storage of yours here (an endpoint or an account in the"
            " environment), so say where the results go, e.g. --output s3://bucket/evaluations;"
            " or add --local-storage"
        )


def _embedded(job: LocalJob, endpoint: str | None, local_storage: bool) -> bool:
    return local_storage or uses_embedded(job.spec, endpoint, os.environ)


def _refused(problems: list[str]) -> int:
    print("\n".join(problems), file=sys.stderr)
    return MANIFEST_FAULT
