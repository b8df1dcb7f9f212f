"""The operator under load: FineTuneJobs whose prepare ends at once, against a real control plane.

    python benchmarks/operator/run.py [--loads burst,rate,steady,churn] [--jobs 500] [--nodes 4]
        [--seconds 60] [--steady 300] [--churn 500] [--nice 0]

etcd, API server, controller manager and scheduler are real; kwok simulates the nodes. Everything
shares the cores of this machine. With ``--nice -15`` the operator's process comes before the
others, as if it had a node of its own.

burst   --jobs FineTuneJobs at once
rate    20 FineTuneJobs a second, for --seconds
steady  --steady running jobs whose progress is read, for --seconds, and a restart of the operator
churn   --churn jobs of one node, created, completed and deleted, 50 at a time

Beside burst and rate, "bare" is a client that makes the same children itself (`bare.py`). "First
child" is the time from the request to create a job to its first Job; a gang is whole when all of
its pods run. Writes are counted in the API server's audit log, without Leases.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "operator")]

import loads  # noqa: E402
from measured import MeasuredOperator  # noqa: E402
from plane import PODS  # noqa: E402
from rows import HEAD  # noqa: E402

RATE = 20.0
_INSIDE = "FINETUNE_BENCH_NETWORK"


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--loads", default="burst,rate,steady,churn")
    made.add_argument("--jobs", type=int, default=500)
    made.add_argument("--nodes", type=int, default=4)
    made.add_argument("--seconds", type=float, default=60.0)
    made.add_argument("--steady", type=int, default=300)
    made.add_argument("--churn", type=int, default=500)
    made.add_argument("--nice", type=int, default=0, help="of the operator's process")
    made.add_argument("--only", choices=("ours", "bare"), help="leave out the other")
    given = made.parse_args()
    _enter_network()
    MeasuredOperator.nice = given.nice
    for load in given.loads.split(","):
        asyncio.run(run(load, given))


async def run(load: str, given: argparse.Namespace) -> None:
    if load == "burst":
        await _compare(f"{given.jobs} at once", given.jobs, math.inf, given)
    elif load == "rate":
        text = f"{RATE:.0f}/s for {given.seconds:.0f} s"
        await _compare(text, int(RATE * given.seconds), RATE, given)
    elif load == "steady":
        await loads.steady(given.steady, given.nodes, given.seconds)
    elif load == "churn":
        await loads.churn(given.churn, 1, 50)
    else:
        raise SystemExit(f"--loads: burst, rate, steady or churn; got {load!r}")


async def _compare(title: str, count: int, rate: float, given: argparse.Namespace) -> None:
    print(f"\n{title}, {given.nodes} nodes a job\n{HEAD}", flush=True)
    rows = [
        await measure(count, rate, given.nodes)
        for measure in (loads.bare, loads.ours)
        if given.only in (None, measure.__name__)
    ]
    for row in rows:
        print(row, flush=True)
    if len(rows) == 2:
        print(f"ours to bare, last gang whole: {rows[1].last / rows[0].last:.2f}", flush=True)


def _enter_network() -> None:
    """Go on in a network namespace in which the pods' addresses are local, so that the trainers'
    server answers for all pods."""
    if _INSIDE not in os.environ:
        rights = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        command = ["unshare", "--net", *rights, sys.executable, *sys.argv]
        os.execvpe("unshare", command, {**os.environ, _INSIDE: "1"})
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "route", "add", "local", PODS, "dev", "lo"], check=True)


if __name__ == "__main__":
    main()
