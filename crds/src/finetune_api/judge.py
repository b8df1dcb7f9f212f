"""``spec.evaluation.judge``: a model that compares answers of the tuned and the base model, and
what it said."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from finetune_api.base import Count, DnsName, Model, Record, Spelling, Text, Word
from finetune_api.base import NonNegativeCount as Number
from finetune_api.tasks import MetricKind

WIN_RATE: Final = "WinRate"
"""Metric of the judge: mean over samples of 1 where it prefers the tuned model's answer, 0 where it
prefers the base model's, and 1/2 for neither, each the mean of both orders of the answers."""
WIN_RATE_KIND: Final = MetricKind("Scores", default=False, relative=True)
_HOST: Final = r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?"
_NEAR: Final = (
    r"(localhost|127\.0\.0\.1|[a-z0-9]([a-z0-9-]*[a-z0-9])?\.[a-z0-9]([a-z0-9-]*[a-z0-9])?\.svc"
    r"(\.cluster\.local)?)"
)
"""Hosts to which no network outside of the machine or the cluster leads."""
JudgeEndpoint = Annotated[
    str,
    Spelling(
        rf"^(https://{_HOST}|http://{_NEAR})(:[0-9]+)?(/[A-Za-z0-9._~-]+)*/?$",
        "the address of an OpenAI-compatible API, without credentials and query:"
        " https://judge.example.com/v1; http only for services of the cluster"
        " (http://judge.models.svc/v1) and localhost",
        max_length=512,
    ),
]


class JudgeSecretReference(Model):
    """A Secret in the job's namespace."""

    name: DnsName
    """Name of the Secret. Its key API_KEY is sent as bearer token. Only the pod of publish gets it,
    by reference; the operator never reads it."""


class Judge(Model):
    """A judge model behind an OpenAI-compatible API (chat completions). Prompts, references and
    answers of test samples are sent to it."""

    endpoint: JudgeEndpoint
    """Address of the API; `/chat/completions` is appended. The platform limits it by the chart's
    `admission.judgeEndpoints`. Redirects are not followed."""
    model: Annotated[str, Field(min_length=1, max_length=256)]
    """Name of the model there."""
    rubric: Text = (
        "Which answer is more helpful and more correct? Length, style and confidence do not count."
        " Where there is a reference, it is a correct answer."
    )
    """What makes an answer the better one."""
    secret_ref: JudgeSecretReference | None = None
    """Secret with the key of the API. Absent: no key is sent."""
    max_samples: Count = 100
    """Maximum number of samples per test set that are judged, two requests each: the first ones."""
    max_reply_tokens: Annotated[int, Field(ge=8, le=16384)] = 512
    """Maximum length of a reply, in tokens."""
    timeout_seconds: Annotated[int, Field(ge=1, le=600)] = 60
    """Time for one try of a request. Tries that end with 429, 5xx or no reply are repeated up to
    four times, after Retry-After or with growing pauses."""
    concurrency: Annotated[int, Field(ge=1, le=32)] = 4
    """Requests at the same time."""


class JudgedSet(Record):
    """What the judge said about one test set."""

    data_set: Word
    """Name of the set."""
    samples: Number
    """Samples with a score."""
    wins: Number
    """Samples whose score is above 1/2: the tuned model's answer is preferred."""
    ties: Number
    """Samples whose score is 1/2: neither, or another one in each order."""
    losses: Number
    """Samples whose score is below 1/2."""
    equal: Number
    """Of the ties, samples to which both models gave the same answer; the judge was not asked."""
    agreed: Number
    """Samples for which the judge said the same in both orders of the answers."""
    unreadable: Number = 0
    """Replies without a verdict, whose samples have no score."""
    unanswered: Number = 0
    """Requests without a reply, whose samples have no score."""

    @property
    def agreement(self) -> float | None:
        """Share of the samples for which both orders gave the same verdict; None: none was
        asked."""
        asked = self.samples - self.equal
        return self.agreed / asked if asked else None


class JudgeResult(Record):
    """What the judge said, and what it cost."""

    model: str
    """Name of the model."""
    sets: list[JudgedSet]
    """One for each judged set."""
    requests: Number
    """Requests that were answered."""
    prompt_tokens: Number
    """Tokens that were sent, as the API counts them."""
    reply_tokens: Number
    """Tokens of the replies, as the API counts them."""
