"""Precision of a run: the number formats of computation and of weights.

    FP32  float32 throughout
    BF16  matrix products in bfloat16, float32 master weights
    FP8   as BF16, with the linear layers of the blocks in 8 bits and a scale for each tensor

An optimizer step is often smaller than the spacing of bfloat16, so trained weights are kept in
float32 with each of them. There are two ways to bfloat16, and a run has one of them, at any
sharding, because method and optimizer of the run spec decide:

    copies    FSDP gathers bfloat16 copies of the float32 weights, also where nothing is sharded.
              Everything is computed in bfloat16. Faster, and smaller: only the copies of two blocks
              exist at a time. For methods that train every weight.
    autocast  torch casts weights where a product needs them. For methods that freeze the base
              (frozen weights are in bfloat16 anyway), and for optimizers that cannot be sharded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.parameters import decoder_blocks


@dataclass(frozen=True)
class Precision:
    """The precision of a run."""

    bf16: bool = True
    """Whether matrix products are in bfloat16 (or less)."""
    copies: bool = False
    """Whether FSDP makes bfloat16 copies of the weights; else autocast casts them."""
    fp8: bool = False
    """Whether linear layers compute in 8 bits."""

    @property
    def autocast(self) -> bool:
        return self.bf16 and not self.copies

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of weights that are not trained."""
        return torch.bfloat16 if self.bf16 else torch.float32


FP32 = Precision(bf16=False)


def precision_of(spec: FineTuneJobSpec, cuda: bool) -> Precision:
    """The precision that a spec means; Auto is BF16 on a GPU, FP32 elsewhere."""
    name = spec.training.precision
    if name == "FP32" or (name == "Auto" and not cuda):
        return FP32
    kind = spec.method.kind
    copies = not kind.freezes and kind.shards and spec.training.optimizer_kind.shards
    return Precision(copies=copies, fp8=name == "FP8")


def use_fp8(model: nn.Module, emulate: bool = False) -> int:
    """Convert the linear layers of the blocks to 8 bits (Micikevicius et al. 2022,
    arXiv:2209.05433), with scales found for each tensor as it comes; layers whose sides are no
    multiples of 16 stay as they are. A micro-batch may have any number of tokens: the weight's
    gradient is a sum over the tokens, which are padded to what the kernel takes.

    Args:
        emulate: whether to compute what a GPU would, by other means.

    Returns:
        The number of layers that compute in 8 bits.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    def fits(module: nn.Module, _name: str) -> bool:
        return isinstance(module, nn.Linear) and not (
            module.in_features % 16 or module.out_features % 16
        )

    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    for block in decoder_blocks(model):
        convert_to_float8_training(block, module_filter_fn=fits, config=config)
    return sum(isinstance(module, Float8Linear) for module in model.modules())
