"""Memory limit and OOM kills of the container, and the number of processes of prepare."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer.memory_limit import count_oom_kills, memory_limit
from finetune_trainer.prepare.mapping import pool
from finetune_trainer.prepare.mapping.pool import PROCESS_BYTES, WORTH_BYTES, count_processes


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".", 1)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_memory_and_kills(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None and count_oom_kills(tmp_path) == 0
    write(tmp_path, memory_max="max\n", memory_events="low 0\noom 3\noom_kill 2\n")
    assert memory_limit(tmp_path) is None and count_oom_kills(tmp_path) == 2
    write(tmp_path, memory_max="1048576\n")
    assert memory_limit(tmp_path) == 1 << 20


@pytest.mark.parametrize(
    ("size", "limit", "processes"),
    [(0, None, 1), (WORTH_BYTES, None, 1), (WORTH_BYTES + 1, None, 2), (1 << 30, None, 16),
     (1 << 30, 8 * PROCESS_BYTES, 6), (1 << 30, PROCESS_BYTES, 1)],
)  # fmt: skip
def test_process_count_is_limited_by_cores_memory_and_data(
    size: int, limit: int | None, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "count_cores", lambda: 16)
    monkeypatch.setattr(pool, "memory_limit", lambda: limit)
    assert count_processes(size) == processes
