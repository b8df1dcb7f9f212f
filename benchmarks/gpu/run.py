"""Run all GPU tests and benchmarks in one command of at most 8 minutes (``make gpu``).

    python benchmarks/gpu/run.py [--out FOLDER] [--seconds 460] [--only tests training …]

Nothing is installed and no network is used: the packages of this Python are used, and missing ones
are named. The most important section runs first. Each section has its own processes and its own
time budget, so one that hangs costs only its budget. ``results.json`` and ``results.md`` are
written after each section.

Exit code: 0 if all that ran succeeded, 1 if something failed, 2 if there is no GPU or a required
package is missing. ``--device cpu`` runs this script without a GPU, as a smoke test.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
SOURCES: Final = (
    "crds/src", "operator/src", "trainer-image/src", "tests", "tests/trainer", "benchmarks",
    "benchmarks/gpu",
)  # fmt: skip
NEEDED: Final = (
    "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy", "pyarrow",
    "pydantic", "boto3", "jinja2", "prometheus-client", "pyyaml",
)  # fmt: skip
"""Distributions that the trainer cannot be imported without."""
OPTIONAL: Final = ("pytest", "triton", "liger-kernel", "bitsandbytes", "torchao", "trl", "datasets")
"""Distributions that some sections or tests need. Without them those are skipped, and named."""
TEST_SECONDS: Final = 90
"""A test that takes longer counts as hanging."""
FIRST: Final = ("test_gpu.py", "test_gpu_packing.py", "test_gpu_dropout.py", "test_gpu_memory.py")
"""Test files that run first, in this order."""

REACHED_THE_END: Final = ("done", "ended with 1", "ended with 2", "ended with 5")
"""Ends of pytest after its last test: success, failures, a failed import, no test."""

Row = dict[str, Any]
TESTS, FIGURES = "tests", "figures"


@dataclass
class Section:
    """The result of a part."""

    name: str
    kind: str
    """Kind of the rows: ``TESTS`` or ``FIGURES``."""
    seconds: float = 0.0
    ended: str = "not reached: no time was left"
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.ended.startswith("failed") or any(
            r.get("outcome") == "failed" for r in self.rows
        )


@dataclass(frozen=True)
class Part:
    """A section to run."""

    name: str
    seconds: float
    """Time budget."""
    run: Callable[[Section, float], None]
    """Fills the section; the second argument is the deadline by ``time.monotonic``."""
    kind: str = FIGURES


def lacking(names: Sequence[str]) -> list[str]:
    """Return the distributions that are not installed."""
    return [name for name in names if found(name) is None]


def found(name: str) -> str | None:
    """Return the version of a distribution, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine(device: str) -> Row:
    """Describe device, driver, commit and package versions."""
    said: Row = {
        "device": None, "capability": None, "memory_gib": None, "cuda": None, "driver": None,
        "python": platform.python_version(), "cpus": os.cpu_count(), "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "versions": {name: found(name) for name in (*NEEDED, *OPTIONAL)},
    }  # fmt: skip
    if found("torch") is None:
        return said
    import torch

    if device == "cpu":
        return said | {"device": f"cpu ({platform.processor() or platform.machine()})"}
    if not torch.cuda.is_available():
        return said
    properties = torch.cuda.get_device_properties(0)
    return said | {
        "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda,
        "driver": output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
    }  # fmt: skip


def commit() -> str | None:
    return output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])


def output(command: Sequence[str]) -> str | None:
    """Return the first line that a command prints; None without output, command or in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def environment(out: Path, device: str) -> dict[str, str]:
    """Return the environment of all processes: import path, results file, no network."""
    path = [str(ROOT / source) for source in SOURCES]
    if os.environ.get("PYTHONPATH"):
        path.append(os.environ["PYTHONPATH"])
    own = {
        "PYTHONPATH": os.pathsep.join(path), "GPU_RESULTS": str(out / "rows.jsonl"),
        "GPU_TEST_SECONDS": str(TEST_SECONDS), "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }  # fmt: skip
    if device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    return {**os.environ, **own}


def run_process(command: Sequence[str], env: Mapping[str, str], log: Path, until: float) -> str:
    """Run a command until a deadline, then kill all of its processes. Returns how it ended."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, env=dict(env), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "done" if code == 0 else f"ended with {code}"


def read_rows(path: Path) -> list[Row]:
    """Parse the complete lines of a results file; the last line may be cut off."""
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def test_rows(told: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Return one row per finished test, and the names of tests that started but did not end. A
    test that fails in set-up, call or tear-down has failed."""
    rows: dict[str, Row] = {}
    begun: dict[str, None] = {}
    for line in told:
        if line["event"] == "start":
            begun[line["test"]] = None
            continue
        before = rows.get(line["test"])
        if before is None or before["outcome"] != "failed":
            rows[line["test"]] = {k: v for k, v in line.items() if k != "event"}
    return list(rows.values()), [test for test in begun if test not in rows]


class Runner:
    """One run of everything."""

    def __init__(self, out: Path, device: str, tests: Path, trainings: Sequence[Sequence[str]]):
        self.out, self.device, self.tests = out, device, tests
        self.trainings = trainings
        self.env = environment(out, device)
        self.log = out / "log.txt"
        self.sections: list[Section] = []
        self.machine = machine(device)
        self.note = ""

    def parts(self) -> Iterator[Part]:
        """Yield the parts, the most important first."""
        yield Part("tests", 240, self.run_tests, TESTS)
        yield Part("pieces", 40, lambda s, u: self.run_benchmark(s, u, ["pieces.py"]))
        yield Part("training", 200, lambda s, u: self.run_benchmark(s, u, self.trainings[0]))
        for more in self.trainings[1:]:
            name = "training " + " ".join(more[2:4])
            yield Part(name, 200, lambda s, u, more=more: self.run_benchmark(s, u, more))  # type: ignore[misc]

    def run_tests(self, section: Section, until: float) -> None:
        """Run each file in a process; if the process ends early, another runs the tests left."""
        if found("pytest") is None:
            section.ended = "skipped: there is no pytest"
            return
        files = sorted(self.tests.glob("test_gpu*.py"), key=by_worth)
        section.ended = "done"
        for path in files:
            done: list[str] = []
            while True:
                rows, hung, ended = self.run_file(path, done, until)
                section.rows += [row | {"test": row["test"] or path.name} for row in rows]
                new = [row["test"] for row in rows] + hung
                for test in hung:
                    section.rows.append(
                        {
                            "test": test, "outcome": "failed", "seconds": 0.0, "figures": {},
                            "message": f"did not end ({ended}); its stack is in {self.log.name}",
                        }
                    )  # fmt: skip
                done += new
                if ended == "out of time":
                    section.ended = f"out of time in {path.name}"
                    return
                # A hanging test ends its process with 1, and so does pytest after a failed test.
                if not new or (ended in REACHED_THE_END and not hung):
                    break
            if not done:
                section.rows.append(
                    {
                        "test": path.name, "outcome": "failed", "seconds": 0.0, "figures": {},
                        "message": f"pytest {ended} and ran nothing: see {self.log.name}",
                    }
                )  # fmt: skip

    def run_file(
        self, path: Path, done: Sequence[str], until: float
    ) -> tuple[list[Row], list[str], str]:
        results = Path(self.env["GPU_RESULTS"])
        results.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "pytest", str(path), "-q", "--noconftest", "-p", "gpuresults",
            "-p", "no:cacheprovider", "-p", "no:randomly", f"--rootdir={ROOT}",
            "-o", "addopts=--import-mode=importlib",
            *(f"--deselect={test}" for test in done),
        ]  # fmt: skip
        ended = run_process(command, self.env, self.log, until)
        rows, hung = test_rows(read_rows(results))
        return rows, hung, ended

    def run_benchmark(self, section: Section, until: float, command: Sequence[str]) -> None:
        """Run a script of this folder, which appends a line of JSON per figure."""
        results = Path(self.env["GPU_RESULTS"])
        results.unlink(missing_ok=True)
        script, *arguments = command
        ended = run_process(
            [sys.executable, str(Path(__file__).parent / script), *arguments],
            self.env, self.log, until,
        )  # fmt: skip
        section.rows = read_rows(results)
        good = ended in ("done", "out of time")
        section.ended = ended if good else f"failed: {ended}; see {self.log.name}"

    def run(self, seconds: float, only: Sequence[str]) -> None:
        """Run all parts within ``seconds``, and write the results after each."""
        end = time.monotonic() + seconds
        parts = [part for part in self.parts() if not only or part.name.split()[0] in only]
        self.sections = [Section(part.name, part.kind) for part in parts]
        for part, section in zip(parts, self.sections, strict=True):
            began = time.monotonic()
            if end - began < 5:
                break
            print(f"{section.name}: at most {min(part.seconds, end - began):.0f} s", flush=True)
            try:
                part.run(section, min(end, began + part.seconds))
            except Exception as error:  # an error of this script: continue with the next part
                section.ended = f"failed: {type(error).__name__}: {error}"
            section.seconds = round(time.monotonic() - began, 1)
            self.write()
            print(
                f"  {section.ended}, {section.seconds:.0f} s, {len(section.rows)} rows", flush=True
            )

    @property
    def failed(self) -> bool:
        return any(section.failed for section in self.sections)

    def write(self) -> None:
        """Replace both results files, each atomically."""
        results = {
            "machine": self.machine, "note": self.note,
            "sections": [
                {"name": s.name, "seconds": s.seconds, "ended": s.ended, "rows": s.rows}
                for s in self.sections
            ],
        }  # fmt: skip
        write(self.out / "results.json", json.dumps(results, indent=1) + "\n")
        write(self.out / "results.md", markdown(self.machine, self.note, self.sections))


def by_worth(path: Path) -> tuple[int, str]:
    return (FIRST.index(path.name) if path.name in FIRST else len(FIRST), path.name)


def write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def markdown(about: Row, note: str, sections: Sequence[Section]) -> str:
    """Render the results as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
    missing = ", ".join(k for k, v in about["versions"].items() if not v)
    lines = [
        f"# {about['device'] or 'No GPU'}", "",
        f"{about['date']}, commit {about['commit']}, driver {about['driver']}, CUDA"
        f" {about['cuda']}, {about['memory_gib']} GiB, Python {about['python']}", "",
        f"Versions: {versions}. Not installed: {missing or 'nothing'}.", "",
    ]  # fmt: skip
    if note:
        lines += [note, ""]
    for section in sections:
        lines += [f"## {section.name}", "", f"{section.ended}, {section.seconds:.0f} s.", ""]
        if section.kind == TESTS and section.rows:
            lines += ["| test | outcome | seconds | |", "|---|---|---|---|"]
            for row in section.rows:
                figures = ", ".join(f"{k} {v}" for k, v in row["figures"].items())
                shown = "; ".join(filter(None, (row["message"], figures)))
                name = row["test"].rsplit("/", 1)[-1]
                lines.append(cells([name, row["outcome"], row["seconds"], shown]))
            lines.append("")
        elif section.rows:
            columns = list(dict.fromkeys(key for row in section.rows for key in row))
            lines += [cells(columns), cells(["---"] * len(columns))]
            lines += [cells([row.get(c, "") for c in columns]) for row in section.rows]
            lines.append("")
    return "\n".join(lines)


def cells(values: Sequence[object]) -> str:
    return "| " + " | ".join(str(v).replace("|", "\\|").replace("\n", " ") for v in values) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".finetune" / "gpu")
    parser.add_argument("--seconds", type=float, default=460)
    parser.add_argument("--only", nargs="+", default=[], help="tests, pieces, training")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests" / "trainer")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    (out / "log.txt").unlink(missing_ok=True)
    small = ["training.py", "--shapes", "8M", "--rounds", "1", "--steps", "1"]
    large = [
        ["training.py", "--shapes", "1B", "--rounds", "1", "--steps", "6"],
        ["training.py", "--shapes", "3B", "--rounds", "1", "--steps", "4"],
    ]
    runner = Runner(
        out, options.device, options.tests, [small] if options.device == "cpu" else large
    )
    missing = lacking(NEEDED)
    if missing:
        runner.note = f"Nothing was run: {sys.executable} lacks {', '.join(missing)}."
    elif runner.machine["device"] is None:
        runner.note = "Nothing was run: torch sees no GPU here."
    if runner.note:
        runner.write()
        print(runner.note, file=sys.stderr)
        return 2
    runner.run(options.seconds, options.only)
    runner.write()
    print(f"{out / 'results.md'}\n{out / 'results.json'}")
    return int(runner.failed)


if __name__ == "__main__":
    sys.exit(main())
