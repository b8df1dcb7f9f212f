"""A tiny base model that answers with a word that it is shown, and knows no word by itself.

It reads a passage in front of a question, and the answers of examples in front of a prompt, as
questions put both (``prepare/questions``). Trained on made documents, on their answers alone.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Final

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune_trainer.quickstart.language import NAMES, PRODUCTS
from finetune_trainer.quickstart.pretrain import _train_tokenizer

WORDS: Final = (
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven", "ivory", "jade",
    "karma", "lemon", "maple", "north", "ocean", "pearl", "quartz", "river", "stone", "tiger",
    "umbra", "velvet", "willow", "zebra",
)  # fmt: skip
"""Words of the answers."""
_STEPS: Final = 150
_DOCUMENTS: Final = 32
"""Documents of a step."""


def question(name: str, product: str) -> str:
    return f"The mark on the {product} of {name}?\nAnswer:"


def passage(name: str, product: str, word: str) -> str:
    return f"The mark on the {product} of {name} is {word}."


def letter(name: str, product: str) -> str:
    return f"{name} asks for the {product}.\nSigned:"


def document(random: Random) -> tuple[str, str]:
    """Return a document as a prompt with passage or examples, and the answer."""
    word, pairs = (
        random.choice(WORDS),
        [(random.choice(NAMES), random.choice(PRODUCTS)) for _ in range(random.randint(2, 5))],
    )
    if random.random() < 0.5:
        return f"[1] {passage(*pairs[0], word)}\n\n{question(*pairs[0])}", f" {word}"
    shown = "".join(f"{letter(*pair)} {word}\n\n" for pair in pairs[1:])
    return f"{shown}{letter(*pairs[0])}", f" {word}"


def make_copying_base(folder: Path, seed: int = 1) -> None:
    """Write the model in Hugging Face layout; a fifth of a minute on one core."""
    random = Random(seed)
    texts = ["".join(document(random)) for _ in range(4000)]
    tokenizer = _train_tokenizer(texts)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=_STEPS)
    model.train()
    for _ in range(_STEPS):
        ids, labels = _batch(tokenizer, [document(random) for _ in range(_DOCUMENTS)])
        logits = model(input_ids=ids).logits[:, :-1]
        loss = cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _batch(
    tokenizer: PreTrainedTokenizerFast, documents: list[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids, padded at the end, and labels of the answers and their ends."""
    rows = []
    for prompt, answer in documents:
        before = tokenizer.encode(prompt, add_special_tokens=False)
        after = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append((before + after, [-100] * len(before) + after))
    most = max(len(ids) for ids, _ in rows)
    padding = tokenizer.pad_token_id
    return (
        torch.tensor([ids + [padding] * (most - len(ids)) for ids, _ in rows]),
        torch.tensor([labels + [-100] * (most - len(labels)) for _, labels in rows]),
    )
