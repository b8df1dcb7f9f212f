"""Fetch the model that a run starts from, for prepare, training and publish.

    find_base ──► a whole model                      ──► local folder; weights may stay remote
              └─► a whole model, a published adapter ──► local folder with the merged model

The result is a local folder in Hugging Face layout; its weights may still be in object storage.
Only publish needs to know of a merged adapter: it adds the new adapter to the old one.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from transformers import GenerationConfig

from finetune_api.names import ENV_MODEL_CACHE
from finetune_api.run_spec import RunSpec
from finetune_trainer.engine.model import Pretrained, build_base
from finetune_trainer.engine.ties import adapted_ties
from finetune_trainer.failures import UserError
from finetune_trainer.storage import modelfiles
from finetune_trainer.storage.modelcache import cached
from finetune_trainer.storage.objects import ObjectInfo, Stores
from finetune_trainer.storage.published import Base, fetch_adapter, find_base
from finetune_trainer.storage.weight_reader import Weights

MAX_SHARD: Final = "4GB"
_held: Final[list[IO[Any]]] = []
"""Open lock files that prevent eviction of cache folders until this process ends."""
_MERGED: Final = ".merged"
"""Marker file, written last: the merge in this folder is complete, and a later start of the workers
in the same pod reuses it."""


@dataclass(frozen=True)
class BaseFiles:
    """Files of the base model on the local disk, and the location of its weights."""

    base: Base
    """Origin of the model."""
    folder: Path
    """The whole model in Hugging Face layout, without weights that are remote or were not
    requested."""
    adapter: Path | None
    """Published adapter that is already merged into the weights."""
    objects: tuple[ObjectInfo, ...] = ()
    """Objects with the weights, if they are not in the folder."""
    cached: Path | None = None
    """Folder in this node's cache with the same objects."""

    def weights(self, stores: Stores) -> Weights:
        """Return a reader of the weights."""
        if self.cached is not None:
            return Weights.of_files(sorted(self.cached.iterdir()))
        if self.objects:
            return Weights.of_objects(stores.of(self.base.model.storage), self.objects)
        return Weights.of_folder(self.folder)

    def in_version_of(self, first: BaseFiles) -> BaseFiles:
        """Return these files with the objects that rank 0 has listed, so that all ranks read the
        same version. A cached copy of another version is not used."""
        same = self.objects == first.objects
        return replace(self, objects=first.objects, cached=self.cached if same else None)


def fetch_base(run_spec: RunSpec, stores: Stores, scratch: Path, weights: bool) -> BaseFiles:
    """Fetch the model that the run starts from into ``scratch / "model"``.

    Args:
        scratch: folder on the local disk; needs space for the model in float32 if an adapter is
            merged.
        weights: False fetches only configuration, tokenizer and adapter, and checks that the
            weights exist.

    Raises:
        UserError: as ``find_base``, ``modelfiles.fetch_model`` and, without weights (in prepare),
            ``check_headless`` and ``check_ties``.
    """
    base = find_base(run_spec, stores)
    adapter = fetch_adapter(base, stores, scratch / "base-adapter")
    folder = scratch / "model"
    if not weights:
        modelfiles.fetch_tokenizer(base.model, stores, folder)
        if adapter is not None:
            check_headless(adapter, base.lineage[-1].uri)
            check_ties(folder, adapter, base.lineage[-1].uri)
    elif adapter is None:
        objects = modelfiles.fetch_model(base.model, stores, folder)
        return BaseFiles(base, folder, None, objects, _cached(base, stores, objects))
    elif not (folder / _MERGED).exists():
        beneath = scratch / "model-beneath"
        objects = modelfiles.fetch_model(base.model, stores, beneath)
        whole = BaseFiles(base, beneath, None, objects)
        merge_adapter(beneath, whole.weights(stores), adapter, folder)
        _remove(beneath)
    return BaseFiles(base, folder, adapter)


def _cached(base: Base, stores: Stores, objects: tuple[ObjectInfo, ...]) -> Path | None:
    """Return the folder of the node's cache with the objects, locked until this process ends; None
    without a cache."""
    cache = os.environ.get(ENV_MODEL_CACHE)
    found = (
        cached(Path(cache), stores.of(base.model.storage), objects) if cache and objects else None
    )
    if found is None:
        return None
    _held.append(found[1])
    return found[0]


def check_headless(adapter: Path, source: str) -> None:
    """Refuse an adapter with a classification head, which cannot be merged into the base model.

    Raises:
        UserError: 'NotMergeable'.
    """
    settings = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))
    if settings.get("modules_to_save"):
        raise UserError(
            "NotMergeable",
            f"{source}: its adapter comes with a head ({', '.join(settings['modules_to_save'])}),"
            " so it cannot be merged: publish the first job with output.format: Both",
        )


def check_ties(whole: Path, adapter: Path, source: str) -> None:
    """Refuse an adapter of an embedding that is tied to the output head, or of that head: merging
    would change both. Only the model's configuration is read.

    Raises:
        UserError: 'NotMergeable'.
    """
    model = build_base(whole, init="Meta", pack=False)
    get_peft_model(model, PeftConfig.from_pretrained(str(adapter)))
    if ends := adapted_ties(model):
        raise UserError(
            "NotMergeable",
            f"{source}: its adapter changes one of {' and '.join(ends)}, which are one weight of"
            " this model (tie_word_embeddings), so it cannot be merged: leave them out of the"
            " first job's targetModules",
        )


def merge_adapter(whole: Path, weights: Weights, adapter: Path, folder: Path) -> None:
    """Write the model of a folder with an adapter in peft's layout merged into its weights. The
    result is in float32, so that weights are rounded only once, when they are loaded. All other
    files are copied from the model."""
    _remove(folder)
    folder.mkdir(parents=True)
    model = build_base(whole, torch.float32, Pretrained(weights), pack=False)
    tuned = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    merged = tuned.merge_and_unload()
    # The model's own generation config is copied below; save_pretrained would validate it first.
    merged.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    merged.save_pretrained(str(folder), max_shard_size=MAX_SHARD)
    for path in modelfiles.small_files(whole):
        target = folder / path.relative_to(whole)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    (folder / _MERGED).touch()


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
