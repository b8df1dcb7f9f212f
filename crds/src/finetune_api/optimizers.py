"""``spec.training.optimizer`` and ``anchor``: the optimizers, and anchors against forgetting.

``OPTIMIZERS`` is the single table of optimizers, as ``METHODS`` is of methods.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from finetune_api.base import DecimalString, Model, Rule, is_zero
from finetune_api.methods import METHODS

OptimizerName = Literal["AdamW", "AdamW8bit", "Adafactor", "Muon"]


@dataclass(frozen=True)
class OptimizerKind:
    """Properties of an optimizer that do not depend on the model."""

    state_bytes: float
    """Bytes of state per parameter of a large trained matrix (embeddings and parameters that are
    not matrices take AdamW's)."""
    needs_gpu: bool = False
    """Whether it needs a GPU, and a package that not every trainer image has."""
    shards: bool = True
    """Whether it supports a sharded model (`compute.sharding`), and so FP8, which computes with
    FSDP's copies of the weights."""
    matrices: bool = False
    """Whether it needs a method that trains matrices of hidden layers."""


OPTIMIZERS: Final[dict[OptimizerName, OptimizerKind]] = {
    "AdamW": OptimizerKind(8.0),
    # One byte per moment, and a 32-bit scale per 256 values of each moment.
    "AdamW8bit": OptimizerKind(2.0 + 8 / 256, needs_gpu=True, shards=False),
    # One sum per row and column: for a LoRA matrix of rank 16, 1/16 of its size.
    "Adafactor": OptimizerKind(4 / 16, shards=False),
    "Muon": OptimizerKind(4.0, matrices=True),
}


class Anchor(Model):
    """Anchors that keep the tuned model near the base model, against forgetting. "0" disables an
    anchor."""

    kl_coefficient: DecimalString = "0"
    """Weight of the divergence KL(base || tuned) of the next-token probabilities, in nats, which is
    added to the loss of each supervised token of the sets marked `replay` (Li and Hoiem 2016,
    arXiv:1606.09282; Raghavan et al. 2024, arXiv:2205.00334); "1" weights it like the loss. Costs a
    forward pass over those sets, and with Full and Partial the memory of a second, frozen model."""
    l2_coefficient: DecimalString = "0"
    """Pull of each trained weight towards its base value, scaled by the learning rate and decoupled
    from the loss: w - rate * l2Coefficient * (w - base) (L2-SP; Li et al. 2018, arXiv:1802.01483).
    For Full and Partial only, at 4 bytes per trained weight; for adapters, which are the difference
    to the base weights, use `weightDecay`."""


def optimizer_rules() -> tuple[Rule, ...]:
    """Return the rules of what each optimizer requires of a spec."""

    def rule(names: Sequence[str], cel: str, message: str, holds: Any, shown: str) -> Rule:
        return Rule(
            f"!(self.training.optimizer in {json.dumps(names)}) || {cel}",
            f"training.optimizer {', '.join(names)} {message}; or set training.optimizer: AdamW",
            lambda spec: spec.training.optimizer not in names or holds(spec),
            ("training.optimizer", shown),
        )

    kinds = OPTIMIZERS.items()
    types = [name for name, kind in METHODS.items() if kind.matrices]
    return (
        rule(
            [name for name, kind in kinds if kind.needs_gpu],
            "self.compute.gpusPerNode > 0",
            "needs a GPU: set compute.gpusPerNode",
            lambda spec: spec.compute.gpus_per_node > 0,
            "compute.gpusPerNode",
        ),
        rule(
            [name for name, kind in kinds if not kind.shards],
            "self.compute.sharding in ['Auto', 'NoShard']",
            "cannot be sharded: set compute.sharding: NoShard",
            lambda spec: spec.compute.sharding in ("Auto", "NoShard"),
            "compute.sharding",
        ),
        rule(
            [name for name, kind in kinds if not kind.shards],
            "self.training.precision != 'FP8'",
            "does not go with FP8: set training.precision: BF16",
            lambda spec: spec.training.precision != "FP8",
            "training.precision",
        ),
        rule(
            [name for name, kind in kinds if kind.matrices],
            f"self.method.type in {json.dumps(types)}",
            f"needs matrices of hidden layers: set method.type to one of {', '.join(types)}",
            lambda spec: spec.method.type in types,
            "method.type",
        ),
    )


def anchor_rules() -> tuple[Rule, ...]:
    """Return the rules of what the anchors require of a spec."""
    types = [name for name, kind in METHODS.items() if kind.trains and not kind.adapts]
    kl = is_zero("self.training.anchor.klCoefficient")
    l2 = is_zero("self.training.anchor.l2Coefficient")
    return (
        Rule(
            f"{kl} || (has(self.data.train) && self.data.train.exists(t, t.replay))",
            "training.anchor.klCoefficient needs general data: mark a set of data.train with"
            ' replay: true, or set klCoefficient: "0"',
            lambda s: (
                float(s.training.anchor.kl_coefficient) == 0
                or any(t.replay for t in s.data.train or ())
            ),
            ("training.anchor.klCoefficient",),
        ),
        Rule(
            f"{l2} || self.method.type in {json.dumps(types)}",
            f"training.anchor.l2Coefficient is for method.type {', '.join(types)}: for an adapter,"
            " which is the difference to the base weights, set training.weightDecay",
            lambda s: float(s.training.anchor.l2_coefficient) == 0 or s.method.type in types,
            ("training.anchor.l2Coefficient", "method.type"),
        ),
    )
