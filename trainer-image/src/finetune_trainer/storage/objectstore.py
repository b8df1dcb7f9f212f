"""Client of an object storage server: the only module that uses boto3.

An ``ObjectStore`` serves one storage profile (endpoint, region, keys) and takes ``s3://bucket/key``
addresses. All server and network errors are translated here to exceptions of ``failures``, with the
address and what to check. Import it from ``objects``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Final

import boto3
import botocore.exceptions as errors
import botocore.session
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore import UNSIGNED
from botocore.config import Config

from finetune_api.encryption import Encryption
from finetune_trainer.failures import (
    StorageDenied,
    StorageUnavailable,
    TrainerError,
    UserError,
    object_changed,
)
from finetune_trainer.liveness import progressed
from finetune_trainer.storage.error_codes import (
    CONFLICT_CODES,
    OVERLOAD_CODES,
    RANGE_CODES,
    refusal,
)
from finetune_trainer.storage.objectinfo import (
    BeyondTheEnd,
    Credentials,
    FileInfo,
    ObjectInfo,
    ObjectNotFound,
    PreconditionFailed,
    file_info,
    split_uri,
)
from finetune_trainer.storage.objectstream import MemoryFile, Opened, open_stream

# An unreachable endpoint is reported after 4 tries of 5 s and their backoff: under 30 s.
CONNECT_SECONDS: Final = 5
READ_SECONDS: Final = 60
TRIES: Final = 4
TRANSFER: Final = TransferConfig(
    multipart_threshold=16 << 20, multipart_chunksize=16 << 20, max_concurrency=8
)
ALGORITHMS: Final = {"S3": "AES256", "KMS": "aws:kms"}
"""S3's names of ``storage.encryption.type``."""
DELETE_BATCH: Final = 1000
"""S3's limit of keys per DeleteObjects request."""


@cache
def _service_descriptions() -> Any:
    """Return botocore's loader of the S3 API description, shared because parsing takes 0.2 s."""
    return botocore.session.Session().get_component("data_loader")


class ObjectStore:
    """Client of one storage profile. Thread-safe.

    Besides the documented exceptions, every method raises StorageDenied (credentials, permissions,
    missing bucket) and StorageUnavailable (no response or overload, after bounded retries).

    Args:
        endpoint: URL of an S3-compatible server; None: Amazon S3.
        region: region that requests are signed for.
        credentials: keys; None: boto3's credential chain (web identity, instance role), or
            anonymous access if the chain finds none.
        encryption: of what is written; None: as the bucket is configured.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        region: str = "us-east-1",
        credentials: Credentials | None = None,
        encryption: Encryption | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._encryption = encryption
        self._keys_from = credentials.source if credentials else "the pod's identity"
        own = botocore.session.Session()
        own.register_component("data_loader", _service_descriptions())
        session = boto3.Session(
            botocore_session=own,
            aws_access_key_id=credentials and credentials.access_key,
            aws_secret_access_key=credentials and credentials.secret_key,
            aws_session_token=credentials and credentials.session_token,
            region_name=region,
        )
        # Some S3-compatible servers reject checksums in trailers; our own sha256 is end to end.
        checksums = "when_required" if endpoint else "when_supported"
        config = Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"mode": "standard", "total_max_attempts": TRIES},
            max_pool_connections=32,
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
            s3={"addressing_style": "path"} if endpoint else {},
        )
        if session.get_credentials() is None:
            self._keys_from = "anonymous access (no credentials were given)"
            config = config.merge(Config(signature_version=UNSIGNED))
        self._client = session.client("s3", endpoint_url=endpoint, config=config)
        _encrypt(self._client, encryption)

    # --- whole objects -----------------------------------------------------------------------

    def get(self, uri: str) -> bytes:
        """Return the object's bytes.

        Raises:
            ObjectNotFound: the object does not exist.
        """
        return self.get_tagged(uri)[0]

    def get_tagged(self, uri: str) -> tuple[bytes, str]:
        """Return the object's bytes and ETag; raise as ``get``."""
        with self._asking("read", uri) as at:
            answer = self._client.get_object(**at)
            return answer["Body"].read(), answer["ETag"]

    def put(
        self,
        uri: str,
        data: bytes | memoryview,
        *,
        if_match: str | None = None,
        if_absent: bool = False,
    ) -> str:
        """Write an object and return its ETag.

        Args:
            if_match: ETag that the object must have now.
            if_absent: the object must not exist now.

        Raises:
            PreconditionFailed: the condition does not hold. Requests are retried, so an earlier try
                of this put may have invalidated the condition: read the object back to find out.
        """
        condition = {"IfMatch": if_match} if if_match else {}
        if if_absent:
            condition["IfNoneMatch"] = "*"
        try:
            with self._asking("write", uri) as at:
                return str(self._client.put_object(**at, Body=_body(data), **condition)["ETag"])
        except ObjectNotFound:  # If-Match on a missing object
            raise PreconditionFailed(uri) from None

    def head(self, uri: str) -> ObjectInfo | None:
        """Return size and ETag, or None if the object does not exist."""
        try:
            with self._asking("look up", uri) as at:
                answer = self._client.head_object(**at)
        except ObjectNotFound:
            return None
        return ObjectInfo(uri, answer["ContentLength"], answer["ETag"])

    def list(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        """Yield every object whose address begins with ``prefix_uri``, in the order of keys. End
        the prefix of a folder with '/'."""
        bucket, prefix = split_uri(prefix_uri)
        with self._asking("list", prefix_uri):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=bucket, Prefix=prefix):
                for item in page.get("Contents", ()):
                    yield ObjectInfo(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"])

    def delete(self, uris: Iterable[str]) -> None:
        """Remove objects; missing ones are ignored."""
        keys: dict[str, list[str]] = {}
        for bucket, key in map(split_uri, uris):
            keys.setdefault(bucket, []).append(key)
        for bucket, named in keys.items():
            for start in range(0, len(named), DELETE_BATCH):
                batch = [{"Key": key} for key in named[start : start + DELETE_BATCH]]
                with self._asking("delete", f"s3://{bucket}/{batch[0]['Key']}"):
                    answer = self._client.delete_objects(
                        Bucket=bucket, Delete={"Objects": batch, "Quiet": True}
                    )
                for fault in answer.get("Errors", ()):
                    uri = f"s3://{bucket}/{fault.get('Key')}"
                    raise self._failure("delete", uri, str(fault.get("Code")), str(fault))

    # --- large objects -----------------------------------------------------------------------

    def read_stream(self, uri: str, *, etag: str | None = None) -> BinaryIO:
        """Return the object as a seekable file that is read lazily and resumes after broken
        connections.

        Args:
            etag: version to read; None: the version found at the first request.

        Raises:
            ObjectNotFound: the object does not exist.
            DataError: 'ObjectChanged', here or from a later read, if the object was replaced.
        """

        def opener(position: int, version: str | None) -> Opened:
            part = {"Range": f"bytes={position}-"} if position else {}
            if version:
                part["IfMatch"] = version
            try:
                with self._asking("read", uri) as at:
                    answer = self._client.get_object(**at, **part)
            except PreconditionFailed:
                raise object_changed(uri) from None
            body = _MappedBody(answer["Body"], self, uri)
            return Opened(body, position + answer["ContentLength"], answer["ETag"])

        return open_stream(opener, etag)

    def download(self, uri: str, path: Path) -> None:
        """Write the object to a file (completely or not at all), in parallel parts.

        Raises:
            ObjectNotFound: the object does not exist.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._asking("read", uri) as at:
            self._client.download_file(
                **at, Filename=str(path), Config=TRANSFER, Callback=_note_progress
            )

    def download_into(self, uri: str, file: BinaryIO) -> None:
        """Write the object to the beginning of an open file, in parallel parts; a failure may leave
        some of them.

        Raises:
            ObjectNotFound: the object does not exist.
        """
        with self._asking("read", uri) as at:
            self._client.download_fileobj(
                **at, Fileobj=file, Config=TRANSFER, Callback=_note_progress
            )

    def upload(self, path: Path, uri: str) -> FileInfo:
        """Write a file to an object, in parallel parts, and hash it meanwhile."""
        with ThreadPoolExecutor(1) as hasher, self._asking("write", uri) as at:
            info = hasher.submit(file_info, path)
            self._client.upload_file(Filename=str(path), **at, Config=TRANSFER)
            return info.result()

    def get_range(self, uri: str, start: int, stop: int, *, etag: str | None = None) -> bytes:
        """Return bytes ``start`` to ``stop`` (exclusive) of an object; fewer if it ends before.

        Args:
            etag: version to read.

        Raises:
            ObjectNotFound: the object does not exist.
            PreconditionFailed: the object has another version.
        """
        if start >= stop:
            return b""
        version = {"IfMatch": etag} if etag else {}
        for left in reversed(range(TRIES)):
            try:
                with self._asking("read", uri) as at:
                    wanted = f"bytes={start}-{stop - 1}"
                    body = self._client.get_object(**at, Range=wanted, **version)["Body"]
            except BeyondTheEnd:
                return b""
            try:
                with self._asking("read", uri):
                    found = bytes(body.read())
                progressed()
                return found
            except StorageUnavailable:  # the connection broke during the transfer
                if not left:
                    raise
        raise AssertionError("the last try returns or raises")

    def begin_parts(self, uri: str) -> str:
        """Start a multipart upload and return its id. The object exists only after
        ``join_parts``."""
        with self._asking("write", uri) as at:
            return str(self._client.create_multipart_upload(**at)["UploadId"])

    def put_part(self, uri: str, upload: str, number: int, data: bytes | memoryview) -> str:
        """Write a part (numbers from 1; at least 5 MiB except the last) and return its ETag."""
        with self._asking("write", uri) as at:
            made = self._client.upload_part(
                **at, UploadId=upload, PartNumber=number, Body=_body(data)
            )
        progressed()
        return str(made["ETag"])

    def join_parts(self, uri: str, upload: str, etags: Iterable[str], size: int) -> None:
        """Complete a multipart upload from its parts' ETags, in the order of part numbers.

        After a lost response the request is repeated, and the server may no longer know the upload:
        an object of ``size`` bytes then counts as success."""
        parts = [{"PartNumber": n, "ETag": etag} for n, etag in enumerate(etags, start=1)]
        with self._asking("write", uri) as at:
            try:
                self._client.complete_multipart_upload(
                    **at, UploadId=upload, MultipartUpload={"Parts": parts}
                )
            except self._client.exceptions.NoSuchUpload:
                found = self.head(uri)
                if found is None or found.size != size:
                    raise

    def drop_parts(self, uri: str, upload: str) -> None:
        """Abort a multipart upload and remove its parts; no object is created."""
        with self._asking("write", uri) as at:
            self._client.abort_multipart_upload(**at, UploadId=upload)

    def open_parts(self, prefix_uri: str) -> Iterator[tuple[str, str]]:
        """Yield unfinished multipart uploads under ``prefix_uri`` as (address, upload id)."""
        with self._asking("list", prefix_uri) as at:
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=at["Bucket"], Prefix=at["Key"]):
                for item in page.get("Uploads", ()):
                    yield f"s3://{at['Bucket']}/{item['Key']}", item["UploadId"]

    def create_bucket(self, bucket: str) -> None:
        """Create a bucket; no error if this account already owns it."""
        with (
            self._asking("create", f"s3://{bucket}/"),
            suppress(self._client.exceptions.BucketAlreadyOwnedByYou),
        ):
            self._client.create_bucket(Bucket=bucket)

    # --- faults ------------------------------------------------------------------------------

    @contextmanager
    def _asking(self, verb: str, uri: str) -> Iterator[dict[str, str]]:
        """Provide the arguments Bucket and Key of a request; translate the errors of its block."""
        bucket, key = split_uri(uri)
        try:
            yield {"Bucket": bucket, "Key": key}
        except S3UploadFailedError as error:
            cause = error.__context__
            if not isinstance(cause, errors.ClientError):
                raise self._unreachable(verb, uri, error) from error
            raise self._failure(verb, uri, _code(cause), str(cause)) from error
        except errors.ClientError as error:
            raise self._failure(verb, uri, _code(error), str(error)) from error
        except (errors.NoCredentialsError, errors.PartialCredentialsError) as error:
            raise self._failure(verb, uri, "AccessDenied", str(error)) from error
        except errors.SSLError as error:
            raise StorageDenied(
                "CertificateNotTrusted", f"cannot {verb} {uri} at {self._place}: {error}"
            ) from error
        except errors.ParamValidationError as error:
            raise UserError("InvalidAddress", f"{uri!r}: {error}") from error
        except (errors.BotoCoreError, ConnectionError) as error:
            raise self._unreachable(verb, uri, error) from error

    def _failure(self, verb: str, uri: str, code: str, text: str) -> TrainerError:
        """Return the exception for a server's error code."""
        bucket, _ = split_uri(uri)
        tried = f"cannot {verb} {uri} at {self._place}: {text}"
        if code in CONFLICT_CODES:
            return PreconditionFailed(uri)
        if code in RANGE_CODES:
            return BeyondTheEnd(uri)
        if code == "NoSuchBucket" or (code == "404" and self._bucket_is_missing(bucket)):
            return StorageDenied(
                "BucketNotFound",
                f"bucket {bucket!r} does not exist at {self._place} (needed for {uri}); create it,"
                " or correct the address or storage.endpoint",
            )
        if code in ("NoSuchKey", "404"):
            return ObjectNotFound(uri)
        return refusal(code, tried, verb, self._keys_from, self._encryption)

    def _bucket_is_missing(self, bucket: str) -> bool:
        """HEAD responds identically for a missing key and a missing bucket: check the bucket."""
        try:
            self._client.head_bucket(Bucket=bucket)
        except errors.ClientError as error:
            return _code(error) == "404"
        except errors.BotoCoreError:
            return False
        return False

    def _unreachable(self, verb: str, uri: str, error: Exception) -> StorageUnavailable:
        return StorageUnavailable(
            "StorageUnreachable",
            f"cannot {verb} {uri}: {self._place} does not answer ({error}); check storage.endpoint"
            " and the network",
        )

    @property
    def _place(self) -> str:
        return self.endpoint or "Amazon S3"


def _encrypt(client: Any, encryption: Encryption | None) -> None:
    """Make a client ask for server-side encryption in every request that creates an object, also in
    those of boto3's transfer manager."""
    if encryption is None:
        return
    asked: dict[str, Any] = {"ServerSideEncryption": ALGORITHMS[encryption.type]}
    if encryption.kms_key_id is not None:
        asked["SSEKMSKeyId"] = encryption.kms_key_id
    if encryption.bucket_key is not None:
        asked["BucketKeyEnabled"] = encryption.bucket_key
    for request in ("PutObject", "CreateMultipartUpload"):
        client.meta.events.register(
            f"provide-client-params.s3.{request}", lambda params, **_: {**params, **asked}
        )


def _note_progress(count: int) -> None:
    progressed()


def _body(data: bytes | memoryview) -> Any:
    """Return a request body for boto3; a memoryview is sent without a copy."""
    return data if isinstance(data, bytes) else MemoryFile(data)


@dataclass(frozen=True)
class _MappedBody:
    """A response body that raises StorageUnavailable on a broken connection."""

    body: Any
    store: ObjectStore
    uri: str

    def read(self, amount: int) -> bytes:
        with self.store._asking("read", self.uri):
            return bytes(self.body.read(amount))

    def close(self) -> None:
        self.body.close()


def _code(error: errors.ClientError) -> str:
    """Return the error code of a response; for overload statuses the status itself, because the
    codes differ between vendors."""
    answer = error.response
    code = str(answer.get("Error", {}).get("Code", ""))
    status = str(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    return status if not code or status in OVERLOAD_CODES else code
