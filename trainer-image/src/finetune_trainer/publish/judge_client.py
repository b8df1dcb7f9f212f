"""Requests to the judge: the chat completions of an OpenAI-compatible API, with bounds on time,
size and number of tries. No other module sends data to servers besides object storage."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import Any, Final, NamedTuple

import urllib3
from urllib3.exceptions import HTTPError

from finetune_api.judge import Judge
from finetune_api.names import ENV_JUDGE_KEY
from finetune_trainer.failures import UserError, printable
from finetune_trainer.liveness import progressed

log = logging.getLogger(__name__)

TRIES: Final = 5
MOST_FAILURES: Final = 8
"""Requests in a row without a reply after which no more are made."""
MOST_BYTES: Final = 1 << 20
"""Bytes of a reply that are read."""
_CONNECT_SECONDS: Final = 10.0
_LONGEST_PAUSE: Final = 60
"""Seconds between two tries, at most, whatever Retry-After says."""
_OVERLOADED: Final = frozenset({408, 429, 500, 502, 503, 504, 529})
_NOT_THIS: Final = frozenset({400, 413, 422})
"""The API refuses one request, as where it is longer than the judge's context."""
_EXCERPT: Final = 200


class Reply(NamedTuple):
    """Reply to a request."""

    text: str | None
    """What the judge said; None: the API's answer has no text."""
    prompt_tokens: int
    reply_tokens: int


class JudgeClient:
    """Asks the judge. Thread-safe."""

    def __init__(self, judge: Judge, key: str | None, backoff: float = 1.0) -> None:
        """
        Args:
            key: of the API; None: none is sent.
            backoff: seconds of the first pause between tries, which then doubles.
        """
        self._judge = judge
        self._key = key
        self._uri = f"{judge.endpoint.rstrip('/')}/chat/completions"
        self._pool = urllib3.PoolManager(maxsize=judge.concurrency)
        self._retries = urllib3.Retry(
            total=TRIES - 1, redirect=False, allowed_methods=None, status_forcelist=_OVERLOADED,
            backoff_factor=backoff, backoff_max=_LONGEST_PAUSE, backoff_jitter=backoff / 2,
            respect_retry_after_header=True, retry_after_max=_LONGEST_PAUSE, raise_on_status=False,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._failures = 0

    @classmethod
    def of(cls, judge: Judge) -> JudgeClient:
        """A client with the key of the environment."""
        return cls(judge, (os.environ.get(ENV_JUDGE_KEY) or "").strip() or None)

    def ask(self, messages: list[dict[str, str]]) -> Reply | None:
        """Send a chat and return the reply; None: there was none, after all tries.

        Raises:
            UserError: 'JudgeFailed': the API refuses the request (no such model, no access, a
                redirect), or MOST_FAILURES requests in a row had no reply.
        """
        progressed()
        try:
            status, body = self._post(messages)
        except (HTTPError, OSError) as error:
            self._unanswered(f"{type(error).__name__}: {error}")
            return None
        if status in _OVERLOADED | _NOT_THIS:
            self._unanswered(f"status {status}: {self._excerpt(body)}")
            return None
        if status != 200:
            what = "a redirect, which is not followed" if 300 <= status < 400 else "refused"
            raise self._failed(f"{what}: status {status}: {self._excerpt(body)}")
        with self._lock:
            self._failures = 0
        return _reply(body)

    def _post(self, messages: list[dict[str, str]]) -> tuple[int, bytes]:
        """Return status and body.

        Raises:
            HTTPError, OSError: no reply, or none in time.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = {
            "model": self._judge.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self._judge.max_reply_tokens,
        }
        response = self._pool.request(
            "POST", self._uri, body=json.dumps(request).encode(), headers=headers,
            retries=self._retries, redirect=False, preload_content=False,
            timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=self._judge.timeout_seconds),
        )  # fmt: skip
        # A server that sends byte by byte would never run into the timeout of a read.
        deadline = time.monotonic() + self._judge.timeout_seconds
        body = b""
        try:
            for part in response.stream(1 << 14):
                body += part
                if len(body) > MOST_BYTES:
                    raise OSError(f"the reply has more than {MOST_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise OSError(f"the reply took more than {self._judge.timeout_seconds} s")
        except BaseException:
            response.close()
            raise
        response.release_conn()
        return response.status, body

    def _unanswered(self, why: str) -> None:
        why = self._without_key(printable(why))
        log.warning("the judge at %s did not reply: %s", self._uri, why)
        with self._lock:
            self._failures += 1
            if self._failures >= MOST_FAILURES:
                raise self._failed(f"no reply to {self._failures} requests in a row: {why}")

    def _failed(self, why: str) -> UserError:
        return UserError(
            "JudgeFailed",
            f"spec.evaluation.judge: {self._uri}, model {self._judge.model}: {why}. Check endpoint,"
            " model, the Secret of secretRef (key API_KEY), and networkPolicy.egress of the chart:"
            " a run that has trained goes on with publish",
        )

    def _excerpt(self, body: bytes) -> str:
        text = self._without_key(body[:MOST_BYTES].decode("utf-8", "replace"))
        return printable(" ".join(text.split())[:_EXCERPT])

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _reply(body: bytes) -> Reply:
    try:
        raw: Any = json.loads(body)
        text = raw["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return Reply(None, 0, 0)
    used = raw.get("usage")
    counts = [
        count if isinstance(count, int) and 0 <= count < 1 << 40 else 0
        for key in ("prompt_tokens", "completion_tokens")
        for count in [used.get(key) if isinstance(used, dict) else 0]
    ]
    return Reply(text if isinstance(text, str) else None, *counts)
