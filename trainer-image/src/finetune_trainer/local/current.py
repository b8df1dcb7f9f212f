"""``finetune current`` and ``finetune rollback``: the model in use at a destination."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_trainer.failures import TrainerError, exit_code, failure_of, printable
from finetune_trainer.local.state import StateFolder
from finetune_trainer.storage.current import CurrentFile, CurrentPointer, now, rolled_back
from finetune_trainer.storage.objectstore import ObjectStore
from finetune_trainer.storage.s3server import EmbeddedS3


def current(
    destination: str, state_dir: Path, *, endpoint: str | None, local_storage: bool, back: bool,
    run: str | None = None,
) -> int:  # fmt: skip
    """Show ``CURRENT.json`` of a destination, or move it back, and return the exit code.

    Args:
        back: make an earlier model the current one.
        run: ID of the run that published it; None: the one before the current.
    """
    console = Console()
    try:
        with _store(state_dir, endpoint, local_storage) as store:
            pointer = CurrentPointer(store, destination)
            if back:
                time = now()
                file = pointer.change(lambda f: rolled_back(f, pointer.uri, run, time))
            else:
                file = pointer.read().file
    except TrainerError as error:
        failure = failure_of(error)
        console.print(f"[bold red]{failure.failure_class}[/] ({failure.reason})", highlight=False)
        console.print(error.message, markup=False, highlight=False, soft_wrap=True)
        return int(exit_code(failure))
    _show(console, pointer.uri, file)
    return 0


@contextmanager
def _store(state_dir: Path, endpoint: str | None, local_storage: bool) -> Iterator[ObjectStore]:
    if not local_storage:
        yield ObjectStore(endpoint)
        return
    with EmbeddedS3(StateFolder(state_dir).storage) as server:
        yield server.store()


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
