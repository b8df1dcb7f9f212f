"""``spec.training``: steps, optimizer, regularization, precision, early stopping, guard."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from finetune_api.base import Count, DecimalString, Fraction, Model, Rule, is_one, is_zero
from finetune_api.optimizers import OPTIMIZERS, Anchor, OptimizerKind, OptimizerName
from finetune_api.tasks import Metric

DEFAULT_MAX_LENGTH: Final = 2048
TokenWeighting = Literal["None", "Entropy", "Probability"]


class EarlyStopping(Model):
    """End the training early when a validation metric no longer improves."""

    metric: Metric = "Loss"
    """Validation metric to watch."""
    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Number of evaluations without improvement after which training ends."""
    min_delta: DecimalString = "0"
    """Minimum change that counts as improvement, in units of the metric."""


class Guard(Model):
    """Handling of non-finite losses and loss spikes."""

    spike_deviations: DecimalString | None = None
    """Skip a step (make no update) if the logarithm of its loss exceeds the running mean by this
    many standard deviations, and the loss is above 1.5 times its mean; "6" is cautious. Absent:
    only non-finite losses and gradients skip a step, because a batch of rare, hard records looks
    like a spike and would never be learned."""
    max_skipped_steps: Annotated[int, Field(ge=0, le=100)] = 5
    """Maximum number of consecutive skipped steps. Beyond that, the run goes back to its newest
    checkpoint before them, with a lower learning rate and without the samples of the skipped steps,
    which metrics.json lists (set, number in it, shard and row; the first 100)."""
    max_rollbacks: Annotated[int, Field(ge=0, le=100)] = 2
    """Maximum number of rollbacks of a run, over all attempts. Beyond that, or without a checkpoint
    to go back to, the run fails with class Diverged and reason LossNotFinite or, after spikes only,
    LossSpike."""
    rollback_factor: Fraction = "0.5"
    """Factor of the learning rate at each rollback."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!{is_zero('self.rollbackFactor')}",
            "rollbackFactor must be above 0: at 0 the run would continue without learning",
            lambda guard: float(guard.rollback_factor) > 0,
            ("rollbackFactor",),
        ),
    )


class Training(Model):
    """Training: steps, optimizer, regularization, precision."""

    epochs: Annotated[int, Field(ge=1, le=10000)] | None = None
    """Passes over the training set. If neither epochs nor maxSteps is given: 3."""
    max_steps: Count | None = None
    """Number of optimizer steps, instead of epochs."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Maximum length of a sample, in tokens. Absent: the model's maximum, but at most 2,048."""
    batch_size: Annotated[int, Field(ge=1, le=1_048_576)] = 32
    """Samples per optimizer step over all processes, independent of their number."""
    micro_batch_tokens: Annotated[int, Field(ge=8, le=16_777_216)] | None = None
    """Maximum number of tokens of a micro-batch, which one process runs through the model in one
    forward pass. Absent: maxLength, but at least 2,048. Affects memory and speed, not the
    result."""
    learning_rate: DecimalString | None = None
    """Peak learning rate. Absent: "2e-4" for LoRA and QLoRA, "3e-3" for IA3, "1e-2" for
    PromptTuning and PrefixTuning, "2e-5" for Full and Partial."""
    schedule: Literal["Cosine", "Linear", "Constant"] = "Cosine"
    """Learning rate after the warm-up. Cosine: half a cosine to zero. Linear: linearly to zero.
    Constant: unchanged."""
    warmup_ratio: Fraction = "0.03"
    """Share of the steps in which the learning rate rises linearly from zero."""
    optimizer: OptimizerName = "AdamW"
    """AdamW: two moments, 8 bytes per trained weight. AdamW8bit: the same in 2 bytes (Dettmers et
    al. 2022, arXiv:2110.02861), on GPUs only. Adafactor: sums of rows and columns, almost no
    memory, no momentum (Shazeer and Stern 2018, arXiv:1804.04235). Muon: orthogonalized updates of
    matrices of hidden layers (also those of LoRA), 4 bytes per weight (Jordan et al. 2024; Liu et
    al. 2025, arXiv:2502.16982); embeddings, the head, experts in one tensor and their adapters,
    norms and biases use AdamW. A learning rate means about the same for each of them."""
    weight_decay: DecimalString = "0"
    """Decoupled weight decay; not applied to norms and biases."""
    anchor: Anchor = Anchor()
    """Anchors that keep the tuned model near the base model, against forgetting."""
    dropout: Fraction = "0"
    """Dropout probability of the outputs of attention and feed-forward blocks."""
    label_smoothing: Fraction = "0"
    """Share of the target's probability that is spread over the vocabulary (or the classes) in
    training (Szegedy et al. 2016, arXiv:1512.00567). Losses that are shown have no smoothing."""
    token_weighting: TokenWeighting = "None"
    """Weight of each supervised token's gradient, from the prediction of the model in training,
    against forgetting. Entropy: the entropy of its 20 likeliest tokens by its maximum, so that what
    the model is sure of changes little (EAFT; Diao et al. 2026, arXiv:2601.02151). Probability:
    that of the target, so that what the model finds impossible changes little (DFT; Wu et al. 2025,
    arXiv:2508.05629; with anchor.klCoefficient ASFT, arXiv:2509.23753). Losses that are shown have
    no weights."""
    neftune_alpha: DecimalString = "0"
    """Scale of uniform noise on the embeddings in training: each value is at most alpha /
    sqrt(tokens of the sample * embedding width) (NEFTune; Jain et al. 2024, arXiv:2310.05914; 5 is
    usual)."""
    layer_decay: Fraction = "1"
    """Ratio of the learning rates of a decoder block and the block above it; embeddings count as
    below the lowest block, the head as above the highest (Howard and Ruder 2018, arXiv:1801.06146).
    "1": the same rate for all."""
    max_grad_norm: DecimalString = "1.0"
    """Maximum gradient norm; a larger gradient is scaled down. "0" disables clipping."""
    precision: Literal["Auto", "BF16", "FP8", "FP32"] = "Auto"
    """Precision of the computation. BF16: bfloat16, by copies of the weights with Full and an
    optimizer that can be sharded, else by autocast; the same at any `compute.sharding`. FP8: as
    BF16, with the linear layers in 8 bits (Ada, Hopper or newer; needs compile, without which
    scaling costs more time than the matrix products save). FP32: float32 throughout, never TF32.
    Trained weights are always kept in float32. Auto: BF16 on a GPU, FP32 on a CPU."""
    router_aux_loss_coefficient: DecimalString = "0"
    """Weight of the load-balancing loss of a mixture of experts (Fedus et al. 2022,
    arXiv:2101.03961), which is computed per micro-batch and added to the training loss. Model
    configurations call it `router_aux_loss_coef`. Needs whole micro-batches without padding: not
    with `compute.contextParallel` above 1 or `compile`."""
    gradient_checkpointing: Literal["Auto", "Always", "Never"] = "Auto"
    """Keep fewer activations and recompute them in the backward pass: less memory, about a third
    more time. Auto: only if the memory of a process is not sufficient otherwise (see
    `compute.sharding`)."""
    compile: bool = False
    """Compile the decoder blocks with torch.compile: about a minute at the start for faster steps.
    Micro-batches are padded to one size, chosen for the data (at most microBatchTokens), so that
    the blocks are compiled only once. Needs a C compiler in the image (images built with EXTRA=gpu
    have one)."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 42
    """Seed of the sample order, of dropout and of new weights."""
    guard: Guard = Guard()
    """Handling of non-finite losses and loss spikes."""
    early_stopping: EarlyStopping | None = None
    """End the training early when a validation metric no longer improves. Absent: train to the
    end."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!(has(self.epochs) && has(self.maxSteps))",
            "epochs and maxSteps exclude each other: give one of them",
            lambda t: t.epochs is None or t.max_steps is None,
            ("epochs", "maxSteps"),
        ),
        Rule(
            f"{is_zero('self.routerAuxLossCoefficient')} || !self.compile",
            "routerAuxLossCoefficient would count the padding that compile adds: set compile to"
            ' false, or the coefficient to "0"',
            lambda t: float(t.router_aux_loss_coefficient) == 0 or not t.compile,
            ("routerAuxLossCoefficient", "compile"),
        ),
        Rule(
            "self.precision != 'FP8' || self.compile",
            "precision FP8 is slower than BF16 without compile, which fuses scaling and rounding:"
            " set compile to true, or precision to BF16",
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
            f"self.tokenWeighting == 'None' || {is_zero('self.labelSmoothing')}",
            'tokenWeighting is of the target\'s own loss: set labelSmoothing to "0", or'
            " tokenWeighting to None",
            lambda t: t.token_weighting == "None" or float(t.label_smoothing) == 0,
            ("tokenWeighting", "labelSmoothing"),
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
        """Maximum tokens of a sample, before the model's own maximum is applied."""
        return self.max_length or DEFAULT_MAX_LENGTH

    @property
    def optimizer_kind(self) -> OptimizerKind:
        """The optimizer's entry in ``OPTIMIZERS``."""
        return OPTIMIZERS[self.optimizer]
