"""``finetune eval``: the manifests that its options stand for, what it refuses, and a real
comparison of two models."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from finetune_api.spec import parse_spec
from finetune_trainer.cli import main
from finetune_trainer.local.eval_options import add_options, manifests_of


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(arguments)


def spec_of(*arguments: str) -> dict[str, Any]:
    (raw,) = manifests_of(options(*arguments), 0)
    spec: dict[str, Any] = raw["spec"]
    parse_spec(spec)
    return spec


def test_options_become_a_manifest() -> None:
    spec = spec_of(
        "s3://bots/support/3-abcde", "--data", "s3://data/Faq_1.jsonl", "--data",
        "own=s3://data/x.jsonl", "--data", "s3://data/*.jsonl", "--examples", "s3://data/train.gz",
        "--shots", "2", "--shots", "8", "--metrics", "Accuracy,F1", "--format", "Classification",
        "--max-samples", "50", "--max-new-tokens", "9", "--max-length", "512",
        "--precision", "FP32", "--min-effect", "0.5", "--output", "s3://results/evals/",
    )  # fmt: skip
    assert spec["method"] == {"type": "None"}
    classified = {"format": "Classification"}
    assert spec["data"] == {
        "test": [
            {"source": "s3://data/Faq_1.jsonl", "name": "faq-1", **classified},
            {"source": "s3://data/x.jsonl", "name": "own", **classified},
            {"source": "s3://data/*.jsonl", **classified},
        ],
        "train": [{"source": "s3://data/train.gz", "name": "train", **classified}],
    }
    assert spec["evaluation"] == {
        "metrics": ["Accuracy", "F1"], "maxSamples": 50, "maxNewTokens": 9, "minEffect": "0.5",
        "baselines": {"shots": [2, 8]},
    }  # fmt: skip
    assert spec["training"] == {"maxLength": 512, "precision": "FP32"}
    assert spec["output"]["destination"].startswith("s3://results/evals/eval-support-3-abcde-")
    assert spec["storage"] == {"workspace": "s3://results/evals/.workspace"}


def test_defaults_are_left_to_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("org/model@main", "--data", "builtin://instructions.jsonl")
    assert spec["model"] == {"source": "hf://org/model@main"}
    assert spec["data"]["test"] == [
        {"source": "builtin://instructions.jsonl", "name": "instructions"}
    ]
    assert spec["evaluation"] == {"minEffect": "2"}
    assert "training" not in spec and "task" not in spec
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    (raw,) = manifests_of(options("org/model", "--data", "test.jsonl"), 2)
    assert raw["spec"]["model"] == {"source": "./org/model"}, "a folder that exists is meant"
    assert raw["spec"]["data"]["test"] == [{"source": "./test.jsonl", "name": "test"}]
    assert raw["spec"]["compute"] == {"gpusPerNode": 2}


def test_a_template_of_the_library_with_its_fields() -> None:
    spec = spec_of("hf://org/m", "--data", "s3://d/a.csv", "--template", "Summarize",
                   "--field", "document=article")  # fmt: skip
    template = {"name": "Summarize", "fields": {"document": "article"}}
    assert spec["data"]["test"][0]["template"] == template


def test_each_model_has_a_job_of_its_own_and_shares_prepared_data() -> None:
    found = manifests_of(options("hf://a/m", "hf://b/m", "--data", "s3://d/t.jsonl"), 0)
    assert len({raw["metadata"]["name"] for raw in found}) == 2
    assert len({raw["spec"]["output"]["destination"] for raw in found}) == 2
    assert len({raw["spec"]["storage"]["workspace"] for raw in found}) == 1


TRAINS = """
apiVersion: finetune-operator.dev/v1alpha1
kind: FineTuneJob
metadata: {name: job}
spec:
  model: {source: "hf://org/model"}
  data: {train: [{source: "s3://d/a.jsonl"}]}
  output: {destination: "s3://models/out"}
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["org/model"], "--data: give at least one test set"),
        (["model", "--data", "s3://d/t"], "model: there is no such folder, and a model of the hub"),
        (["a/m", "a/m", "--data", "s3://d/t"], "hf://a/m is given twice"),
        ([*(f"a/m{n}" for n in range(9)), "--data", "s3://d/t"], "9 models given; 1 to 8"),
        (["job.yaml", "a/m"], "job.yaml is a manifest"),
        (["job.yaml", "--data", "s3://d/t"], "job.yaml is a manifest"),
        (["job.yaml"], "spec.method.type: LoRA trains a model: finetune run job.yaml"),
        (["gone.yaml"], "gone.yaml: cannot be read"),
        (["a/m", "--data", "gone.jsonl"], "gone.jsonl does not exist; got './gone.jsonl'"),
        (["a/m", "--data", "s3://d/t", "--metrics", "Acuracy"], "did you mean Accuracy"),
        (["a/m", "--data", "s3://d/t", "--shots", "4"], "give data.train"),
        (["a/m", "--data", "s3://d/t", "--template", "Classify", "--field", "x"],
         "--field x: give"),
        (["a/m", "--data", "s3://d/t", "--endpoint", "http://s3"], "--output: s3:// is a storage"),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_to_do(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(TRAINS)
    assert main(["eval", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not Path(".finetune").exists(), "nothing has begun"


@pytest.mark.slow
def test_two_models_are_measured_and_compared(tiny_base: Path, tmp_path: Path) -> None:
    """The second one is the first with noise; it is compared over all samples. The manifest of an
    evaluation does the same as the options."""
    other = tmp_path / "other"
    shutil.copytree(tiny_base / "model", other)
    weights = load_file(other / "model.safetensors")
    noisy = {name: value + 0.1 * value.std() * value.sign() for name, value in weights.items()}
    save_file(noisy, other / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model").symlink_to(tiny_base / "model")
    (tmp_path / "test.jsonl").symlink_to(tiny_base / "data" / "intent-test.jsonl")

    text = finetune(
        tmp_path, "eval", "model", "other", "--data", "test.jsonl", "--metrics", "Loss,Accuracy",
        "--max-new-tokens", "4", "--precision", "FP32",
    )  # fmt: skip
    assert "1 of 2: model" in text and "2 of 2: other" in text
    assert "prepared before" in text, "the models have the same tokenizer"
    assert f"A: {tmp_path}/model (measured by eval-model-" in text
    assert f"B: {tmp_path}/other (measured by eval-other-" in text
    assert "25 samples in common" in text and "worse" in text
    assert "pvc://" not in text
    (name,) = (tmp_path / ".finetune" / "models").glob("eval-model-*")
    (folder,) = name.iterdir()
    assert {"manifest.json", "metrics.json", "report.html"} <= {p.name for p in folder.iterdir()}

    job = yaml.safe_load(TRAINS)
    job["spec"] |= {
        "method": {"type": "None"}, "model": {"source": "./model"},
        "data": {"test": [{"name": "test", "source": "./test.jsonl"}]},
        "evaluation": {"metrics": ["Loss"]}, "training": {"precision": "FP32"},
        "compute": {"gpusPerNode": 0},
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    alone = finetune(tmp_path, "eval", "job.yaml")
    assert f"{tmp_path}/model (measured by job 1-" in alone
    loss = re.search(r"Loss\s+A\s+(\S+ \([^)]*\))", text)
    assert loss is not None and loss[1] in alone


def finetune(folder: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-m", "finetune_trainer", *arguments], cwd=folder, text=True, timeout=300,
        env=environment | {"COLUMNS": "160"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout
