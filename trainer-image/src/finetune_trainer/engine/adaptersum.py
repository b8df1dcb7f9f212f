"""The sum of two LoRA adapters: an adapter that was trained on top of another one is published as
one adapter on the base model of the first.

    s1 B1 A1  +  s2 B2 A2  =  [s1 B1 | s2 B2] [A1 ; A2]

Ranks add up, and scales are folded into B. A layer that only one adapter adapts gets zeros for the
other adapter. The result is a plain LoRA adapter of one rank, which any LoRA loader can read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune_api.run_spec import RunSpec
from finetune_trainer.engine.base import BaseFiles
from finetune_trainer.failures import UserError

_MORE: Final = (
    "use_dora", "modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern",
    "layer_replication", "lora_bias", "trainable_token_indices",
)  # fmt: skip
"""peft settings that give an adapter more than two matrices per layer, or more than one rank."""


def check_sum(run_spec: RunSpec, files: BaseFiles) -> None:
    """Refuse a run whose result could not be published as an adapter of its lineage's base model.

    Raises:
        UserError: 'NoSumOfAdapters'; the message names the alternatives.
    """
    spec = run_spec.spec
    if files.adapter is None or spec.effective_output_format in (None, "Merged"):
        return
    lora = spec.method.effective_lora
    plain = spec.method.kind.block == "lora" and not (lora.use_dora or lora.target_parameters)
    plain = plain and spec.kind.generates  # a classification adapter contains a head
    if plain and is_plain(files.adapter):
        return
    first = files.base.lineage[-1]
    remedy = f"publish job {first.job} with output.format: Both"
    if "Merged" in spec.method.kind.formats:
        remedy = f"set spec.output.format: Merged, or {remedy}"
    raise UserError(
        "NoSumOfAdapters",
        f"spec.output.format: {spec.effective_output_format} would publish an adapter on top of"
        f" the one in {first.uri} ({first.method}), and the two cannot be summed to one adapter:"
        " only plain LoRA adapters can be (no useDora, no targetParameters, no head);"
        f" {remedy}",
    )


def is_plain(adapter: Path) -> bool:
    """Return whether an adapter has exactly one pair of matrices per layer, all of one rank."""
    config = _config(adapter)
    more = any(config.get(name) for name in _MORE) or config.get("bias", "none") != "none"
    named = isinstance(config.get("target_modules"), list)
    return config["peft_type"] == "LORA" and named and not more


def add_adapters(first: Path, second: Path, folder: Path) -> None:
    """Write the sum of two plain adapters (``is_plain``) to ``folder`` in peft's layout.

    ``folder`` may be the folder of either adapter. Settings that do not affect a trained adapter
    are copied from the second.
    """
    configs, parts = [], []
    for adapter in (first, second):
        config = _config(adapter)
        configs.append(config)
        parts.append(_scaled(load_file(adapter / SAFETENSORS_WEIGHTS_NAME), _scale(config)))
    ranks = [config["r"] for config in configs]
    weights = {
        name: _side_by_side(
            name, [(part.get(name), r) for part, r in zip(parts, ranks, strict=True)]
        )
        for name in sorted(parts[0].keys() | parts[1].keys())
    }
    targets = sorted({name for config in configs for name in config["target_modules"]})
    both = {
        "r": sum(ranks),
        "lora_alpha": sum(ranks),
        "use_rslora": False,
        "target_modules": targets,
    }
    save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    text = json.dumps(configs[1] | both, indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def _config(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))
    return found


def _scale(config: dict[str, Any]) -> float:
    rank = config["r"]
    return float(config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank))


def _scaled(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    return {name: w.float() * (1.0 if _is_a(name) else scale) for name, w in weights.items()}


def _is_a(name: str) -> bool:
    return ".lora_A" in name or ".lora_embedding_A" in name


def _side_by_side(name: str, parts: list[tuple[Tensor | None, int]]) -> Tensor:
    """Concatenate a layer's matrices along their ranks; None stands for a matrix of zeros."""
    axis = 0 if _is_a(name) else 1
    there = next(part for part, _ in parts if part is not None)
    full = []
    for part, rank in parts:
        shape = list(there.shape)
        shape[axis] = rank
        full.append(torch.zeros(shape) if part is None else part)
    return torch.cat(full, dim=axis).contiguous()
