"""``spec.training.optimizer`` and ``anchor``: how the weights change, and what holds them.

``OPTIMIZERS`` is the one table of the optimizers, as ``METHODS`` is of the methods.
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
    """What can be said of an optimizer without a model."""

    state_bytes: float
    """Bytes of state that a number of a large trained matrix takes (embeddings, and what is no
    matrix, take AdamW's)."""
    needs_gpu: bool = False
    """Whether it runs on GPUs alone, by a package that not every trainer image has."""
    shards: bool = True
    """Whether it goes with a model in shards (`compute.sharding`), and so with FP8, which computes
    with FSDP's copies of the weights."""
    matrices: bool = False
    """Whether it is for matrices of hidden layers, and useless to methods that train none."""


OPTIMIZERS: Final[dict[OptimizerName, OptimizerKind]] = {
    "AdamW": OptimizerKind(8.0),
    # A byte for each moment, and a 32-bit scale of both for each 256 of them.
    "AdamW8bit": OptimizerKind(2.0 + 8 / 256, needs_gpu=True, shards=False),
    # A sum for each row and column: of a LoRA matrix of rank 16 a sixteenth of its size.
    "Adafactor": OptimizerKind(4 / 16, shards=False),
    "Muon": OptimizerKind(4.0, matrices=True),
}


class Anchor(Model):
    """What holds the tuned model near the untuned one, against forgetting. "0" switches a part
    off."""

    kl_coefficient: DecimalString = "0"
    """Weight of the divergence KL(untuned || tuned) between the two models' next-token
    probabilities, in nats, that is added to the loss of each learned token of the sets marked
    `replay` (Li and Hoiem 2016, arXiv:1606.09282; Raghavan et al. 2024, arXiv:2205.00334); "1"
    counts it as much as the loss. It costs a forward pass over those sets, and with Full and
    Partial the memory of a second, frozen model."""
    l2_coefficient: DecimalString = "0"
    """Pull of each trained weight towards its untuned value, by the learning rate, apart from the
    loss: w - rate * this * (w - untuned) (L2-SP; Li et al. 2018, arXiv:1802.01483). For Full and
    Partial, at 4 bytes a trained weight; adapters have `weightDecay` for it, since they are the
    difference."""


def optimizer_rules() -> tuple[Rule, ...]:
    """What of a spec goes with which optimizer."""

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
    """What an anchor needs of a spec."""
    types = [name for name, kind in METHODS.items() if not kind.adapts]
    kl = is_zero("self.training.anchor.klCoefficient")
    l2 = is_zero("self.training.anchor.l2Coefficient")
    return (
        Rule(
            f"{kl} || self.data.train.exists(t, t.replay)",
            "training.anchor.klCoefficient needs general data to hold the model to: mark a set of"
            ' data.train with replay: true, or set klCoefficient: "0"',
            lambda s: (
                float(s.training.anchor.kl_coefficient) == 0 or any(t.replay for t in s.data.train)
            ),
            ("training.anchor.klCoefficient",),
        ),
        Rule(
            f"{l2} || self.method.type in {json.dumps(types)}",
            f"training.anchor.l2Coefficient is for method.type {', '.join(types)}: of an adapter,"
            " which is the difference to the untuned weights, set training.weightDecay",
            lambda s: float(s.training.anchor.l2_coefficient) == 0 or s.method.type in types,
            ("training.anchor.l2Coefficient", "method.type"),
        ),
    )
