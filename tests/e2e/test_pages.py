"""The reports in a browser: they render anywhere without the network, hold the figures of
metrics.json, and are accessible by axe's rules."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from measured import measured_set
from playwright.sync_api import Browser, Page, sync_playwright
from test_publish_papers import DATA_REPORT, about

from finetune_api.evaluation_results import BASE, TUNED, Row
from finetune_trainer.publish import report
from finetune_trainer.quickstart import make_quickstart

pytestmark = pytest.mark.e2e
TEMPLATES = {"note": {"prompt": "{{ message }}\nNote:", "completion": " {{ note }}"}}
KINDS = {
    "labels": [("wrong → right", 12), ("right → wrong", 1), ("both wrong", 3), ("both right", 9)],
    "texts": [("better", 1), ("worse", 1), ("unchanged", 1)],
}
"""Samples of the made report, by kind of change."""
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@dataclass(frozen=True)
class Reports:
    """Two runs, the second of which started from the model of the first."""

    report: Path
    """report.html of the second run."""
    data: Path
    """report.html of its prepared data."""
    metrics: dict[str, Any]
    """Its metrics.json."""
    predictions: list[dict[str, Any]]
    """The lines of its predictions.jsonl."""
    samples: Path
    """report.html of a made run with many kinds of samples."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, made_samples: Path) -> Reports:
    folder = tmp_path_factory.mktemp("pages")
    make_quickstart(folder, tiny=True, cache=folder / "cache")
    run(folder, "first", {"source": "./model"}, "intent", "reply")
    run(folder, "second", {"fineTuneJobRef": {"name": "first"}}, "note", "intent", gates=[
        {"dataSet": "note", "metric": "Loss", "operator": "BetterThan", "row": "Base"},
        {"dataSet": "intent", "metric": "Loss", "operator": "WorsensAtMost", "value": "0.1"},
    ])  # fmt: skip
    (published,) = (folder / ".finetune" / "models" / "second").iterdir()
    (data,) = (folder / ".finetune" / "runs" / "second").glob("*/report.html")
    metrics = json.loads((published / "metrics.json").read_text())
    lines = (published / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    return Reports(published / "report.html", data, metrics, predictions, made_samples)


@pytest.fixture(scope="module")
def made_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with samples of every kind, and with texts that may break a page."""
    shot = Row(model="Base", prompt="1-shot")
    kinds = {"gained": 12, "lost": 1, "wrong": 3, "right": 9}
    said = [
        ("a" if kind in ("lost", "right") else "b", "a" if kind in ("gained", "right") else "c")
        for kind, count in kinds.items()
        for _ in range(count)
    ]
    hostile = ["x" * 900, "<script>alert(1)</script> \u202e", "A question. " * 90]
    labels = measured_set(
        ["a"] * len(said),
        {BASE: [b for b, _ in said], shot: ["a"] * 6, TUNED: [t for _, t in said]},
        name="labels",
        prompts=[f"{hostile[n % 3]} {n}" for n in range(len(said))],
    )
    text = "The parcel is on its way and comes on monday. "
    texts = measured_set(
        [text, text, text * 20],
        {BASE: ["w" * 600, text, text], TUNED: [text, "The parcel", text]},
        ("Loss", "ExactMatch", "Rouge"),
        name="texts",
    )
    page = tmp_path_factory.mktemp("samples") / "report.html"
    made = dataclasses.replace(about(), sets=[labels, texts])
    page.write_text(report.render(made, json.dumps(DATA_REPORT).encode()), encoding="utf-8")
    return page


def run(folder: Path, name: str, model: dict[str, Any], task: str, kept: str, **more: Any) -> None:
    """Run a job on this machine that tunes for one task of the quickstart, and keeps another."""

    def source(name: str, side: str) -> dict[str, Any]:
        template = {"template": TEMPLATES[name]} if name in TEMPLATES else {}
        return {"name": name, "source": f"./data/{name}-{side}.jsonl", **template}

    spec = {
        "model": model,
        "data": {
            "train": [source(task, "train")],
            "test": [source(task, "test")],
            "retention": [source(kept, "test")],
            "quality": {"contamination": "Ignore"},
        },
        "training": {"maxSteps": 10, "batchSize": 8, "precision": "FP32"},
        "evaluation": {
            "maxSamples": 40, "maxNewTokens": 6, "artefactCheck": "Off",
            "baselines": {"shots": [2], "maxSamples": 20}, **more,
        },
        "method": {"type": "LoRA", "lora": {"rank": 4}},
        "output": {"destination": f"s3://models/{name}"},
        "compute": {"gpusPerNode": 0},
    }  # fmt: skip
    raw = {
        "apiVersion": "finetune-operator.dev/v1alpha1", "kind": "FineTuneJob",
        "metadata": {"name": name}, "spec": spec,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-m", "finetune_trainer", "run", f"{name}.yaml", "--local-storage"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stdout + done.stderr  # 3: held by its gates


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "make tools FOR=e2e installs it"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """A page in a tab of its own, with what it complained about."""

    def __init__(self, browser: Browser, path: Path, scheme: Any, size: Any) -> None:
        self.context = browser.new_context(color_scheme=scheme, viewport=size)
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.as_uri()
        self.page.goto(self.url)


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["report", "data", "samples"])
def test_a_page_renders_anywhere(
    reports: Reports, browser: Browser, which: str, scheme: str, size: dict[str, int]
) -> None:
    opened = Opened(browser, getattr(reports, which), scheme, size)
    try:
        page = opened.page
        assert opened.requests == [opened.url], "the page holds all that it shows"
        for details in page.locator("details").all():
            details.evaluate("element => element.open = true")
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= size["width"], "tables scroll, the page does not"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != (
            "rgb(255, 255, 255)"
        )
        assert dark is (scheme == "dark")
        assert opened.said == []
    finally:
        opened.context.close()


def test_the_figures_are_those_of_metrics_json(reports: Reports, browser: Browser) -> None:
    opened = Opened(browser, reports.report, "light", DESKTOP)
    try:
        cells = {text.strip() for text in opened.page.locator("td").all_inner_texts()}
        for each in reports.metrics["test"]:
            for row in ("base", "tuned"):
                assert f"{each[row]['Loss']:.3f}" in cells, (each["dataSet"], row)
            for shown in each["rows"]:
                assert any(cell.startswith(shown["row"]) for cell in cells), shown["row"]
        for gate in reports.metrics["gates"]:
            assert gate["because"] in cells
        matrix = reports.metrics["matrix"]
        assert [name.split()[0] for name in matrix["models"]] == ["Base", "first", "second"]
        assert {column["dataSet"] for column in matrix["columns"]} >= {"intent"}
        charts = opened.page.locator("svg[role=img]")
        assert charts.first.get_attribute("aria-label") == ("Loss by optimizer step")
        points = [p for p in reports.metrics["validation"] if "Loss" in p["overall"]]
        assert opened.page.locator("svg circle.dot.validation").count() >= len(points)
    finally:
        opened.context.close()


@pytest.mark.parametrize("name", ["labels", "texts"])
def test_samples_are_filtered_by_what_tuning_changed(
    made_samples: Path, browser: Browser, name: str
) -> None:
    opened = Opened(browser, made_samples, "light", DESKTOP)
    try:
        part = opened.page.get_by_role("region", name=f"Samples of {name}", exact=True)
        choices, samples = part.get_by_role("radio"), part.get_by_role("article")
        labels = part.locator("label").all_inner_texts()
        kinds = [label.strip().rsplit(" ", 1) for label in labels]
        everything = samples.count()
        assert kinds[0] == ["all shown", str(everything)] and choices.first.is_checked()
        assert [(kind, int(count)) for kind, count in kinds[1:]] == KINDS[name]
        shown = 0
        for choice, (kind, count) in zip(choices.all()[1:], KINDS[name], strict=True):
            assert choice.is_disabled() is (count == 0)
            if count:
                choice.check()
                visible = samples.all()  # by role: hidden ones have none
                assert len(visible) == min(count, 8)
                assert all(kind in sample.inner_text() for sample in visible)
                shown += len(visible)
        assert shown == everything, "each sample is of one kind"
        choices.first.focus()
        opened.page.keyboard.press("ArrowDown")
        assert choices.nth(1).is_checked(), "by the keyboard"
        assert opened.said == []
    finally:
        opened.context.close()


def test_samples_of_a_run_are_those_of_predictions_jsonl(
    reports: Reports, browser: Browser
) -> None:
    opened = Opened(browser, reports.report, "dark", PHONE)
    try:
        for name in ("note", "intent"):
            part = opened.page.get_by_role("region", name=f"Samples of {name}", exact=True)
            lines = [
                (line["prompt"].strip(), line["reference"].strip(), answers)
                for line in reports.predictions
                if line["dataSet"] == name and (answers := line["answers"])
            ]
            counts = part.locator("label .dim").all_inner_texts()
            assert sum(map(int, counts[1:])) == len(lines)
            for sample in part.get_by_role("article").all():
                prompt, reference = (
                    sample.locator(where).first.text_content().strip() for where in (".text", "dd")
                )
                rows = sample.locator("dt").evaluate_all("all => all.map(e => e.firstChild.data)")
                said = sample.locator("dd").all_text_contents()
                found = dict(zip((row.strip() for row in rows[1:]), said[1:], strict=True))
                known = next(a for p, r, a in lines if (p, r) == (prompt, reference))
                assert found == {row: text.strip() for row, text in known.items()}
                assert {"Base", "Tuned"} <= found.keys()
    finally:
        opened.context.close()
