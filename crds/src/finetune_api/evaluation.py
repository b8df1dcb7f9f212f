"""``spec.evaluation``: test metrics, prompts for the base model, and what decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune_api.base import Count, DecimalString, DnsLabel, FieldName, Model, Rule, Text, is_zero
from finetune_api.custom_metrics import CustomMetric, with_declared
from finetune_api.gates import Gate, GateRow
from finetune_api.judge import WIN_RATE, Judge
from finetune_api.remedy import Remedy
from finetune_api.sources import DataUri, StorageAccess
from finetune_api.tasks import DEFAULT_METRICS, OF_BUILT_IN, Kinds, Metric

ArtefactCheck = Literal["Sample", "Full", "Off"]


class BaselinePrompt(Model):
    """A prompt of the user's own for the base model."""

    name: DnsLabel
    """Name of its row in the results."""
    text: Text
    """Instruction in front of each test prompt: as a system turn in conversations, else followed by
    an empty line. It may say what a tuned model knows: the labels, the wanted form, rules."""
    shots: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of examples between the instruction and the test prompt."""


class Baselines(Model):
    """Prompts for the base model. Its answers to the test prompts as they are (zero-shot) are
    always measured. There are none for a classification head, and for format Text."""

    shots: Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(max_length=4)] | None = None
    """Numbers of examples (few-shot): each test prompt follows that many training samples, as
    conversations or texts of the same form. They are drawn by the seed of data.split, with
    different labels where there are labels, never near duplicates of the test prompt. An empty
    list: no few-shot. Absent: 1 and 4, as far as there are training sets and they fit into the
    model's context."""
    draws: Annotated[int, Field(ge=1, le=10)] = 2
    """Number of draws of the examples. Answers with few examples depend much on which ones; the
    results show the spread."""
    max_samples: Count = 200
    """Number of test samples per set that are answered with these prompts, at most
    evaluation.maxSamples: the first ones."""
    prompts: Annotated[list[BaselinePrompt], Field(max_length=8)] = []
    """Prompts of the user's own."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.prompts)"
            " || self.prompts.all(p, self.prompts.exists_one(q, q.name == p.name))",
            "the names of the prompts must differ",
            lambda b: len({p.name for p in b.prompts}) == len(b.prompts),
            ("prompts[].name",),
        ),
        Rule(
            "!has(self.prompts)"
            " || !self.prompts.exists(p, p.name == 'retrieval' || p.name.endsWith('-shot'))",
            "retrieval and names that end in -shot are those of other rows",
            lambda b: not any(p.name == "retrieval" or p.name.endswith("-shot") for p in b.prompts),
            ("prompts[].name",),
        ),
    )


class Passages(Model):
    """Passages for retrieval."""

    source: DataUri
    """`s3://bucket/prefix/*.jsonl` or `pvc://claim/path` of records with a field `text`: one
    passage each. Formats and compression as for training data."""
    storage: StorageAccess | None = None
    """Access to these passages. Absent: `spec.storage`."""
    top: Annotated[int, Field(ge=1, le=20)] = 3
    """Number of passages in front of each test prompt, best first."""


def _gate_rule(row: GateRow, cel: str, why: str, holds: Callable[[Any], bool]) -> Rule:
    return Rule(
        f"!has(self.gates) || !self.gates.exists(g, has(g.row) && g.row == '{row}') || ({cel})",
        f"a gate against {row} needs that row: {why}",
        lambda e: not any(g.row == row for g in e.gates) or holds(e),
        ("gates[].row",),
    )


class Evaluation(Model):
    """Evaluation on validation and test sets."""

    every_steps: Count | None = None
    """Steps between evaluations on the validation sets. Absent: ten evaluations over the run."""
    metrics: Annotated[list[Metric], Field(min_length=1, max_length=16)] | None = None
    """Metrics of the final test. Absent: Loss and Perplexity, with Accuracy, Precision, Recall and
    F1 for format Classification, and ExactMatch, Bleu and Rouge (ROUGE-L) for other prompts with
    completions. Rouge1, Rouge2, ChrF, NormalizedExactMatch and TokenF1 (as in SQuAD: without case,
    punctuation and articles), ValidJson, JsonMatch and JsonFieldF1 (equal JSON values, shared
    fields), ChoiceMatch (the chosen letter), NumberMatch (the last number) and StrictNumberMatch
    (the number behind the reference's words, as in "#### 42") are measured on request, and
    InstructionFollowing (the share of answers that do all that their prompts ask for) where every
    prompt has instructions in the words of `builtin://instructions.jsonl`, which has it always.
    Also on request, for format Classification with at most 64 labels: LabelAccuracy, the share of
    samples whose label is the likeliest of all labels of the set after the prompt (acc of
    lm-evaluation-harness), LabelAccuracyPerToken and LabelAccuracyPerCharacter (acc_norm), by
    log-likelihoods divided by the label's length, and CalibrationError, how far the probabilities
    of the labels are from the share that is right (ECE in 15 bins, Guo et al. 2017).
    Task SequenceClassification: Loss, Accuracy, Precision, Recall and F1."""
    custom_metrics: Annotated[list[CustomMetric], Field(max_length=8)] = []
    """Metrics of the user's own, on all test and retention sets that have answers. Their code is in
    the trainer image; prepare tries it on reference answers, publish measures."""
    judge: Judge | None = None
    """A model that compares the tuned model's answers with the base model's, on test sets with free
    text as answers: metric WinRate, above 0.5 where it prefers the tuned model's. Personal data in
    what is sent to it is replaced, as by `data.quality.personalData` Redact, unless that is Ignore.
    Absent: nothing is sent anywhere."""
    max_samples: Count = 1000
    """Maximum number of samples per set for which text is generated; the loss is always over the
    whole set."""
    min_effect: DecimalString = "2"
    """Smallest gain over the base model that matters, in points: hundredths of a share (Accuracy,
    F1, Rouge) or of a nat (Loss), and points of Bleu and ChrF. The verdict of a metric is NotBetter
    once the samples rule out such a gain."""
    slices: Annotated[list[FieldName], Field(max_length=4)] = []
    """Fields of the records, e.g. language, by whose values the test metrics are reported too, so
    that rare cases are seen; the base and the tuned model are compared in each. Of each field and
    test set the 32 most frequent values are told apart; the others are "(other)", and records
    without a value "(none)". Personal data in values is replaced as by `data.quality.personalData`
    Redact. Some test record must have the field."""
    baselines: Baselines = Baselines()
    """Prompts for the base model, beside the test prompts as they are: does it need tuning, or
    would a prompt do? See the report and metrics.json."""
    passages: Passages | None = None
    """Passages that are retrieved for the test prompts, by BM25. Base and tuned model also answer
    with them."""
    gates: Annotated[list[Gate], Field(max_length=32)] = []
    """Conditions that the results must meet. A run that misses one is Complete with the condition
    Evaluated=False, which says by how much. Until publish has decided, Evaluated is Unknown."""
    remedy: Remedy | None = None
    """A remedy for forgetting, without training: the run goes on with the model at a point between
    the base model (0) and the tuned model (1). Each sample of a retention set belongs to one of two
    halves, by a hash of its text: one half chooses the point, the other is what gates, metrics and
    report are about. Of the points that do not worsen the loss of any retention set by more than
    its limit, the one with the lowest validation loss is chosen; if there is none, the tuned model
    is kept, and the results say so. Costs a pass over the validation sets and half of the retention
    sets for each point, 1 and 0 included, without generated text; with Full and Partial also
    reading the base model again. Absent: the tuned model is taken as it is."""
    data_curve: bool = False
    """Whether the run also trains on parts of its training samples, 25 % and 50 %, to say whether
    more of the same data would help (recommendation CollectMoreData). The smaller part is within
    the larger one; both have the same share of each training set, drawn by training.seed. Each
    sample is visited as often as in the whole training, with the same settings: steps, warm-up and
    decay shrink with the samples, and each training ends at the step that corresponds to the
    published checkpoint. It starts from the base model again, after the tuned model is tested, and
    changes nothing about that model. Costs about three quarters of the time of the training, and
    two more tests of validation and test sets; counts as evaluation in `status.usage`. A part
    whose training is interrupted twice is left out."""
    max_new_tokens: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Maximum length of a generated answer, in tokens. Absent: the longest completion of the
    training sets (without them, of all sets), but at most 512."""
    artefact_check: ArtefactCheck = "Sample"
    """What publish compares with the test before the model counts as published: it loads the model
    again from object storage, as the model card tells users. Sample: the losses of up to 16 test
    samples, and the first 32 tokens of their answers. Full: all test samples, which may take long
    on a CPU. Off: nothing. Without test sets, up to 16 training samples are compared with the
    trained checkpoint. A model that differs fails the run with reason ArtefactDiffers."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!{is_zero('self.minEffect')}",
            "minEffect is the smallest gain that matters: give a number above 0",
            lambda e: float(e.min_effect) > 0,
            ("minEffect",),
        ),
        Rule(
            "!has(self.slices) || self.slices.all(f, self.slices.exists_one(g, g == f))",
            "the fields of slices must differ",
            lambda e: len(set(e.slices)) == len(e.slices),
            ("slices",),
        ),
        Rule(
            "!has(self.customMetrics)"
            " || self.customMetrics.all(m, self.customMetrics.exists_one(n, n.name == m.name))",
            "the names of customMetrics must differ",
            lambda e: len({m.name for m in e.custom_metrics}) == len(e.custom_metrics),
            ("customMetrics[].name",),
        ),
        Rule(
            f"!has(self.gates) || self.gates.all(g, g.metric == {json.dumps(OF_BUILT_IN)}"
            " || g.metric in (has(self.metrics) ? self.metrics"
            f" : {json.dumps(DEFAULT_METRICS)})"
            " || (has(self.customMetrics) && self.customMetrics.exists(m, m.name == g.metric))"
            f" || (has(self.judge) && g.metric == '{WIN_RATE}'))",
            "a gate needs a metric that is measured: name it in evaluation.metrics, too, or declare"
            " it in evaluation.customMetrics (WinRate: by evaluation.judge)",
            lambda e: (
                {g.metric for g in e.gates}
                <= {
                    OF_BUILT_IN,
                    *(e.metrics or DEFAULT_METRICS),
                    *(m.name for m in e.custom_metrics),
                    *([WIN_RATE] if e.judge else ()),
                }
            ),
            ("gates[].metric",),
        ),
        Rule(
            f"!has(self.gates) || self.gates.all(g, g.metric != '{WIN_RATE}' || !has(g.row)"
            " || g.row == 'Base')",
            "WinRate is about the base model's answers to the test prompts as they are: remove row,"
            " or give Base",
            lambda e: all(g.row in (None, "Base") for g in e.gates if g.metric == WIN_RATE),
            ("gates[].row",),
        ),
        Rule(
            "!self.dataCurve || !has(self.remedy)",
            "dataCurve does not go with remedy: trainings on parts of the data have no point of"
            " their own to compare",
            lambda e: not (e.data_curve and e.remedy is not None),
            ("remedy.scan",),
        ),
        _gate_rule(
            "FewShot",
            "!has(self.baselines.shots) || self.baselines.shots.size() > 0",
            "baselines.shots is empty",
            lambda e: e.baselines.shots != [],
        ),
        _gate_rule(
            "Prompt",
            "has(self.baselines.prompts) && self.baselines.prompts.size() > 0",
            "give baselines.prompts",
            lambda e: bool(e.baselines.prompts),
        ),
        _gate_rule(
            "Retrieval", "has(self.passages)", "give passages", lambda e: e.passages is not None
        ),
    )

    @property
    def kinds(self) -> Kinds:
        """All metrics that there are for the run."""
        return with_declared(self.custom_metrics, judged=self.judge is not None)
