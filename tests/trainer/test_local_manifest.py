"""Manifests of `finetune run`: local paths become claims, and errors name the field's path."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.base import InvalidSpec
from finetune_trainer.cli import main
from finetune_trainer.local.manifest import claim_of, read_manifest
from finetune_trainer.local.state import StateFolder


def manifest(folder: Path, **changes: Any) -> Path:
    raw: dict[str, Any] = {
        "apiVersion": "finetune-operator.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "job"},
        "spec": {
            "model": {"source": "s3://bucket/model"},
            "data": {"train": [{"source": "s3://bucket/train.jsonl"}]},
            "output": {"destination": "s3://bucket/out"},
        },
    } | changes
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def problems(path: Path) -> list[str]:
    with pytest.raises(InvalidSpec) as caught:
        read_manifest(path)
    return caught.value.problems


def test_every_form_of_a_path_becomes_a_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = {
        "model": {"source": "./model"},
        "data": {
            "train": [
                {"source": f"{tmp_path}/data/a.jsonl"},
                {"source": f"file://{tmp_path}/data/*.jsonl"},
                {"source": "~/data/**/*.jsonl"},
                {"source": "./data/"},
                {"source": "./model/../data/a.jsonl"},
                {"source": f"../{tmp_path.name}/data/a.jsonl"},
            ]
        },
        "output": {"destination": "s3://bucket/out"},
    }
    job = read_manifest(manifest(tmp_path, spec=spec))
    where = {name: folder.name for name, folder in job.claims.items()}

    def shown(address: str) -> str:
        claim, _, rest = address.removeprefix("pvc://").partition("/")
        return f"{where[claim]}:{rest}"

    assert shown(job.spec.model.source) == f"{tmp_path.name}:model"
    assert [shown(source.source) for source in job.spec.data.train] == [
        "data:a.jsonl",
        "data:*.jsonl",
        "data:**/*.jsonl",
        f"{tmp_path.name}:data/",
        "data:a.jsonl",
        "data:a.jsonl",
    ]


RELATIVE = {
    "model": {"source": "s3://bucket/model"},
    "data": {"train": [{"source": "./here.jsonl"}]},
    "output": {"destination": "s3://bucket/out"},
}


def test_relative_paths_start_from_the_manifests_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, elsewhere = tmp_path / "jobs", tmp_path / "elsewhere"
    jobs.mkdir()
    elsewhere.mkdir()
    (jobs / "here.jsonl").touch()
    path = manifest(jobs, spec=RELATIVE)
    monkeypatch.chdir(elsewhere)
    for spelled in (path, Path("../jobs/job.yaml")):
        assert list(read_manifest(spelled).claims.values()) == [jobs]
    (jobs / "here.jsonl").unlink()
    (elsewhere / "here.jsonl").touch()
    assert problems(path) == [
        f"spec.data.train[0].source: {jobs}/here.jsonl does not exist; got './here.jsonl'"
    ]


def test_a_path_without_its_first_dot_is_told_how_to_be_written(tmp_path: Path) -> None:
    (tmp_path / "here.jsonl").touch()
    data = {"train": [{"source": "here.jsonl"}]}
    assert problems(manifest(tmp_path, spec=RELATIVE | {"data": data})) == [
        "spec.data.train[0].source: a path starts with ./, ../, / or ~; write './here.jsonl'"
    ]


def test_relative_paths_of_standard_input_start_from_the_working_directory(
    tmp_path: Path,
) -> None:
    text = manifest(tmp_path, spec=RELATIVE).read_text()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "here.jsonl").touch()
    for spelled in ("-", "/dev/stdin"):
        validated = subprocess.run(
            [sys.executable, "-m", "finetune_trainer", "validate", spelled],
            input=text, cwd=elsewhere, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert validated.returncode == 0, validated.stderr


def test_claims_link_to_their_folders(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("here")
    claims: dict[str, Path] = {}
    address = claim_of(f"{tmp_path}/data/a.jsonl", tmp_path, claims)
    state = StateFolder(tmp_path / "state")
    for _ in range(2):  # the second call replaces the links of the first
        state.link_claims(claims)
    assert (state.claims / address.removeprefix("pvc://")).read_text() == "here"


def test_each_fault_is_reported_once_with_its_path(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        apiVersion="v1",
        metadata={"name": "Not A Name"},
        extra=1,
        spec={
            "model": {"source": f"{tmp_path}/nothing/model"},
            "data": {"train": [{"source": f"{tmp_path}/none.jsonl"}]},
            "output": {"destination": "here"},
            "training": {"epochs": 0},
        },
    )
    told = problems(path)
    assert [line.split(":", 1)[0] for line in told[:5]] == [
        "apiVersion",
        "metadata.name",
        "extra",
        "spec.model.source",
        "spec.data.train[0].source",
    ]
    assert {line.split(":", 1)[0] for line in told[5:]} == {
        "spec.training.epochs",
        "spec.output.destination",
    }
    assert len(told) == 7
    assert "there is no folder" in told[3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not YAML"),
        ("", "holds 0 FineTuneJobs"),
        ("- 1\n", "holds 0 FineTuneJobs"),
        ("kind: FineTuneJob\n---\nkind: FineTuneJob\n", "holds 2 FineTuneJobs"),
        ("kind: FineTuneJob\n", "spec: required"),
        ("kind: FineTuneJob\nspec: 3\n", "spec: must be a mapping"),
        ("kind: FineTuneJob\nspec: {data: 3, model: 4}\n", "spec.model"),
    ],
)
def test_files_without_exactly_one_valid_job_are_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert any(said in line for line in problems(path))


def test_a_job_among_other_objects_is_found(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    path.write_text(f"kind: Secret\nmetadata: {{name: s}}\n---\n{path.read_text()}")
    assert read_manifest(path).name == "job"


def test_a_misspelled_field_is_reported_with_a_suggestion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {
        "model": {"source": "s3://bucket/model"},
        "data": {"train": [{"source": "s3://bucket/train.jsonl"}]},
        "output": {"destination": "s3://bucket/out"},
        "metod": {"type": "LoRA"},
    }
    path = str(manifest(tmp_path, spec=spec, sepc={}))
    for command in (["validate", path], ["run", path, "--state-dir", str(tmp_path / "state")]):
        assert main(command) == 2
        told = "".join(capsys.readouterr())
        assert "sepc: unknown field; did you mean spec?" in told
        assert "spec.metod: unknown field; did you mean method?" in told


def test_validate_reports_faults_and_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(manifest(tmp_path))]) == 0
    assert main(["validate", str(manifest(tmp_path, spec={}))]) == 2
    assert "spec.model: required, but absent" in capsys.readouterr().err
    assert main(["validate", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["quickstart", "quickstart-full", "quickstart-cluster", "sequence-1", "sequence-2"]
)
def test_the_examples_are_valid(name: str, tiny_base: Path, tmp_path: Path) -> None:
    examples = shutil.copytree(Path(__file__).parents[2] / "examples", tmp_path / "examples")
    (tmp_path / ".finetune").mkdir()
    (tmp_path / ".finetune" / "quickstart").symlink_to(tiny_base)
    assert read_manifest(examples / f"{name}.yaml").name == name.removesuffix("-cluster")


def test_a_pod_template_is_validated_as_on_a_cluster(tmp_path: Path) -> None:
    spec = {
        "model": {"source": "s3://bucket/model"},
        "data": {"train": [{"source": "s3://bucket/train.jsonl"}]},
        "output": {"destination": "s3://bucket/out"},
        "compute": {"podTemplate": {"spec": {"hostNetwork": True}}},
    }
    (told,) = problems(manifest(tmp_path, spec=spec))
    assert told.startswith("spec.compute.podTemplate.spec.hostNetwork: not allowed")


def test_a_job_that_refers_to_itself_is_refused(tmp_path: Path) -> None:
    spec = {
        "model": {"fineTuneJobRef": {"name": "job"}},
        "data": {"train": [{"source": "s3://bucket/train.jsonl"}]},
        "output": {"destination": "s3://bucket/out"},
    }
    (problem,) = problems(manifest(tmp_path, spec=spec))
    assert problem.startswith("spec.model.fineTuneJobRef must name another FineTuneJob")
