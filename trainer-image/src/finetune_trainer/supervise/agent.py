"""torchrun, with a report of its failure for the supervisor.

torchrun exits with 1 for any failure of a worker. This module runs torchrun in a process of its own
and writes the cause to the file named by ``FINETUNE_AGENT_REPORT``: the workers' exit codes, or the
error of a failed rendezvous.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from finetune_trainer.supervise.fork_server import begin_process

ENV_REPORT: Final = "FINETUNE_AGENT_REPORT"
ELASTIC: Final = "elastic"
"""torchrun's name of the rendezvous backend of elastic gangs (``rendezvous``)."""


def main(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Run torchrun, and exit with 0 if all workers succeeded, else with 1.

    Args:
        arguments: of torchrun; the last one is the workers' module (see ``work``).
        environment: variables of this process and its workers.
    """
    begin_process("agent", environment, signal.SIGTERM)
    code = _run(arguments, environment)
    _flush()
    # The workers have ended. A regular shutdown of torch would only delay the peers.
    os._exit(code)


def work(module: str, environment: Mapping[str, str]) -> None:
    """Run a training process: the function ``main`` of a module, which returns the exit code."""
    begin_process(f"rank-{os.environ['RANK']}", environment, signal.SIGKILL)
    code = importlib.import_module(module).main()
    _flush()
    if code:
        # Threads may still wait for peers: exit without joining them.
        os._exit(code)


def _run(arguments: list[str], environment: Mapping[str, str]) -> int:
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    from finetune_trainer.supervise import rendezvous

    rendezvous.register()
    try:
        config, _, _ = config_from_args(parse_args(arguments))  # type: ignore[no-untyped-call]
        elastic_launch(config, work)(arguments[-1], environment)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return _report({"kind": "workers", "codes": codes})
    except (RendezvousError, dist.DistError, ConnectionError, TimeoutError) as error:
        return _report({"kind": "rendezvous", "message": f"{type(error).__name__}: {error}"})
    return 0


def _report(words: dict[str, Any]) -> int:
    Path(os.environ[ENV_REPORT]).write_text(json.dumps(words))
    return 1


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
