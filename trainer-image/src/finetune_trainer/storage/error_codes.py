"""Error codes of S3 servers, and the failure that each of them means."""

from __future__ import annotations

from typing import Final

from finetune_trainer.failures import StorageDenied, StorageUnavailable, TrainerError

DENIED_CODES: Final = {
    *("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
    *("InvalidToken", "AllAccessDisabled", "AccountProblem", "401", "403"),
}
EXPIRED_CODES: Final = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
WRONG_REGION_CODES: Final = {"AuthorizationHeaderMalformed", "PermanentRedirect", "301"}
OVERLOAD_CODES: Final = {
    *("SlowDown", "RequestTimeout", "Throttling", "TooManyRequests", "429"),
    *("InternalError", "ServiceUnavailable", "500", "502", "503", "504"),
}
RANGE_CODES: Final = {"InvalidRange", "416"}
CONFLICT_CODES: Final = {"PreconditionFailed", "ConditionalRequestConflict", "412"}


def refusal(code: str, tried: str, verb: str, keys_from: str) -> TrainerError:
    """Return the exception for a request that the server refused, with what to do.

    Args:
        code: error code, or HTTP status.
        tried: the request, with the server's message.
        verb: read, write, list or delete.
        keys_from: origin of the access keys.
    """
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
    if code in OVERLOAD_CODES:
        return StorageUnavailable("StorageOverloaded", tried)
    if code == "NoSuchUpload":  # for example, aborted by a newer attempt's sweep
        return StorageUnavailable("UploadGone", f"{tried}. Another process ended the upload")
    return TrainerError("StorageRefused", tried)
