"""A published model as its users have it: loaded by plain transformers and peft, as the model card
(``modelcard``) tells them, and asked without the trainer's packing, kernels and losses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from finetune_api.tasks import TASKS as KINDS
from finetune_api.tasks import TaskName
from finetune_trainer.engine.model import GENERATION
from finetune_trainer.engine.task_losses import TASKS
from finetune_trainer.evaluate.measure import greedy
from finetune_trainer.evaluate.prompt_batches import Ids
from finetune_trainer.prepared.dataset import TokenSample
from finetune_trainer.storage.modelconfig import CONFIG

_ROWS: Final = 256
"""Labels whose logits are in float32 at a time: a large vocabulary takes a megabyte for each."""


class IncompleteArtefact(Exception):
    """The published weights lack parameters, which transformers would draw at random."""


def load_merged(folder: Path, task: TaskName) -> Any:
    """Load a full model.

    Raises:
        IncompleteArtefact: the files lack parameters, or hold them in another shape.
    """
    model, report = TASKS[task].auto.from_pretrained(
        folder, output_loading_info=True, use_safetensors=True
    )
    lacking = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if lacking:
        raise IncompleteArtefact(f"its weights do not hold {', '.join(lacking[:5])}")
    return model.eval()


def load_adapter(folder: Path, base: Path, task: TaskName) -> Any:
    """Load an adapter on its base, the whole model of a folder."""
    options: dict[str, Any] = {}
    if not KINDS[task].generates:
        options = {
            "config": AutoConfig.from_pretrained(folder / CONFIG, trust_remote_code=False),
            "ignore_mismatched_sizes": True,
        }
    whole = TASKS[task].auto.from_pretrained(base, use_safetensors=True, **options)
    model: Any = PeftModel.from_pretrained(whole, str(folder), torch_device="cpu")
    if (folder / GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def loss_of(model: Any, sample: TokenSample, label: str | None) -> float:
    """Return the mean loss of a sample's labels in nats: of its supervised tokens, or of its class.

    Args:
        label: name of its class, for a classifier.
    """
    ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        if label is not None:
            number = model.config.label2id[label]
            return float(cross_entropy(logits.float(), torch.tensor(number)))
        logits = logits[-ids.shape[1] :]  # without virtual tokens in front
        targets = torch.from_numpy(np.flatnonzero(sample.supervised))
        total = torch.zeros(())
        for at in torch.split(targets, _ROWS):
            total += cross_entropy(logits[at - 1].float(), ids[0, at], reduction="sum")
    return float(total) / len(targets)


def class_of(model: Any, sample: TokenSample) -> str:
    """Return the name of the likeliest class."""
    ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return str(model.config.id2label[int(logits.argmax())])


def answer_of(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Ids, most: int
) -> tuple[str, bool]:
    """Return the greedy answer to a prompt, by the end tokens of the model's generation config, and
    whether it ended by one of them.

    Args:
        prompt: tokens, shape [tokens].
        most: maximum number of generated tokens.
    """
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    known = model.generation_config.eos_token_id
    ends = known if isinstance(known, list) else [] if known is None else [known]
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=greedy(tokenizer, ends, most),
        )
    said = out[0, ids.shape[1] :]
    ended = bool(torch.isin(said, torch.tensor(ends)).any())
    return str(tokenizer.decode(said, skip_special_tokens=True)), ended


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, *, framed: bool) -> list[int]:
    """Return the tokens of a text.

    Args:
        framed: whether the tokenizer adds its special tokens; a chat template writes its own.
    """
    encoded = tokenizer(
        text, add_special_tokens=framed, padding=False, truncation=False, verbose=False
    )
    return list(encoded["input_ids"])
