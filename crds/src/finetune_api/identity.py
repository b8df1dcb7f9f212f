"""How runs and their children are called, and where a run's files live: pure functions.

A run is ``<number>-<five characters of the job's uid>``: a job deleted and made again has another
uid, so it cannot take over the checkpoints of its namesake.
"""

from __future__ import annotations

import hashlib
import re

from finetune_api.names import Role

# Longest base of a child's name. A Job's pods are called <job>-<index>-<5 random>; the hostname
# <job>-<index> and every label value must fit 63: 63 - len("-prepare-999") - len("-1023") = 46.
_BASE_MAX = 44


def run_id(number: int, uid: str) -> str:
    """``3-0f9c2`` for run 3 of the job with that uid."""
    return f"{number}-{re.sub('[^a-z0-9]', '', uid.lower())[:5]}"


def child_base(job_name: str, run: str) -> str:
    """DNS label of at most 44 characters that all children of a run begin with.

    Service names must begin with a letter and cannot hold dots, which a job's name may: such
    names, and those that are too long, are shortened and get a digest of the whole name.
    """
    label = re.sub(r"[^a-z0-9-]", "-", job_name)
    if not label[0].isalpha():
        label = f"j{label}"
    room = _BASE_MAX - len(run) - 1
    if label != job_name or len(label) > room:
        digest = hashlib.sha256(job_name.encode()).hexdigest()[:6]
        label = f"{label[: room - 7].rstrip('-')}-{digest}"
    return f"{label}-{run}"


def child_name(job_name: str, run: str, role: Role, revision: int) -> str:
    """Name of the Job of a role (and of the gang's Service) in one revision of a run."""
    return f"{child_base(job_name, run)}-{role}-{revision}"


def run_spec_name(job_name: str, run: str, revision: int) -> str:
    """Name of the ConfigMap that holds the run spec of one revision of a run."""
    return f"{child_base(job_name, run)}-run-spec-{revision}"


def label_value(job_name: str) -> str:
    """The job's name as a label value: itself where it fits, else shortened with a digest."""
    if len(job_name) <= 63:
        return job_name
    return f"{job_name[:56].rstrip('-.')}-{hashlib.sha256(job_name.encode()).hexdigest()[:6]}"


# --- object storage ------------------------------------------------------------------------------


def run_uri(workspace: str, job_name: str, run: str) -> str:
    """Prefix of a run's working files: HEAD.json, commits, baseline."""
    return f"{workspace}/runs/{job_name}/{run}"


def data_uri(workspace: str, digest: str) -> str:
    """Prefix of prepared data of that content digest, shared by all jobs of the workspace."""
    return f"{workspace}/data/{digest}"


def output_uri(destination: str, run: str) -> str:
    """Prefix of the published model of a run."""
    return f"{destination.rstrip('/')}/{run}"


def merged_uri(published: str) -> str:
    """Prefix of the whole model below a published one."""
    return f"{published.rstrip('/')}/merged"


def adapter_uri(published: str) -> str:
    """Prefix of the adapter below a published model."""
    return f"{published.rstrip('/')}/adapter"
