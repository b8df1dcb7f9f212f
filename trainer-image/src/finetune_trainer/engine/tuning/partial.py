"""Select the parameters that the Partial method trains."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from finetune_api.methods import Partial
from finetune_trainer.engine.parameters import decoder_blocks
from finetune_trainer.failures import UserError

_NAMES_SHOWN = 24


def partial_parameters(model: PreTrainedModel, partial: Partial) -> set[str]:
    """Return the names of the parameters that ``partial`` selects, as in ``named_parameters``: a
    tied weight (output head and embedding) has only its first name.

    Raises:
        UserError: 'NoSuchParameters' if a part of the selection matches nothing; the message lists
            the model's names.
    """
    names = [name for name, _ in model.named_parameters()]
    choices: dict[str, set[str]] = {}
    if partial.last_layers is not None:
        last = _last_layers(model, partial.last_layers)
        choices["lastLayers"] = {n for n, p in model.named_parameters() if p in last}
    for pattern in partial.parameters or ():
        choices[f"parameters: {pattern}"] = {n for n in names if fnmatchcase(n, pattern)}
    if partial.biases:
        choices["biases"] = {n for n in names if n.rsplit(".", 1)[-1].endswith("bias")}
    if partial.norms:
        choices["norms"] = set(_of_norms(model)).intersection(names)
    for choice, chosen in choices.items():
        if not chosen:
            raise UserError(
                "NoSuchParameters",
                f"spec.method.partial.{choice} fits no parameter of the model, which has"
                f" {shown(names)}",
            )
    return set().union(*choices.values())


def _last_layers(model: PreTrainedModel, count: int) -> set[nn.Parameter]:
    """Parameters of the last decoder blocks."""
    blocks = decoder_blocks(model)
    if count > len(blocks):
        raise UserError(
            "NoSuchParameters",
            f"spec.method.partial.lastLayers: {count} is more than the {len(blocks)} decoder blocks"
            " of the model; lower it, or set method.type: Full",
        )
    return {parameter for block in blocks[-count:] for parameter in block.parameters()}


def _of_norms(model: nn.Module) -> list[str]:
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for own, _ in module.named_parameters(recurse=False)
    ]


def shown(names: Iterable[str]) -> str:
    """Format the first parameter names, with ``*`` for layer numbers and duplicates removed."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    more = f" and {len(kinds) - _NAMES_SHOWN} more" if len(kinds) > _NAMES_SHOWN else ""
    return ", ".join(kinds[:_NAMES_SHOWN]) + more
