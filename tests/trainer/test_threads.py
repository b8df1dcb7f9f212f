"""OpenMP settings of a process: threads by its share of the cores, and passive waiting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune_trainer import threads
from finetune_trainer.adaptive_spinning import can_adapt
from finetune_trainer.threads import adapts, count_cores, thread_environment

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("environ", "processes", "added"),
    [
        ({}, 1, {"OMP_NUM_THREADS": "8", **PASSIVE}),
        ({}, 3, {"OMP_NUM_THREADS": "2", **PASSIVE}),
        ({}, 20, {"OMP_NUM_THREADS": "1", **PASSIVE}),
        ({"OMP_NUM_THREADS": "5"}, 2, PASSIVE),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 2, {"OMP_NUM_THREADS": "4"}),
        ({"GOMP_SPINCOUNT": "9"}, 2, {"OMP_NUM_THREADS": "4"}),
        ({"KMP_BLOCKTIME": "0"}, 2, {"OMP_NUM_THREADS": "4"}),
    ],
)
def test_variables_set_by_the_user_are_kept(
    environ: dict[str, str], processes: int, added: dict[str, str]
) -> None:
    assert thread_environment(environ, processes, cores=8) == added


@pytest.mark.skipif(not can_adapt(), reason="this system has no scheduler statistics")
def test_a_training_process_adapts_unless_the_user_has_set_a_wait_policy() -> None:
    assert thread_environment({}, cores=8, adaptive=True) == {"OMP_NUM_THREADS": "8"}
    assert adapts({"OMP_NUM_THREADS": "8"})
    for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        assert not adapts({variable: "1"})


def test_without_scheduler_statistics_training_waits_passively(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "can_adapt", lambda: False)
    assert thread_environment({}, cores=8, adaptive=True) == {"OMP_NUM_THREADS": "8", **PASSIVE}
    assert not adapts({})


@pytest.mark.parametrize(
    ("files", "groups", "cores"),
    [
        ({}, "0::/", 8),
        ({"cpu.max": "max 100000"}, "0::/", 8),
        ({"cpu.max": "200000 100000"}, "0::/", 2),
        ({"cpu.max": "50000 100000"}, "0::/", 1),
        ({"cpu.max": "250000 100000"}, "0::/", 3),
        ({"cpu.max": "1600000 100000"}, "0::/", 8),
        ({"pods/cpu.max": "300000 100000", "pods/one/cpu.max": "max 100000"}, "0::/pods/one", 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/", 8),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, "", 2),
        (
            {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"},
            "4:memory:/b\n1:cpu,cpuacct:/a/c",
            4,
        ),
    ],
)
def test_a_pods_cpu_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], groups: str, cores: int
) -> None:
    for name, text in files.items():
        path = tmp_path / "cgroups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "groups").write_text(groups)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert count_cores(tmp_path / "cgroups", tmp_path / "groups") == cores


def test_without_cgroups_the_cpu_affinity_counts(tmp_path: Path) -> None:
    here = len(os.sched_getaffinity(0))
    assert count_cores(tmp_path / "none", tmp_path / "none") == here
