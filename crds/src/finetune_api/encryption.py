"""``storage.encryption``: encryption at rest of what a job writes to object storage."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from finetune_api.base import Model, Rule, Spelling

KeyId = Annotated[
    str,
    Spelling(
        r"^[a-zA-Z0-9][a-zA-Z0-9:/_.-]*$",
        "a key id, an alias (alias/training) or an ARN (arn:aws:kms:region:account:key/id)",
        max_length=2048,
    ),
]


class Encryption(Model):
    """Server-side encryption of every object that the job writes: prepared data, checkpoints and
    models."""

    type: Literal["S3", "KMS"]
    """Who manages the key. S3: the storage server (SSE-S3, AES-256). KMS: the server's key
    management service (SSE-KMS); the job's credentials then need kms:GenerateDataKey and
    kms:Decrypt on the key."""
    kms_key_id: KeyId | None = None
    """Key for type KMS: its id, alias or ARN. Absent: the service's default key for object
    storage."""
    bucket_key: bool | None = None
    """For type KMS: whether the server derives keys of objects from a key of the bucket, which
    needs far fewer requests to the key service. Absent: as the bucket is configured."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.type == 'KMS' || !(has(self.kmsKeyId) || has(self.bucketKey))",
            "kmsKeyId and bucketKey need type: KMS; with type: S3 the server manages the keys",
            lambda e: e.type == "KMS" or (e.kms_key_id is None and e.bucket_key is None),
            ("type",),
        ),
    )
