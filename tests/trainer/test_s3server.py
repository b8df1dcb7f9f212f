"""The embedded S3 server: start, kept data, exclusive ownership, clean-up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune_trainer.failures import UserError
from finetune_trainer.storage.s3server import EmbeddedS3

OWNER = """
import sys
from pathlib import Path
from finetune_trainer.storage.s3server import EmbeddedS3
with EmbeddedS3(Path(sys.argv[1])) as server:
    server.ensure_bucket("kept")
    server.store().put("s3://kept/key", b"before the kill")
    print((server.folder / "server.pid").read_text(), flush=True)
    sys.stdin.read()
"""


def wait_gone(pid: int) -> bool:
    """Return whether a process ends within 20 s; a zombie has ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_data_and_keys_outlive_the_server(tmp_path: Path) -> None:
    with EmbeddedS3(tmp_path / "data") as first:
        first.ensure_bucket("kept")
        first.ensure_bucket("kept")
        first.store().put("s3://kept/key", b"value")
        keys = first.access_key, first.secret_key
    with EmbeddedS3(tmp_path / "data") as second:
        assert (second.access_key, second.secret_key) == keys
        assert second.store().get("s3://kept/key") == b"value"
    assert (tmp_path / "data/credentials.json").stat().st_mode & 0o777 == 0o600


def test_a_folder_has_one_owner(s3: EmbeddedS3, bucket: str) -> None:
    with pytest.raises(UserError, match="served by another process") as caught:
        EmbeddedS3(s3.folder).__enter__()
    assert caught.value.reason == "StorageInUse"
    s3.store().put(f"s3://{bucket}/key", b"the first one still serves")


def test_the_server_dies_with_its_owner_and_its_data_survives(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdin and owner.stdout
    with owner, owner.stdin, owner.stdout:
        pid = int(owner.stdout.readline())
        os.kill(owner.pid, signal.SIGKILL)
    assert wait_gone(pid)
    with EmbeddedS3(folder) as server:
        assert server.store().get("s3://kept/key") == b"before the kill"


def test_a_server_left_behind_is_stopped_first(tmp_path: Path) -> None:
    first = EmbeddedS3(tmp_path / "data").__enter__()
    assert first._process and first._lock
    first.ensure_bucket("kept")
    first._lock.close()  # as if its owner had been killed without the server
    with EmbeddedS3(tmp_path / "data") as second:
        assert first._process.wait(10) == -signal.SIGKILL
        second.ensure_bucket("kept")


def test_a_reused_process_id_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "server.pid").write_text(str(os.getpid()))
    with EmbeddedS3(folder) as server:
        server.ensure_bucket("fresh")


def test_the_server_listens_on_loopback_only(s3: EmbeddedS3) -> None:
    pid = int((s3.folder / "server.pid").read_text())
    inodes = {
        str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()
    }
    listening = [
        fields[1].split(":")[0]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        if (fields := line.split())[3] == "0A" and f"socket:[{fields[9]}]" in inodes
    ]
    assert len(listening) >= 8
    assert set(listening) == {"0100007F"}
