"""Names of runs and their child objects, and URIs of a run's files: pure functions.

A run ID is ``<number>-<five characters of the job's uid>``. A job that is deleted and created again
gets another uid, so it cannot take over the checkpoints of its predecessor.
"""

from __future__ import annotations

import hashlib
import re

from finetune_api.names import Role

# Maximum length of a child name's base. A Job's pods are named <job>-<index>-<5 random>; the
# hostname <job>-<index> and every label value must fit 63 characters:
# 63 - len("-prepare-999") - len("-1023") = 46.
_BASE_MAX = 44


def run_id(number: int, uid: str) -> str:
    """Return the run ID: ``3-0f9c2`` for run 3 of a job whose uid begins with 0f9c2."""
    return f"{number}-{re.sub('[^a-z0-9]', '', uid.lower())[:5]}"


def child_base(job_name: str, run: str) -> str:
    """Return the name prefix of all child objects of a run: a DNS label of at most 44 characters.

    Unlike a job's name, a Service's name must begin with a letter and has no dots. Other job names,
    and those that are too long, are adapted and get a digest of the full name.
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
    """Return the name of a role's Job (and of the gang's Service) in one revision of a run."""
    return f"{child_base(job_name, run)}-{role}-{revision}"


def run_spec_name(job_name: str, run: str, revision: int) -> str:
    """Return the name of the ConfigMap with the run spec of one revision of a run."""
    return f"{child_base(job_name, run)}-run-spec-{revision}"


def network_policy_name(job_name: str, run: str) -> str:
    """Return the name of the NetworkPolicy of a run's pods."""
    return f"{child_base(job_name, run)}-network"


def label_value(job_name: str) -> str:
    """Return the job's name as a label value: unchanged if it fits, else shortened with a
    digest."""
    if len(job_name) <= 63:
        return job_name
    return f"{job_name[:56].rstrip('-.')}-{hashlib.sha256(job_name.encode()).hexdigest()[:6]}"


# --- object storage ------------------------------------------------------------------------------


def run_uri(workspace: str, job_name: str, run: str) -> str:
    """Return the prefix of a run's working files: HEAD.json, checkpoints, answers."""
    return f"{workspace}/runs/{job_name}/{run}"


def data_uri(workspace: str, digest: str) -> str:
    """Return the prefix of prepared data with this content digest, shared by all jobs of the
    workspace."""
    return f"{workspace}/data/{digest}"


def base_row_uri(workspace: str, key: str) -> str:
    """Return the address of a row of a base model, shared by all jobs of the workspace."""
    return f"{workspace}/base-rows/{key}.json"


def output_uri(destination: str, run: str) -> str:
    """Return the prefix of a run's published model."""
    return f"{destination.rstrip('/')}/{run}"


def merged_uri(published: str) -> str:
    """Return the prefix of the merged model below a published model."""
    return f"{published.rstrip('/')}/merged"


def adapter_uri(published: str) -> str:
    """Return the prefix of the adapter below a published model."""
    return f"{published.rstrip('/')}/adapter"
