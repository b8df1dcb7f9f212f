"""``finetune interpolate``: a point between the base and the tuned model of a published run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from finetune_api.base import InvalidSpec
from finetune_api.names import ENV_PVC_ROOT, ExitCode
from finetune_api.remedy import Scan
from finetune_trainer.failures import TrainerError, printable
from finetune_trainer.local.display import show_error
from finetune_trainer.local.runner import HELD, MANIFEST_FAULT
from finetune_trainer.local.state import StateFolder
from finetune_trainer.local.storage import copy_published, published_store, storage_for
from finetune_trainer.publish.point import PublishedPoint, publish_point
from finetune_trainer.publish.point_spec import read_run_spec
from finetune_trainer.publish.results import remedy_text
from finetune_trainer.storage.objects import Stores


def interpolate(
    uri: str, state_dir: Path, *, endpoint: str | None, local_storage: bool,
    scan: Scan | None = None, points: Sequence[str] = (),
) -> int:  # fmt: skip
    """Choose and publish a point, and return the exit code: ``HELD`` if none qualifies, or the
    chosen one misses a gate.

    Args:
        uri: folder of the published model.
        scan, points: as ``read_run_spec``.
    """
    console, state = Console(), StateFolder(state_dir)
    os.environ.setdefault(ENV_PVC_ROOT, str(state.claims))
    try:
        with published_store(state_dir, endpoint, local_storage) as store:
            run_spec = read_run_spec(store, uri, scan, points)
        with (
            storage_for(run_spec.spec, state, endpoint, local_storage) as where,
            tempfile.TemporaryDirectory() as scratch,
        ):
            run_spec = run_spec.model_copy(update={"spec": where.spec})
            stores = Stores(run_spec, where.environment(run_spec))
            found = publish_point(run_spec, stores, Path(scratch))
            copy = None
            if found.uri is not None and where.embedded is not None:
                copy = state.model_folder(run_spec.job.name, found.uri.rpartition("/")[2])
                copy_published(stores.default, found.uri, copy)
    except InvalidSpec as error:
        for line in error.problems:
            console.print(Text(printable(line), "red"), soft_wrap=True)
        return MANIFEST_FAULT
    except TrainerError as error:
        return show_error(console, error)
    return _show(console, found, uri, copy)


def _show(console: Console, found: PublishedPoint, uri: str, copy: Path | None) -> int:
    def say(text: str) -> None:
        console.print(Text(printable(text)), soft_wrap=True)

    say(f"Remedy:  {remedy_text(found.remedy)}")
    if found.uri is not None:
        say(f"Model:   {found.uri}")
        if copy is not None:
            say(f"Copy:    {copy}")
        say(f"Report:  {copy or found.uri}/report.html")
    else:
        say(f"Model:   {uri}, as it is; nothing was published")
    if found.held:
        say(f"Held:    {found.held}")
    return HELD if found.held or found.remedy.chosen is None else int(ExitCode.OK)
