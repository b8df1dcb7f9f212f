"""Helpers of the prepare tests: tiny tokenizers, a tiny model, a prefix in object storage."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune_api.results import PreparedSummary
from finetune_api.run_spec import RunSpec
from finetune_api.sources import StorageAccess
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.prepare.reading.records import Record, read_records
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.storage.objects import ObjectStore, Stores

CORPUS = [
    "The cat sat on the mat and looked at the bird in the tree.",
    "Review: a fine film. Sentiment: positive negative neutral",
    "user assistant system model Label: yes no",
    "What is the capital of this land? It is a small town by the sea.",
]

LLAMA3 = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>\
assistant<|end_header_id|>

{% endif %}"""

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}\
{{ raise_exception('there is no system role') }}{% endif %}{% for m in messages %}\
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

# Writes an empty thought before the last answer only, so earlier turns are rendered differently.
THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think></think>
{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

SPECIAL = [
    "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>",
    "<|im_end|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip


def make_tokenizer(
    *, bos: bool = False, chat: str | None = None, metaspace: bool = False
) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer of a few hundred tokens: byte-level, or with SentencePiece's space at
    the beginning of a text."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        alphabet = ["▁", "\n", "é", *(chr(c) for c in range(33, 127))]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos or chat else None, eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
    )  # fmt: skip
    if chat is not None:
        made.chat_template = chat
    return made


def save_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, positions: int = 256, **save: Any
) -> Path:
    """Write a model folder in Hugging Face layout: a Llama of a few thousand parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=positions,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, **save)
    tokenizer.save_pretrained(folder)
    return folder


def lines(*records: Any) -> bytes:
    """Records as JSON Lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return bytes(sink.getvalue().to_pybytes())


def read(name: str, data: bytes) -> list[Record]:
    """The records of an object."""
    return list(read_records(f"s3://b/{name}", io.BytesIO(data)))


def fault(name: str, data: bytes) -> TrainerError:
    """The error of reading an object."""
    with pytest.raises(TrainerError) as caught:
        read(name, data)
    return caught.value


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    """Distinct records of prompt and completion."""
    return [
        {"prompt": f"What is number {i}?", "completion": f" It is {i}."}
        for i in range(start, start + count)
    ]


ALL: Any = {"split": {"validation": "0", "test": "0"}}
"""Data settings without held-out shares."""

LONG = {"prompt": "The cat sat. " * 30 + "End:", "completion": " yes"}


class OneStore(Stores):
    """Stores that share one client: creating a client takes longer than a small job."""

    def __init__(self, run_spec: RunSpec, store: ObjectStore) -> None:
        super().__init__(run_spec)
        self._store = store

    def of(self, access: StorageAccess | None) -> ObjectStore:
        return self._store


@dataclass
class Workplace:
    """A prefix of the bucket, and prepare for run specs over its objects."""

    root: str
    store: ObjectStore
    run_spec_for: Callable[..., RunSpec]
    scratch: Iterator[Path]

    def put(self, name: str, data: bytes) -> str:
        uri = f"{self.root}/{name}"
        self.store.put(uri, data)
        return uri

    def run_spec(self, *train: bytes, **spec: Any) -> RunSpec:
        """Return a run spec whose training sources are JSON Lines objects of these contents."""
        for i, data in enumerate(train):
            self.put(f"data/{i}.jsonl", data)
        data_block = {"train": [{"source": f"{self.root}/data/"}], **spec.pop("data", {})}
        output = {"destination": f"{self.root}/out"}
        return self.run_spec_for(data=data_block, output=output, **spec)

    def prepare(self, run_spec: RunSpec) -> tuple[PreparedSummary, PreparedData]:
        summary = prepare(run_spec, OneStore(run_spec, self.store), next(self.scratch))
        assert summary is not None
        return summary, PreparedData.open(self.store, summary.uri, next(self.scratch))

    def fault(self, *train: bytes, **spec: Any) -> TrainerError:
        run_spec = self.run_spec(*train, **spec)
        with pytest.raises(TrainerError) as caught:
            prepare(run_spec, OneStore(run_spec, self.store), next(self.scratch))
        left = [o.uri for o in self.store.list(f"{self.root}/out/")]
        assert not [uri for uri in left if uri.endswith(("manifest.json", "prepared.json"))]
        return caught.value


def texts(data: PreparedData, split: Any) -> list[str]:
    """Decoded samples of a split, without special tokens."""
    tokenizer = make_tokenizer(bos=True)
    found = data.samples(split, range(len(data.index(split))))
    return [tokenizer.decode(s.ids, skip_special_tokens=True) for s in found]
