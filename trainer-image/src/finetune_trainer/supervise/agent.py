"""torchrun, with a word for the supervisor about how it ended.

torchrun turns every end of a worker into exit code 1. This runs it in its own process and writes
what it knows of a failure to the file named by ``FINETUNE_AGENT_REPORT``: the exit codes of its
workers, or that the gang did not form.
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
_PR_SET_PDEATHSIG: Final = 1


def main(arguments: list[str]) -> int:
    """Runs torchrun with these arguments; 0 when all workers have ended well, else 1."""
    _die_with_parent()
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

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
    """torchrun ends its workers on SIGTERM: ask for one when the supervisor is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        code
    )  # the workers have ended; taking torch down in order would only keep peers waiting
