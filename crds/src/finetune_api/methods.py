"""``spec.method``: which weights are trained, and what follows from it.

``METHODS`` is the one table of the methods: whoever needs to know what a method can do asks its
row, and nobody compares names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import DecimalString, Fraction, Model, Rule, is_one, is_zero
from finetune_api.tasks import TASKS, TaskName

MethodName = Literal["Full", "Partial", "LoRA", "QLoRA", "IA3", "PromptTuning", "PrefixTuning"]
OutputFormat = Literal["Adapter", "Merged", "Both"]
_RSLORA_ALPHA: Final = 8
"""Alpha of useRslora where the spec names none: its scale at rank 16 is plain LoRA's 2."""
Names = Annotated[
    list[Annotated[str, StringConstraints(min_length=1, max_length=256)]],
    Field(min_length=1, max_length=64),
]


@dataclass(frozen=True)
class MethodKind:
    """What can be said of a method without a model."""

    block: str
    """Settings block of ``spec.method``; empty where the method has none."""
    learning_rate: float
    """Peak learning rate where the spec names none."""
    formats: tuple[OutputFormat, ...]
    """Formats that can be published; the first is the default."""
    freezes: bool = True
    """Whether weights of the base stay as they are, and so may be held in bfloat16."""
    quantizes: bool = False
    """Whether the linear layers of the base are held in 4 bits, which needs a GPU."""
    shards: bool = True
    """Whether the model can lie in shards on the processes (`compute.sharding`), and so whether it
    goes with precisions that copy weights."""
    packs: bool = True
    """Whether documents can share a row: not where each needs virtual tokens before it."""
    recomputes: bool = True
    """Whether activations can be computed again (`training.gradientCheckpointing`): not where that
    drops keys and values that are learned."""
    matrices: bool = True
    """Whether it trains matrices of hidden layers, which some optimizers are for."""
    tasks: tuple[TaskName, ...] = tuple(TASKS)
    """What it can be used for."""

    @property
    def adapts(self) -> bool:
        """Whether it trains an adapter, and leaves the model's own weights as they are."""
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
        "prompt", 1e-2, ("Adapter",), packs=False, matrices=False, tasks=_LANGUAGE
    ),
    "PrefixTuning": MethodKind(
        "prompt",
        1e-2,
        ("Adapter",),
        packs=False,
        recomputes=False,
        matrices=False,
        tasks=_LANGUAGE,
    ),
}


def methods_for(format: OutputFormat) -> list[MethodName]:
    """Methods whose result can be published in a format."""
    return [name for name, kind in METHODS.items() if format in kind.formats]


class Partial(Model):
    """Some of the model's own weights: the union of what the fields name."""

    last_layers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Decoder blocks that are trained, counted from the last one."""
    parameters: Names | None = None
    """Patterns of parameter names, e.g. `model.layers.*.mlp.*` or `lm_head.weight`; `*` stands for
    any characters, `?` for one."""
    biases: bool = False
    """Train every bias (BitFit; Ben Zaken et al. 2022, arXiv:2106.10199)."""
    norms: bool = False
    """Train the weights of every normalisation."""

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
    """Scale of the update: alpha / rank, or with useRslora alpha / root of the rank. Absent: twice
    the rank, which is a scale of 2 at any rank; with useRslora 8, which is one of 2 at rank 16 and
    falls with the root of a larger rank (Kalajdzievski 2023, arXiv:2312.03732: alpha is the same
    for all ranks)."""
    dropout: Fraction = "0"
    """Probability that an input of an adapter is dropped."""
    target_modules: Names | None = None
    """Names (or name endings) of the modules that get an adapter. Absent: every linear layer but
    the output head; of a mixture of experts those of its attention; with targetParameters given,
    none."""
    target_parameters: Names | None = None
    """Names (or name endings) of parameters that get an adapter though they are of no linear layer:
    experts that are held in one tensor, e.g. `mlp.experts.gate_up_proj`."""
    use_rslora: bool = False
    """Rank-stabilised scale: alpha over the root of the rank, for large ranks (Kalajdzievski 2023,
    arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the magnitude of each output apart from its direction (DoRA; Liu et al. 2024,
    arXiv:2402.09353). Slower."""
    lora_plus_ratio: DecimalString = "1"
    """Learning rate of the B matrices over that of the A matrices (LoRA+; Hayou et al. 2024,
    arXiv:2402.12354, where 16 is advised)."""

    initialization: Literal["Default", "PiSSA"] = "Default"
    """Default: A is random, B zero. PiSSA: A and B are the principal part of each weight, which is
    taken from the base (Meng et al. 2024, arXiv:2404.02948): it learns in fewer steps, each of
    which computes two adapters. Published as a plain adapter of twice the rank. Either way the
    model begins as it was."""

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
        """Alpha, or its default. Over the root of the rank it must not grow with the rank, or the
        scale would."""
        if self.alpha is not None:
            return self.alpha
        return _RSLORA_ALPHA if self.use_rslora else 2 * self.rank


class Ia3(Model):
    """Learned scales of activations (Liu et al. 2022, arXiv:2205.05638)."""

    target_modules: Names | None = None
    """Names (or name endings) of the modules whose activations are scaled. Absent: what is usual
    for the architecture (keys, values and the last layer of the feed-forward block); other
    architectures must name them."""
    feedforward_modules: Names | None = None
    """Those of targetModules whose input is scaled, not their output. Absent, with targetModules
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
    """Learned vectors before every sample. Its tokens are no part of `training.maxLength`."""

    virtual_tokens: Annotated[int, Field(ge=1, le=4096)] = 20
    """Number of vectors."""


def _block_rule(block: str) -> Rule:
    """A settings block stands with the methods that read it alone."""
    types = [name for name, kind in METHODS.items() if kind.block == block]
    return Rule(
        f"!has(self.{block}) || self.type in {json.dumps(types)}",
        f"{block} goes with type {' or '.join(types)} only: remove it, or set type: {types[0]}",
        lambda m: getattr(m, block) is None or m.type in types,
        ("type",),
    )


class Method(Model):
    """Which weights are trained."""

    type: MethodName = "LoRA"
    """Full: every weight. Partial: chosen weights of the model, the rest frozen. LoRA: small
    matrices beside the linear layers, the rest frozen. QLoRA: LoRA over a base in 4 bits, for
    models that do not fit the GPU (Dettmers et al. 2023, arXiv:2305.14314); the test measures it
    so, and Merged adds the adapter to the base as it is stored. IA3: scales of activations.
    PromptTuning: embeddings before the sample (Lester et al. 2021, arXiv:2104.08691).
    PrefixTuning: keys and values before it in every layer (Li and Liang 2021,
    arXiv:2101.00190)."""
    partial: Partial | None = None
    """What Partial trains."""
    lora: Lora | None = None
    """Settings of LoRA and QLoRA; absent, their defaults."""
    ia3: Ia3 | None = None
    """Settings of IA3; absent, its defaults."""
    prompt: Prompt | None = None
    """Settings of PromptTuning and PrefixTuning; absent, their defaults."""

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
            "type Partial needs method.partial, which says what is trained",
            lambda m: m.type != "Partial" or m.partial is not None,
            ("type",),
        ),
    )

    @property
    def kind(self) -> MethodKind:
        """The method's row of the table."""
        return METHODS[self.type]

    @property
    def effective_partial(self) -> Partial:
        assert self.partial is not None, "a rule asks for it"
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
        """Positions that the method takes before every sample."""
        return self.effective_prompt.virtual_tokens if self.kind.block == "prompt" else 0

    @property
    def settings(self) -> Model | None:
        """Settings of the method, every default filled in; None where it has none."""
        return getattr(self, f"effective_{self.kind.block}") if self.kind.block else None
