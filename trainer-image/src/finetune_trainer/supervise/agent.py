"""torchrun, with a report of its failure for the supervisor.

torchrun exits with 1 for any failure of a worker. This module runs torchrun in a process of its own
and writes the cause to the file named by ``FINETUNE_AGENT_REPORT``: the workers' exit codes, or the
error of a failed rendezvous.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

ENV_REPORT: Final = "FINETUNE_AGENT_REPORT"
ELASTIC: Final = "elastic"
"""torchrun's name of the rendezvous backend of elastic gangs (``rendezvous``)."""
_PR_SET_PDEATHSIG: Final = 1


def main(arguments: list[str]) -> int:
    """Run torchrun with these arguments. Return 0 if all workers succeeded, else 1."""
    _die_with_parent()
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    from finetune_trainer.supervise import rendezvous

    rendezvous.register()
    try:
        run(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return _report({"kind": "workers", "codes": codes})
    except (RendezvousError, dist.DistError, ConnectionError, TimeoutError) as error:
        return _report({"kind": "rendezvous", "message": f"{type(error).__name__}: {error}"})
    return 0


def _report(words: dict[str, Any]) -> int:
    Path(os.environ[ENV_REPORT]).write_text(json.dumps(words))
    return 1


def _die_with_parent() -> None:
    """Receive SIGTERM when the supervisor is killed: torchrun then ends its workers."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # The workers have ended. A regular shutdown of torch would only delay the peers.
    os._exit(code)
