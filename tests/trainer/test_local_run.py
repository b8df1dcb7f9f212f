"""`finetune run` end to end: interrupted, resumed, and refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from transformers import AutoModelForCausalLM

from finetune_api.names import ExitCode
from finetune_api.results import Termination


def write_job(folder: Path, base: Path, name: str = "tiny", **changes: Any) -> None:
    spec: dict[str, Any] = {
        "model": {"source": f"{base}/model"},
        "data": {"train": [{"name": "intent", "source": f"{base}/data/intent-train.jsonl"}]},
        "training": {"maxSteps": 150, "batchSize": 8, "precision": "FP32"},
        "evaluation": {"everySteps": 1000, "maxNewTokens": 4, "metrics": ["Loss", "Accuracy"]},
        "output": {"destination": "s3://models/tuned", "format": "Merged"},
        "compute": {"nodes": 1, "gpusPerNode": 1},
        "prepare": {"workers": 2},
    } | changes
    raw = {
        "apiVersion": "finetune-operator.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": spec,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(raw))


@contextmanager
def started(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start `finetune run` on the folder's job; kill its process group on exit."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune_trainer", "run", "job.yaml"],
        cwd=folder,
        env=environment | {"COLUMNS": "120", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(folder: Path) -> tuple[int, str]:
    with started(folder) as process:
        text, _ = process.communicate(timeout=300)
        return process.returncode, text


@pytest.mark.slow
def test_a_stopped_run_resumes_and_completes(tiny_base: Path, tmp_path: Path) -> None:
    write_job(tmp_path, tiny_base)
    with started(tmp_path) as process:
        while process.poll() is None and not any(
            "step 1/150" in log.read_text()
            for log in tmp_path.glob(".finetune/runs/tiny/*/train*.log")
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=300)
    assert process.returncode == ExitCode.INTERRUPTED, said
    assert "no GPU: training on the CPU" in said
    assert "of 150 is saved" in said
    assert "To continue: finetune run job.yaml" in said

    code, text = run(tmp_path)
    assert code == 0, text
    assert "continues; files" in text
    assert "prepared before" in text
    assert "150 steps" in text
    assert "restarts" not in text, "a stop after a save is no restart"
    assert "150 steps, first after" in text
    (folder,) = (tmp_path / ".finetune" / "models" / "tiny").iterdir()
    assert str(folder) in text.replace("\n", "")
    assert "First step after" in (folder / "report.html").read_text()
    parts = json.loads((folder / "metrics.json").read_text())["training"]["startupSeconds"]
    total = parts.pop("total")
    assert list(parts) == [
        "launch", "import", "rendezvous", "data", "model", "restore", "baseline",
        "step"]  # fmt: skip
    assert sum(parts.values()) == pytest.approx(total, abs=0.01 * len(parts)), (
        "each part is rounded"
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert model.num_parameters() > 0
    state = json.loads((tmp_path / ".finetune" / "jobs" / "tiny.json").read_text())
    assert [(r["number"], r["complete"]) for r in state["runs"]] == [(1, True)]
    for log in tmp_path.glob(".finetune/runs/tiny/*/*.log"):
        of_libraries = re.findall(r".*(?:Warning:|^W\d{4} |ailed to load).*", log.read_text(), re.M)
        assert not of_libraries, log


@pytest.mark.slow
def test_a_killed_process_costs_what_the_classes_of_time_say(
    tiny_base: Path, tmp_path: Path
) -> None:
    """The training process is killed once: the classes add up to the time of the processes, from
    the first supervisor's start to the last one's end."""
    checkpoints = {"checkpoint": {"everySteps": 10}}
    write_job(tmp_path, tiny_base, **checkpoints)
    with started(tmp_path) as process:
        until_logged(tmp_path, process, "step 30/150")
        supervisor, worker = training_processes(process.pid)
        began = start_of(supervisor.pid)
        worker.kill()
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    (message,) = tmp_path.glob(".finetune/runs/tiny/*/termination/train-0.json")
    trained = Termination.model_validate_json(message.read_text()).trained
    assert trained is not None and trained.time is not None
    spent = trained.time
    wall = (spent.until - began) * spent.processes
    print(f"{wall:.1f} s of processes: {spent.seconds}")
    assert spent.total == pytest.approx(wall, rel=0.01, abs=0.2)
    assert (trained.restarts, spent.uncommitted) == (1, 0)
    assert {"launch", "load", "productive", "recomputed", "evaluation", "checkpoint"} <= {
        name for name, seconds in spent.seconds.items() if seconds > 0
    }
    assert f"of processes: {spent.text}" in said.replace("\n", " ")
    (folder,) = (tmp_path / ".finetune" / "models" / "tiny").iterdir()
    training = json.loads((folder / "metrics.json").read_text())["training"]
    assert 0 < training["goodput"] < 1 and training["processSeconds"]["recomputed"] > 0
    assert "Time of the processes" in (folder / "report.html").read_text()


def start_of(pid: int) -> float:
    """Start of a process in Unix time, to a clock tick (psutil's is based on a boot time in whole
    seconds)."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def until_logged(folder: Path, process: subprocess.Popen[str], text: str) -> None:
    while process.poll() is None and not any(
        text in log.read_text() for log in folder.glob(".finetune/runs/tiny/*/train*.log")
    ):
        time.sleep(0.02)


def training_processes(pid: int) -> tuple[psutil.Process, psutil.Process]:
    """The supervisor and the training process: of the processes without children the largest."""
    below = psutil.Process(pid).children(recursive=True)
    supervisor = next(p for p in below if "supervise" in p.cmdline())
    ends = [p for p in supervisor.children(recursive=True) if not p.children()]
    return supervisor, max(ends, key=lambda p: int(p.memory_info().rss))


@pytest.mark.slow
def test_a_job_starts_from_the_model_of_another(tiny_base: Path, tmp_path: Path) -> None:
    quick = {
        "training": {"maxSteps": 2, "batchSize": 8, "precision": "FP32"},
        "evaluation": {"metrics": ["Loss"]},
        "compute": {"nodes": 1, "gpusPerNode": 0},
        "method": {"type": "LoRA", "lora": {"rank": 2}},
    }
    after = {"model": {"fineTuneJobRef": {"name": "tiny"}}, **quick}
    after["output"] = {"destination": "s3://models/next"}
    write_job(tmp_path, tiny_base, name="next", **after)
    code, text = run(tmp_path)
    assert code == ExitCode.USER_ERROR
    assert "job tiny has published no model" in text and "finetune run MANIFEST of tiny" in text

    write_job(tmp_path, tiny_base, **quick, output={"destination": "s3://models/tiny"})
    code, text = run(tmp_path)
    assert code == 0, text
    write_job(tmp_path, tiny_base, name="next", **after)
    code, text = run(tmp_path)
    assert code == 0, text
    (folder,) = (tmp_path / ".finetune" / "models" / "next").iterdir()
    lineage = json.loads((folder / "metrics.json").read_text())["lineage"]
    assert [a.get("job") for a in lineage] == [None, "tiny"]
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"].endswith("/model")


def test_a_failure_sets_the_exit_code_and_names_the_remedy(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": \n')
    write_job(tmp_path, tiny_base, data={"train": [{"source": f"{tmp_path}/bad.jsonl"}]})
    code, text = run(tmp_path)
    assert code == ExitCode.DATA_ERROR
    assert "Prepare failed: DataError" in text
    assert f"{tmp_path}/bad.jsonl, line 2" in text.replace("\n", "")
    assert "prepare.log" in text


def test_supervise_starts_without_torch(tmp_path: Path) -> None:
    """Check the imports in a new process, which exits because the run spec is missing."""
    program = (
        "import sys; from finetune_trainer.cli import main; code = main(['supervise']);"
        "heavy = {'torch', 'transformers', 'boto3', 'numpy'} & set(sys.modules);"
        "print(code, sorted(heavy))"
    )
    message = str(tmp_path / "message")
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=os.environ | {"FINETUNE_RUN_SPEC": "/nowhere", "FINETUNE_TERMINATION": message},
    )  # fmt: skip
    assert found.stdout.split(maxsplit=1) == [str(int(ExitCode.USER_ERROR)), "[]\n"]
