"""The reports in a browser: they render anywhere without the network, hold the figures of
metrics.json, and are accessible by axe's rules."""

from __future__ import annotations

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
from playwright.sync_api import Browser, Page, sync_playwright

from finetune_trainer.quickstart import make_quickstart

pytestmark = pytest.mark.e2e
TEMPLATES = {"note": {"prompt": "{{ message }}\nNote:", "completion": " {{ note }}"}}
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


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
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
    return Reports(published / "report.html", data, metrics)


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
@pytest.mark.parametrize("which", ["report", "data"])
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
