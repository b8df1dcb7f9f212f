"""Construction of the contract's status models from Python field names."""

from __future__ import annotations

from typing import Any, TypeVar

from finetune_api.base import Model

M = TypeVar("M", bound=Model)


def make(model: type[M], **fields: Any) -> M:
    """Build a model from its fields' Python names; manifests use only the aliases."""
    return model.model_validate(fields, by_alias=False, by_name=True)
