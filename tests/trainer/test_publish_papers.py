"""Report, model card and metrics of a published model, from made-up figures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.evaluation_results import (
    BASE,
    TUNED,
    Comparison,
    DataCurve,
    DataCurvePoint,
    DataSetScores,
    Estimate,
    EvaluationResult,
    Recommendation,
    Row,
    SetCurve,
    SetTable,
    Slice,
    TableRow,
)
from finetune_api.remedy import RemedyPoint, RemedyResult, RetentionChange
from finetune_api.results import Ancestor, PreparedSummary, StagePlan, Startup, TrainSummary
from finetune_api.run_spec import CONTRACT_VERSION, JobIdentity, RunSpec, TunedBase
from finetune_api.sources import ModelLocation
from finetune_api.spec import parse_spec
from finetune_trainer.evaluate.table import Answered
from finetune_trainer.prepared.dataset import Reference
from finetune_trainer.prepared.manifest import DataManifest, DataSet
from finetune_trainer.publish import modelcard, report, run_facts
from finetune_trainer.publish.chart import Line, line_chart, ticks
from finetune_trainer.publish.measured_sets import MeasuredSet
from finetune_trainer.storage.runfiles import (
    CurvePoint,
    RunResult,
    SampleOrigin,
    ValidationPoint,
)

DATA_REPORT = {
    "digest": "d",
    "sources": [
        {
            "name": "support", "format": "Classification", "objects": 1, "bytes": 10, "records": 9,
            "dropped": {"Duplicate": 2, "Overlength": 0},
            "truncated": {"promptBeginning": 1, "completionEnd": 0, "textEnd": 0},
            "splits": {
                "train": {
                    "samples": 7, "tokens": 70, "supervisedTokens": 7, "supervisedShare": 0.1,
                    "lengthPercentiles": {"p50": 9, "p99": 12, "p100": 14},
                    "labels": {"yes": 4, "no": 3}, "distinctLabels": 2,
                    "previews": [
                        {
                            "where": "s3://bucket/t.jsonl:1", "tokens": 9,
                            "parts": [{"text": "", "supervised": False, "cut": 1200},
                                      {"text": "is it <b>?", "supervised": False},
                                      {"text": " yes", "supervised": True}],
                        }
                    ],
                },
            },
        }
    ],
}  # fmt: skip


def measured(name: str, prompt: str, reference: str, answers: Mapping[Row, str]) -> MeasuredSet:
    """A set of one sample, with what each row answered to it."""
    return MeasuredSet(
        name=name, retention=False, metrics={}, digests=["d"], slices={}, groups=np.zeros(1, int),
        references=[Reference(np.zeros(1, np.int32), prompt, reference, None)],
        answered=[Answered(row, [0], [answer]) for row, answer in answers.items()],
    )  # fmt: skip


def about(
    source: str = "hf://org/name@rev",
    scores: bool = True,
    before: Sequence[Ancestor] = (),
    base: str = "",
    **spec: object,
) -> run_facts.About:
    run_spec = RunSpec(
        version=CONTRACT_VERSION,
        job=JobIdentity(namespace="default", name="support", uid="0f9c2"),
        run="1-0f9c2",
        spec=parse_spec(
            {
                "model": {"source": source},
                "data": {"train": [{"source": "s3://bucket/t.jsonl"}]},
                "output": {"destination": "s3://bucket/out"},
            }
            | spec
        ),
    )
    found = DataSetScores(
        name="support",
        samples=9,
        base={"Loss": 2.0, "Accuracy": 0.5, "Perplexity": 123456.7},
        tuned={"Loss": 2.5, "Accuracy": 0.975, "Perplexity": 12.2},
    )
    compared = {
        "Accuracy": Comparison(
            effect=0.475, low=0.2, high=0.6, p=0.001, test="McNemar", verdict="Better"
        ),
        "Loss": Comparison(
            effect=0.5,
            low=-0.5,
            high=1.5,
            p=0.3,
            test="SignFlip",
            verdict="TooFewSamples",
            needed_samples=1200,
        ),
    }
    value = Estimate(value=0.5, low=0.4, high=0.6, lowest=0.45, highest=0.55)
    rows = [
        TableRow(row="Base", model="Base", prompt="0-shot", samples=9,
                 metrics={"Accuracy": value}, comparisons=compared),
        TableRow(row="Base 4-shot", model="Base", prompt="4-shot", samples=5, draws=2,
                 metrics={"Accuracy": value}, comparisons=compared, tokens_per_answer=3.5,
                 process_seconds=1.25, measured_by="job 1-<b>"),
        TableRow(row="Tuned", model="Tuned", prompt="0-shot", samples=9, groups=3,
                 metrics={"Accuracy": value}),
    ]  # fmt: skip
    advice = Recommendation(
        action="Tune", row="Tuned", metric="Accuracy", because="tuning is what helps"
    )
    slices = [
        Slice(field="language", value=f"{name}<i>", samples=4, groups=2, base={"Accuracy": value},
              tuned={"Accuracy": Estimate(value=0.25)}, metric="Accuracy", comparison=comparison)
        for name, comparison in (
            ("pt", compared["Accuracy"].model_copy(update={"effect": -0.25, "p_adjusted": 0.04})),
            ("da", None),
        )
    ]  # fmt: skip
    table = SetTable(name="support", rows=rows, recommendation=advice, slices=slices)
    curve = DataCurve(
        points=[
            DataCurvePoint(
                share=0.5, samples=1234, steps=10, validation_loss=1.75, process_seconds=2.5
            ),
            DataCurvePoint(share=1, samples=2468, steps=20),
        ],
        not_measured=[0.25],
        sets=[
            SetCurve(
                data_set="support", metric="Accuracy", values=[None, value, value],
                comparison=compared["Accuracy"], more_helps=True, because="it <b>rises</b>",
            )
        ],
    )  # fmt: skip
    answers = {BASE: "b", Row(model="Base", prompt="4-shot"): "b4", TUNED: "c"}
    lineage = [Ancestor(uri=source), *before]
    result = RunResult(
        summary=TrainSummary(
            attempt=2, restarts=1, steps=20, checkpoint="s3://bucket/commit", checkpoint_step=10,
            scores=[found] if scores else [], trainable_parameters=10, total_parameters=1000,
            tokens=9000, training_seconds=60.0,
            startup=Startup(seconds={"model": 1.25, "step": 2.0}, from_step=0, first_step=1.0),
        ),
        curve=[
            CurvePoint(
                step=s, data_stage="warm", loss=3 / s, learning_rate=1e-4, gradient_norm=1.0
            )
            for s in (1, 10, 20)
        ],
        validation=[
            ValidationPoint(step=10, sets={"support": {"Loss": 1.5}}, overall={"Loss": 1.5})
        ],
        lineage=lineage,
        versions={"torch": "1"},
        processes=2,
        device="cpu",
    )  # fmt: skip
    prepared = PreparedSummary(
        digest="d", uri="s3://bucket/data/d", reused=False, train_samples=7, validation_samples=1,
        test_samples=1, train_tokens=70, supervised_tokens=7, total_steps=20,
        stages=[StagePlan(name="warm", steps=15, mixture={"support": 1.0})],
    )  # fmt: skip
    sets = [
        DataSet(split="train", name="support", format="Classification", samples=7, tokens=70,
                supervised=7)
    ]  # fmt: skip
    data = DataManifest(
        classes=[],
        version=1, digest="d", sets=sets, shards={"train": [], "validation": [], "test": []},
        max_length=64, max_completion_tokens=4, stop_token_ids=[0], dropped={}, files=[],
    )  # fmt: skip
    sizes = run_facts.Sizes(
        {"adapter": 1_234_567, "merged": 2_000_000_000}, full_copy=1_980_000_000
    )
    return run_facts.gather(
        run_spec, result, prepared, data, sizes, ModelLocation(source=base or source),
        evaluation=EvaluationResult(sets=[table] if scores else [], data_curve=curve),
        sets=[measured("support", "<script>x</script>", "a", answers)],
    )  # fmt: skip


class Page(HTMLParser):
    """Collects open tags, seen tags and links out of the page."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)  # <line …/>

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def remedied(chosen: float | None) -> run_facts.About:
    """A run with a remedy that has measured three points."""
    points = [
        RemedyPoint(
            point=at, validation_loss=2 - at, qualifies=at < 1 and chosen is not None,
            retention=[RetentionChange(data_set="a<b", loss=1 + at, change=at, low=at - 0.1,
                                       high=at + 0.1)],
        )
        for at in (1.0, 0.5, 0.0)
    ]  # fmt: skip
    points[0] = points[0].model_copy(update={"validation_loss": None})
    found = RemedyResult(
        scan="LayerLinear", limits={"a<b": 0.75}, points=points, chosen=chosen,
        because="the figures",
    )  # fmt: skip
    made = about()
    evaluation = made.evaluation.model_copy(update={"remedy": found})
    return dataclasses.replace(made, evaluation=evaluation)


@pytest.mark.parametrize(("chosen", "verdict"), [(0.5, "chosen"), (None, "kept: no point")])
def test_the_points_of_a_remedy_are_shown(chosen: float | None, verdict: str) -> None:
    made = remedied(chosen)
    text = report.render(made, json.dumps(DATA_REPORT).encode())
    Page().feed(text)
    assert "<b>LayerLinear</b>: the figures." in text and verdict in text
    assert 'aria-label="Change of the losses from the base model' in text
    assert "<title>a&lt;b, point 0.5: 0.5</title>" in text
    assert "<title>Validation, point 0.5: -0.5</title>" in text
    assert "a&lt;b (limit 0.75)" in text and "+0.5 (0.4, 0.6)" in text
    assert "Remedy: LayerLinear: the figures." in modelcard.render(made)
    told = json.loads(run_facts.metrics_text(made))
    assert told["remedy"].get("chosen") == chosen
    assert told["remedy"]["points"][1]["retention"][0]["change"] == 0.5
    published = dict(run_facts.settings(made))["Published checkpoint"]
    named = ", point 0.5 from the base model (LayerLinear)" if chosen else ""
    assert published == f"step 10{named}"


@pytest.mark.parametrize("scores", [True, False])
def test_the_report_is_self_contained_and_well_formed(scores: bool) -> None:
    text = report.render(about(scores=scores), json.dumps(DATA_REPORT).encode())
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert "script" not in page.seen, "text of samples is escaped"
    assert {"svg", "polyline", "circle", "table"} <= page.seen
    assert "url(" not in text
    assert ("The run had no test set" in text) is not scores


def test_the_report_shows_figures_data_and_examples() -> None:
    text = re.sub(r"\s+", " ", report.render(about(), json.dumps(DATA_REPORT).encode()))
    for shown in (
        '<span class="pill good">+47.5 %</span>', '<span class="pill bad">+0.500</span>',
        "123,457", "2 Duplicate 1 truncated", "yes 4, no 3", "&lt;script&gt;x&lt;/script&gt;",
        "[1,200 tokens cut off]", '<mark class="supervised"> yes</mark>',
        "is it &lt;b&gt;?", "LoRA, rank 16",
        "adapter 1.2 MB, merged 2,000.0 MB", "published checkpoint, step 10", "Loss 1.5",
        "1.2 (measured by run job 1-&lt;b&gt;)",
        "First step after</th><td>3.2 s (model 1.2, step 2.0)", "LoRA on <code>hf://org/name@rev<",
        '<td>warm</td><td class="num">15</td><td>support 100 %</td>',
        "Trained parameters</th><td>10 of 1,000 (1 %)", "; a full copy has 1,980.0 MB",
    ):  # fmt: skip
        assert shown in text, shown


def test_the_report_shows_the_data_curve() -> None:
    text = re.sub(r"\s+", " ", report.render(about(), json.dumps(DATA_REPORT).encode()))
    for shown in (
        '<th class="num">support, Accuracy</th>',
        '<td>50 %</td><td class="num">1,234</td><td class="num">10</td><td class="num">1.75</td>'
        '<td class="num">50.0 % (40, 60)</td><td class="num">2.5</td>',
        '<td>100 %</td><td class="num">2,468</td><td class="num">20</td><td class="num">–</td>',
        "<b>support</b>: it &lt;b&gt;rises&lt;/b&gt;.",
        "left out, as their trainings were interrupted: 25 %",
    ):
        assert shown in text, shown
    told = json.loads(run_facts.metrics_text(about()))["dataCurve"]
    assert told["points"][0]["samples"] == 1234 and told["notMeasured"] == [0.25]


def test_the_report_shows_groups_and_slices() -> None:
    text = re.sub(r"\s+", " ", report.render(about(), json.dumps(DATA_REPORT).encode()))
    assert "samples: 9 in 3 groups" in text and '<td class="num">9 in 3 groups</td>' in text
    rows = [
        '<td>pt&lt;i&gt;</td><td class="num">4 in 2 groups</td>'
        '<td class="num">50.0 % (40, 60)</td><td class="num">25.0 %</td><td class="num">'
        '<span class="pill bad">-25.0 % (20, 60)</span></td><td class="num">0.04</td>',
        "<td>da&lt;i&gt;</td>",
    ]
    assert 0 < text.index(rows[0]) < text.index(rows[1])
    told = json.loads(run_facts.metrics_text(about()))["test"][0]["slices"]
    assert [(s["field"], s["value"]) for s in told] == [
        ("language", "pt<i>"),
        ("language", "da<i>"),
    ]
    assert told[0]["comparison"]["pAdjusted"] == 0.04 and told[0]["groups"] == 2


def test_the_report_names_the_published_model_of_a_referenced_job() -> None:
    told = about()
    reference = {"model": {"fineTuneJobRef": {"name": "one"}}}
    run_spec = told.run_spec.model_copy(
        update={
            "spec": parse_spec({**told.spec.to_json(), **reference}),
            "base": TunedBase(job="one", run="1-a", uri="s3://one/1-a"),
        }
    )
    told = dataclasses.replace(told, run_spec=run_spec)
    text = report.render(told, json.dumps(DATA_REPORT).encode())
    assert "LoRA on <code>s3://one/1-a</code>" in text
    assert "<th>Base model</th><td>s3://one/1-a</td>" in text


def test_the_card_has_front_matter_and_loading_code() -> None:
    _, front, body = modelcard.render(about()).split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["base_model"] == "org/name"
    assert matter["library_name"] == "transformers"
    metrics = matter["model-index"][0]["results"][0]["metrics"]
    assert {m["name"]: m["value"] for m in metrics}["Accuracy"] == 0.975
    row = "| support | Accuracy | 50.0 % | 97.5 % | +47.5 % | 20, 60 | better |"
    assert row in body
    assert "| -0.5, 1.5 | undecided: 1,200 samples would do |" in body
    assert 'from_pretrained("org/name", revision="rev")' in body
    assert 'from_pretrained("merged")' in body
    other = modelcard.render(about(source="s3://bucket/model"))
    assert "`base` is a copy of `s3://bucket/model`" in other
    assert "base_model" not in yaml.safe_load(other.split("---\n")[1])


def test_the_card_shows_the_lineage() -> None:
    assert "## Lineage" not in modelcard.render(about())
    one = Ancestor(uri="s3://one/1-a", job="one", run="1-a", method="LoRA", formats=["adapter"])
    told = about(before=[one])
    text = modelcard.render(told)
    assert "| 1 | `hf://org/name@rev` |  |  |  |" in text
    assert "| 2 | `s3://one/1-a` | one 1-a | LoRA | adapter |" in text
    assert "| 3 | this model | support 1-0f9c2 | LoRA | adapter and merged |" in text
    assert "it is loaded on `hf://org/name@rev` alone" in text
    assert [a["uri"] for a in json.loads(run_facts.metrics_text(told))["lineage"]] == [
        "hf://org/name@rev", "s3://one/1-a"]  # fmt: skip

    whole = one.model_copy(update={"formats": ["merged"]})
    over = about(before=[whole], base="s3://one/1-a/merged")
    assert "`base` is a copy of `s3://one/1-a/merged`" in modelcard.render(over)
    assert "it is loaded on" not in modelcard.render(over)
    assert modelcard.front_matter(over)["base_model"] == "org/name", (
        "the first model of the lineage"
    )


def test_the_report_shows_the_lineage() -> None:
    data = json.dumps(DATA_REPORT).encode()
    assert "Made from" not in report.render(about(), data)
    one = Ancestor(uri="s3://one/1-a", job="one", run="1-a", method="LoRA", formats=["adapter"])
    assert (
        "Made from <code>hf://org/name@rev</code>, then <code>s3://one/1-a</code> (LoRA, job one),"
        " then this run"
    ) in report.render(about(before=[one]), data)


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_non_finite_figures_are_shown(loss: float) -> None:
    told = about()
    scores = [
        dataclasses.replace(told.scores[0], tuned=loss),
        dataclasses.replace(told.scores[2], tuned=math.exp(700)),
    ]
    found = told.result.summary.scores[0]
    summary = told.result.summary.model_copy(
        update={"scores": [found.model_copy(update={"tuned": {"Loss": loss}})]}
    )
    result = told.result.model_copy(update={"summary": summary})
    told = dataclasses.replace(told, scores=scores, result=result)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    raw = json.loads(run_facts.metrics_text(told), parse_constant=refuse)
    assert raw["test"][0]["tuned"] == {"Loss": None}
    assert scores[0].better is (None if math.isnan(loss) else False)
    assert scores[1].show(scores[1].tuned) == "1.014e+304"
    assert "1.014e+304" in report.render(told, json.dumps(DATA_REPORT).encode())
    metrics = modelcard.front_matter(told)["model-index"][0]["results"][0]["metrics"]
    assert [m["name"] for m in metrics] == ["Perplexity"]


def test_metrics_json_is_complete() -> None:
    raw = json.loads(run_facts.metrics_text(about()))
    assert raw["test"][0]["rows"][0]["comparisons"]["Accuracy"]["verdict"] == "Better"
    assert raw["test"][0]["gain"] == pytest.approx(
        {"Loss": 0.5, "Accuracy": 0.475, "Perplexity": 12.2 - 123456.7}
    )
    assert [point["step"] for point in raw["training"]["curve"]] == [1, 10, 20]
    assert {point["dataStage"] for point in raw["training"]["curve"]} == {"warm"}
    assert raw["data"]["stages"] == [{"name": "warm", "steps": 15, "mixture": {"support": 1.0}}]
    assert raw["spec"]["model"]["source"] == "hf://org/name@rev"
    assert (raw["training"]["tokens"], raw["training"]["goodputTokensPerSecond"]) == (9000, 150.0)
    assert raw["parameters"] == {"trainable": 10, "total": 1000}
    assert raw["training"]["startupSeconds"] == {"model": 1.25, "step": 2.0, "total": 3.25}


def test_quarantined_samples_are_named() -> None:
    assert "Samples left out" not in modelcard.render(about())
    places = [
        SampleOrigin(
            data_set=name, number=n, shard=f"shards/train-{name}-00000-00.arrow", row=n - 1
        )
        for name, n in [("support", 3), *(("notes", n) for n in range(1, 8))]
    ]
    told = about()
    summary = told.result.summary.model_copy(update={"rollbacks": 1, "quarantined_samples": 108})
    result = told.result.model_copy(update={"summary": summary, "quarantined": places})
    told = dataclasses.replace(told, result=result)
    training = json.loads(run_facts.metrics_text(told))["training"]
    assert (training["rollbacks"], training["quarantinedSamples"]) == (1, 108)
    assert len(training["quarantined"]) == 8
    assert training["quarantined"][0] == {
        "dataSet": "support", "number": 3, "shard": "shards/train-support-00000-00.arrow", "row": 2,
    }  # fmt: skip
    named = "108: sample 3 of 'support'; samples 1, 2, 3, 4, 5, … of 'notes'"
    assert f"| Samples left out of the training | {named}" in modelcard.render(told)
    assert "Samples left out" in report.render(told, json.dumps(DATA_REPORT).encode())


@given(
    # Ranges of losses and steps; spans close to zero have no even steps in floating point.
    st.floats(-1e6, 1e6).map(lambda x: round(x, 6)),
    st.floats(0, 1e6).filter(lambda x: x == 0 or x > 1e-6),
    st.integers(2, 9),
)
def test_ticks_cover_the_range_evenly(low: float, span: float, most: int) -> None:
    high = low + span
    found = ticks(low, high, most)
    assert found[0] <= low + 1e-9 * abs(low)
    assert found[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(found) <= most + 3
    steps = [b - a for a, b in pairwise(found)]
    assert all(math.isclose(s, steps[0], rel_tol=1e-6) for s in steps)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e3)), max_size=20))
def test_every_point_of_a_curve_is_inside_the_chart(points: list[tuple[int, float]]) -> None:
    chart = line_chart([Line("Training", "training", points)], "Loss", "step", marked=3)
    assert bool(chart) is bool(points)
    for pair in re.findall(r'points="([^"]*)"', chart):
        for x, y in (map(float, place.split(",")) for place in pair.split()):
            assert 0 <= x <= 760
            assert 0 <= y <= 300


def test_non_finite_values_are_left_out() -> None:
    chart = line_chart(
        [Line("Training", "training", [(1, math.nan), (2, math.inf)])], "Loss", "step"
    )
    assert chart == ""
