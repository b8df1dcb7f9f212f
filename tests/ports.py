"""Free ports for the servers that tests start."""

from __future__ import annotations

import itertools
import os
import random
import socket

# Below the ephemeral ports, so that no connection can take a port between the check and the listen.
# Each worker of a test run has its own range.
_FIRST, _EACH, _WORKERS = 12_000, 1_000, 20
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
_ports = itertools.cycle(range(_EACH))
for _ in range(random.SystemRandom().randrange(_EACH)):  # each run starts at a random port
    next(_ports)


def free_port() -> int:
    """Return a free port of 127.0.0.1, a different one on each call."""
    for offset in itertools.islice(_ports, _EACH):
        port = _FIRST + _worker * _EACH + offset
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError(f"no free port in {_EACH} of worker {_worker}")
