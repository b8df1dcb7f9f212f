"""An operator process against a real control plane, for the API tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.api import eventually
from ports import free_port

IMAGE = "registry.example/trainer:1"


class OperatorProcess:
    """``python -m finetune_operator``; killed at the end of the ``with`` block."""

    def __init__(self, kubeconfig: Path, log: Path, *arguments: str) -> None:
        self.port = free_port()
        self._log = log
        self._command = [sys.executable, "-m", "finetune_operator", "--kubeconfig", str(kubeconfig)]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port), *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, image: str = IMAGE) -> None:
        """Start the process, or restart it after ``kill``; return once it is ready. A process that
        does not get ready is killed."""
        self.spawn(image)
        try:
            eventually(
                "the operator is ready", lambda: self.get("readyz") == (200, "ok"), within=60
            )
        except BaseException:
            self.kill()
            raise

    def spawn(self, image: str = IMAGE) -> None:
        """Start the process, and do not wait for it."""
        command = [*self._command, "--image", image]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)

    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        if error is not None:
            sys.stderr.write(self.log()[-20_000:])

    def log(self) -> str:
        return self._log.read_text()

    def get(self, path: str) -> tuple[int, str] | None:
        """Status and text of an HTTP page of the process; None while it does not listen."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=5) as page:
                return page.status, page.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            if self.process.poll() is not None:
                raise AssertionError(f"the operator has ended: {self.log()[-5000:]}") from None
            return None

    def metric(self, series: str) -> float | None:
        """Value of one series of /metrics, by its full name with labels."""
        page = self.get("metrics")
        for line in (page[1] if page else "").splitlines():
            name, _, value = line.rpartition(" ")
            if name == series:
                return float(value)
        return None

    def kill(self) -> None:
        """SIGKILL: no clean shutdown, so the Lease is not released."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def wait(self, seconds: float) -> int:
        """Exit code of a process that is expected to end."""
        return self.process.wait(timeout=seconds)


class ForkedOperator(OperatorProcess):
    """The same, forked from a process that has imported everything: it starts in a fraction of a
    second."""

    def spawn(self, image: str = IMAGE) -> None:
        self._process = _Forked([*self._command[3:], "--image", image], self._log)  # type: ignore[assignment]


class _Forked:
    """The methods of ``subprocess.Popen`` that ``OperatorProcess`` uses."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["finetune_operator.__main__"])
        self._child = context.Process(target=_run_operator, args=(arguments, log))
        self._child.start()

    def poll(self) -> int | None:
        return self._child.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._child.join(timeout)
        code = self._child.exitcode
        if code is None:
            raise TimeoutError(f"the operator has not ended after {timeout} s")
        return code

    def kill(self) -> None:
        self._child.kill()

    def send_signal(self, number: signal.Signals) -> None:
        assert self._child.pid is not None
        os.kill(self._child.pid, number)


def _run_operator(arguments: list[str], log: Path) -> None:
    from finetune_operator.__main__ import main

    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = ["finetune-operator", *arguments]
    main()
