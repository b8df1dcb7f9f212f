"""CURRENT.json: compare-and-swap, decisions, and the way back."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from finetune_api.run_spec import JobIdentity
from finetune_trainer.cli import main
from finetune_trainer.failures import UserError
from finetune_trainer.storage.current import CurrentFile, CurrentPointer, UsedModel, rolled_back
from finetune_trainer.storage.published import Manifest
from finetune_trainer.storage.s3server import EmbeddedS3

JOB = JobIdentity(namespace="team", name="bot", uid="u")


def model(run: str) -> UsedModel:
    return UsedModel(run=run, job=JOB, uri=f"s3://b/out/{run}", digest=run, since="2026-01-01")


@pytest.fixture
def pointer(s3: Any, bucket: str) -> CurrentPointer:
    return CurrentPointer(s3.store(), f"s3://{bucket}/out/")


def test_of_runs_that_end_together_one_swaps(pointer: CurrentPointer) -> None:
    seen = pointer.read()
    assert (seen.file.current, seen.etag) == (None, None)
    won: list[str] = []
    start = threading.Barrier(4)

    def swap(run: str) -> None:
        start.wait()
        if pointer.swap(seen, seen.file.after(run, model(run), ["support"], "2026-01-01")):
            won.append(run)

    threads = [threading.Thread(target=swap, args=(f"{n}-a",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    current = pointer.read().file.current
    assert current is not None and won == [current.run]


def test_decisions_are_counted_and_a_held_run_moves_nothing() -> None:
    file = CurrentFile().after("1-a", model("1-a"), ["support", "tone"], "t1")
    file = file.after("2-a", None, ["support"], "t2")
    assert file.current == model("1-a") and file.earlier == []
    assert file.decided == {"support": 2, "tone": 1}
    assert file.has_decided("2-a") and not file.has_decided("3-a")
    assert [(d.run, d.became_current) for d in file.decisions] == [("2-a", False), ("1-a", True)]


def test_the_way_back() -> None:
    file = CurrentFile()
    for run in ("1-a", "2-a", "3-a"):
        file = file.after(run, model(run), [], "t")
    back = rolled_back(file, "s3://b/out/CURRENT.json", None, "now")
    assert back.current is not None and (back.current.run, back.current.since) == ("2-a", "now")
    # The way back does not lead to what was left on purpose.
    assert [m.run for m in back.earlier] == ["1-a"]
    to = rolled_back(file, "s3://b/out/CURRENT.json", "1-a", "now")
    assert to.current is not None and to.current.run == "1-a"
    with pytest.raises(UserError, match=r"names no run 9-a; earlier models: 2-a, 1-a"):
        rolled_back(file, "s3://b/out/CURRENT.json", "9-a", "now")
    with pytest.raises(UserError, match="names no earlier model; earlier models: none"):
        rolled_back(CurrentFile(), "s3://b/out/CURRENT.json", None, "now")


def test_what_others_wrote_is_shown_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EmbeddedS3(tmp_path / "s3") as server:
        server.ensure_bucket("models")
        pointer = CurrentPointer(server.store(), "s3://models/out")
        odd = model("1-a").model_copy(update={"since": "[/x]\x1b]8;;http://evil\x1b"})
        pointer.change(lambda file: file.moved(odd))
    where = ["s3://models/out", "--local-storage", "--state-dir", str(tmp_path)]
    assert main(["current", *where]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_another_programs_file_is_not_touched(pointer: CurrentPointer) -> None:
    pointer.store.put(pointer.uri, b'{"current": "mine"}')
    with pytest.raises(UserError, match="was not written by a run") as failed:
        pointer.read()
    assert failed.value.reason == "NotACurrentFile"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EmbeddedS3(tmp_path / "s3") as server:
        server.ensure_bucket("models")
        pointer = CurrentPointer(server.store(), "s3://models/out")
        for run in ("1-a", "2-a"):
            pointer.change(lambda file, run=run: file.after(run, model(run), ["tone"], "t"))
    where = ["s3://models/out", "--local-storage", "--state-dir", str(tmp_path)]
    assert main(["current", *where]) == 0
    shown = capsys.readouterr().out
    assert "current" in shown and "2-a" in shown and "Test set tone has decided 2 times" in shown
    assert main(["rollback", *where]) == 0
    with EmbeddedS3(tmp_path / "s3") as server:
        current = CurrentPointer(server.store(), "s3://models/out").read().file.current
    assert current is not None and current.run == "1-a"
    assert main(["rollback", *where]) == 10
    assert "names no earlier model" in capsys.readouterr().out
    assert main(["promote", *where, "2-a"]) == 10
    assert "2-a/manifest.json does not exist" in capsys.readouterr().out
    with EmbeddedS3(tmp_path / "s3") as server:
        manifest = Manifest(
            run="2-a", job=JOB, base_model="s3://b/base", method="LoRA", lineage=[],
            checkpoint="c", formats=["adapter"], files={},
        ).to_text()  # fmt: skip
        server.store().put("s3://models/out/2-a/manifest.json", manifest)
    assert main(["promote", *where, "2-a"]) == 0
    with EmbeddedS3(tmp_path / "s3") as server:
        current = CurrentPointer(server.store(), "s3://models/out").read().file.current
    assert current is not None and current.run == "2-a"
    assert current.digest == hashlib.sha256(manifest).hexdigest()
    assert main(["rollback", *where, "--run", "7-a"]) == 10
    assert "names no run 7-a" in capsys.readouterr().out
