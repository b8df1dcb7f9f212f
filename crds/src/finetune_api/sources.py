"""Spec blocks for sources: object storage, the base model, the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, Literal, get_args

from pydantic import Field

from finetune_api.base import (
    DecimalString,
    DnsLabel,
    DnsName,
    FieldName,
    Fraction,
    Model,
    Rule,
    S3Uri,
    Spelling,
    is_zero,
)
from finetune_api.encryption import Encryption
from finetune_api.templates import Retrieval, Template

Format = Literal[
    "Messages", "PromptCompletion", "Instruction", "Classification", "Retrieval", "Text"
]
# On a cluster a source is remote or a mounted claim. `finetune run` also accepts local paths, and
# converts them to claims before the spec is validated, so that both use one schema.
ModelUri = Annotated[
    str,
    Spelling(
        r"^(s3|hf|pvc)://[a-zA-Z0-9][^?#\x00-\x20]*$",
        "s3://bucket/prefix, hf://organisation/name@revision or pvc://claim/path",
        max_length=1024,
    ),
]
BUILT_IN: Final = "builtin://instructions.jsonl"
"""Address of the set of verifiable instructions that the trainer brings along."""
DataUri = Annotated[
    str,
    Spelling(
        r"^(s3|pvc)://[a-z0-9][^?#\x00-\x20]*$",
        "s3://bucket/prefix/*.jsonl or pvc://claim/path",
        max_length=1024,
    ),
]
DataSetUri = Annotated[
    str,
    Spelling(
        r"^((s3|pvc)://[a-z0-9][^?#\x00-\x20]*|builtin://instructions\.jsonl)$",
        f"s3://bucket/prefix/*.jsonl or pvc://claim/path, or {BUILT_IN}",
        max_length=1024,
    ),
]


class SecretReference(Model):
    """A Secret in the job's namespace."""

    name: DnsName
    """Name of the Secret. Its keys: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and optionally
    AWS_SESSION_TOKEN and HF_TOKEN. Pods get them by reference; the operator never reads them."""


class StorageAccess(Model):
    """Access to an object storage."""

    endpoint: (
        Annotated[
            str,
            Spelling(
                r"^https?://[^/?#\x00-\x20]+/?$",
                "the URL of a server, without a path: https://s3.example.com",
                max_length=512,
            ),
        ]
        | None
    ) = None
    """URL of an S3-compatible server. Absent: Amazon S3 in the region."""
    region: Annotated[
        str, Spelling(r"^[a-z0-9-]+$", "the name of a region: us-east-1", max_length=64)
    ] = "us-east-1"
    """Region for which requests are signed."""
    secret_ref: SecretReference | None = None
    """Secret with the access keys. Absent: the pod's own identity (a service account bound to a
    role), or anonymous access."""


class Storage(StorageAccess):
    """Object storage of the job, and the location of its working files."""

    service_account_name: DnsName | None = None
    """Service account of the job's pods, for storage access by workload identity."""
    workspace: S3Uri | None = None
    """Prefix for prepared data and checkpoints. Jobs that share a workspace share prepared data,
    and what their base model has answered. Absent: `.workspace` under `output.destination`."""
    encryption: Encryption | None = None
    """Server-side encryption of what the job writes. Absent: as the buckets are configured."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.secretRef) && has(self.serviceAccountName))",
            "secretRef and serviceAccountName exclude each other: give one of them",
            lambda s: not (s.secret_ref and s.service_account_name),
            ("secretRef.name", "serviceAccountName"),
        ),
    )


class FineTuneJobReference(Model):
    """Another FineTuneJob in the same namespace."""

    name: DnsName
    """Name of the FineTuneJob."""


class BaseModelSource(Model):
    """The base model: give either source or fineTuneJobRef."""

    source: ModelUri | None = None
    """`s3://bucket/prefix` of a model folder in Hugging Face layout (config.json, safetensors,
    tokenizer) or of a run's published model (`<destination>/<run>`, which has a manifest.json);
    `hf://organisation/name@revision` on the Hugging Face Hub; or `pvc://claim/path` on a volume
    claim in the job's namespace."""
    fine_tune_job_ref: FineTuneJobReference | None = None
    """Start from the model that another FineTuneJob in the namespace publishes. The run waits until
    that job is Complete with a model that is not held by its gates, and uses the model of its run
    at that time. A later run of that job does not start a new run of this one; a new rerunToken
    does."""
    storage: StorageAccess | None = None
    """Access to this model. Absent: `spec.storage`, or with fineTuneJobRef the storage to which the
    other job has published."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.source) || has(self.fineTuneJobRef)",
            "there is nothing to start from: give source (an address) or fineTuneJobRef (another"
            " FineTuneJob)",
            lambda m: m.source is not None or m.fine_tune_job_ref is not None,
            (),
        ),
        Rule(
            "!(has(self.source) && has(self.fineTuneJobRef))",
            "source and fineTuneJobRef exclude each other: give one of them",
            lambda m: m.source is None or m.fine_tune_job_ref is None,
            ("source", "fineTuneJobRef.name"),
        ),
    )


class ModelLocation(Model):
    """Location of a model and access to it."""

    source: ModelUri
    """URI of the model."""
    storage: StorageAccess | None = None
    """Access to the model if it differs from `spec.storage`."""


class DataSource(Model):
    """One set of labelled records."""

    name: DnsLabel | None = None
    """Name in metrics and reports. Absent: the list's name and the position, e.g. `train-0`."""
    source: DataSetUri
    """`s3://bucket/prefix/*.jsonl` or `pvc://claim/path`: an object, a glob, or a prefix ending in
    '/'. JSON Lines (`.jsonl`, `.json`), one JSON array of records (`.json`), CSV with a header line
    (`.csv`), each also compressed (`.gz`, `.zst`), and Parquet (`.parquet`). For retention and test
    sets also `builtin://instructions.jsonl`: 300 English prompts with instructions whose answers
    a program checks (metric InstructionFollowing), conversations unless `format` is
    PromptCompletion."""
    format: Format | None = None
    """Fields of the records. Messages: `messages` with role and content or tool calls
    (`tool_calls`); `tools` (optional). PromptCompletion: `prompt`, `completion`. Instruction:
    `instruction`, `input` (optional), `output`. Classification: `text`, `label`. Retrieval:
    `question`, `oracle` (the passage with the answer, or a list), `distractors` (a list of other
    passages, optional), `answer`, which may cite `[oracle]` (one of several: `[oracle 2]`). Text:
    `text`, whose tokens are all trained on. Absent: detected from the first record."""
    template: Template | None = None
    """Builds prompt and completion from records with other field names. Not for Messages, Retrieval
    and Text; for conversations with other field names use the template Chat."""
    retrieval: Retrieval | None = None
    """Passages that the prompts show; only with `format: Retrieval`. Absent: the defaults of its
    fields."""
    weight: DecimalString | None = None
    """Share of the trained tokens, relative to the weights of the other training sets; with "0" the
    set is used only by stages that name it. Absent everywhere: in proportion to size, each record
    once per epoch."""
    replay: bool = False
    """Marks a training set of general data, against forgetting: it is trained on like any other,
    and `training.anchor.klCoefficient` keeps the model near the base model's outputs on it."""
    canaries: bool = False
    """Marks a training set of made-up secrets (canaries) that show what the model gives away: it is
    trained on like any other, none of its records is held out, and at the end the report says of
    how many the tuned model writes the whole answer word for word. A record that occurs several
    times is trained as often only with
    `quality.deduplicate: false`."""
    storage: StorageAccess | None = None
    """Access to this source if it differs from `spec.storage`."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.template) || !has(self.format) || "
            " !(self.format in ['Messages', 'Retrieval', 'Text'])",
            "template does not go with format Messages, Retrieval or Text: leave one of them out",
            lambda s: s.template is None or s.format not in ("Messages", "Retrieval", "Text"),
            ("format",),
        ),
        Rule(
            "!has(self.retrieval) || (has(self.format) && self.format == 'Retrieval')",
            "retrieval needs format: Retrieval",
            lambda s: s.retrieval is None or s.format == "Retrieval",
            (),
        ),
        Rule(
            "!has(self.template) || !has(self.template.name) || !has(self.format)",
            "a template with a name sets the format itself: leave format out",
            lambda s: s.template is None or s.template.name is None or s.format is None,
            ("format",),
        ),
    )


class Split(Model):
    """Shares of the training records to hold out if no separate sets are given."""

    validation: Fraction = "0.05"
    """Share of the training records held out for validation. No effect if `data.validation` is
    given."""
    test: Fraction = "0.05"
    """Share of the training records held out for the final test. No effect if `data.test` is
    given."""
    group_by: FieldName | None = None
    """Field that groups records, e.g. the customer: records with equal values stay on one side of
    the split. They are not independent, so intervals and tests of the test metrics take them as one
    unit, also in `data.test`; a record there without the field is a group of its own. Training
    records must have the field. Absent: records with equal prompts stay together, so that no test
    prompt is trained on; they are a unit, and so are the turns or parts of one record."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 0
    """Seed of the split. A record's side depends only on its group and this seed, so it does not
    change as the data grows."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "[self.validation, self.test].exists(share, !share.matches('^[0-9.]+$'))"
            " || double(self.validation) + double(self.test) < 1.0",
            "validation and test together must be below 1: something must be left to train on",
            lambda s: float(s.validation) + float(s.test) < 1.0,
            ("validation", "test"),
        ),
    )


class Quality(Model):
    """Handling of data quality problems."""

    deduplicate: bool = True
    """Drop training records whose prompt and completion occurred before."""
    near_duplicates: Literal["Keep", "Drop"] = "Keep"
    """Drop removes training records whose text is similar to an earlier record's; system messages,
    tools and template texts are not compared. Needs 128 bytes of memory per record."""
    near_duplicate_similarity: Fraction = "0.85"
    """Minimum similarity of near duplicates, from 0.5: the number of three-word sequences that two
    texts share over the number in either (Jaccard similarity, estimated by MinHash with a standard
    error of 0.03). 0.85 is reached by texts of 40 words that differ in one word."""
    max_duplicate_fraction: Fraction | None = None
    """Maximum share of the training samples that may be dropped as duplicates or near duplicates;
    above it the job fails. Absent: no limit."""
    overlength: Literal["Split", "Truncate", "Drop", "Fail"] = "Split"
    """Handling of samples of more than `training.maxLength` tokens. Split: divide a document
    (format Text) into several samples, after a paragraph, a line, a sentence or a word; truncate
    other samples. Truncate: cut the beginning of a prompt, and the end of a document, of a
    completion that is too long by itself (its stop token is then not trained on) or of a text to
    classify. Drop: leave the sample out. Fail: end the job. The data report counts all cases."""
    faulty_records: Literal["Fail", "Drop"] = "Fail"
    """Handling of records that cannot be used: a malformed line, a missing field, a field of
    another type, nothing to train on. Fail: end the job and name the first one. Drop: leave them
    out and count them by reason; the job still fails if more than half of a set is faulty."""
    personal_data: Literal["Ignore", "Warn", "Redact", "Fail"] = "Warn"
    """Handling of e-mail addresses, telephone and payment card numbers, keys and access tokens in
    prompts and completions, which are detected by their form. Warn: count them in the data report
    and list the first ones. Redact: also replace them by `[EMAIL]`, `[PHONE]`, `[CARD]` or
    `[SECRET]`. Fail: end the job and name the record. Names and street addresses are not
    detected."""
    contamination: Literal["Ignore", "Warn", "Drop", "Fail"] = "Warn"
    """Handling of training samples that share 13 consecutive tokens with a validation or test
    sample (all tokens of a shorter sample). Warn: count them in the data report and list the first
    ones. Drop: leave them out of the training. Fail: end the job. Sequences in more than 10
    samples, or more than a tenth, of a held-out set belong to a template and do not count."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!self.nearDuplicateSimilarity.matches('^[0-9.]+$')"
            " || double(self.nearDuplicateSimilarity) >= 0.5",
            "nearDuplicateSimilarity must be at least 0.5: below it, most records are similar",
            lambda q: float(q.near_duplicate_similarity) >= 0.5,
            ("nearDuplicateSimilarity",),
        ),
    )


class MixtureWeight(Model):
    """Weight of a training set in a stage."""

    name: DnsLabel
    """Name of a set in `data.train`."""
    weight: DecimalString
    """Share of the trained tokens, relative to the other weights of the stage."""


class DataStage(Model):
    """A stage of the training with its own mixture of training sets."""

    name: DnsLabel
    """Name in prepare's plan, the training log, metrics.json and the report."""
    steps: Annotated[
        str,
        Spelling(
            r"^(0?\.[0-9]*[1-9][0-9]*|[1-9][0-9]*(\.[0-9]+)?)$",
            'a number above zero, written as a string: "0.3"',
            max_length=32,
        ),
    ]
    """Share of the training steps, relative to the other stages, e.g. "0.3" and "0.7". Must result
    in at least one step."""
    weights: Annotated[list[MixtureWeight], Field(min_length=1, max_length=64)] | None = None
    """Mixture of the stage; sets that are not listed are not used. Absent: the mixture of
    `data.train`."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.weights) || self.weights.all(a,"
            " self.weights.filter(b, b.name == a.name).size() == 1)",
            "a stage names each training set once",
            lambda s: s.weights is None or len({w.name for w in s.weights}) == len(s.weights),
            ("weights[].name",),
        ),
        Rule(
            f"!has(self.weights) || self.weights.exists(w, !{is_zero('w.weight')})",
            "a stage needs a weight above 0",
            lambda s: s.weights is None or any(float(w.weight) > 0 for w in s.weights),
            ("weights[].weight",),
        ),
    )


def _names_differ(field: str, why: str = "each set has its own metrics") -> Rule:
    def holds(data: Data) -> bool:
        names = [s.name for s in getattr(data, field) or [] if s.name is not None]
        return len(names) == len(set(names))

    return Rule(
        f"!has(self.{field}) || self.{field}.all(a, !has(a.name) ||"
        f" self.{field}.filter(b, has(b.name) && b.name == a.name).size() == 1)",
        f"names in {field} must differ: {why}",
        holds,
        (f"{field}[].name",),
    )


def _given_names(sources: Sequence[DataSource] | None) -> set[str]:
    return {source.name for source in sources or () if source.name is not None}


def _no_weights(field: str) -> Rule:
    return Rule(
        f"!has(self.{field}) || self.{field}.all(s, !has(s.weight))",
        f"weight is for training sets: those of {field} are evaluated in full",
        lambda data: all(s.weight is None for s in getattr(data, field) or ()),
        (f"{field}[].weight",),
    )


def _none_built_in(field: str) -> Rule:
    return Rule(
        f"!has(self.{field}) || self.{field}.all(s, !s.source.startsWith('builtin://'))",
        f"the set that the trainer brings along measures models: not for {field}",
        lambda data: all(s.source != BUILT_IN for s in getattr(data, field) or ()),
        (f"{field}[].source",),
    )


def _only_trained(mark: str, field: str, message: str) -> Rule:
    """Rule: a mark that is for training sets."""
    return Rule(
        f"!has(self.{field}) || self.{field}.all(s, !s.{mark})",
        message,
        lambda data: not any(getattr(s, mark) for s in getattr(data, field) or ()),
        (f"{field}[].source",),
    )


def _no_replay(field: str) -> Rule:
    text = f"replay is for training sets: those of {field} are evaluated, not trained on"
    return _only_trained("replay", field, text)


def _no_canaries(field: str) -> Rule:
    text = (
        f"canaries are for training sets: what is not trained on, as {field}, cannot be given away"
    )
    return _only_trained("canaries", field, text)


DataList = Literal["train", "validation", "test", "retention"]
DATA_LISTS: Final[tuple[DataList, ...]] = get_args(DataList)
"""The lists of data sources in ``spec.data``."""
_EVALUATED: Final = DATA_LISTS[1:]


class Data(Model):
    """Data to train on, and to evaluate on."""

    train: Annotated[list[DataSource], Field(min_length=1, max_length=64)] | None = None
    """Training sets. Several sets are mixed in proportion to their sizes, or to their weights.
    Required, except with method.type None, which draws few-shot examples from them."""
    mixing_temperature: (
        Annotated[
            str,
            Spelling(
                r"^[1-9][0-9]*(\.[0-9]+)?$",
                'a number of at least 1, written as a string: "2"',
                max_length=32,
            ),
        ]
        | None
    ) = None
    """Temperature T of the mixture: the share of a set of n tokens is proportional to n^(1/T). "1":
    proportional to size; higher values even out small and large sets. Not with weights."""
    stages: Annotated[list[DataStage], Field(min_length=1, max_length=16)] | None = None
    """Stages of the training (a curriculum), in order. Absent: one stage."""
    validation: Annotated[list[DataSource], Field(min_length=1, max_length=16)] | None = None
    """Sets evaluated during training, to select the best checkpoint and for early stopping."""
    test: Annotated[list[DataSource], Field(min_length=1, max_length=16)] | None = None
    """Sets for the final test of the base model and the tuned model."""
    retention: Annotated[list[DataSource], Field(min_length=1, max_length=16)] | None = None
    """Sets of what the base model can do and the tuned model must not lose, measured as the test
    sets are: general text, other tasks, instructions. Nothing is tuned for them, so a change of
    their metrics is forgetting (or transfer). See evaluation.gates."""
    split: Split = Split()
    """Shares of the training records to hold out if validation or test sets are not given."""
    quality: Quality = Quality()
    """Handling of data quality problems."""

    def sources(self) -> list[DataSource]:
        """Return the sources of all lists."""
        return [source for field in DATA_LISTS for source in getattr(self, field) or ()]

    def names(self, field: DataList) -> list[str]:
        """Return the names of the sets of a list, in order."""
        sources: list[DataSource] = getattr(self, field) or []
        return [source.name or f"{field}-{i}" for i, source in enumerate(sources)]

    RULES: ClassVar[tuple[Rule, ...]] = (
        *(_names_differ(field) for field in DATA_LISTS),
        Rule(
            "!has(self.retention) || !has(self.test) || self.retention.all(r, !has(r.name) ||"
            " !self.test.exists(t, has(t.name) && t.name == r.name))",
            "a name stands for a test set or a retention set: results are reported by name",
            lambda d: not _given_names(d.retention) & _given_names(d.test),
            ("retention[].name",),
        ),
        _names_differ("stages", "results are reported by stage name"),
        Rule(
            "!has(self.train) || self.train.all(s, has(s.weight))"
            " || self.train.all(s, !has(s.weight))",
            "give every training set a weight, or none",
            lambda d: len({s.weight is None for s in d.train or ()}) <= 1,
            ("train[].weight",),
        ),
        Rule(
            "!has(self.train) || !has(self.train[0].weight) || has(self.stages)"
            f" || self.train.exists(s, has(s.weight) && !{is_zero('s.weight')})",
            "a training set needs a weight above 0",
            lambda d: (
                d.stages is not None
                or d.train is None
                or d.train[0].weight is None
                or any(float(s.weight) > 0 for s in d.train)
            ),
            ("train[].weight",),
        ),
        Rule(
            "!has(self.mixingTemperature) || !has(self.train) || self.train.all(s, !has(s.weight))",
            "mixingTemperature and weights exclude each other: give one of them",
            lambda d: d.mixing_temperature is None or all(s.weight is None for s in d.train or ()),
            ("mixingTemperature", "train[].weight"),
        ),
        *(_no_weights(field) for field in _EVALUATED),
        *(_no_replay(field) for field in _EVALUATED),
        *(_no_canaries(field) for field in _EVALUATED),
        *(_none_built_in(field) for field in ("train", "validation")),
        Rule(
            "!has(self.stages) || !has(self.train)"
            " || self.stages.all(s, !has(s.weights) || s.weights.all(w,"
            " self.train.exists(t, has(t.name) && t.name == w.name)))",
            "weights of a stage must name sets of data.train (give those a name)",
            lambda d: all(
                d.train is None or w.name in {s.name for s in d.train}
                for stage in d.stages or ()
                for w in stage.weights or ()
            ),
            ("train[].name",),
        ),
    )
