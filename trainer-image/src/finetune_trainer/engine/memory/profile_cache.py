"""ProfileCache of one model, each made once: what prepare has measured serves the gang, too, which
would hold its GPUs while it measures.

They are kept as JSON in the run's folder, by a key of all that facts depend on. Where a key is not
there (another image, a model that has changed, a gang that is not as the spec says), or what is
there cannot be read, the model is rehearsed.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.memory.estimate import ModelProfile
from finetune_trainer.engine.memory.profiling import profile_model
from finetune_trainer.failures import UserError

_PACKAGES: Final = ("finetune-trainer", "torch", "transformers", "peft")
"""What is rehearsed, and what counts."""

_ROWS_ALONE: Final = {"micro_batch_tokens"}
"""Fields of ``spec.training`` that change rows and no facts; alternatives differ in it."""


class ProfileCache:
    """Facts of the model of a folder under any spec.

    Args:
        folder: only the model's configuration is read.
        max_length: most tokens of a sample.
        kept: what ``to_json`` gave elsewhere.
    """

    def __init__(self, folder: Path, max_length: int, kept: bytes | None = None) -> None:
        self._folder, self._max_length = folder, max_length
        # Read when they are asked for: those of another trainer may have another form.
        self._kept: dict[str, Any] = json.loads(kept) if kept else {}
        self._made: dict[str, ModelProfile | UserError] = {}

    def __call__(self, spec: FineTuneJobSpec) -> ModelProfile:
        """Facts of the model under a spec.

        Raises:
            UserError: as ``profile_model``.
        """
        key = self._key(spec)
        if key not in self._made:
            self._made[key] = self._find(key, spec)
        found = self._made[key]
        if isinstance(found, UserError):
            raise found
        return found

    def _find(self, key: str, spec: FineTuneJobSpec) -> ModelProfile | UserError:
        if key in self._kept:
            with suppress(ValidationError):  # another build of this version wrote it
                return TypeAdapter(ModelProfile).validate_python(self._kept[key])
        try:
            return profile_model(self._folder, spec, self._max_length)
        except UserError as error:
            return error

    def to_json(self) -> bytes:
        """All facts that were asked for."""
        profile = {
            key: found for key, found in self._made.items() if isinstance(found, ModelProfile)
        }
        return TypeAdapter(dict[str, ModelProfile]).dump_json(profile, indent=1)

    def _key(self, spec: FineTuneJobSpec) -> str:
        parts = {
            "configuration": (self._folder / "config.json").read_text(encoding="utf-8"),
            "packages": {name: version(name) for name in _PACKAGES},
            "longest": self._max_length,
            "task": spec.task,
            "method": spec.method.to_json(),
            "training": spec.training.model_dump(mode="json", exclude=_ROWS_ALONE),
            "on GPUs": spec.compute.gpus_per_node > 0,
            "shares rows": spec.compute.context_parallel > 1,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
