"""Entry point of a training process: imports only what its run needs.

The fork server imports this module, and with it what the run's processes share. bitsandbytes and
torchao initialize CUDA when they are imported, which must not happen before a fork: the processes
of a run that needs them import everything themselves.
"""

from __future__ import annotations

from contextlib import suppress

from finetune_trainer.optional_packages import hide_unused, requirements
from finetune_trainer.stage import load_run_spec


def preload() -> None:
    """Import what the training processes of this container's run share."""
    spec = load_run_spec().spec
    hide_unused(spec)
    import torch.distributed.run  # noqa: F401

    if not any(requirements(spec)):
        from finetune_trainer.train import worker  # noqa: F401

        fill_caches()


def fill_caches() -> None:
    """Fill the caches of libraries that every training process needs, which takes 0.3 s of CPU time
    in each. Starts no threads, and connects to nothing."""
    from finetune_trainer.engine.transformers_loading import fill_conversion_table
    from finetune_trainer.storage.objects import Credentials, ObjectStore

    fill_conversion_table()
    ObjectStore("http://localhost", credentials=Credentials("none", "none"))


def main() -> int:
    """Run the training process and return its exit code."""
    from finetune_trainer.train import worker

    return worker.main()


with suppress(Exception):  # the worker reads the run spec again, and reports the failure
    preload()
