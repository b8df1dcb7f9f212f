"""Scores of the tuned model's answers by the judge (``evaluation.judge``), beside the base model's.

    MeasuredSet ──► pairs of answers ──(both orders)──► JudgeClient ──► WinRate of Base and Tuned
                                                             └──► judgements/<set>.json ──► next try

Publish asks, as it holds no GPU. A set that is judged is not judged again by a later try of
publish, as long as nothing has changed that the judge sees.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Final

from finetune_api.evaluation_results import BASE, TUNED
from finetune_api.judge import WIN_RATE, Judge, JudgedSet, JudgeResult
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.evaluate.judge import (
    EQUAL,
    Judgement,
    Pair,
    counts_of,
    messages_of,
    verdict_of,
)
from finetune_trainer.evaluate.table import Answered
from finetune_trainer.failures import UserError
from finetune_trainer.personal import redacted
from finetune_trainer.publish.judge_client import JudgeClient, Reply
from finetune_trainer.publish.measured_sets import MeasuredSet
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.runfiles import SetJudgements

log = logging.getLogger(__name__)
FEWEST: Final = 0.5
"""Share of the samples that must have a score."""
Ask = Callable[[list[dict[str, str]]], Reply | None]


@dataclass(frozen=True)
class Judging:
    """The judge of a run, and where its judgements are kept."""

    judge: Judge
    ask: Ask
    store: ObjectStore
    run_uri: str
    redact: bool
    """Whether personal data is replaced in what is sent."""

    @classmethod
    def of(cls, spec: FineTuneJobSpec, store: ObjectStore, run_uri: str) -> Judging | None:
        """The judge of a spec; None: there is none."""
        judge = spec.evaluation.judge
        if judge is None:
            return None
        redact = spec.data.quality.personal_data != "Ignore"
        return cls(judge, JudgeClient.of(judge).ask, store, run_uri, redact)

    def __call__(self, sets: Sequence[MeasuredSet]) -> tuple[list[MeasuredSet], JudgeResult]:
        """Return the sets with the judge's scores, and what it said.

        Raises:
            UserError: 'JudgeFailed', see ``JudgeClient.ask``; or more than half of the samples of a
                set have no score.
        """
        judged = [self._judged(each) if WIN_RATE in each.metrics else None for each in sets]
        found = [each for each in judged if each is not None]
        result = JudgeResult(
            model=self.judge.model,
            sets=[each.said for each in found],
            requests=sum(each.requests for each in found),
            prompt_tokens=sum(each.prompt_tokens for each in found),
            reply_tokens=sum(each.reply_tokens for each in found),
        )
        pairs = zip(sets, judged, strict=True)
        return [_with_scores(each, one.scores) if one else each for each, one in pairs], result

    def _judged(self, found: MeasuredSet) -> SetJudgements:
        pairs = pairs_of(found, self.judge.max_samples, self.redact)
        digest = _digest(self.judge, pairs)
        known = runfiles.read_judgements(self.store, self.run_uri, found.name)
        if known is not None and known.digest == digest:
            return known
        log.info("the judge %s compares %d answers of %s", self.judge.model, len(pairs), found.name)
        made = judge_pairs(self.judge, self.ask, found.name, pairs).model_copy(
            update={"digest": digest}
        )
        runfiles.write_judgements(self.store, self.run_uri, found.name, made)
        return made


def pairs_of(found: MeasuredSet, most: int, redact: bool) -> list[Pair]:
    """The first samples of a set, with the answers of the base and the tuned model.

    Args:
        most: samples.
        redact: replace personal data.
    """

    def clean(text: str) -> str:
        whole = redacted(text) if redact else text
        return whole.encode("utf-8", "replace").decode()  # of JSON, half a surrogate pair

    return [
        Pair(
            prompt=clean(found.references[number].prompt),
            reference=clean(found.references[number].completion),
            base=clean(base),
            tuned=clean(tuned),
        )
        for number, (base, tuned) in list(_answers(found).items())[:most]
    ]


def judge_pairs(judge: Judge, ask: Ask, name: str, pairs: Sequence[Pair]) -> SetJudgements:
    """Ask the judge about all pairs in both orders, and count what it says.

    Args:
        name: of the set.

    Raises:
        UserError: 'JudgeFailed'.
    """
    differ = [pair for pair in pairs if pair.base.strip() != pair.tuned.strip()]
    chats = [
        messages_of(pair, judge.rubric, secrets.token_hex(8), tuned_first=tuned_first)
        for pair in differ
        for tuned_first in (False, True)
    ]
    with ThreadPoolExecutor(judge.concurrency) as pool:
        try:
            replies = list(pool.map(ask, chats))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    verdicts = [verdict_of(reply.text or "") if reply else None for reply in replies]
    asked = map(Judgement, verdicts[::2], verdicts[1::2])
    judgements = [
        EQUAL if pair.base.strip() == pair.tuned.strip() else next(asked) for pair in pairs
    ]
    scores = [each.score for each in judgements]
    answered = [reply for reply in replies if reply is not None]
    equal = len(pairs) - len(differ)
    said = JudgedSet(
        data_set=name,
        **counts_of(scores),
        equal=equal,
        agreed=sum(each.agrees for each in judgements) - equal,
        unreadable=sum(verdict_of(reply.text or "") is None for reply in answered),
        unanswered=len(replies) - len(answered),
    )
    if said.samples < FEWEST * len(pairs):
        raise UserError(
            "JudgeFailed",
            f"spec.evaluation.judge: {judge.model} gave verdicts in both orders on {said.samples}"
            f" of {len(pairs)} samples of {name} ({said.unreadable} replies without a verdict,"
            f" {said.unanswered} requests without a reply); take a model that follows instructions,"
            " or raise maxReplyTokens: a run that has trained goes on with publish",
        )
    return SetJudgements(
        digest="",
        said=said,
        scores=scores,
        requests=len(answered),
        prompt_tokens=sum(reply.prompt_tokens for reply in answered),
        reply_tokens=sum(reply.reply_tokens for reply in answered),
    )


def _answers(found: MeasuredSet) -> dict[int, tuple[str, str]]:
    """Answers of the base and the tuned model by number of the sample, where both have answered."""
    base, tuned = (
        dict(zip(row.samples, row.answers, strict=True))
        for wanted in (BASE, TUNED)
        for row in found.answered
        if row.row == wanted
    )
    return {number: (base[number], said) for number, said in tuned.items() if number in base}


def _with_scores(found: MeasuredSet, scores: Sequence[float | None]) -> MeasuredSet:
    """The set with a score of 1/2 for each judged answer of the base model, and those of the tuned
    one."""
    by_sample = dict(zip(_answers(found), scores, strict=False))

    def scored(row: Answered) -> Answered:
        if row.row not in (BASE, TUNED) or not by_sample:
            return row
        own = [by_sample.get(number) for number in row.samples]
        if row.row == BASE:
            own = [None if score is None else 0.5 for score in own]
        return replace(row, scores={**row.scores, WIN_RATE: own})

    return replace(found, answered=[scored(row) for row in found.answered])


def _digest(judge: Judge, pairs: Sequence[Pair]) -> str:
    """Digest of what decides the judgements."""
    told = [judge.endpoint, judge.model, judge.rubric, judge.max_reply_tokens]
    text = json.dumps([*told, *map(asdict, pairs)])
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
