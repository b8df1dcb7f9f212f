"""``spec.training``: steps, optimizer, regularisation, precision, and what stops or guards them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from finetune_api.base import Count, DecimalString, Fraction, Model, Rule, is_one, is_zero
from finetune_api.optimizers import OPTIMIZERS, Anchor, OptimizerKind, OptimizerName
from finetune_api.tasks import Metric

DEFAULT_MAX_LENGTH: Final = 2048


class EarlyStopping(Model):
    """Ends the training when validation no longer improves."""

    metric: Metric = "Loss"
    """Validation metric that is watched."""
    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Evaluations without improvement after which training ends."""
    min_delta: DecimalString = "0"
    """Least change that counts as improvement, in units of the metric."""


class Guard(Model):
    """What is done about losses that are no numbers, and about sudden large ones."""

    spike_deviations: DecimalString | None = None
    """A step is skipped (its update is not made) where the logarithm of its loss exceeds its
    running mean by this many standard deviations, and its loss by half; "6" is careful. Absent:
    only losses and gradients that are no finite numbers skip a step, since a batch of rare, hard
    records looks like a spike, and would never be learned."""
    max_skipped_steps: Annotated[int, Field(ge=0, le=100)] = 5
    """Steps that may be skipped in a row. Beyond, the run goes back to its newest checkpoint from
    before them, with a lower learning rate and without the samples of the skipped steps, which
    metrics.json names (set, number in it, shard and row; the first 100)."""
    max_rollbacks: Annotated[int, Field(ge=0, le=100)] = 2
    """Times that a run goes back, over all of its attempts. Beyond, or where it has no commit to go
    back to, it fails with class Diverged and reason LossNotFinite or, after spikes alone,
    LossSpike."""
    rollback_factor: Fraction = "0.5"
    """What the learning rate is multiplied by each time."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!{is_zero('self.rollbackFactor')}",
            "rollbackFactor must be above 0: at 0 the run would go on without learning",
            lambda guard: float(guard.rollback_factor) > 0,
            ("rollbackFactor",),
        ),
    )


class Training(Model):
    """How the weights are trained."""

    epochs: Annotated[int, Field(ge=1, le=10000)] | None = None
    """Passes over the training set. Absent, with maxSteps absent too: 3."""
    max_steps: Count | None = None
    """Optimizer steps, instead of epochs."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Longest sample, in tokens. Absent: the model's maximum, but at most 2,048."""
    batch_size: Annotated[int, Field(ge=1, le=1_048_576)] = 32
    """Samples per optimizer step over all processes; the same at any number of them."""
    micro_batch_tokens: Annotated[int, Field(ge=8, le=16_777_216)] | None = None
    """Most tokens that one process runs through the model at once. Absent: maxLength, but at least
    2,048. Affects memory and speed, not the result."""
    learning_rate: DecimalString | None = None
    """Peak learning rate. Absent: "2e-4" for LoRA and QLoRA, "3e-3" for IA3, "1e-2" for
    PromptTuning and PrefixTuning, "2e-5" for Full and Partial."""
    schedule: Literal["Cosine", "Linear", "Constant"] = "Cosine"
    """Course of the learning rate after the warm-up: to zero by a half cosine, to zero by a line,
    or constant."""
    warmup_ratio: Fraction = "0.03"
    """Share of the steps in which the learning rate rises linearly from zero."""
    optimizer: OptimizerName = "AdamW"
    """AdamW: two moments, 8 bytes a trained weight. AdamW8bit: the same in 2 bytes (Dettmers et al.
    2022, arXiv:2110.02861), on GPUs alone. Adafactor: sums of rows and columns, next to nothing,
    and no momentum (Shazeer and Stern 2018, arXiv:1804.04235). Muon: matrices of hidden layers
    (those of LoRA too) get orthogonal updates, at 4 bytes a weight (Jordan et al. 2024; Liu et al.
    2025, arXiv:2502.16982); embeddings, the head, experts in one tensor and their adapters, norms
    and biases get AdamW. A learning rate means about the same for all of them."""
    weight_decay: DecimalString = "0"
    """Decoupled weight decay; not applied to norms and biases."""
    anchor: Anchor = Anchor()
    """What holds the tuned model near the untuned one, against forgetting."""
    dropout: Fraction = "0"
    """Probability with which outputs of attention and feed-forward blocks are dropped."""
    label_smoothing: Fraction = "0"
    """Share of the target's probability that is spread over the vocabulary (or the classes) while
    training (Szegedy et al. 2016, arXiv:1512.00567). Measured losses are without."""
    neftune_alpha: DecimalString = "0"
    """Size of uniform noise on the embeddings while training: each number is at most this over the
    root of (tokens of the sample times embedding width) (NEFTune; Jain et al. 2024,
    arXiv:2310.05914, where 5 is usual)."""
    layer_decay: Fraction = "1"
    """Learning rate of a decoder block over that of the block above it; embeddings lie below the
    lowest, the head above the highest (Howard and Ruder 2018, arXiv:1801.06146). "1": all alike."""
    max_grad_norm: DecimalString = "1.0"
    """Largest norm of the gradient; a larger one is scaled down. "0" switches clipping off."""
    precision: Literal["Auto", "BF16", "FP8", "FP32"] = "Auto"
    """Numbers that the model computes in. BF16: bfloat16, by copies of the weights with Full and
    optimizers that can be sharded, else by autocast; the same at any `compute.sharding`. FP8: as
    BF16, with the linear layers in 8 bits (Ada, Hopper or newer; needs compile, without which
    scaling takes longer than the products save). FP32: float32 throughout, never TF32. Trained
    weights are kept in float32 with each. Auto: BF16 on a GPU, FP32 on a CPU."""
    router_aux_loss_coefficient: DecimalString = "0"
    """Weight of the loss that spreads tokens over the experts of a mixture (Fedus et al. 2022,
    arXiv:2101.03961), computed row by row and added to the training loss. Configurations of such
    models name theirs as `router_aux_loss_coef`. It needs rows whole and without padding: not with
    `compute.contextParallel` above 1 or `compile`."""
    gradient_checkpointing: Literal["Auto", "Always", "Never"] = "Auto"
    """Keep fewer activations and compute them again on the way back: less memory, about a third
    more time. Auto: where the memory of a process does not suffice without (see
    `compute.sharding`)."""
    compile: bool = False
    """Compile the decoder blocks by torch.compile: faster steps for about a minute at the start.
    Rows are padded to one size, chosen for the data (at most microBatchTokens), so that it happens
    once. Needs a C compiler in the image
    (there is one in those built with EXTRA=gpu)."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 42
    """Seed of the order of the samples, of dropout and of new weights."""
    guard: Guard = Guard()
    """What is done about losses that are no numbers, and about sudden large ones."""
    early_stopping: EarlyStopping | None = None
    """Ends the training when validation no longer improves. Absent: trains to the end."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.epochs) && has(self.maxSteps))",
            "epochs and maxSteps exclude each other: give one of them",
            lambda t: t.epochs is None or t.max_steps is None,
            ("epochs", "maxSteps"),
        ),
        Rule(
            f"{is_zero('self.routerAuxLossCoefficient')} || !self.compile",
            "routerAuxLossCoefficient would count the padding that compile adds to rows: set"
            ' compile to false, or the coefficient to "0"',
            lambda t: float(t.router_aux_loss_coefficient) == 0 or not t.compile,
            ("routerAuxLossCoefficient", "compile"),
        ),
        Rule(
            "self.precision != 'FP8' || self.compile",
            "precision FP8 is slower than BF16 without compile, which makes one kernel of"
            " scaling and rounding: set compile to true, or precision to BF16",
            lambda t: t.precision != "FP8" or t.compile,
            ("precision", "compile"),
        ),
        Rule(
            f"!{is_one('self.dropout')}",
            "dropout must be below 1: at 1 nothing would be left to learn from",
            lambda t: float(t.dropout) < 1,
            ("dropout",),
        ),
        Rule(
            f"!{is_one('self.labelSmoothing')}",
            "labelSmoothing must be below 1: at 1 the targets would not count",
            lambda t: float(t.label_smoothing) < 1,
            ("labelSmoothing",),
        ),
        Rule(
            f"!{is_zero('self.layerDecay')}",
            "layerDecay must be above 0: at 0 no block below the highest would learn",
            lambda t: float(t.layer_decay) > 0,
            ("layerDecay",),
        ),
    )

    @property
    def longest(self) -> int:
        """Most tokens of a sample; of a model with a smaller maximum, that many."""
        return self.max_length or DEFAULT_MAX_LENGTH

    @property
    def optimizer_kind(self) -> OptimizerKind:
        """The optimizer's row of the table."""
        return OPTIMIZERS[self.optimizer]
