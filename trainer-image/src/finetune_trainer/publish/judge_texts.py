"""What the judge said, in words, for the report, the model card and the terminal."""

from __future__ import annotations

from finetune_api.judge import JudgedSet, JudgeResult


def judge_texts(found: JudgeResult | None) -> list[str]:
    """What the judge said and cost, in sentences; none: there is no judge."""
    if found is None:
        return []
    texts = [f"{each.data_set}: {_said(each)}." for each in found.sets]
    tokens = f"{found.prompt_tokens:,} tokens sent, {found.reply_tokens:,} received"
    return [*texts, f"Judge {found.model}: {found.requests:,} requests, {tokens}."]


def _said(found: JudgedSet) -> str:
    agreement = found.agreement
    parts = [
        f"of {found.samples:,} judged answers, the tuned model's is preferred in {found.wins:,},"
        f" the base model's in {found.losses:,}, neither in {found.ties:,}"
    ]
    if found.equal:
        parts[0] += f" ({found.equal:,} with equal answers)"
    if agreement is not None:
        parts.append(f"both orders of the answers agree in {100 * agreement:.0f} %")
    if found.unreadable:
        parts.append(f"{found.unreadable:,} replies without a verdict")
    if found.unanswered:
        parts.append(f"{found.unanswered:,} requests without a reply")
    return "; ".join(parts)
