"""Files of a base model's folder: find them, check that they are complete, and fetch them.

A model folder is in Hugging Face layout: config.json, weights as safetensors (one file, or an
index and its shards), and the tokenizer's files. It is untrusted: names that are no plain file
names are passed over, and weights are safetensors, never pickles.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from finetune_api.sources import ModelLocation
from finetune_trainer.failures import StorageUnavailable, UserError
from finetune_trainer.storage.claim_paths import check_inside, claim_path
from finetune_trainer.storage.filenames import is_plain
from finetune_trainer.storage.modelconfig import CONFIG, check_config, check_size, load_config
from finetune_trainer.storage.objects import ObjectInfo, Stores

WEIGHTS: Final = "model.safetensors"
WEIGHTS_INDEX: Final = "model.safetensors.index.json"
SMALL: Final = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""Files fetched besides the weights: configuration and tokenizer."""
NOT_TOKENIZER: Final = (CONFIG, "generation_config.json", WEIGHTS_INDEX)

_PARALLEL_FILES: Final = 4


@dataclass(frozen=True)
class ModelLimits:
    """Limits from the model's configuration."""

    max_length: int | None
    """``max_position_embeddings``; None if the architecture has no bound."""
    vocabulary: int
    """``vocab_size``: rows of the embedding."""


def fetch_tokenizer(location: ModelLocation, stores: Stores, folder: Path) -> Path:
    """Fetch configuration and tokenizer to ``folder``, and check that the source has the weights,
    without fetching them.

    Raises:
        UserError: 'ModelNotFound', naming the address and the required files.
    """
    source = location.source
    if source.startswith("s3://"):
        _fetch_small(location, stores, folder)
    elif source.startswith("hf://"):
        hub = _Hub.of(location, stores)
        _replace_link(folder, hub.fetch(SMALL))
        names = hub.names(folder)
        _require(source, names, CONFIG, *_weights(source, folder, names))
    else:
        _link_claim(source, folder)
    _check_small(source, folder)
    return folder


def fetch_model(location: ModelLocation, stores: Stores, folder: Path) -> tuple[ObjectInfo, ...]:
    """Fetch the model to ``folder``, except weights in object storage, which are read from there.

    Returns:
        The objects that hold the weights; empty if the weights are in the folder, fetched from the
        hub or linked from a claim.

    Raises:
        UserError: 'ModelNotFound', naming the address and the required files;
            'UnsupportedModel', 'UnreadableModel', 'OutsideClaim', naming the file.
    """
    source = location.source
    objects: tuple[ObjectInfo, ...] = ()
    if source.startswith("s3://"):
        objects = _fetch_small(location, stores, folder)
    elif source.startswith("hf://"):
        hub = _Hub.of(location, stores)
        _replace_link(folder, hub.fetch(SMALL))
        weights = _weights(source, folder, hub.names(folder))
        _replace_link(folder, hub.fetch((*SMALL, *weights)))
        _require(source, _names(folder), CONFIG, *weights)
    else:
        _link_claim(source, folder)
    _check_small(source, folder)
    return objects


def read_limits(folder: Path, source: str) -> ModelLimits:
    """Return the limits from the configuration in a model folder.

    Raises:
        UserError: 'UnsupportedModel' if transformers does not support the configuration.
    """
    try:
        config = load_config(folder).get_text_config()
        return ModelLimits(getattr(config, "max_position_embeddings", None), config.vocab_size)
    except Exception as error:  # of the classes of hundreds of architectures
        raise UserError(
            "UnsupportedModel",
            f"{source}/{CONFIG}: not the configuration of a language model that transformers knows:"
            f" {first_line(error)}",
        ) from None


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a fetched folder that the tokenizer depends on."""
    return [path for path in small_files(folder) if path.name not in NOT_TOKENIZER]


def small_files(folder: Path) -> list[Path]:
    """Return configuration and tokenizer files of a fetched folder, without the weights' index."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and _is_small(path.relative_to(folder).as_posix())
        and path.name != WEIGHTS_INDEX
    ]


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model's folder. The folder may contain other safetensors files,
    such as an older version or other shards."""
    names = (path.name for path in folder.iterdir())
    return [folder / name for name in _weights(str(folder), folder, names)]


def first_line(error: Exception) -> str:
    """Return the first line of a library's error message."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _weights(source: str, folder: Path, names: Iterable[str]) -> list[str]:
    """Return the names of the weight files; for shards, those in the index in ``folder``.

    Raises:
        UserError: 'UnreadableModel', the index is damaged, or names files that are not safetensors.
    """
    if WEIGHTS_INDEX not in names:
        return [WEIGHTS]
    try:
        found = set(json.loads((folder / WEIGHTS_INDEX).read_bytes())["weight_map"].values())
        wrong = [n for n in found if not (is_plain(n) and n.endswith(".safetensors"))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            "UnreadableModel",
            f"{source}/{WEIGHTS_INDEX}: not an index of weight files"
            f" ({type(error).__name__}: {error}); write the model again",
        ) from None
    if wrong:
        raise UserError(
            "UnreadableModel",
            f"{source}/{WEIGHTS_INDEX}: names {wrong[0]!r}; weights must be .safetensors files"
            " beside it (pickles such as .bin and .pt are never read): convert the model",
        )
    return sorted(found)


def _check_small(source: str, folder: Path) -> None:
    for path in small_files(folder):
        check_size(source, path.relative_to(folder).as_posix(), path.stat().st_size)
    check_config(source, folder)


def _require(source: str, there: Iterable[str], *wanted: str) -> None:
    names = set(there)
    missing = [name for name in wanted if name not in names]
    if not missing:
        return
    shown = ", ".join(sorted(names)[:8]) or "nothing"
    raise UserError(
        "ModelNotFound",
        f"{source}: {', '.join(missing[:3])} is missing (there: {shown}). spec.model.source must"
        f" name a folder in Hugging Face layout ({CONFIG}, {WEIGHTS} or {WEIGHTS_INDEX} and its"
        " parts, tokenizer.json and tokenizer_config.json), or what a run has published (the folder"
        " that holds manifest.json)",
    )


def _is_small(name: str) -> bool:
    """Return whether a file (name relative to the model folder) is configuration or tokenizer."""
    folder, _, base = name.rpartition("/")
    suffixes = tuple(pattern.removeprefix("*") for pattern in SMALL)
    inside = folder in ("", "additional_chat_templates")
    return inside and is_plain(base) and base.endswith(suffixes)


def _fetch_small(location: ModelLocation, stores: Stores, folder: Path) -> tuple[ObjectInfo, ...]:
    """Fetch configuration and tokenizer of a model in object storage, except files present in the
    same size; return the objects that hold the weights."""
    store, source = stores.of(location.storage), f"{location.source.rstrip('/')}/"
    found = {info.uri.removeprefix(source): info for info in store.list(source)}
    _require(location.source, found, CONFIG)

    def fetch(name: str) -> None:
        check_size(location.source, name, found[name].size)
        path = folder / name
        if not (path.exists() and path.stat().st_size == found[name].size):
            store.download(found[name].uri, path)

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(fetch, filter(_is_small, found)))
    weights = _weights(location.source, folder, found)
    _require(location.source, found, *weights)
    return tuple(found[name] for name in weights)


def _names(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def _link_claim(source: str, folder: Path) -> None:
    path = claim_path(source)
    names = _names(path)
    if WEIGHTS_INDEX in names:
        check_inside(path / WEIGHTS_INDEX, source)
    weights = _weights(source, path, names)
    _require(source, names, CONFIG, *weights)
    for file in (*small_files(path), *(path / name for name in weights)):
        check_inside(file, source)
    _replace_link(folder, path)


def _replace_link(folder: Path, target: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
    folder.symlink_to(target.resolve(), target_is_directory=True)


@dataclass(frozen=True)
class _Hub:
    """A model of the Hugging Face hub, read through the hub cache."""

    source: str
    repository: str
    revision: str | None
    token: str | None

    @classmethod
    def of(cls, location: ModelLocation, stores: Stores) -> _Hub:
        repository, _, revision = location.source.removeprefix("hf://").partition("@")
        return cls(
            location.source, repository, revision or None, stores.hub_token(location.storage)
        )

    def fetch(self, patterns: Iterable[str]) -> Path:
        """Return a folder with the matching files, fetched if they are not cached."""
        try:
            return Path(
                snapshot_download(
                    self.repository,
                    revision=self.revision,
                    allow_patterns=list(patterns),
                    token=self.token,
                )
            )
        except Exception as error:
            raise self._failure(error) from None

    def names(self, folder: Path) -> list[str]:
        """Return the names of the model's files; in offline mode, those of the cache."""
        try:
            info = HfApi(token=self.token).model_info(self.repository, revision=self.revision)
        except OfflineModeIsEnabled:
            return _names(folder)
        except Exception as error:
            raise self._failure(error) from None
        return [entry.rfilename for entry in info.siblings or []]

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError) or (
            isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        ):
            return UserError(
                "ModelNotFound",
                f"{self.source}: the hub has no such model or revision, or HF_TOKEN of the storage"
                f" Secret may not read it: {first_line(error)}",
            )
        if isinstance(error, LocalEntryNotFoundError | HfHubHTTPError | ConnectionError):
            return StorageUnavailable(
                "HubUnreachable",
                f"{self.source}: the Hugging Face hub does not answer"
                f" ({first_line(error)}); check the network, or put the model into object"
                " storage",
            )
        return error
