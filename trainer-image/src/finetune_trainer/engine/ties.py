"""Tied weights: shared by two modules, mostly the embedding and the output head, under an adapter.

In training, one of the modules has an adapter, and the other uses the base weight. Merged, the
adapter would change both modules: another model than the one that was evaluated.
"""

from __future__ import annotations

from typing import Final

from torch import nn

_ADAPTED: Final = "base_layer."
"""Part of the names of base weights that have a peft adapter."""


def adapted_ties(model: nn.Module) -> list[str]:
    """Return all names of a tied weight that has a peft adapter; empty if there is none."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.ndim > 1:  # biases may be shared: no adapter is added to them
            names.setdefault(weight, []).append(name)
    shared = (known for known in names.values() if len(known) > 1)
    adapted = (known for known in shared if any(_ADAPTED in name for name in known))
    return [name.replace(_ADAPTED, "") for name in next(adapted, [])]
