"""Read a FineTuneJob manifest from a file and convert local paths to addresses.

The API accepts ``s3://``, ``hf://`` and ``pvc://``. A path (``./dir``, ``/dir``, ``~/dir``,
``file://…``) becomes ``pvc://<claim>/<name>``, and the claim a link to the path's folder, so that
stages read it like a mounted volume. Relative paths start from the manifest's folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from finetune_api.base import InvalidSpec, did_you_mean
from finetune_api.names import API_VERSION, KIND
from finetune_api.podtemplate import template_problems
from finetune_api.sources import DATA_LISTS
from finetune_api.spec import SELF_REFERENCE, FineTuneJobSpec, parse_spec, refers_to_itself

_PATH: Final = re.compile(r"^(\.{1,2}/|/|~/|file://)")
_NAME: Final = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
_GLOB: Final = re.compile(r"[*?\[]")
STDIN: Final = Path("-")
"""Path that stands for standard input."""


@dataclass(frozen=True)
class LocalJob:
    """A valid manifest, with its local paths converted."""

    name: str
    namespace: str
    spec: FineTuneJobSpec
    claims: dict[str, Path]
    """Folders that replace volume claims, by claim name."""


def read_manifest(path: Path) -> LocalJob:
    """Return the job in a YAML (or JSON) file, or in standard input (``-``).

    Relative paths in the manifest start from its folder; if the manifest is not a regular file,
    from the working directory.

    Raises:
        InvalidSpec: one line per fault, each with the field's path in the manifest.
    """
    return job_of(_load(path), _folder_of(path))


def job_of(raw: dict[str, Any], folder: Path) -> LocalJob:
    """Return the job of a manifest whose relative paths start from ``folder``.

    Raises:
        InvalidSpec: as ``read_manifest``.
    """
    problems = _problems_of_head(raw)
    claims: dict[str, Path] = {}
    spec = raw.get("spec")
    if not isinstance(spec, dict):
        problems.append("spec: required, but absent" if spec is None else "spec: must be a mapping")
        raise InvalidSpec(problems)
    spec, faults = _with_claims(spec, folder, claims)
    problems += faults
    try:
        parsed = parse_spec(spec)
    except InvalidSpec as error:
        raise InvalidSpec(problems + error.problems) from None
    problems += template_problems(parsed.compute.pod_template)
    if problems:
        raise InvalidSpec(problems)
    metadata = raw["metadata"]
    if refers_to_itself(metadata["name"], parsed):
        raise InvalidSpec([f"{SELF_REFERENCE}; got {metadata['name']}"])
    return LocalJob(metadata["name"], metadata.get("namespace") or "default", parsed, claims)


def _load(path: Path) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if path == STDIN else path.read_text(encoding="utf-8")
        documents = [d for d in yaml.safe_load_all(text) if d]
    except OSError as error:
        raise InvalidSpec([f"{path}: cannot be read: {error.strerror}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidSpec([f"{path}: is not YAML: {error}"]) from None
    jobs = [d for d in documents if isinstance(d, dict) and d.get("kind") == KIND]
    if len(jobs) == 1:
        return jobs[0]
    if len(documents) == 1 and isinstance(documents[0], dict):
        return documents[0]
    raise InvalidSpec([f"{path}: holds {len(jobs)} FineTuneJobs; it must hold one"])


def _folder_of(manifest: Path) -> Path:
    """Return the absolute folder that the manifest's relative paths start from."""
    piped = manifest == STDIN or manifest.is_relative_to("/dev") or not manifest.is_file()
    return Path.cwd() if piped else manifest.absolute().parent


def _problems_of_head(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    for field, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
        if raw.get(field) != wanted:
            problems.append(f"{field}: must be {wanted}; got {raw.get(field)!r}")
    metadata = raw.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or len(name) > 253 or not _NAME.match(name):
        problems.append(
            "metadata.name: must be lower-case letters, digits, '-' and '.', at most 253"
            f" characters; got {name!r}"
        )
    known = {"apiVersion", "kind", "metadata", "spec", "status"}
    problems += [
        f"{field}: unknown field{did_you_mean(str(field), known)}"
        for field in raw
        if field not in known
    ]
    return problems


def _with_claims(
    spec: dict[str, Any], start: Path, claims: dict[str, Path]
) -> tuple[dict[str, Any], list[str]]:
    """Return the spec with paths converted to addresses, and the faults; add to ``claims``.
    Relative paths start from ``start``. Blocks of a wrong type are left for ``parse_spec`` to
    refuse."""
    problems: list[str] = []

    def converted(block: Any, where: str) -> Any:
        source = block.get("source") if isinstance(block, dict) else None
        if not isinstance(source, str):
            return block
        try:
            if _PATH.match(source):
                return {**block, "source": claim_of(source, start, claims)}
            if "://" in source or not (start / source).exists():
                return block
            raise ValueError(f"a path starts with ./, ../, / or ~; write './{source}'")
        except ValueError as error:
            problems.append(f"{where}.source: {error}")
            # A valid one, so that the fault is reported once.
            return {**block, "source": "pvc://missing/missing"}

    spec = dict(spec)
    if "model" in spec:
        spec["model"] = converted(spec["model"], "spec.model")
    if isinstance(spec.get("data"), dict):
        data = dict(spec["data"])
        for name in DATA_LISTS:
            if isinstance(data.get(name), list):
                data[name] = [
                    converted(source, f"spec.data.{name}[{i}]")
                    for i, source in enumerate(data[name])
                ]
        spec["data"] = data
    return spec, problems


def claim_of(source: str, start: Path, claims: dict[str, Path]) -> str:
    """Return the ``pvc://`` address of a path and add its claim to ``claims``. A relative path
    starts from ``start``.

    Raises:
        ValueError: the path does not exist; names it as looked up and as written.
    """
    text = source.removeprefix("file://")
    path = Path(os.path.normpath(start / Path(text).expanduser()))
    parts = path.parts
    # The claim is the folder above the last part, or above the first part with a wildcard.
    literal = next((i for i, part in enumerate(parts) if _GLOB.search(part)), len(parts) - 1)
    folder = Path(*parts[:literal]).resolve() if literal else path
    rest = "/".join(parts[literal:])
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; got {source!r}")
    if not _GLOB.search(rest) and not (folder / rest).exists():
        raise ValueError(f"{folder / rest} does not exist; got {source!r}")
    slug = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")[:40]
    claim = f"local-{slug}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}".replace(
        "--", "-"
    )
    claims[claim] = folder
    return f"pvc://{claim}/{rest}{'/' if text.endswith('/') else ''}"


def with_paths(text: str, claims: Mapping[str, Path]) -> str:
    """Replace claim addresses in a message by the local paths."""
    for claim, folder in claims.items():
        text = text.replace(f"pvc://{claim}/", f"{folder}/")
    return text
