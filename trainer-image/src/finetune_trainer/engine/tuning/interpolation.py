"""Points between the base and the tuned weights: the model is moved along that line, in place.

    weights = base + factor * (tuned - base)

    Interpolation   factor = point                              (WiSE-FT; arXiv:2109.01903)
    LayerLinear     factor = point + (1 - point) * depth        (LiNeS; arXiv:2410.17146)

depth grows linearly from 0 in the first block to 1 in the last one. Embeddings count as the first
block, what follows the blocks as the last one. The base value of an adapter's weights is known: 0
for B of LoRA (the update factor * B A is exactly that share of the tuned one; A stays), 1 for the
scales of IA3. With PiSSA, B of the frozen adapter is scaled too: their difference is the update.
The base values of a model's own weights are read again, which costs 4 bytes for each trained weight
from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from finetune_api.remedy import Scan
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.dtensors import local_tensor
from finetune_trainer.engine.parameters import decoder_blocks, depth_below_top
from finetune_trainer.engine.pissa import is_kept
from finetune_trainer.failures import UserError


@dataclass(frozen=True)
class Moved:
    """A parameter on the line."""

    parameter: nn.Parameter
    base: Tensor | float
    """Base values, sharded as the parameter is, or one value for all."""
    depth: float
    """From 0 in the first block to 1 in the last one."""


class Line:
    """The line between base and tuned model, which is at point 1 now."""

    def __init__(self, moved: list[Moved], scan: Scan) -> None:
        self._moved = moved
        self._scan = scan
        self._at = 1.0

    @torch.no_grad()
    def move(self, point: float) -> None:
        """Move the model to a point from its current one. Parameters whose factor does not change
        keep every bit. From 0, the base model, nothing leads back."""
        for each in self._moved:
            ratio = self._factor(point, each.depth) / self._factor(self._at, each.depth)
            if ratio != 1.0:
                local_tensor(each.parameter).sub_(each.base).mul_(ratio).add_(each.base)
        self._at = point

    def _factor(self, point: float, depth: float) -> float:
        """Share of the tuned weights; at point 0 of either scan all weights are the base's."""
        if self._scan == "Interpolation" or point == 0:
            return point
        return point + (1 - point) * depth


def line_of(model: nn.Module, scan: Scan, base: Mapping[str, Tensor]) -> Line:
    """Return the line of a tuned model.

    Args:
        model: with the tuned weights, sharded or not.
        base: base values of the model's own trained weights, by name: see ``own_weights``.
    """
    depths = _depths(model)
    moved = []
    for name, parameter in model.named_parameters():
        if is_kept(name, parameter) and not _is_direction(name):
            value = _base_value(name)
            values = base[name] if value is None else value
            moved.append(Moved(parameter, values, depths.get(parameter, 1.0)))
    return Line(moved, scan)


def own_weights(model: nn.Module, read_base: Callable[[], None]) -> dict[str, Tensor]:
    """Return the base values of the model's own trained weights, by name: this process's shards.
    None are read for an adapter. A collective.

    Args:
        read_base: writes the base's weights into the model, which has them afterwards.
    """
    own = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not _is_direction(name) and _base_value(name) is None
    ]
    if not own:
        return {}
    read_base()
    return {name: local_tensor(parameter.detach()).clone() for name, parameter in own}


def check_scan(model: nn.Module, spec: FineTuneJobSpec) -> None:
    """Refuse a scan by depth in a model whose blocks are not known.

    Raises:
        UserError: 'UnsuitableModel'.
    """
    remedy = spec.evaluation.remedy
    if remedy is not None and remedy.scan == "LayerLinear" and not decoder_blocks(model):
        raise UserError(
            "UnsuitableModel",
            "spec.evaluation.remedy.scan: LayerLinear grows with the depth, and this model has no"
            " list of blocks; set scan: Interpolation",
        )


_BASE_VALUES: Final = {".lora_B.": 0.0, ".lora_embedding_B.": 0.0, ".ia3_l.": 1.0}
"""Values of an adapter's weights with which it changes nothing, by part of their names."""


def _base_value(name: str) -> float | None:
    """The base value of an adapter's weights; None: they are the model's own."""
    return next((value for part, value in _BASE_VALUES.items() if part in name), None)


def _is_direction(name: str) -> bool:
    """Whether weights are the half of a LoRA adapter that is not scaled."""
    return ".lora_A." in name or ".lora_embedding_A." in name


def _depths(model: nn.Module) -> dict[nn.Parameter, float]:
    """Depth of the parameters of blocks and embeddings; that of the others is 1."""
    blocks = len(decoder_blocks(model))
    return {
        parameter: min(max(blocks - below, 0) / max(blocks - 1, 1), 1.0)
        for parameter, below in depth_below_top(model).items()
    }
