"""Floating-point operations of a step, for the share of the device's peak that they reach (MFU).

Counted are the operations that the model needs for the real tokens. Padding, recomputation and
masked attention, which an implementation computes in addition, do not count. With P weights in
matrix products per token, V more in the output head, D the sum of the attention widths of the
layers, and documents of n tokens, a forward pass takes

    2 P Σn  +  2 V · supervised  +  2 D Σn²        (Chowdhery et al. 2022, appendix B; causal)

operations: logits are needed at supervised positions only, and causal attention needs half of the
square. The backward pass takes as many again for the gradients of the inputs, and once more for
those of trained weights. So a frozen weight costs two passes, a trained weight three (LoRA gets no
credit for gradients of its frozen base, which are not computed), and attention three.

A classification head runs once per document, which has one label. Bidirectional attention needs the
whole square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from finetune_trainer.engine.classification import head_names
from finetune_trainer.engine.parameters import ORIGINAL, size_of

PEAKS: Final = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "A10G": 70e12,
    "L4": 121e12, "A40": 150e12, "RTX 4090": 165e12,
}  # fmt: skip
"""Dense bfloat16 operations per second, from the vendors' data sheets. The first key that the
device's name contains applies."""


@dataclass(frozen=True)
class Work:
    """Weights in the matrix products of a model. Expert weights count by the share of tokens that
    are routed to them."""

    frozen: float
    """Frozen weights per token."""
    trained: float
    """Trained weights per token."""
    head: int
    """Weights of the output head or the classification head."""
    head_trained: bool
    attention: int
    """Sum of the attention widths of all layers; doubled if attention is bidirectional."""

    def training(self, lengths: npt.NDArray[np.integer], supervised: int) -> float:
        """Operations of the forward and backward pass over documents of these lengths."""
        tokens, squares = float(lengths.sum()), float((lengths.astype(np.float64) ** 2).sum())
        body = 2 * tokens * (2 * self.frozen + 3 * self.trained)
        head = 2 * supervised * self.head * (3 if self.head_trained else 2)
        return body + head + 3 * 2 * self.attention * squares


def work_of(model: nn.Module, base: PreTrainedModel) -> Work:
    """Return the work of a model under tuning; ``base`` is the transformers model within it."""
    config = base.config.get_text_config()
    tables = {m.weight for m in base.modules() if isinstance(m, nn.Embedding)}
    output = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    named = [] if output is not None else head_names(base)
    head = {
        weight
        for module in (output, *map(base.get_submodule, named))
        if module is not None
        for name, weight in module.named_parameters()
        if weight.ndim >= 2 and ORIGINAL not in f".{name}"
    }
    frozen = trained = 0.0
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or weight in tables or weight in head or ORIGINAL in name:
            continue
        size = size_of(weight) * (_routed_share(config) if weight.ndim == 3 else 1.0)
        frozen, trained = (
            (frozen, trained + size) if weight.requires_grad else (frozen + size, trained)
        )
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Work(
        frozen=frozen,
        trained=trained,
        head=sum(size_of(weight) for weight in head),
        head_trained=any(weight.requires_grad for weight in head),
        attention=config.num_hidden_layers * heads * width * (1 if _is_causal(base) else 2),
    )


def _is_causal(base: PreTrainedModel) -> bool:
    """Return whether no token attends to later tokens."""
    return all(getattr(module, "is_causal", True) for module in base.modules())


def _routed_share(config: object) -> float:
    """Share of the experts that a token is routed to."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return getattr(config, "num_experts_per_tok", 1) / experts if experts else 1.0


def peak(device: torch.device) -> float | None:
    """Dense bfloat16 operations per second of a GPU; None if it is unknown or no GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for known, rate in PEAKS.items() if known in name), None)
