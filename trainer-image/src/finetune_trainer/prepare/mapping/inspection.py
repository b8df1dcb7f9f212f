"""What is done about personal data in drafts: it is counted, redacted, or ends the job."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from finetune_trainer.failures import DataError
from finetune_trainer.prepare.quality.personal import IN_WORDS, scan
from finetune_trainer.prepare.rendering.drafts import Draft


def inspect(draft: Draft, policy: str, *, own_group: bool) -> Draft:
    """The draft with the kinds that its parts hold; under Redact, without their values.

    Args:
        own_group: whether the group is the draft's own prompt, which is redacted with it: prompts
            that have become equal stay on one side of the split.

    Raises:
        DataError: 'PersonalData' under policy Fail, naming record and kind.
    """
    if policy == "Ignore":
        return draft
    scanned = [scan(part.text) for part in draft.parts]
    found: Counter[str] = sum((kinds for _, kinds in scanned), Counter())
    if not found:
        return draft
    if policy == "Fail":
        raise _refusal(draft, [kinds for _, kinds in scanned])
    if policy == "Warn":
        return replace(draft, personal=found)
    parts = tuple(
        part._replace(text=text) for part, (text, _) in zip(draft.parts, scanned, strict=True)
    )
    return replace(
        draft,
        parts=parts,
        prompt="".join(part.text for part in parts[:-1]),
        completion=scan(draft.completion)[0],
        label=None if draft.label is None else scan(draft.label)[0],
        group=scan(draft.group)[0] if own_group else draft.group,
        own=scan(draft.own)[0],
        personal=found,
    )


def _refusal(draft: Draft, by_part: list[Counter[str]]) -> DataError:
    part, kinds = next((part, k) for part, k in zip(draft.parts, by_part, strict=True) if k)
    side = "what is learned of it" if part.learned else "its prompt"
    named = " and ".join(IN_WORDS[kind] for kind in kinds)
    return DataError(
        "PersonalData",
        f"{draft.where}: {side} holds {named}; take it out of the record, or set"
        " data.quality.personalData to Redact, Warn or Ignore",
    )
