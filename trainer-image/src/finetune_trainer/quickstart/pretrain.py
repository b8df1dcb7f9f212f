"""Pre-train the quickstart's base model from random weights, in half a minute on two cores.

A Llama of a million parameters and its byte-pair tokenizer are trained on dialogues in the small
language of ``language``. The resulting model answers customers' messages, so it represents their
intents, and does the tasks that the quickstart tunes it on for some of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune_trainer.quickstart.language import document

EOS: Final = "<|endoftext|>"
PAD: Final = "<|pad|>"
# The dialogues' speaker names are the roles of the chat template, so the base model can chat.
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Customer: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Agent: ' + message['content'] + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Agent:' }}{% endif %}"
)
CONTEXT: Final = 512
ROW: Final = 128
"""Tokens of a pre-training sequence."""
REPLY_WEIGHT: Final = 4.0
"""Loss weight of tokens in answers. Customers' messages are random and hardly predictable; answers
follow from them."""


@dataclass(frozen=True)
class Size:
    """Shape of the model, and length of its pre-training."""

    hidden: int
    layers: int
    heads: int
    steps: int
    rows: int
    """Sequences of a step."""


SIZES: Final = {
    "quickstart": Size(hidden=128, layers=4, heads=4, steps=200, rows=8),
    "tiny": Size(hidden=64, layers=2, heads=2, steps=40, rows=8),
}


def make_base(folder: Path, size: Size, seed: int = 1) -> set[str]:
    """Write a base model in Hugging Face layout; the files are the same for the same seed and
    machine.

    Returns:
        The customers' messages in its training data, which test sets must not contain.
    """
    texts, seen = _corpus(size.steps * size.rows * ROW, seed)
    tokenizer = _train_tokenizer(texts)
    model = _pretrain(texts, tokenizer, size, seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return seen


def _corpus(tokens: int, seed: int) -> tuple[list[str], set[str]]:
    """Return documents of at least ``tokens`` tokens, and the customers' messages in them."""
    random = Random(seed)
    texts, seen = [], set()
    for _ in range(tokens // 30 + 1000):  # a document has about 40 tokens
        text, asked = document(random)
        texts.append(text)
        if asked is not None:
            seen.add(asked)
    return texts, seen


def _train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts[:4000], trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, model_max_length=CONTEXT
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _pretrain(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, size: Size, seed: int
) -> LlamaForCausalLM:
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            intermediate_size=3 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads // 2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.random.set_rng_state(state)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # Muon (orthogonalized updates of the matrices) needs a third of AdamW's steps here.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.018, weight_decay=0.01),
        torch.optim.AdamW(others, lr=0.006, betas=(0.9, 0.95)),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, size.steps))
        for o in optimizers
    ]
    model.train()
    for ids, weights in _rows(texts, tokenizer, size):
        logits = model(input_ids=ids).logits[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


def _rate(step: int, steps: int) -> float:
    """Learning rate relative to the peak: 20 steps of warm-up, constant, then linear decay to a
    twentieth."""
    return min(1.0, (step + 1) / 20) * max(0.05, min(1.0, (steps - step) / (0.6 * steps)))


def _rows(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, size: Size
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and loss weights for each step, both of shape [size.rows, ROW]. Documents are
    concatenated, each followed by EOS."""
    ids: list[int] = []
    weights: list[float] = []
    encoded = tokenizer(texts, return_offsets_mapping=True)
    for text, tokens, offsets in zip(
        texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        answers = _answers(text)
        ids += [*tokens, tokenizer.eos_token_id]
        weights += [
            REPLY_WEIGHT if any(a <= start < b for a, b in answers) else 1.0 for start, _ in offsets
        ]
        weights.append(REPLY_WEIGHT)
    for step in range(size.steps):
        part = slice(step * size.rows * ROW, (step + 1) * size.rows * ROW)
        yield torch.tensor(ids[part]).view(-1, ROW), torch.tensor(weights[part]).view(-1, ROW)


def _answers(text: str) -> list[tuple[int, int]]:
    """Return the character spans of answers."""
    spans, start = [], 0
    for line in text.split("\n"):
        head = line.split(":", 1)[0]
        if head in ("Agent", "Entry", "Label", "Note"):
            spans.append((start + len(head) + 1, start + len(line)))
        start += len(line) + 1
    return spans
