"""``finetune current``, ``promote`` and ``rollback``: the model in use at a destination."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_api.methods import METHODS
from finetune_trainer.failures import TrainerError, UserError, printable
from finetune_trainer.local.display import show_error
from finetune_trainer.local.storage import published_store
from finetune_trainer.storage.current import (
    CurrentFile,
    CurrentPointer,
    now,
    rolled_back,
    used_model,
)
from finetune_trainer.storage.published import MANIFEST, read_published


def current(
    destination: str, state_dir: Path, *, endpoint: str | None, local_storage: bool,
    change: Change | None = None,
) -> int:  # fmt: skip
    """Show ``CURRENT.json`` of a destination, after a change of it if there is one, and return the
    exit code."""
    console = Console()
    try:
        with published_store(state_dir, endpoint, local_storage) as store:
            pointer = CurrentPointer(store, destination)
            file = pointer.change(change(pointer)) if change else pointer.read().file
    except TrainerError as error:
        return show_error(console, error)
    _show(console, pointer.uri, file)
    return 0


Change = Callable[[CurrentPointer], Callable[[CurrentFile], CurrentFile]]


def back(run: str | None) -> Change:
    """An earlier model is the current one again.

    Args:
        run: ID of the run that published it; None: the one before the current.
    """

    def change(pointer: CurrentPointer) -> Callable[[CurrentFile], CurrentFile]:
        time = now()
        return lambda file: rolled_back(file, pointer.uri, run, time)

    return change


def to(run: str) -> Change:
    """A published run becomes the current model, whatever its gates said.

    Args:
        run: ID of a run below the destination.
    """

    def change(pointer: CurrentPointer) -> Callable[[CurrentFile], CurrentFile]:
        uri = f"{pointer.destination.rstrip('/')}/{run}"
        found = read_published(pointer.store, uri)
        if found is None:
            raise UserError(
                "ModelNotFound", f"{uri}/{MANIFEST} does not exist: no run published it"
            )
        if not METHODS[found[0].method].trains:
            raise UserError(
                "NoModelPublished",
                f"{uri}: this run has evaluated a model, and published none; promote a run that"
                " trained one",
            )
        model = used_model(uri, *found)
        return lambda file: file.moved(model)

    return change


def _show(console: Console, uri: str, file: CurrentFile) -> None:
    if file.current is None:
        console.print(f"{uri}: no model is in use yet", markup=False, soft_wrap=True)
        return
    table = Table(title=Text(uri), title_justify="left")
    for name in ("", "run", "job", "since", "model"):
        table.add_column(name, overflow="fold")
    for number, model in enumerate([file.current, *file.earlier]):
        mark = "current" if number == 0 else ""
        cells = mark, model.run, model.job.name, model.since, model.uri
        table.add_row(*(Text(printable(cell)) for cell in cells))  # others may write the file
    console.print(table)
    for name, count in file.decided.items():
        text = f"Test set {printable(name)} has decided {count} times"
        console.print(text, markup=False, highlight=False)
