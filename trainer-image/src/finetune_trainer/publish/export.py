"""Convert a checkpoint to files that plain ``transformers`` and ``peft`` can load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch.distributed.checkpoint.storage import StorageReader
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune_api.run_spec import RunSpec
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.adaptersum import add_adapters
from finetune_trainer.engine.base import MAX_SHARD, BaseFiles, fetch_base
from finetune_trainer.engine.checkpointing.dcp import load_weights
from finetune_trainer.engine.checkpointing.dcp_storage import METADATA, CheckpointReader
from finetune_trainer.engine.model import (
    CPU,
    GENERATION,
    TEXT,
    Pretrained,
    Purpose,
    build_base,
    configuration,
    load_tokenizer,
    purpose_of,
)
from finetune_trainer.engine.pissa import INITIAL, is_kept, join
from finetune_trainer.engine.placeholders import materialize
from finetune_trainer.engine.tuning.methods import Tuned, apply_method
from finetune_trainer.failures import UserError
from finetune_trainer.prepared.manifest import DataManifest
from finetune_trainer.storage.checkpoint_files import read_file
from finetune_trainer.storage.objects import ObjectStore, Stores
from finetune_trainer.storage.run_head import read_head
from finetune_trainer.storage.weight_reader import Weights


@dataclass(frozen=True)
class Loaded:
    """A tuned model, in float32 on the CPU."""

    model: Tuned
    """Weights that were not trained may be on the meta device, if only an adapter is written."""
    tokenizer: PreTrainedTokenizerBase
    base: BaseFiles


def load_tuned(
    run_spec: RunSpec,
    stores: Stores,
    checkpoint_uri: str | None,
    classes: Sequence[str],
    scratch: Path,
    whole: bool,
) -> Loaded:
    """Return the tuned model with the weights of a checkpoint.

    Args:
        classes: names of the classes, for a task with classes.
        whole: False leaves weights that were not trained on the meta device: an adapter can be
            written without fetching the base's weights.

    Raises:
        UserError: 'CheckpointGone' if HEAD no longer names the checkpoint.
        CorruptCheckpoint: files of the checkpoint differ from those that HEAD lists.
    """
    reader = checkpoint_reader(stores.default, run_spec.run_uri, checkpoint_uri)
    base = fetch_base(run_spec, stores, scratch, weights=whole)
    weights = base.weights(stores) if whole else None
    model = tuned_model(base.folder, weights, reader, run_spec.spec, classes)
    return Loaded(model, load_tokenizer(base.folder), base)


def checkpoint_reader(
    store: ObjectStore, run_uri: str, checkpoint_uri: str | None
) -> CheckpointReader:
    """Return a reader of a checkpoint.

    Raises: as ``load_tuned``.
    """
    found = read_head(store, run_uri)
    named = found[0].named if found else ()
    checkpoint = next((c for c in named if c.uri == checkpoint_uri), None)
    if checkpoint is None:
        raise UserError(
            "CheckpointGone",
            f"{checkpoint_uri} is not among the checkpoints of {run_uri}/HEAD.json; give"
            " spec.rerunToken a new value to train again",
        )
    return CheckpointReader(store, checkpoint, read_file(store, checkpoint, METADATA))


def tuned_model(
    base: Path,
    weights: Weights | None,
    checkpoint: StorageReader,
    spec: FineTuneJobSpec,
    classes: Sequence[str] = (),
) -> Tuned:
    """Return the model of a folder with the weights of a checkpoint, in float32 on the CPU. Only
    the weights of the checkpoint are read.

    Args:
        weights: weights of the base; None leaves weights that were not trained on the meta device.
        classes: as for ``load_tuned``.
    """
    if weights is None:
        purpose = purpose_of(spec, classes)
        model = apply_method(build_base(base, init="Meta", purpose=purpose, pack=False), spec)
        _allocate_trained(model)
    else:
        model = initial_model(base, weights, spec, classes)
    load_weights(checkpoint, model)
    return model.eval()


def initial_model(
    base: Path, weights: Weights, spec: FineTuneJobSpec, classes: Sequence[str] = ()
) -> Tuned:
    """Return the model of a folder as a run begins with it, in float32 on the CPU."""
    purpose = purpose_of(spec, classes)
    return apply_method(build_base(base, torch.float32, Pretrained(weights), purpose), spec)


def write_formats(
    loaded: Loaded, spec: FineTuneJobSpec, manifest: DataManifest, folder: Path
) -> list[str]:
    """Write the model in the formats of ``output.format``, and return the names of their folders.
    Modifies the model."""
    wanted, stops, classes = spec.effective_output_format, manifest.stop_token_ids, manifest.classes
    formats = []
    if wanted in ("Adapter", "Both"):
        write_adapter(
            loaded.model, loaded.tokenizer, loaded.base, spec, stops, folder / "adapter", classes
        )
        formats.append("adapter")
    if wanted in ("Merged", "Both"):
        purpose = purpose_of(spec, classes)
        write_merged(
            loaded.model, loaded.tokenizer, loaded.base.folder, stops, folder / "merged", purpose
        )
        formats.append("merged")
    return formats


def _allocate_trained(model: Tuned) -> None:
    """Allocate the parameters that checkpoints hold on the CPU; the others stay on meta."""
    trained = {p for name, p in model.named_parameters() if is_kept(name, p)}
    materialize(model, CPU, only=trained.__contains__)


def full_copy_bytes(base: Path, purpose: Purpose) -> int:
    """Return the bytes of a full model's weights in the dtype of the base."""
    model = build_base(base, init="Meta", purpose=purpose, pack=False)
    dtype: Any = model.config.dtype or torch.float32
    return sum(p.numel() for p in model.parameters()) * int(dtype.itemsize)


def write_adapter(
    model: Tuned,
    tokenizer: PreTrainedTokenizerBase,
    base: BaseFiles,
    spec: FineTuneJobSpec,
    stops: list[int],
    folder: Path,
    classes: Sequence[str] = (),
) -> None:
    """Write the adapter in peft's layout, combined with the adapter that is merged into the base's
    weights, if any. With classes, the configuration that names them is written too, else the
    generation config.

    Args:
        stops: as for ``write_merged``.
    """
    assert isinstance(model, PeftModel), "validated: output.format Adapter requires an adapter"
    if INITIAL in model.peft_config:
        model = _plain_adapter(model, base.folder, spec)
    config = model.peft_config["default"]
    name, _, revision = base.base.model.source.removeprefix("hf://").partition("@")
    config.base_model_name_or_path = name
    config.revision = revision or None
    # The vocabulary is unchanged; by default peft would query the hub to check that.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; ours is one level up
    if base.adapter is not None:
        add_adapters(base.adapter, folder, folder)
    tokenizer.save_pretrained(str(folder))
    own = configuration(base.folder, purpose_of(spec, classes))
    if classes:
        own.save_pretrained(str(folder))
    else:
        _generation_config(base.folder, stops, own).save_pretrained(str(folder))


def _plain_adapter(model: PeftModel, base: Path, spec: FineTuneJobSpec) -> PeftModel:
    """Return PiSSA's two adapters as one adapter of twice the rank and the same scale."""
    lora = spec.method.effective_lora
    doubled = lora.model_copy(update={"rank": 2 * lora.rank, "initialization": "Default"})
    method = spec.method.model_copy(update={"lora": doubled})
    plain = apply_method(
        build_base(base, init="Meta", pack=False), spec.model_copy(update={"method": method})
    )
    assert isinstance(plain, PeftModel), "same method as the model"
    config: Any = plain.peft_config["default"]
    config.lora_alpha = lora.effective_alpha * (2**0.5 if lora.use_rslora else 2)
    _allocate_trained(plain)
    join(plain, model)
    return plain.eval()


def write_merged(
    model: Tuned,
    tokenizer: PreTrainedTokenizerBase,
    base: Path,
    stops: list[int],
    folder: Path,
    purpose: Purpose = TEXT,
) -> None:
    """Write a full model in Hugging Face layout, in the dtype of the base's weights.

    Adapters are merged in float32 and rounded once. Modifies ``model``.

    Args:
        stops: tokens that end trained answers; added to the stop tokens of the generation config.
    """
    whole = _merged(model) if isinstance(model, PeftModel) else model
    config = configuration(base, purpose)
    torch.nn.Module.to(whole, config.dtype or torch.float32)
    # The configuration of the base, without the changes made for training.
    whole.config = config
    if whole.can_generate():
        whole.generation_config = _generation_config(base, stops, config)
    whole.save_pretrained(str(folder), max_shard_size=MAX_SHARD)
    tokenizer.save_pretrained(str(folder))


def _merged(model: PeftModel) -> PreTrainedModel:
    """Return the model with its adapter merged and its trained head in place: peft unwraps single
    modules, but not heads of several layers."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.modules_to_save["default"])
    merged: Any = model
    return merged.merge_and_unload()  # type: ignore[no-any-return]


_SAMPLING: Final = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}
"""Sampling settings and their neutral values."""


def _generation_config(base: Path, stops: list[int], config: PreTrainedConfig) -> GenerationConfig:
    if (base / GENERATION).exists():
        found = GenerationConfig.from_pretrained(base)
    else:
        found = GenerationConfig.from_model_config(config)
    known = found.eos_token_id
    ends = {*stops, *(known if isinstance(known, list) else [known])} - {None}
    # Older models have sampling settings without do_sample; save_pretrained refuses that.
    if not found.do_sample and any(
        getattr(found, name) not in (None, neutral) for name, neutral in _SAMPLING.items()
    ):
        found.do_sample = True
    found.eos_token_id = sorted(ends) if len(ends) > 1 else next(iter(ends), None)
    return found
