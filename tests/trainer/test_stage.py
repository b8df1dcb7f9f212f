"""Entry point of prepare and publish: run spec in, termination message and exit code out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_api.results import PublishSummary, Termination
from finetune_api.run_spec import RunSpec
from finetune_trainer.failures import DataError
from finetune_trainer.stage import run_stage
from finetune_trainer.storage.objects import Stores

PUBLISHED = PublishSummary(uri="s3://bucket/out/1-abcde", digest="0", formats=["adapter"], bytes=1)

WAITS = """
import sys, threading, time
from finetune_trainer.stage import run_stage
def body(run_spec, stores):
    threading.Thread(target=time.sleep, args=(600,)).start()
    print("works", flush=True)
    time.sleep(600)
sys.exit(run_stage("prepare", body))
"""


HANGS = """
import os, sys, time
from finetune_trainer import liveness
from finetune_trainer.stage import run_stage
liveness.START_SECONDS = 2.0
def body(run_spec, stores):
    time.sleep(600)
sys.exit(run_stage("publish", body))
"""


@pytest.fixture
def termination(
    run_spec_for: Callable[..., RunSpec], run_spec_file: Callable[[RunSpec], Path]
) -> Callable[[], Termination]:
    """Set up a stage's environment. Call it to read the termination message."""
    folder = run_spec_file(run_spec_for()).parent

    def read() -> Termination:
        return Termination.model_validate(json.loads((folder / "termination/message").read_text()))

    return read


def test_success(termination: Callable[[], Termination], bucket: str) -> None:
    def body(run_spec: RunSpec, stores: Stores) -> PublishSummary:
        stores.default.put(f"{run_spec.output_uri}/adapter", b"1")
        return PUBLISHED

    assert run_stage("publish", body) == 0
    assert termination() == Termination(run="1-abcde", role="publish", published=PUBLISHED)


@pytest.mark.parametrize(
    ("error", "code", "reason", "words"),
    [
        (DataError("MalformedRecord", "train.jsonl:7: no JSON"), 11, "MalformedRecord", "jsonl:7"),
        (ZeroDivisionError("oops"), 22, "Unexpected", "ZeroDivisionError at test_stage.py"),
    ],
)
def test_failure(
    termination: Callable[[], Termination], error: Exception, code: int, reason: str, words: str
) -> None:
    def body(run_spec: RunSpec, stores: Stores) -> PublishSummary:
        raise error

    before = signal.getsignal(signal.SIGTERM)
    assert run_stage("prepare", body) == code
    word = termination()
    assert (word.run, word.role) == ("1-abcde", "prepare")
    assert word.failure is not None and word.failure.reason == reason
    assert words in word.failure.message
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ('{"version": 99}', "contract version 1; got 99"),
        ('{"version": 1, "job": {}}', "runSpec.run: required"),
    ],
)
def test_an_invalid_run_spec_is_refused(
    termination: Callable[[], Termination], text: str | None, words: str
) -> None:
    path = Path(os.environ["FINETUNE_RUN_SPEC"])
    path.unlink() if text is None else path.write_text(text)
    assert run_stage("publish", lambda run_spec, stores: PUBLISHED) == 10
    failure = termination().failure
    assert failure is not None and words in failure.message


def test_sigterm_ends_a_stage_immediately(termination: Callable[[], Termination]) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "works\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 23
    failure = termination().failure
    assert failure is not None
    assert (failure.failure_class, failure.retryable) == ("Preempted", True)


def test_a_stage_that_hangs_ends_with_its_stacks_in_storage(
    termination: Callable[[], Termination], run_spec_for: Callable[..., RunSpec], bucket: str
) -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], timeout=120, stderr=subprocess.PIPE)
    assert done.returncode == 24, done.stderr
    failure = termination().failure
    assert failure is not None and failure.failure_class == "Stalled"
    assert "publish made no progress for" in failure.message
    run_spec = run_spec_for()
    stacks = Stores(run_spec).default.get(f"{run_spec.run_uri}/stacks/publish.txt").decode()
    assert "in body" in stacks
