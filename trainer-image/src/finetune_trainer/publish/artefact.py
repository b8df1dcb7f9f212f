"""The published model is the tested one: load the model again from object storage, and compare.

    objects of a format ──► empty folder ──► plain transformers, peft (``plain``)
        ──► tokens of the prompts, losses, greedy answers ──► within the bound of ``agreement``

It happens before ``manifest.json`` is written, so a model that differs is never complete. The
comparison spans all that leads from the tested weights to a user's: export, merge, rounding,
upload, tokenizer, chat template, generation config.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from finetune_api.evaluation_results import ArtefactResult
from finetune_api.sources import ModelLocation
from finetune_api.tasks import TASKS, TaskName
from finetune_trainer.engine.model import CPU
from finetune_trainer.engine.sharding import capacity
from finetune_trainer.evaluate.agreement import (
    Agreement,
    Outcome,
    compare,
    same_answer,
    same_tokens,
)
from finetune_trainer.failures import TrainerError
from finetune_trainer.liveness import progressed
from finetune_trainer.publish import plain
from finetune_trainer.publish.cases import Case, Compared
from finetune_trainer.publish.files import download_folder
from finetune_trainer.storage.modelconfig import load_tokenizer
from finetune_trainer.storage.modelfiles import fetch_model, weight_files
from finetune_trainer.storage.objects import ObjectInfo, Stores
from finetune_trainer.storage.published import PublishedFile

ROOM: Final = 1.25
"""Memory to load and ask a model, as a multiple of its weights' bytes."""
_WEIGHTS: Final = ".safetensors"
_UNREADABLE: Final = (
    plain.IncompleteArtefact,
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    SafetensorError,
)
"""Errors of transformers, peft and safetensors about the files of a model."""


class ArtefactDiffers(TrainerError):
    """The published model is not the tested one."""

    def __init__(self, uri: str, what: str) -> None:
        super().__init__(
            "ArtefactDiffers",
            f"{uri}: loaded again, this is not the model that was tested: {what}. The model has no"
            " manifest.json, so it does not count as published. Report this; with"
            " evaluation.artefactCheck: Off the run publishes the model as it is",
        )


@dataclass(frozen=True)
class Artefact:
    """A published model."""

    uri: str
    """Address of the folders of the formats."""
    formats: Sequence[str]
    """adapter, merged."""
    files: Mapping[str, PublishedFile]
    """Files of the formats, by name relative to ``uri``."""
    task: TaskName
    base: ModelLocation
    """The whole model on which an adapter is loaded."""
    tokenizer: Path
    """Folder with the base model's tokenizer, which made the prepared tokens."""


class _TooLarge(Exception):
    """The weights of a format need more memory or disk than there is."""


def check(artefact: Artefact, compared: Compared, stores: Stores, scratch: Path) -> ArtefactResult:
    """Load each format from object storage, and compare each with the tested model.

    A format whose weights need more memory or disk than there is, is left out.

    Args:
        scratch: folder for temporary files.

    Raises:
        ArtefactDiffers: a format cannot be loaded, or differs by more than the bound.
        StorageDenied, StorageUnavailable: object storage cannot be read.
    """
    found: dict[str, Agreement] = {}
    left_out: dict[str, str] = {}
    for name in artefact.formats:
        folder = scratch / "artefact"
        shutil.rmtree(folder, ignore_errors=True)
        gc.collect()  # of the model before, so that memory holds one at a time
        try:
            _fetch(artefact, name, stores, folder)
            found[name] = _agreement(artefact, name, compared, folder)
        except _TooLarge as error:
            left_out[name] = str(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return ArtefactResult(
        formats=list(found),
        side=compared.side,
        samples=len(compared.cases),
        largest_loss_difference=max((each.largest for each in found.values()), default=0.0),
        answers_equal=min((each.equal for each in found.values()), default=0),
        of=max((each.of for each in found.values()), default=0),
        left_out=left_out,
    )


def not_compared(formats: Sequence[str]) -> ArtefactResult:
    """The result of a run that has nothing to compare its published model with."""
    why = (
        "there is no test set and the base model does not fit the memory of publish, or no sample"
        " has a finite loss"
    )
    return ArtefactResult(
        formats=[], side="train", samples=0, largest_loss_difference=0.0, answers_equal=0, of=0,
        left_out=dict.fromkeys(formats, why),
    )  # fmt: skip


def _fetch(artefact: Artefact, name: str, stores: Stores, folder: Path) -> None:
    """Fetch a format to ``folder / name``; of an adapter also its base, to ``folder / "base"``.

    Raises:
        _TooLarge: with the figures.
    """
    files = {n: file for n, file in artefact.files.items() if n.startswith(f"{name}/")}
    on_disk = sum(file.bytes for n, file in files.items() if n.endswith(_WEIGHTS))
    needed, base = on_disk, folder / "base"
    objects_of_base: Sequence[ObjectInfo] = ()
    if name == "adapter":
        objects_of_base = fetch_model(artefact.base, stores, base)
        there = () if objects_of_base else weight_files(base)
        downloads = sum(info.size for info in objects_of_base)
        on_disk += downloads
        needed += downloads + sum(path.stat().st_size for path in there)
    folder.mkdir(parents=True, exist_ok=True)
    for what, wanted, has in (
        ("memory", needed, capacity(CPU, 1)),
        ("free disk", on_disk, shutil.disk_usage(folder).free),
    ):
        if wanted * ROOM > has:
            raise _TooLarge(
                f"its {wanted:,} bytes of weights do not fit the {has:,} bytes of {what}"
            )
    for info in objects_of_base:
        store = stores.of(artefact.base.storage)
        store.download(info.uri, base / info.uri.rpartition("/")[2])
    download_folder(stores.default, artefact.uri, files, folder)


def _agreement(artefact: Artefact, name: str, compared: Compared, folder: Path) -> Agreement:
    """Return the agreement of a format that was fetched, which is within the bound."""
    uri, generates = f"{artefact.uri}/{name}", TASKS[artefact.task].generates
    try:
        if name == "adapter":
            model = plain.load_adapter(folder / name, folder / "base", artefact.task)
        else:
            model = plain.load_merged(folder / name, artefact.task)
        tokenizer = load_tokenizer(folder / name)
    except _UNREADABLE as error:
        if "allocate memory" in str(error):  # of torch's allocator on the CPU: a RuntimeError
            raise
        raise ArtefactDiffers(uri, f"it cannot be loaded: {error}") from error
    _check_tokenizer(tokenizer, load_tokenizer(artefact.tokenizer), uri)
    for case in compared.cases:
        _check_text(tokenizer, case, uri)
    outcomes = [
        _outcome(model, tokenizer, case, uri, generates=generates) for case in compared.cases
    ]
    losses, names = zip(*((case.loss, case.name) for case in compared.cases), strict=True)
    found = compare(losses, outcomes, names, compared.bound(model.dtype))
    if found.difference is not None:
        raise ArtefactDiffers(uri, found.difference)
    return found


def _check_tokenizer(
    published: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase, uri: str
) -> None:
    """Check what a user's conversations are rendered with. Prepared prompts are rendered text, and
    do not show which template has made them; that was the base model's."""
    for name in ("chat_template", "bos_token", "eos_token"):
        ours, theirs = getattr(published, name), getattr(base, name)
        if ours != theirs:
            raise ArtefactDiffers(
                uri, f"its tokenizer has {name} {_shown(ours)}, the base model's {_shown(theirs)}"
            )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _check_text(tokenizer: PreTrainedTokenizerBase, case: Case, uri: str) -> None:
    """Check that a user's tokens of a text are the prepared ones."""
    text = case.text
    if text is None:
        return
    tokens = plain.tokens_of(tokenizer, text.text, framed=text.framed)
    if not same_tokens(text.ids, tokens, text.answered, cut=text.cut):
        raise ArtefactDiffers(
            uri,
            f"its tokenizer makes {_shown(tokens)} of the text of {case.name}, tested with"
            f" {_shown(text.ids.tolist())}",
        )


def _outcome(
    model: Any, tokenizer: PreTrainedTokenizerBase, case: Case, uri: str, *, generates: bool
) -> Outcome:
    """Return what the published model does with a sample."""
    progressed()
    known = getattr(model.config, "label2id", {})
    if case.label is not None and case.label not in known:
        raise ArtefactDiffers(uri, f"its config.json has no class {case.label!r} ({_shown(known)})")
    loss, tested = plain.loss_of(model, case.sample, case.label), case.answer
    if tested is None:
        return Outcome(loss)
    if not generates:
        return Outcome(loss, plain.class_of(model, case.sample) == tested.text)
    said, ended = plain.answer_of(model, tokenizer, tested.prompt, tested.most)
    return Outcome(loss, same_answer(tested.text, said, ended, must_end=tested.must_end))
