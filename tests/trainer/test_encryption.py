"""Server-side encryption of what is written: the headers on the wire before a real server, and what
the server's refusals become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api.encryption import Encryption
from finetune_api.names import storage_env
from finetune_trainer.failures import StorageDenied, StorageUnavailable, TrainerError, UserError
from finetune_trainer.storage import objectstore
from finetune_trainer.storage.error_codes import refusal
from finetune_trainer.storage.objects import Credentials, ObjectStore, Stores
from finetune_trainer.storage.s3server import EmbeddedS3
from trainer.recording_proxy import Request, recording

PREFIX = "x-amz-server-side-encryption"
KEY = "arn:aws:kms:us-east-1:111122223333:key/1a-2b"
TYPES = [
    ({"type": "S3"}, {"": "AES256"}),
    ({"type": "KMS"}, {"": "aws:kms"}),
    (
        {"type": "KMS", "kmsKeyId": KEY, "bucketKey": True},
        {"": "aws:kms", "-aws-kms-key-id": KEY, "-bucket-key-enabled": "true"},
    ),
    ({"type": "KMS", "bucketKey": False}, {"": "aws:kms", "-bucket-key-enabled": "false"}),
]


def asked(request: Request) -> dict[str, str]:
    """What a request asks for about encryption."""
    return {
        name.removeprefix(PREFIX): value
        for name, value in request.headers.items()
        if name.startswith(PREFIX)
    }


def write_all(store: ObjectStore, root: str, path: Path) -> list[str]:
    """Write by every method of the store; return the failures' reasons."""
    path.write_bytes(bytes(6 << 20))

    def multipart() -> None:
        upload = store.begin_parts(f"{root}/d")
        store.join_parts(f"{root}/d", upload, [store.put_part(f"{root}/d", upload, 1, b"d")], 1)

    found = []
    for write in (
        lambda: store.put(f"{root}/a", b"a"),
        lambda: store.put(f"{root}/b", b"b", if_absent=True),
        lambda: store.upload(path, f"{root}/c"),
        multipart,
    ):
        try:
            write()
        except TrainerError as error:
            found.append(error.reason)
    return found


@pytest.mark.parametrize(("spec", "headers"), TYPES)
def test_every_write_asks_for_the_encryption(
    s3: EmbeddedS3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    spec: dict[str, Any], headers: dict[str, str],
) -> None:  # fmt: skip
    small = objectstore.TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)
    monkeypatch.setattr(objectstore, "TRANSFER", small)
    keys = Credentials(s3.access_key, s3.secret_key)
    with recording(s3.endpoint) as (endpoint, requests):
        store = ObjectStore(endpoint, "us-east-1", keys, Encryption.model_validate(spec))
        reasons = write_all(store, f"s3://{bucket}", tmp_path / "file")
    begun = [r for r in requests if r.line.startswith(("PUT", "POST")) and "uploadId" not in r.line]
    assert len(begun) >= 4 and all(asked(r) == headers for r in begun), begun
    parts = [r for r in requests if "uploadId" in r.line]
    assert not any(asked(r) for r in parts)
    if spec["type"] == "S3":
        assert not reasons and s3.store().get(f"s3://{bucket}/a") == b"a"
        assert len(parts) == 5  # two parts and one, and each upload completed
    else:
        assert reasons == ["EncryptionNotSupported"] * 4


def test_only_the_jobs_own_storage_asks_for_it(s3: EmbeddedS3, run_spec_for: Any) -> None:
    run_spec = run_spec_for(
        storage={"endpoint": s3.endpoint, "encryption": {"type": "S3"}},
        model={"source": "s3://models/a", "storage": {"endpoint": "http://other"}},
    )
    environ = {
        storage_env(profile, key): "x"
        for profile in range(2)
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }
    stores = Stores(run_spec, environ)
    own, other = stores.default, stores.of(run_spec.spec.model.storage)
    assert own._encryption is not None and other._encryption is None


@pytest.mark.parametrize(
    ("code", "verb", "text", "kind", "reason"),
    [
        ("AccessDenied", "write", "not authorized to perform: kms:GenerateDataKey", StorageDenied,
         "EncryptionKeyDenied"),
        ("AccessDenied", "read", "not authorized to perform: kms:Decrypt on the resource",
         StorageDenied, "EncryptionKeyDenied"),
        ("AccessDenied", "write", "Access Denied", StorageDenied, "AccessDenied"),
        ("KMS.NotFoundException", "write", "Key does not exist", StorageDenied,
         "EncryptionKeyDenied"),
        ("KMS.DisabledException", "read", "is disabled", StorageDenied, "EncryptionKeyDenied"),
        ("KMS.ThrottlingException", "write", "Rate exceeded", StorageUnavailable,
         "StorageOverloaded"),
        ("NotImplemented", "write", "not implemented", UserError, "EncryptionNotSupported"),
        ("NotImplemented", "read", "not implemented", TrainerError, "StorageRefused"),
    ],
)  # fmt: skip
def test_refusals_name_the_key_and_what_to_do(
    code: str, verb: str, text: str, kind: type[TrainerError], reason: str
) -> None:
    encryption = Encryption.model_validate({"type": "KMS", "kmsKeyId": KEY})
    tried = f"cannot {verb} s3://b/k at Amazon S3: {text}"
    error = refusal(code, tried, verb, "Secret s3-credentials", encryption)
    assert type(error) is kind and error.reason == reason and tried in error.message
    if reason == "EncryptionKeyDenied":
        assert KEY in error.message and "kms:GenerateDataKey and kms:Decrypt" in error.message
