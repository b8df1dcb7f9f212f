"""The server behind ``s3://`` on this machine: the user's, Amazon S3, or the embedded one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from finetune_api.names import SECRET_KEYS, storage_env
from finetune_api.run_spec import RunSpec
from finetune_api.sources import DATA_LISTS
from finetune_api.spec import FineTuneJobSpec, parse_spec
from finetune_trainer.local.state import StateFolder
from finetune_trainer.storage.objects import ObjectStore, split_uri
from finetune_trainer.storage.s3server import EmbeddedS3

# Any of these shows that the user has an object storage account.
_ACCOUNT: Final = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE")


@dataclass(frozen=True)
class Where:
    """The storage of a run."""

    spec: FineTuneJobSpec
    """The spec with the endpoint in use."""
    keys: dict[str, str]
    """Access keys of ``spec.storage``, by their names in a Secret."""
    embedded: EmbeddedS3 | None
    """The embedded server, if it is used."""

    def environment(self, run_spec: RunSpec) -> dict[str, str]:
        """Return the keys of every storage profile of the run spec, as the operator sets them in
        pods."""
        own = {k: v for k in SECRET_KEYS if (v := os.environ.get(k))}
        found = {storage_env(0, k): v for k, v in {**own, **self.keys}.items()}
        for profile in range(1, len(run_spec.storage_profiles)):
            found |= {storage_env(profile, k): v for k, v in own.items()}
        return found


@contextmanager
def storage_for(
    spec: FineTuneJobSpec, state: StateFolder, endpoint: str | None, force_embedded: bool
) -> Iterator[Where]:
    """Provide the storage of a run while the context lasts.

    Args:
        endpoint: from the command line; overrides ``spec.storage.endpoint``.
        force_embedded: use the embedded server, even if spec or environment name another.
    """
    if force_embedded or uses_embedded(spec, endpoint, os.environ):
        with EmbeddedS3(state.storage) as server:
            for address in (spec.output.destination, spec.effective_workspace):
                server.ensure_bucket(split_uri(address)[0])
            keys = {
                "AWS_ACCESS_KEY_ID": server.access_key,
                "AWS_SECRET_ACCESS_KEY": server.secret_key,
            }
            yield Where(reached_at(spec, server.endpoint, embedded=True), keys, server)
    else:
        yield Where(reached_at(spec, endpoint or spec.storage.endpoint), {}, None)


@contextmanager
def published_store(
    state_dir: Path, endpoint: str | None, force_embedded: bool
) -> Iterator[ObjectStore]:
    """Provide the storage of published models while the context lasts.

    Args:
        endpoint: None: that of the environment, or Amazon S3.
        force_embedded: use the embedded server of the state folder.
    """
    if not force_embedded:
        yield ObjectStore(endpoint)
        return
    with EmbeddedS3(StateFolder(state_dir).storage) as server:
        yield server.store()


def copy_published(store: ObjectStore, uri: str, folder: Path) -> None:
    """Copy a published model out of the embedded storage to plain files: that server ends with the
    command."""
    for info in store.list(f"{uri}/"):
        store.download(info.uri, folder / info.uri.removeprefix(f"{uri}/"))


def uses_embedded(spec: FineTuneJobSpec, endpoint: str | None, environ: Mapping[str, str]) -> bool:
    """Return whether nothing names other storage: no endpoint, no account in the environment."""
    named = endpoint or spec.storage.endpoint
    return not named and not any(environ.get(name) for name in _ACCOUNT)


def reached_at(
    spec: FineTuneJobSpec, endpoint: str | None, *, embedded: bool = False
) -> FineTuneJobSpec:
    """Return the spec with that endpoint and without Secrets: keys come from the environment. The
    embedded server has no keys to encrypt with."""
    raw: dict[str, Any] = spec.to_json()
    blocks = [raw["storage"]]
    sources = [raw["model"], *(s for part in DATA_LISTS
                               for s in raw["data"].get(part, ()))]  # fmt: skip
    blocks += [source["storage"] for source in sources if "storage" in source]
    for block in blocks:
        block.pop("secretRef", None)
        block.pop("serviceAccountName", None)
    raw["storage"].pop("endpoint", None)
    if embedded:
        raw["storage"].pop("encryption", None)
    if endpoint is not None:
        raw["storage"]["endpoint"] = endpoint
    return parse_spec(raw)
