"""``make gpu`` without a GPU: reports, time budgets of hanging or crashing tests, kept results."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.py"

TESTS = """
import os, time
import pytest

def test_good(record_property):
    record_property("ratio", 1.02)

def test_bad():
    assert 1 + 1 == 3

@pytest.mark.skip(reason="torchao is not installed")
def test_skipped():
    pass

def test_that_hangs():
    time.sleep(600)

def test_that_dies():
    os._exit(9)

def test_that_leaves_the_device_unusable():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.fixture
def broken():
    yield
    raise ValueError("torn down badly")

def test_with_a_bad_end(broken):
    pass

def test_behind_all_of_these():
    pass
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(
        sys.modules, "gpu_run", module
    )  # the dataclass decorator looks the module up
    spec.loader.exec_module(module)
    return module


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_a_missing_gpu_is_reported_as_a_failure(
    run: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert results(tmp_path)["sections"] == []
    assert "torch sees no GPU here" in (tmp_path / "results.md").read_text()


def test_a_missing_required_package_is_named(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "NEEDED", (*run.NEEDED, "no-such-package"))
    assert run.main(["--out", str(tmp_path), "--device", "cpu"]) == 2
    assert results(tmp_path)["note"].endswith("lacks no-such-package.")


def test_every_test_has_a_result_row(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "TEST_SECONDS", 5)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu_all.py").write_text(TESTS)
    (tmp_path / "tests" / "test_gpu_broken.py").write_text("import no_such_module\n")
    out = tmp_path / "out"
    code = run.main(
        ["--out", str(out), "--device", "cpu", "--tests", str(tmp_path / "tests"),
         "--only", "tests", "--seconds", "500"]
    )  # fmt: skip
    assert code == 1
    (section,) = results(out)["sections"]
    rows = {row["test"].split("::")[-1]: row for row in section["rows"]}
    assert {name: row["outcome"] for name, row in rows.items() if "broken" not in name} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_skipped": "skipped",
        "test_that_hangs": "failed",
        "test_that_dies": "failed",
        "test_that_leaves_the_device_unusable": "failed",
        "test_with_a_bad_end": "failed",
        "test_behind_all_of_these": "passed",
    }
    assert rows["test_good"]["figures"] == {"ratio": 1.02}
    assert rows["test_skipped"]["message"] == "torchao is not installed"
    assert "did not end" in rows["test_that_hangs"]["message"]
    assert any("no_such_module" in row["message"] for row in section["rows"]), (
        "a file that cannot be imported"
    )
    page = (out / "results.md").read_text()
    assert "test_good | passed |" in page and "ratio 1.02" in page
    assert "time.sleep" in (out / "log.txt").read_text() or "test_that_hangs" in page


def test_a_hanging_part_costs_its_budget_and_keeps_its_results(
    run: ModuleType, tmp_path: Path
) -> None:
    runner = run.Runner(tmp_path, "cpu", tmp_path, [["training.py"]])
    told = Path(runner.env["GPU_RESULTS"])
    child = "import subprocess, sys, time\n"
    child += f'open({str(told)!r}, \'a\').write(\'{{"name": "first"}}\\n{{"na\')\n'
    child += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    child += "time.sleep(600)\n"
    began = time.monotonic()
    ended = run.run_process([sys.executable, "-c", child], runner.env, runner.log, began + 5)
    assert ended == "out of time" and time.monotonic() - began < 60
    assert run.read_rows(told) == [{"name": "first"}], "the truncated line is skipped"


def test_a_part_stops_at_its_budget_and_a_broken_part_does_not_stop_the_run(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = run.Runner(tmp_path, "cpu", tmp_path, [["training.py"]])
    parts = [
        run.Part("slow", 0.5, lambda section, until: time.sleep(max(0, until - time.monotonic()))),
        run.Part("broken", 1, lambda section, until: 1 / 0),
        run.Part("never", 1, lambda section, until: section.rows.append({"name": "ran"})),
    ]
    monkeypatch.setattr(runner, "parts", lambda: iter(parts))
    runner.run(5.7, [])
    slow, broken, never = results(tmp_path)["sections"]
    assert 0.4 < slow["seconds"] < 3
    assert broken["ended"] == "failed: ZeroDivisionError: division by zero" and runner.failed
    assert never["rows"] == [{"name": "ran"}] or never["ended"].startswith("not reached")
