"""Cache of a model's memory profiles. The trainer reuses the profiles that prepare measured: it
would hold its GPUs while profiling.

Profiles are stored as JSON in the run's folder, keyed by everything they depend on. The model is
profiled again if a key is missing (another image, a changed model, a world that differs from the
spec) or its entry cannot be read.
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
"""Packages whose versions affect a profile: those profiled and those that profile."""

_IRRELEVANT: Final = {"micro_batch_tokens"}
"""Fields of ``spec.training`` that change micro-batches but no profile; alternative specs differ in
them."""


class ProfileCache:
    """Memory profiles of one model under any spec.

    Args:
        folder: the model's folder; only its configuration is read.
        max_length: tokens of the longest sample.
        kept: earlier output of ``to_json``.
    """

    def __init__(self, folder: Path, max_length: int, kept: bytes | None = None) -> None:
        self._folder, self._max_length = folder, max_length
        # Entries are validated on use: another trainer's may have another form.
        self._kept: dict[str, Any] = json.loads(kept) if kept else {}
        self._made: dict[str, ModelProfile | UserError] = {}

    def __call__(self, spec: FineTuneJobSpec) -> ModelProfile:
        """Return the model's profile under a spec.

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
            with suppress(ValidationError):  # written by another build of the same version
                return TypeAdapter(ModelProfile).validate_python(self._kept[key])
        try:
            return profile_model(self._folder, spec, self._max_length)
        except UserError as error:
            return error

    def to_json(self) -> bytes:
        """Serialize all profiles that were requested."""
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
            "training": spec.training.model_dump(mode="json", exclude=_IRRELEVANT),
            "on GPUs": spec.compute.gpus_per_node > 0,
            "context parallel": spec.compute.context_parallel > 1,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
