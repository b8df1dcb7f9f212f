"""Entry point of a training process, started by torchrun: it imports only what its run needs."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from finetune_trainer.optional_packages import hide_unused
from finetune_trainer.stage import load_run_spec


def main() -> int:
    """Run the training process and return its exit code."""
    with suppress(Exception):  # the worker reads the run spec again, and reports the failure
        hide_unused(load_run_spec().spec)
    from finetune_trainer.train import worker

    return worker.main()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # After a failure, threads may still wait for peers: exit without joining them.
    os._exit(code)
