"""Making the contract's models of status from Python names."""

from __future__ import annotations

from typing import Any, TypeVar

from finetune_api.base import Model

M = TypeVar("M", bound=Model)


def make(model: type[M], **fields: Any) -> M:
    """A model by its fields' Python names; manifests know them by their aliases only."""
    return model.model_validate(fields, by_alias=False, by_name=True)
