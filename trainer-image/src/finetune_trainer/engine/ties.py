"""Weights that two modules share, mostly the embedding and the output head, under an adapter.

While training an adapter stands beside one of the modules, and the other is as it was. Merged, it
would be in the weights of both: another model than the one that was tested.
"""

from __future__ import annotations

from typing import Final

from torch import nn

_ADAPTED: Final = "base_layer."
"""In the names of weights that peft has an adapter beside."""


def adapted_ties(model: nn.Module) -> list[str]:
    """The names of a shared weight that has an adapter, of a model that peft has changed; empty
    where there is none."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.ndim > 1:  # biases may be shared: no adapter is added to them
            names.setdefault(weight, []).append(name)
    shared = (known for known in names.values() if len(known) > 1)
    adapted = (known for known in shared if any(_ADAPTED in name for name in known))
    return [name.replace(_ADAPTED, "") for name in next(adapted, [])]
