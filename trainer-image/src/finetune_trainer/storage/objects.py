"""Object storage of a run: the server of each source and of the run itself.

``Stores`` creates ``ObjectStore``s from a run spec and the environment; ``check_conditions``
verifies that a server can hold a run's HEAD.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping

from finetune_api.names import storage_env
from finetune_api.run_spec import RunSpec
from finetune_api.sources import StorageAccess
from finetune_trainer.failures import StorageDenied, UserError
from finetune_trainer.storage.objectinfo import (
    Credentials,
    FileInfo,
    ObjectInfo,
    ObjectNotFound,
    PreconditionFailed,
    file_info,
    split_uri,
)
from finetune_trainer.storage.objectstore import ObjectStore

__all__ = [
    "Credentials",
    "FileInfo",
    "ObjectInfo",
    "ObjectNotFound",
    "ObjectStore",
    "PreconditionFailed",
    "Stores",
    "check_conditions",
    "file_info",
    "split_uri",
]


class Stores:
    """The object stores of a run, one per storage profile of its run spec.

    Keys come from the environment (``names.storage_env``); a profile without keys uses boto3's
    credential chain.

    Raises (at the first use of a store):
        StorageDenied: 'IncompleteCredentials' if the profile's Secret, or half of a key pair, is
            missing from the environment.
    """

    def __init__(self, run_spec: RunSpec, environ: Mapping[str, str] = os.environ) -> None:
        self._run_spec = run_spec
        self._environ = environ
        self._made: dict[int, ObjectStore] = {}

    def hub_token(self, access: StorageAccess | None) -> str | None:
        """Return the Hugging Face hub token of a source's ``storage`` block."""
        profile = self._run_spec.profile_of(access)
        return self._environ.get(storage_env(profile, "HF_TOKEN")) or None

    def of(self, access: StorageAccess | None) -> ObjectStore:
        """Return the store of a source's ``storage`` block; for None, that of ``spec.storage``."""
        profile = self._run_spec.profile_of(access)
        if profile not in self._made:
            self._made[profile] = self._make(profile)
        return self._made[profile]

    @property
    def default(self) -> ObjectStore:
        """The store of ``spec.storage``."""
        return self.of(None)

    def _make(self, profile: int) -> ObjectStore:
        access = self._run_spec.storage_profiles[profile]
        own = self._run_spec.spec.storage if profile == 0 else None  # the only one written to
        return ObjectStore(
            access.endpoint,
            access.region,
            self._credentials(profile, access),
            own.encryption if own else None,
        )

    def _credentials(self, profile: int, access: StorageAccess) -> Credentials | None:
        def value(key: str) -> str | None:
            return self._environ.get(storage_env(profile, key)) or None

        source = f"Secret {access.secret_ref.name}" if access.secret_ref else "the environment"
        access_key, secret_key = value("AWS_ACCESS_KEY_ID"), value("AWS_SECRET_ACCESS_KEY")
        if access_key and secret_key:
            return Credentials(access_key, secret_key, value("AWS_SESSION_TOKEN"), source)
        if access_key or secret_key or access.secret_ref:
            missing = "AWS_SECRET_ACCESS_KEY" if access_key else "AWS_ACCESS_KEY_ID"
            raise StorageDenied(
                "IncompleteCredentials",
                f"{source} gives no {missing} (storage profile {profile}, endpoint"
                f" {access.endpoint or 'Amazon S3'}); it must hold AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY",
            )
        return None


def check_conditions(store: ObjectStore, prefix_uri: str) -> None:
    """Check with a probe object that the server honours conditional writes.

    Without them two attempts could both own a run.

    Raises:
        UserError: 'StoreIgnoresConditions'.
    """
    probe = f"{prefix_uri.rstrip('/')}/.conditions-{secrets.token_hex(8)}"
    try:
        etag = store.put(probe, b"1", if_absent=True)
        honoured = _refused(store, probe, if_absent=True)
        if honoured:
            store.put(probe, b"2", if_match=etag)
            honoured = _refused(store, probe, if_match=etag)
    finally:
        store.delete([probe])
    if not honoured:
        raise UserError(
            "StoreIgnoresConditions",
            f"{store.endpoint or 'Amazon S3'} ignores If-Match or If-None-Match when it writes"
            f" {probe}: checkpoints would not be safe there. Put spec.storage.workspace on a server"
            " that honours conditional writes (Amazon S3, SeaweedFS, MinIO, Ceph, versitygw, in"
            " versions of 2025 or later)",
        )


def _refused(
    store: ObjectStore, uri: str, *, if_match: str | None = None, if_absent: bool = False
) -> bool:
    try:
        store.put(uri, b"x", if_match=if_match, if_absent=if_absent)
    except PreconditionFailed:
        return True
    return False
