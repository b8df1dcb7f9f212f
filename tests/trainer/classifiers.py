"""Tiny encoders and decoders with a word tokenizer, for the classification tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
)

from finetune_trainer.prepared.dataset import TokenSample

WORDS = [
    "the", "a", "this", "that", "is", "was", "very", "so", "not", "and",
    "film", "book", "meal", "trip", "good", "fine", "great", "bad",
    "poor", "dull", "today", "again", "still", "really", "quite",
]  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "dull")
LABELS = ("negative", "positive")
SHAPE = {
    "vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 66,
}  # fmt: skip


def tokenizer_of(marks: bool = True, **settings: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words. With ``marks`` it puts texts between [CLS] and [SEP], and
    its file sets padding and truncation, as those of encoders often do."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if marks:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        inner.enable_padding(length=40, pad_id=0, pad_token="[PAD]")
        inner.enable_truncation(5)
        settings = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"} | settings
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **settings)


def write_encoder(folder: Path, kind: str = "bert", **changes: Any) -> Path:
    """Write a random encoder as a masked language model, as encoders are published: without a
    classification head, and (BERT) without a pooler."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SHAPE | {"pad_token_id": 0} | changes))
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer_of(model_max_length=64).save_pretrained(folder)
    return folder


def write_decoder(folder: Path) -> Path:
    """Write a random Llama. Its tokenizer has an EOS but no padding token, and adds no tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer_of(marks=False, eos_token="[SEP]").save_pretrained(folder)
    return folder


def records(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Random opinions of a few words; one of the words determines the class."""
    draw = np.random.default_rng(seed)
    plain = [word for word in WORDS if word not in GOOD + BAD]
    made = []
    for i in range(count):
        words = draw.choice(plain, draw.integers(3, 12)).tolist()
        words.insert(int(draw.integers(len(words))), str(draw.choice((BAD, GOOD)[i % 2])))
        made.append({"text": " ".join(words), "label": LABELS[i % 2]})
    return made


def lines(made: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in made).encode()


def documents(lengths: list[int], classes: int = 3, seed: int = 0) -> list[TokenSample]:
    """Random documents between [CLS] and [SEP], with random classes."""
    draw = np.random.default_rng(seed)
    made = []
    for n in lengths:
        ids = np.concatenate([[2], draw.integers(5, SHAPE["vocab_size"], n - 2), [3]])
        made.append(
            TokenSample(ids.astype(np.int32), np.zeros(n, np.bool_), int(draw.integers(classes)))
        )
    return made
