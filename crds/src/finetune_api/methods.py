"""``spec.method``: the tuning methods and their properties.

``METHODS`` is the single table of methods. Code reads a method's properties from its entry and
never compares names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import DecimalString, Fraction, Model, Rule, is_one, is_zero
from finetune_api.tasks import TASKS, TaskName

MethodName = Literal[
    "Full", "Partial", "LoRA", "QLoRA", "IA3", "PromptTuning", "PrefixTuning", "None"
]  # fmt: skip
OutputFormat = Literal["Adapter", "Merged", "Both"]
_RSLORA_ALPHA: Final = 8
"""Default alpha with useRslora: at rank 16 the scale is 2, as for plain LoRA."""
Names = Annotated[
    list[Annotated[str, StringConstraints(min_length=1, max_length=256)]],
    Field(min_length=1, max_length=64),
]


@dataclass(frozen=True)
class MethodKind:
    """Properties of a method that do not depend on the model."""

    block: str
    """Settings block of ``spec.method``; empty if the method has none."""
    learning_rate: float
    """Default peak learning rate."""
    formats: tuple[OutputFormat, ...]
    """Supported output formats; the first is the default. Empty: no model is published."""
    trains: bool = True
    """Whether anything is trained; else the model is evaluated as it is."""
    freezes: bool = True
    """Whether base weights are frozen, and can therefore be held in bfloat16."""
    quantizes: bool = False
    """Whether the linear layers of the base are held in 4 bits, which needs a GPU."""
    shards: bool = True
    """Whether the model can be sharded (`compute.sharding`)."""
    packs: bool = True
    """Whether documents can be packed; no if each needs virtual tokens before it."""
    recomputes: bool = True
    """Whether activation checkpointing (`training.gradientCheckpointing`) is supported; no if it
    would drop learned keys and values."""
    matrices: bool = True
    """Whether matrices of hidden layers are trained, which some optimizers need."""
    mixes: bool = True
    """Whether weights between the base and the tuned model are a mixture of the two
    (`evaluation.remedy`); no if samples get virtual tokens."""
    tasks: tuple[TaskName, ...] = tuple(TASKS)
    """Supported tasks."""

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained and the model's own weights are unchanged."""
        return "Adapter" in self.formats


_LANGUAGE: Final[tuple[TaskName, ...]] = ("CausalLM",)


METHODS: Final[dict[MethodName, MethodKind]] = {
    "Full": MethodKind("", 2e-5, ("Merged",), freezes=False),
    "Partial": MethodKind("partial", 2e-5, ("Merged",)),
    "LoRA": MethodKind("lora", 2e-4, ("Adapter", "Merged", "Both")),
    "QLoRA": MethodKind(
        "lora", 2e-4, ("Adapter", "Merged", "Both"), quantizes=True, shards=False, tasks=_LANGUAGE
    ),
    "IA3": MethodKind("ia3", 3e-3, ("Adapter", "Merged", "Both"), matrices=False),
    "PromptTuning": MethodKind(
        "prompt", 1e-2, ("Adapter",), packs=False, matrices=False, mixes=False, tasks=_LANGUAGE
    ),
    "PrefixTuning": MethodKind(
        "prompt",
        1e-2,
        ("Adapter",),
        packs=False,
        recomputes=False,
        matrices=False,
        mixes=False,
        tasks=_LANGUAGE,
    ),
    "None": MethodKind("", 0.0, (), trains=False, matrices=False, mixes=False),
}


def methods_for(format: OutputFormat) -> list[MethodName]:
    """Return the methods that support an output format."""
    return [name for name, kind in METHODS.items() if format in kind.formats]


class Partial(Model):
    """Subset of the model's own weights to train: the union of what the fields select."""

    last_layers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Number of decoder blocks to train, counted from the last one."""
    parameters: Names | None = None
    """Patterns of parameter names, e.g. `model.layers.*.mlp.*` or `lm_head.weight`; `*` matches any
    characters, `?` matches one."""
    biases: bool = False
    """Train every bias (BitFit; Ben Zaken et al. 2022, arXiv:2106.10199)."""
    norms: bool = False
    """Train the weights of every normalization layer."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.lastLayers) || has(self.parameters) || self.biases || self.norms",
            "nothing would be trained: give lastLayers, parameters, biases or norms",
            lambda p: bool(p.last_layers or p.parameters or p.biases or p.norms),
            ("biases", "norms"),
        ),
    )


class Lora(Model):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the update matrices."""
    alpha: Annotated[int, Field(ge=1, le=8192)] | None = None
    """The update is scaled by alpha / rank, or with useRslora by alpha / sqrt(rank). Absent: twice
    the rank, a scale of 2 at any rank; with useRslora 8, a scale of 2 at rank 16 that falls with
    the square root of the rank (Kalajdzievski 2023, arXiv:2312.03732: the same alpha for all
    ranks)."""
    dropout: Fraction = "0"
    """Dropout probability of an adapter's inputs."""
    target_modules: Names | None = None
    """Names (or name endings) of the modules that get an adapter. Absent: every linear layer except
    the output head; in a mixture of experts only those of the attention; none if targetParameters
    is given."""
    target_parameters: Names | None = None
    """Names (or name endings) of parameters outside of linear layers that get an adapter: experts
    held in one tensor, e.g. `mlp.experts.gate_up_proj`."""
    use_rslora: bool = False
    """Rank-stabilized scale alpha / sqrt(rank), for large ranks (Kalajdzievski 2023,
    arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the magnitude of each output separately from its direction (DoRA; Liu et al. 2024,
    arXiv:2402.09353). Slower."""
    lora_plus_ratio: DecimalString = "1"
    """Ratio of the learning rates of the B and A matrices (LoRA+; Hayou et al. 2024,
    arXiv:2402.12354, which recommends 16)."""

    initialization: Literal["Default", "PiSSA"] = "Default"
    """Default: A is random, B is zero. PiSSA: A and B are the principal components of each weight
    and are subtracted from it (Meng et al. 2024, arXiv:2404.02948); training needs fewer steps, but
    each computes two adapters. Published as a plain adapter of twice the rank. With both, the
    initial model equals the base model."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.initialization != 'PiSSA' || !(self.useDora || has(self.targetParameters))",
            "initialization PiSSA goes with neither useDora nor targetParameters",
            lambda lora: (
                lora.initialization != "PiSSA" or not (lora.use_dora or lora.target_parameters)
            ),
            ("initialization", "useDora"),
        ),
        Rule(
            f"!{is_one('self.dropout')}",
            "dropout must be below 1: at 1 the adapters would have no inputs",
            lambda lora: float(lora.dropout) < 1,
            ("dropout",),
        ),
        Rule(
            f"!{is_zero('self.loraPlusRatio')}",
            "loraPlusRatio must be above 0: at 0 the B matrices would stay zero",
            lambda lora: float(lora.lora_plus_ratio) > 0,
            ("loraPlusRatio",),
        ),
        Rule(
            f"!has(self.targetParameters) || ({is_zero('self.dropout')} && !self.useDora)",
            "targetParameters go with neither dropout nor useDora: their adapters are added to the"
            " weights",
            lambda lora: (
                lora.target_parameters is None or (float(lora.dropout) == 0 and not lora.use_dora)
            ),
            ("dropout", "useDora"),
        ),
    )

    @property
    def effective_alpha(self) -> int:
        """Alpha, or its default. With useRslora the default does not depend on the rank, or the
        scale would grow with the rank."""
        if self.alpha is not None:
            return self.alpha
        return _RSLORA_ALPHA if self.use_rslora else 2 * self.rank


class Ia3(Model):
    """Learned scales of activations (Liu et al. 2022, arXiv:2205.05638)."""

    target_modules: Names | None = None
    """Names (or name endings) of the modules whose activations are scaled. Absent: the defaults of
    known architectures (keys, values and the last layer of the feed-forward block); required for
    other architectures."""
    feedforward_modules: Names | None = None
    """The targetModules whose input is scaled instead of the output. Absent, with targetModules
    given: none."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.feedforwardModules) || (has(self.targetModules)"
            " && self.feedforwardModules.all(name, name in self.targetModules))",
            "feedforwardModules must be among targetModules",
            lambda i: set(i.feedforward_modules or ()) <= set(i.target_modules or ()),
            ("feedforwardModules",),
        ),
    )


class Prompt(Model):
    """Learned virtual tokens before every sample. They do not count towards
    `training.maxLength`."""

    virtual_tokens: Annotated[int, Field(ge=1, le=4096)] = 20
    """Number of virtual tokens."""


def _block_rule(block: str) -> Rule:
    """Rule: a settings block is allowed only with the methods that read it."""
    types = [name for name, kind in METHODS.items() if kind.block == block]
    return Rule(
        f"!has(self.{block}) || self.type in {json.dumps(types)}",
        f"{block} goes with type {' or '.join(types)} only: remove it, or set type: {types[0]}",
        lambda m: getattr(m, block) is None or m.type in types,
        ("type",),
    )


class Method(Model):
    """Tuning method: which weights are trained, if any."""

    type: MethodName = "LoRA"
    """Full: every weight. Partial: selected weights of the model, the rest frozen. LoRA: low-rank
    matrices added to the linear layers, the rest frozen. QLoRA: LoRA on a base model in 4 bits, for
    models that do not fit the GPU (Dettmers et al. 2023, arXiv:2305.14314); the final test measures
    the 4-bit model, and Merged adds the adapter to the base weights as stored. IA3: scales of
    activations. PromptTuning: embeddings before the sample (Lester et al. 2021, arXiv:2104.08691).
    PrefixTuning: keys and values before the sample in every layer (Li and Liang 2021,
    arXiv:2101.00190). None: nothing is trained; the model, or the published model of a run, is
    evaluated on data.test and data.retention (or on what data.split.test holds out of data.train),
    as the base model of a training is, and the run publishes its results without a model."""
    partial: Partial | None = None
    """Weights that Partial trains."""
    lora: Lora | None = None
    """Settings of LoRA and QLoRA. Absent: the defaults."""
    ia3: Ia3 | None = None
    """Settings of IA3. Absent: the defaults."""
    prompt: Prompt | None = None
    """Settings of PromptTuning and PrefixTuning. Absent: the defaults."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        *(_block_rule(b) for b in dict.fromkeys(k.block for k in METHODS.values()) if b),
        Rule(
            "self.type != 'QLoRA' || !has(self.lora) || self.lora.initialization != 'PiSSA'",
            "initialization PiSSA splits weights that type QLoRA holds in 4 bits: set type: LoRA",
            lambda m: m.type != "QLoRA" or m.effective_lora.initialization != "PiSSA",
            ("type",),
        ),
        Rule(
            "self.type != 'Partial' || has(self.partial)",
            "type Partial needs method.partial, which selects the weights to train",
            lambda m: m.type != "Partial" or m.partial is not None,
            ("type",),
        ),
    )

    @property
    def kind(self) -> MethodKind:
        """The method's entry in ``METHODS``."""
        return METHODS[self.type]

    @property
    def effective_partial(self) -> Partial:
        assert self.partial is not None, "a rule requires it"
        return self.partial

    @property
    def effective_lora(self) -> Lora:
        lora = self.lora or Lora()
        return lora.model_copy(update={"alpha": lora.effective_alpha})

    @property
    def effective_ia3(self) -> Ia3:
        return self.ia3 or Ia3()

    @property
    def effective_prompt(self) -> Prompt:
        return self.prompt or Prompt()

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens before every sample."""
        return self.effective_prompt.virtual_tokens if self.kind.block == "prompt" else 0

    @property
    def settings(self) -> Model | None:
        """Settings of the method with all defaults filled in; None if it has none."""
        return getattr(self, f"effective_{self.kind.block}") if self.kind.block else None
