"""Error codes of S3 servers, and the failure that each of them means."""

from __future__ import annotations

from typing import Final

from finetune_api.encryption import Encryption
from finetune_trainer.failures import StorageDenied, StorageUnavailable, TrainerError, UserError

DENIED_CODES: Final = {
    *("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
    *("InvalidToken", "AllAccessDisabled", "AccountProblem", "401", "403"),
}
EXPIRED_CODES: Final = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
WRONG_REGION_CODES: Final = {"AuthorizationHeaderMalformed", "PermanentRedirect", "301"}
OVERLOAD_CODES: Final = {
    *("KMS.ThrottlingException", "KMS.InternalException", "KMS.DependencyTimeoutException"),
    *("SlowDown", "RequestTimeout", "Throttling", "TooManyRequests", "429"),
    *("InternalError", "ServiceUnavailable", "500", "502", "503", "504"),
}
RANGE_CODES: Final = {"InvalidRange", "416"}
CONFLICT_CODES: Final = {"PreconditionFailed", "ConditionalRequestConflict", "412"}


UNSUPPORTED_CODES: Final = {
    *("NotImplemented", "InvalidArgument", "InvalidRequest", "InvalidEncryptionAlgorithmError"),
    *("KMSNotConfigured", "400", "501"),
}
"""What servers without a key service answer to a write that asks for encryption."""


def refusal(
    code: str, tried: str, verb: str, keys_from: str, encryption: Encryption | None = None
) -> TrainerError:
    """Return the exception for a request that the server refused, with what to do.

    Args:
        code: error code, or HTTP status.
        tried: the request, with the server's message.
        verb: read, write, list or delete.
        keys_from: origin of the access keys.
        encryption: what the job asks for when it writes.
    """
    if code in OVERLOAD_CODES:
        return StorageUnavailable("StorageOverloaded", tried)
    if code.startswith(("KMS.", "KMSK", "KMSI")) or (code in DENIED_CODES and "kms:" in tried):
        key = (encryption and encryption.kms_key_id) or "the default key"
        return StorageDenied(
            "EncryptionKeyDenied",
            f"{tried}. The objects are encrypted with a key of the key management service"
            f" (storage.encryption asks for {key}). Check that the key exists, is enabled and is in"
            f" the bucket's region, and that {keys_from} may use kms:GenerateDataKey and"
            " kms:Decrypt with it",
        )
    if code in DENIED_CODES:
        return StorageDenied(
            "AccessDenied",
            f"{tried}. The request was made with {keys_from}; check AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, if they are temporary) there, and"
            f" that they may {verb} under this address",
        )
    if code in WRONG_REGION_CODES:
        return StorageDenied("WrongRegion", f"{tried}. Correct storage.region")
    if code in EXPIRED_CODES:  # a new pod gets a new token, and the current Secret
        return StorageUnavailable(
            "CredentialsExpired",
            f"{tried}. The request was made with {keys_from}; renew the token there",
        )
    if code == "RequestTimeTooSkewed":
        return StorageUnavailable(
            "ClockWrong", f"{tried}. The clock of this node is wrong; another node may be right"
        )
    if code == "NoSuchUpload":  # for example, aborted by a newer attempt's sweep
        return StorageUnavailable("UploadGone", f"{tried}. Another process ended the upload")
    if verb == "write" and encryption is not None and code in UNSUPPORTED_CODES:
        return UserError(
            "EncryptionNotSupported",
            f"{tried}. The job asks for storage.encryption.type {encryption.type}, which this"
            " server may not support: leave storage.encryption out, or use another server",
        )
    return TrainerError("StorageRefused", tried)
