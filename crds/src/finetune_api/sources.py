"""Blocks of the spec that say where things are: object storage, the model, the data."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

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
from finetune_api.templates import Retrieval, Template

Format = Literal[
    "Messages", "PromptCompletion", "Instruction", "Classification", "Retrieval", "Text"
]
# On a cluster a source is remote or a mounted claim; `finetune run` also takes paths of its own
# machine, which it turns into claims before the spec is validated (one schema for both).
ModelUri = Annotated[
    str,
    Spelling(
        r"^(s3|hf|pvc)://[a-zA-Z0-9][^?#\x00-\x20]*$",
        "s3://bucket/prefix, hf://organisation/name@revision or pvc://claim/path",
        max_length=1024,
    ),
]
DataUri = Annotated[
    str,
    Spelling(
        r"^(s3|pvc)://[a-z0-9][^?#\x00-\x20]*$",
        "s3://bucket/prefix/*.jsonl or pvc://claim/path",
        max_length=1024,
    ),
]


class SecretReference(Model):
    """A Secret of the job's namespace."""

    name: DnsName
    """Name of the Secret. Read keys: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and, where they
    exist, AWS_SESSION_TOKEN and HF_TOKEN. Pods get them by reference; the operator never reads
    them."""


class StorageAccess(Model):
    """How one place of object storage is reached."""

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
    """URL of an S3-compatible server. Absent: Amazon S3 of the region."""
    region: Annotated[
        str, Spelling(r"^[a-z0-9-]+$", "the name of a region: us-east-1", max_length=64)
    ] = "us-east-1"
    """Region that requests are signed for."""
    secret_ref: SecretReference | None = None
    """Secret that holds the access keys. Absent: the pod's own identity (a service account bound
    to a role), or anonymous access."""


class Storage(StorageAccess):
    """Object storage of the job, and where its working files live."""

    service_account_name: DnsName | None = None
    """Service account of the job's pods, for storage access by workload identity."""
    workspace: S3Uri | None = None
    """Where prepared data and checkpoints are kept. Jobs that share a workspace share prepared
    data. Absent: `.workspace` under the output's destination."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.secretRef) && has(self.serviceAccountName))",
            "secretRef and serviceAccountName exclude each other: give one of them",
            lambda s: not (s.secret_ref and s.service_account_name),
            ("secretRef.name", "serviceAccountName"),
        ),
    )


class FineTuneJobReference(Model):
    """Another FineTuneJob of the same namespace."""

    name: DnsName
    """Name of the FineTuneJob."""


class BaseModelSource(Model):
    """The model to start from: give one of source and fineTuneJobRef."""

    source: ModelUri | None = None
    """`s3://bucket/prefix` of a model folder in Hugging Face layout (config.json, safetensors,
    tokenizer), or of what a run has published (`<destination>/<run>`, which holds manifest.json);
    `hf://organisation/name@revision` of the Hugging Face hub, or `pvc://claim/path` of a volume
    claim in the job's namespace."""
    fine_tune_job_ref: FineTuneJobReference | None = None
    """Start from the model that another FineTuneJob of the namespace publishes: the run waits until
    that job is Complete, and keeps to the run that it finds then. A later run of that job starts
    none of this one; a new rerunToken does."""
    storage: StorageAccess | None = None
    """Access to this model. Absent: `spec.storage`, or, with fineTuneJobRef, the storage that the
    other job has published to."""

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
    """Where a model is, and how it is reached."""

    source: ModelUri
    """Its address."""
    storage: StorageAccess | None = None
    """Access to it where it differs from `spec.storage`."""


class DataSource(Model):
    """One set of labelled records."""

    name: DnsLabel | None = None
    """Name in metrics and reports. Absent: the list's name and the position, e.g. `train-0`."""
    source: DataUri
    """`s3://bucket/prefix/*.jsonl` or `pvc://claim/path`: an object, a glob, or a prefix ending in
    '/'. JSON Lines (`.jsonl`, `.json`), one JSON array of records (`.json`), CSV with a header line
    (`.csv`), each also compressed (`.gz`, `.zst`), and Parquet (`.parquet`)."""
    format: Format | None = None
    """What the records hold. Messages: `messages` of role and content, or of calls of tools
    (`tool_calls`); `tools` (optional). PromptCompletion: `prompt`, `completion`. Instruction:
    `instruction`, `input` (optional), `output`. Classification: `text`, `label`. Retrieval:
    `question`, `oracle` (the passage that holds the answer, or a list), `distractors` (a list of
    other passages, optional), `answer`, which may cite `[oracle]` (of several `[oracle 2]`). Text:
    `text`, all of it learned. Absent: found out from the first record."""
    template: Template | None = None
    """Makes prompt and completion of records whose fields have other names. Not for Messages,
    Retrieval and Text; conversations of other fields have the template Chat."""
    retrieval: Retrieval | None = None
    """Which passages the prompts show; only with `format: Retrieval`. Absent: the defaults of its
    fields."""
    weight: DecimalString | None = None
    """Share of the trained tokens, relative to the weights of the other training sets; "0" leaves
    the set to the stages. Absent everywhere: in proportion to size, each record once an epoch."""
    replay: bool = False
    """Marks a training set of general data, which is there lest the model forget: it is trained
    like any other, and `training.anchor.klCoefficient` holds the model to its old answers on it."""
    storage: StorageAccess | None = None
    """Access to this source where it differs from `spec.storage`."""

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
            "a template with a name knows its format: leave format out",
            lambda s: s.template is None or s.template.name is None or s.format is None,
            ("format",),
        ),
    )


class Split(Model):
    """Held-out shares, cut from the training records where no set of their own is given."""

    validation: Fraction = "0.05"
    """Share of the training records held out for validation. No effect where `data.validation` is
    given."""
    test: Fraction = "0.05"
    """Share of the training records held out for the final test. No effect where `data.test` is
    given."""
    group_by: FieldName | None = None
    """Field whose equal values stay on one side of the split. Absent: records with equal prompts
    stay together, so that no test prompt was trained on."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 0
    """Seed of the split. A record's side depends on its group and this seed alone, so it keeps its
    side as the data grows."""

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
    """What is done about faults of the data."""

    deduplicate: bool = True
    """Drop records of the training set whose prompt and completion occurred before."""
    near_duplicates: Literal["Keep", "Drop"] = "Keep"
    """Drop leaves out records of the training set whose own words are like an earlier one's: system
    turns, tools and the texts of templates do not count. It holds 128 bytes of memory a record."""
    near_duplicate_similarity: Fraction = "0.85"
    """Least similarity of near duplicates, from 0.5: the share of rows of three words that two
    texts have in common, of all that they have (Jaccard; estimated by MinHash, with a standard
    error of 0.03). At 0.85, texts of 40 words that differ in one."""
    max_duplicate_fraction: Fraction | None = None
    """Largest share of the training samples that may be dropped as duplicates or near duplicates:
    with more the job fails. Absent: any."""
    overlength: Literal["Split", "Truncate", "Drop", "Fail"] = "Split"
    """What happens to a sample of more than `training.maxLength` tokens. Split makes several
    samples of a document (format Text), parted behind a paragraph, a line, a sentence or a word,
    and cuts others as Truncate does. Truncate cuts the beginning of the prompt, and the end of a
    document, of a completion that is too long by itself (its stop token is not learned then) or of
    a text to classify; Drop leaves the sample out, Fail ends the job. The data report counts each
    of them."""
    faulty_records: Literal["Fail", "Drop"] = "Fail"
    """What happens to a record that cannot be used: a malformed line, a missing field, one of
    another type, nothing to learn. Fail ends the job and names the first, Drop leaves them out and
    counts them by reason; a set of which more than half is faulty ends the job all the same."""
    personal_data: Literal["Ignore", "Warn", "Redact", "Fail"] = "Warn"
    """E-mail addresses, telephone and payment card numbers, keys and access tokens in prompts and
    completions, found by their form. Warn counts them in the data report with the first places,
    Redact also writes `[EMAIL]`, `[PHONE]`, `[CARD]` or `[SECRET]` in their place, Fail ends the
    job and names the record. Names and street addresses are not found."""
    contamination: Literal["Ignore", "Warn", "Drop", "Fail"] = "Warn"
    """Training samples that share 13 tokens in a row with a validation or test sample (a sample
    that is shorter: all of its tokens). Warn counts them in the data report with the first places,
    Drop leaves them out of the training, Fail ends the job. Rows of tokens that more than 10
    samples of a held-out set have, or more than a tenth of them, are a template's and do not
    count."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!self.nearDuplicateSimilarity.matches('^[0-9.]+$')"
            " || double(self.nearDuplicateSimilarity) >= 0.5",
            "nearDuplicateSimilarity must be at least 0.5: below, most records are alike",
            lambda q: float(q.near_duplicate_similarity) >= 0.5,
            ("nearDuplicateSimilarity",),
        ),
    )


class MixtureWeight(Model):
    """A training set and its part of a stage."""

    name: DnsLabel
    """Name of a set in `data.train`."""
    weight: DecimalString
    """Share of the trained tokens, relative to the other weights of the stage."""


class DataStage(Model):
    """A part of the training with a mixture of its own."""

    name: DnsLabel
    """Name in prepare's plan, the training's log, metrics.json and the report."""
    steps: Annotated[
        str,
        Spelling(
            r"^(0?\.[0-9]*[1-9][0-9]*|[1-9][0-9]*(\.[0-9]+)?)$",
            'a number above zero, written as a string: "0.3"',
            max_length=32,
        ),
    ]
    """Part of the training's steps, relative to the other stages: "0.3" and "0.7". It must come to
    one step at least."""
    weights: Annotated[list[MixtureWeight], Field(min_length=1, max_length=64)] | None = None
    """The mixture of the stage; sets that are not named take no part. Absent: as `data.train`
    says."""

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


def _no_weights(field: str) -> Rule:
    return Rule(
        f"!has(self.{field}) || self.{field}.all(s, !has(s.weight))",
        f"weight is for training sets: those of {field} are measured whole",
        lambda data: all(s.weight is None for s in getattr(data, field) or ()),
        (f"{field}[].weight",),
    )


def _no_replay(field: str) -> Rule:
    return Rule(
        f"!has(self.{field}) || self.{field}.all(s, !s.replay)",
        f"replay is for training sets: those of {field} are measured, not trained",
        lambda data: not any(s.replay for s in getattr(data, field) or ()),
        (f"{field}[].source",),
    )


class Data(Model):
    """What is learned from, and what is measured on."""

    train: Annotated[list[DataSource], Field(min_length=1, max_length=64)]
    """Training sets. Several are a mixture: in proportion to their size, or to their weights."""
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
    """Temperature T of the mixture: a set of n tokens has a share in proportion to n^(1/T). "1" is
    in proportion to size; a higher one evens small and large sets out. Not with weights."""
    stages: Annotated[list[DataStage], Field(min_length=1, max_length=16)] | None = None
    """Stages of the training (a curriculum), in their order. Absent: one stage."""
    validation: Annotated[list[DataSource], Field(min_length=1, max_length=16)] | None = None
    """Sets measured on the way: they choose the checkpoint and stop early."""
    test: Annotated[list[DataSource], Field(min_length=1, max_length=16)] | None = None
    """Sets measured at the end, for the untuned and the tuned model."""
    split: Split = Split()
    """Shares held out of the training records where validation or test sets are not given."""
    quality: Quality = Quality()
    """What is done about faults of the data."""

    def names(self, field: Literal["train", "validation", "test"]) -> list[str]:
        """Names of the sets of a list, in their order."""
        sources: list[DataSource] = getattr(self, field) or []
        return [source.name or f"{field}-{i}" for i, source in enumerate(sources)]

    RULES: ClassVar[tuple[Rule, ...]] = (
        *(_names_differ(field) for field in ("train", "validation", "test")),
        _names_differ("stages", "figures are named by them"),
        Rule(
            "self.train.all(s, has(s.weight)) || self.train.all(s, !has(s.weight))",
            "give every training set a weight, or none",
            lambda d: len({s.weight is None for s in d.train}) == 1,
            ("train[].weight",),
        ),
        Rule(
            "!has(self.train[0].weight) || has(self.stages)"
            f" || self.train.exists(s, has(s.weight) && !{is_zero('s.weight')})",
            "a training set needs a weight above 0",
            lambda d: (
                d.stages is not None
                or d.train[0].weight is None
                or any(float(s.weight) > 0 for s in d.train)
            ),
            ("train[].weight",),
        ),
        Rule(
            "!has(self.mixingTemperature) || self.train.all(s, !has(s.weight))",
            "mixingTemperature and weights exclude each other: give one of them",
            lambda d: d.mixing_temperature is None or all(s.weight is None for s in d.train),
            ("mixingTemperature", "train[].weight"),
        ),
        *(_no_weights(field) for field in ("validation", "test")),
        *(_no_replay(field) for field in ("validation", "test")),
        Rule(
            "!has(self.stages) || self.stages.all(s, !has(s.weights) || s.weights.all(w,"
            " self.train.exists(t, has(t.name) && t.name == w.name)))",
            "weights of a stage must name sets of data.train (give those a name)",
            lambda d: all(
                w.name in {s.name for s in d.train}
                for stage in d.stages or ()
                for w in stage.weights or ()
            ),
            ("train[].name",),
        ),
    )
