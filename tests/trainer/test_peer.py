"""First step compared with TRL: the same records give the same loss and gradient norm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from prepare_helpers import lines, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from trl import SFTConfig, SFTTrainer
from worlds import start_world

from finetune_trainer.prepare.pipeline import prepare
from finetune_trainer.storage import runfiles
from finetune_trainer.storage.objects import Stores

MARKED = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

ANSWERS = ["a bird", "the cat sat on the mat by the sea", "no", "It is a small town.", "a tree"]
PAIRS = [{"prompt": f"What is number {i}?", "completion": f" {a}"} for i, a in enumerate(ANSWERS)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is number {i}?"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "And the one before it?"},
            {"role": "assistant", "content": ANSWERS[i - 1]},
        ]
    }
    for i, answer in enumerate(ANSWERS)
]
SEED = 3
LORA = {"type": "LoRA", "lora": {"rank": 4, "alpha": 8}}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(chat=MARKED)
    tokenizer.pad_token = "</s>"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ours(run_spec: Any, store: Any, folder: Path) -> tuple[float, float]:
    """Return loss and gradient norm of the first step, run through prepare and train."""
    prepare(run_spec, Stores(run_spec), folder / "prepare")
    path = folder / "run-spec.json"
    path.write_text(run_spec.to_text())
    world = start_world(dict(os.environ) | {"FINETUNE_RUN_SPEC": str(path)}, 1, folder / "train")
    assert world.wait() == [0], world.log.read_text()
    (point,) = runfiles.read_result(store, run_spec.run_uri).curve
    return point.loss, point.gradient_norm


def theirs(records: list[Any], lora: bool, model: Path, folder: Path) -> tuple[float, float]:
    """Return the same of TRL, with padding and two gradient accumulation steps."""
    tuned: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if lora:
        torch.manual_seed(SEED)
        tuned = get_peft_model(
            tuned, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
        )
    chats = "messages" in records[0]
    config = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=3, gradient_accumulation_steps=2,
        max_steps=1, logging_steps=1, assistant_only_loss=chats, completion_only_loss=not chats,
        max_grad_norm=0.0, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=tuned, args=config, train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    trainer.train()
    first = trainer.state.log_history[0]
    return first["loss"], first["grad_norm"]


@pytest.mark.parametrize("records", [PAIRS, CHATS], ids=["completion-only", "assistant-only"])
@pytest.mark.parametrize("method", [{"type": "Full"}, LORA], ids=["Full", "LoRA"])
def test_the_first_step_equals_that_of_trl(
    records: list[Any], method: dict[str, Any], model_folder: Path, run_spec_for: Any, s3: Any,
    bucket: str, tmp_path: Path,
) -> None:  # fmt: skip
    store = s3.store()
    for path in model_folder.iterdir():
        store.upload(path, f"s3://{bucket}/model/{path.name}")
    store.put(f"s3://{bucket}/train.jsonl", lines(*records))
    run_spec = run_spec_for(
        method=method,
        data={
            "train": [{"source": f"s3://{bucket}/train.jsonl"}],
            "split": {"validation": "0", "test": "0"},
            "quality": {"deduplicate": False},
        },
        training={
            "maxSteps": 1, "batchSize": len(records), "precision": "FP32", "seed": SEED,
            "maxGradNorm": "0", "microBatchTokens": 256,
        },
    )  # fmt: skip
    loss, norm = ours(run_spec, store, tmp_path)
    assert (loss, norm) == pytest.approx(
        theirs(records, method["type"] == "LoRA", model_folder, tmp_path / "trl"), rel=1e-4
    )
