"""Results of evaluation: rows, metrics with intervals, comparisons, tables of test sets.

Numbers are plain JSON numbers; see ``metrics.json``.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from finetune_api.base import NonNegativeCount as Count
from finetune_api.base import Record, Word
from finetune_api.judge import JudgeResult
from finetune_api.remedy import RemedyResult

Metrics = Annotated[dict[Word, float], Field(max_length=64)]
"""Metric name (as in the spec) to value; Bleu and ChrF are from 0 to 100 and Rouge from 0 to 1, as
in their packages."""


RowModel = Literal["Base", "Tuned", "Current"]
"""Current: the model that CURRENT.json names; its answers are those that it was published with."""
AS_IS: Final = "0-shot"
"""The test prompts as they are."""
RETRIEVAL: Final = "retrieval"
"""The test prompts behind passages."""


class Row(Record):
    """A row of the results: a model, and how the test prompts are put to it."""

    model: RowModel
    """The model."""
    prompt: str = AS_IS
    """0-shot: the test prompts as they are; 4-shot: behind four examples; retrieval: behind
    passages; or the name of a prompt in evaluation.baselines."""
    draw: Count = 0
    """Which draw of the examples, from 0."""

    @property
    def key(self) -> str:
        """Name for files: ``base-4-shot-1``."""
        return f"{self.model.lower()}-{self.prompt}-{self.draw}"

    @property
    def name(self) -> str:
        """Name for people, without the draw: ``Base``, ``Base 4-shot``."""
        return self.model if self.prompt == AS_IS else f"{self.model} {self.prompt}"


BASE: Final = Row(model="Base")
TUNED: Final = Row(model="Tuned")
CURRENT: Final = Row(model="Current")

Verdict = Literal["Better", "Worse", "NotBetter", "TooFewSamples"]
"""Of a comparison: Better and Worse are significant; NotBetter: a gain that matters
(evaluation.minEffect) is ruled out; TooFewSamples: the samples decide nothing."""
ComparisonTest = Literal["McNemar", "SignFlip", "PairedT", "PairedBootstrap"]


class Comparison(Record):
    """Comparison of the tuned with the base model by one metric, over the same samples."""

    effect: float
    """Value of the tuned model minus that of the base model."""
    low: float
    """Lower end of its 95 % confidence interval."""
    high: float
    """Upper end."""
    p: Annotated[float, Field(ge=0, le=1)]
    """Of no difference, two-sided."""
    test: Word
    """``ComparisonTest`` that gave p."""
    verdict: Word
    """``Verdict``: what the samples allow to say; a trainer of another release may know more."""
    groups: Count | None = None
    """Groups of samples that were compared, each one unit: those of data.split.groupBy, else about
    as many as samples. None: an earlier trainer."""
    detectable: float = 0.0
    """Smallest difference that these samples would show with a probability of 80 %."""
    needed_samples: Count | None = None
    """Samples that would show a gain of evaluation.minEffect, if these are too few."""
    p_adjusted: Annotated[float, Field(ge=0, le=1)] | None = None
    """p after Holm (1979), over all comparisons of the results: for whoever claims the best of
    them."""


class Estimate(Record):
    """A metric of one row, with its 95 % confidence interval."""

    value: float
    """Value of the metric; with several draws, over all of them."""
    low: float | None = None
    """Lower end; None: not known, or of fewer than 20 groups."""
    high: float | None = None
    """Upper end."""
    lowest: float | None = None
    """Value of the worst draw, if there are several."""
    highest: float | None = None
    """Value of the best draw."""


class TableRow(Record):
    """Results of one row on one test set."""

    row: Word
    """Name: Base, Base 4-shot, Base retrieval, Tuned, Current."""
    model: RowModel
    """Model of the row."""
    prompt: str
    """How the test prompts were put to it: see ``Row``."""
    samples: Count
    """Samples answered."""
    groups: Count | None = None
    """Groups of these samples (data.split.groupBy), where they are fewer: intervals and tests take
    a group as one unit."""
    draws: Count = 1
    """Draws of the examples."""
    metrics: dict[Word, Estimate]
    """Metrics."""
    comparisons: dict[Word, Comparison] = {}
    """The judged model (``SetTable.judged``), with the test prompts as they are, against this row,
    by metric, over this row's samples."""
    tokens_per_answer: float | None = None
    """Mean number of generated tokens."""
    process_seconds: float = 0.0
    """Time for this row and this set, over all processes; of a GPU run, GPU-seconds."""
    measured_by: str | None = None
    """Job and run that have spent that time and measured the row: its answers were found in the
    workspace. None: this run."""


Action = Literal["Tune", "Prompt", "Retrieve", "TuneAndRetrieve", "Neither", "CollectMoreData"]


class Recommendation(Record):
    """What the results of a test set recommend."""

    action: Action
    """The cheapest way whose answers are not significantly worse than the best: Neither (the base
    model as it is), Prompt, Retrieve, Tune, TuneAndRetrieve. CollectMoreData: the tuned model does
    not reach its target, and more of the same data would help (``DataCurve``)."""
    row: Word
    """Row that answers so."""
    metric: Word
    """Metric that was compared."""
    because: str
    """The figures, in words."""


class Slice(Record):
    """Results on the samples of a test set with one value of a field of ``evaluation.slices``."""

    field: str
    """Field of the records."""
    value: str
    """Its value; (other): any rarer value; (none): the records have none."""
    samples: Count
    """Samples answered."""
    groups: Count | None = None
    """Groups of these samples, as in ``TableRow``."""
    base: dict[Word, Estimate]
    """Metrics of the base model, with the test prompts as they are."""
    tuned: dict[Word, Estimate]
    """Metrics of the tuned model; empty if nothing was trained."""
    metric: Word | None = None
    """Metric of the comparison: the one by which rows are compared."""
    comparison: Comparison | None = None
    """The tuned with the base model; None: the metric has no value here, or nothing was trained."""


class SetTable(Record):
    """Results of all rows on one test set."""

    name: Word
    """Name of the set."""
    retention: bool = False
    """Whether it is a set of data.retention: a change is forgetting, or transfer."""
    rows: list[TableRow]
    """Rows, cheapest first."""
    recommendation: Recommendation | None = None
    """None: a retention set, or no row but the base and the tuned model's loss, or one row."""
    slices: list[Slice] = []
    """Slices of ``evaluation.slices``, the worst change first, or without training by value."""

    @property
    def judged(self) -> TableRow | None:
        """The row that gates and comparisons are about: the tuned model, or without training the
        base model, with the test prompts as they are. None: it was not measured."""
        found = {row.row: row for row in self.rows}
        return found.get(TUNED.name) or found.get(BASE.name)


class GateResult(Record):
    """Result of a gate on one set."""

    data_set: Word
    """Name of the set."""
    metric: Word
    """Metric of the gate."""
    operator: Word
    """Operator of the gate."""
    row: Word | None = None
    """What the judged model was compared with; None: a value alone."""
    wanted: float | None = None
    """Value of the gate."""
    found: float | None = None
    """Value of the judged model; None: not measured, or not finite."""
    passed: bool
    """Whether the gate passed."""
    because: str
    """The figures, in words."""

    @property
    def text(self) -> str:
        """Readable form: ``support F1 AtLeast: 80.1 %, at least 85.0 % wanted``."""
        return f"{self.data_set} {self.metric} {self.operator}: {self.because}"


class CurrentResult(Record):
    """Comparison with the model that CURRENT.json named."""

    run: Word | None = None
    """Run of that model; None: there was none yet."""
    passed: bool
    """Whether the tuned model may become the current one: it has finite metrics, and is not worse
    by more than output.current.margin."""
    because: str
    """The figures, in words."""


class ArtefactResult(Record):
    """The published model, loaded again from object storage, against the tested one."""

    formats: list[Word]
    """Formats that were loaded, and agree: adapter, merged."""
    side: Word
    """Side of the split that the samples are from: test, or train for a run without test sets."""
    samples: Count
    """Samples compared, in each format."""
    largest_loss_difference: float
    """Largest difference of the loss of a sample, in nats per label."""
    answers_equal: Count
    """Answers that are equal, in the format with the fewest."""
    of: Count
    """Answers compared, in each format."""
    left_out: dict[Word, str] = {}
    """Formats that were not loaded, and why."""


class MatrixColumn(Record):
    """One set of a ``TaskMatrix``."""

    data_set: Word
    """Name of the set."""
    metric: Word
    """Metric of the values: the one by which rows are compared."""
    samples: Count
    """Samples that all models with a value have answered."""
    values: list[float | None]
    """Value of each of ``TaskMatrix.models``; None: the model was not measured on these samples."""
    own: Count | None = None
    """Which of the models was the first that had the set as a test set; None: none of them."""
    forgetting: float | None = None
    """Best value of the tuned models before, minus that of the last one (of a loss: the reverse);
    negative: the last one is the best. None: no tuned model before has a value."""
    transfer: Comparison | None = None
    """The last model against its ``own``, over the samples of both: backward transfer."""


class TaskMatrix(Record):
    """What each model of a sequence of runs, each of which started from the one before, does on
    the sets of the last run."""

    models: list[Word]
    """Names, oldest first: the base of the first run, then job and run of each tuned model."""
    columns: list[MatrixColumn]
    """One for each set that a model before the last was measured on."""
    average_forgetting: float | None = None
    """Mean of ``forgetting`` over the columns whose values are shares (Chaudhry et al. 2018,
    arXiv:1801.10112); None: there is none."""
    backward_transfer: float | None = None
    """Mean effect of ``transfer`` over these columns (Lopez-Paz and Ranzato 2017,
    arXiv:1706.08840); None: there is none."""
    not_read: dict[Word, str] = {}
    """Models of the sequence whose results were not read, and why."""


class DataCurvePoint(Record):
    """A training on a part of the training samples."""

    share: Annotated[float, Field(gt=0, le=1)]
    """Share of the training samples; 1: the run itself."""
    samples: Count
    """Training samples."""
    steps: Count
    """Optimizer steps of the measured model."""
    validation_loss: float | None = None
    """Loss over all validation sets, in nats per supervised token; None: there are none, or it is
    not finite."""
    process_seconds: float = 0.0
    """Time of the training and its tests, over all processes; 0 for the run itself."""


class SetCurve(Record):
    """What more training samples do for the results on one test set."""

    data_set: Word
    """Name of the set."""
    metric: Word
    """Metric of the values: the one by which rows are compared."""
    values: list[Estimate | None]
    """Of each point of ``DataCurve``; None: not measured."""
    comparison: Comparison | None = None
    """The whole training against that on half of the samples, over the same test samples."""
    next_gain: float | None = None
    """Change of the metric that twice the samples would bring, by the power law through the three
    values; None: there is none."""
    more_helps: bool | None = None
    """Whether more of the same data would help; None: the test samples do not tell."""
    because: str
    """The figures, in words."""


class DataCurve(Record):
    """Trainings on parts of the training samples (evaluation.dataCurve)."""

    points: list[DataCurvePoint]
    """Ascending shares, the run itself last."""
    not_measured: list[float] = []
    """Shares that were left out, as their trainings were interrupted."""
    sets: list[SetCurve] = []
    """One for each test set that a part was tested on."""


class EvaluationResult(Record):
    """Results of a run on its test and retention sets."""

    sets: list[SetTable]
    """One for each set."""
    gates: list[GateResult] = []
    """Results of the gates."""
    current: CurrentResult | None = None
    """None: output.current is not given."""

    artefact: ArtefactResult | None = None
    """None: not compared (evaluation.artefactCheck: Off, or another release published)."""
    matrix: TaskMatrix | None = None
    """None: the run did not start from the model of another run, or no set is common."""
    remedy: RemedyResult | None = None
    """None: evaluation.remedy is not given."""
    judge: JudgeResult | None = None
    """None: evaluation.judge is not given."""
    data_curve: DataCurve | None = None
    """None: evaluation.dataCurve is not set."""

    @property
    def held(self) -> str | None:
        """Why the run is held: what it missed. None: it is not held."""
        missed = [gate.text for gate in self.gates if not gate.passed]
        if self.current is not None and not self.current.passed:
            missed.append(f"current model {self.current.run or 'none'}: {self.current.because}")
        return "; ".join(missed) or None


class DataSetScores(Record):
    """Test metrics of one data set."""

    name: Word
    """Name of the set."""
    samples: Count
    """Samples measured."""
    base: Metrics
    """Metrics of the base model."""
    tuned: Metrics
    """Metrics of the tuned model; empty if nothing was trained."""
    comparisons: Annotated[dict[Word, Comparison], Field(max_length=64)] = {}
    """The tuned model against the base model, by metric."""

    @property
    def judged(self) -> Metrics:
        """Metrics of the tuned model, or without training of the base model."""
        return self.tuned or self.base
