"""The model that a run starts from, as files of this machine: in prepare, training and publish.

    find_base ──► a whole model                      ──► folder, and weights where they are
              └─► a whole model, a published adapter ──► both merged, in a folder

What comes out is a folder in Hugging Face layout, whose weights may be in object storage still, so
nothing above knows of adapters beneath it but publish, which adds the new one to the old.
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
"""What keeps folders of the cache while this process lives."""
_MERGED: Final = ".merged"
"""Written last: a folder that has it was merged to the end, and a start in place keeps it."""


@dataclass(frozen=True)
class BaseFiles:
    """The base model on this machine's disk."""

    base: Base
    """Where it comes from."""
    folder: Path
    """The whole model in Hugging Face layout, but for weights that are elsewhere or were not asked
    for."""
    adapter: Path | None
    """Published adapter that the weights hold already."""
    objects: tuple[ObjectInfo, ...] = ()
    """What holds the weights, where they are not in the folder."""
    cached: Path | None = None
    """Folder of this node that holds the same."""

    def weights(self, stores: Stores) -> Weights:
        """The weights, to be read."""
        if self.cached is not None:
            return Weights.of_files(sorted(self.cached.iterdir()))
        if self.objects:
            return Weights.of_objects(stores.of(self.base.model.storage), self.objects)
        return Weights.of_folder(self.folder)

    def in_version_of(self, first: BaseFiles) -> BaseFiles:
        """The same with the weights that another process has listed: all of a gang read one
        version, and what this node keeps of another is not read."""
        same = self.objects == first.objects
        return replace(self, objects=first.objects, cached=self.cached if same else None)


def fetch_base(run_spec: RunSpec, stores: Stores, scratch: Path, weights: bool) -> BaseFiles:
    """Makes ``scratch / "model"`` hold the model that the run starts from.

    Args:
        scratch: must hold the model in float32 where an adapter is merged into it.
        weights: False fetches configuration, tokenizer and adapter alone, and makes sure that the
            weights are where the model is.

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
    """Folder of the node's cache that holds the objects, until this process ends."""
    cache = os.environ.get(ENV_MODEL_CACHE)
    found = (
        cached(Path(cache), stores.of(base.model.storage), objects) if cache and objects else None
    )
    if found is None:
        return None
    _held.append(found[1])
    return found[0]


def check_headless(adapter: Path, source: str) -> None:
    """Refuse an adapter that holds a classification head: the model beneath has no place for it.

    Raises:
        UserError: 'NotMergeable'.
    """
    settings = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))
    if settings.get("modules_to_save"):
        raise UserError(
            "NotMergeable",
            f"{source}: its adapter comes with a head ({', '.join(settings['modules_to_save'])}),"
            " which no other model can begin from: publish the first job with output.format: Both",
        )


def check_ties(whole: Path, adapter: Path, source: str) -> None:
    """Refuse an adapter of an embedding that is the output head too, or of that head: merged, it
    would change both. Of the model only its configuration is read.

    Raises:
        UserError: 'NotMergeable'.
    """
    model = build_base(whole, init="Meta", pack=False)
    get_peft_model(model, PeftConfig.from_pretrained(str(adapter)))
    if ends := adapted_ties(model):
        raise UserError(
            "NotMergeable",
            f"{source}: its adapter changes one of {' and '.join(ends)}, which are one weight of"
            " this model (tie_word_embeddings), and no weights can hold that: leave them out of the"
            " first job's targetModules",
        )


def merge_adapter(whole: Path, weights: Weights, adapter: Path, folder: Path) -> None:
    """Write the model of a folder with an adapter in peft's layout merged into its weights, in
    float32: they are rounded when they are loaded, once. All else is the model's own."""
    _remove(folder)
    folder.mkdir(parents=True)
    model = build_base(whole, torch.float32, Pretrained(weights), pack=False)
    tuned = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    merged = tuned.merge_and_unload()
    # What the model's own says is copied; written from here, it would be judged first.
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
