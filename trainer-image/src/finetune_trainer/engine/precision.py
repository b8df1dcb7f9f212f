"""Arithmetic of the model: in which numbers it computes, and in which its weights are kept.

    FP32      32 bits throughout
    BF16      weights in 32 bits, matrix products in bfloat16 (autocast); in shards as PureBF16
    PureBF16  all in bfloat16, with copies of weights that are kept, and changed, in 32 bits
    FP8       as PureBF16, linear layers of the blocks in 8 bits with a scale for each tensor

An optimizer step is often smaller than the spacing of bfloat16, so what is trained is kept in 32
bits force it computes with. The copies are FSDP's, also where nothing is sharded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import nn

from finetune_api.training import Training
from finetune_trainer.engine.parameters import decoder_blocks


@dataclass(frozen=True)
class Precision:
    """One way of computing."""

    halved: bool = True
    """Whether activations are in bfloat16 (or less), and so frozen weights too."""
    copied: bool = False
    """Whether weights are copied to bfloat16 as wholes, rather than by autocast where needed."""
    fp8: bool = False
    """Whether linear layers compute in 8 bits."""

    @property
    def autocast(self) -> bool:
        return self.halved and not self.copied


PRECISIONS: Final = {
    "FP32": Precision(halved=False),
    "BF16": Precision(),
    "PureBF16": Precision(copied=True),
    "FP8": Precision(copied=True, fp8=True),
}


def precision_of(training: Training, cuda: bool) -> Precision:
    """What the spec asks for; Auto takes BF16 on a GPU."""
    if training.precision == "Auto":
        return PRECISIONS["BF16" if cuda else "FP32"]
    return PRECISIONS[training.precision]


def use_fp8(model: nn.Module, emulate: bool = False) -> int:
    """Have the linear layers of the blocks compute in 8 bits (Micikevicius et al. 2022,
    arXiv:2209.05433), with scales found for each tensor as it comes; those whose sides are no
    multiples of 16 stay as they are. Returns how many do. Rows may have any number of tokens: a
    weight's gradient is a sum over them, and is filled up to what the kernel takes.

    Args:
        emulate: whether to compute what a GPU would, by other means.
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
