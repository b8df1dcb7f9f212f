"""Evaluation on all ranks: loss over whole sets, and text generated for their prompts.

    set ──► micro-batches (split over ranks) ──► loss sums ──┐
    set ──► prompts (split over ranks) ──► greedy decoding ──┤──► metrics, identical on all ranks
                 └──► log-likelihoods of the set's labels ───┘

The loss is a sum over supervised tokens divided by their count, so it is independent of the
micro-batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetune_api.evaluation_results import Metrics
from finetune_api.tasks import metrics_from
from finetune_trainer.engine.loss import MicroBatchLosses, evaluating, micro_batch_losses
from finetune_trainer.engine.packing.feed import MicroBatch, MicroBatchBuilder
from finetune_trainer.engine.packing.layout import layout_context
from finetune_trainer.engine.planning.plan import Packing, pack_all
from finetune_trainer.engine.sharding import is_sharded, root_gathered
from finetune_trainer.engine.task_losses import TaskLoss
from finetune_trainer.engine.world import World
from finetune_trainer.evaluate.cached_model import CachedModel
from finetune_trainer.evaluate.label_likelihoods import LabelLikelihoods
from finetune_trainer.evaluate.label_scores import scored_tokens
from finetune_trainer.evaluate.prompt_batches import Ids, PromptBatches, padded
from finetune_trainer.evaluate.scores import answers_to, loss_metrics, need_answers, text_metrics
from finetune_trainer.failures import Interrupted
from finetune_trainer.liveness import progressed
from finetune_trainer.prepared.dataset import PreparedData
from finetune_trainer.prepared.split import Side
from finetune_trainer.storage.runfiles import LabelScores, SetAnswers

Floats = npt.NDArray[np.float64]
OF_LABELS: Final = frozenset(metrics_from("LabelScores"))


class Answer(NamedTuple):
    """A model's answer to a prompt."""

    text: str
    tokens: int
    """Tokens generated, without those that end an answer; 0 for a class."""


@dataclass(frozen=True)
class SetResult:
    """Scores of a model on one set."""

    name: str
    samples: int
    metrics: Metrics
    losses: Floats
    """Loss of each sample, summed over its labels, shape [samples]."""
    labels: Floats
    """Number of labels of each sample: supervised tokens, or one class. Shape [samples]."""
    answers: list[Answer]
    """Answers to the first samples; empty if no metric needs them."""
    label_scores: LabelScores | None = None
    """Log-likelihoods of the labels after the prompts of the answers, if a metric needs them."""

    @property
    def loss_sum(self) -> float:
        return float(self.losses.sum())

    @property
    def tokens(self) -> float:
        """Number of labels summed in ``loss_sum``."""
        return float(self.labels.sum())

    def to_answers(self) -> SetAnswers:
        """As it is kept in storage."""
        return SetAnswers(
            name=self.name,
            metrics=self.metrics,
            losses=self.losses.tolist(),
            labels=[int(n) for n in self.labels],
            answers=[answer.text for answer in self.answers],
            tokens=[answer.tokens for answer in self.answers],
            label_scores=self.label_scores,
        )


@dataclass(frozen=True)
class Measured:
    """Losses and answers of one set, before the metrics; arrays as in ``SetResult``."""

    losses: Floats
    labels: Floats
    asked: list[int]
    """Positions of the samples that have answers."""
    answers: list[Answer]


class LossSums:
    """Sums of losses by sample, on this rank and then on all."""

    def __init__(self, samples: int) -> None:
        self._sums = np.zeros((2, samples))

    def add(self, micro_batch: MicroBatch, losses: torch.Tensor) -> None:
        """Add the losses of a micro-batch's labels, shape [labels]."""
        numbers = micro_batch.numbers.cpu().numpy()
        np.add.at(self._sums[0], numbers, losses.double().cpu().numpy())
        np.add.at(self._sums[1], numbers, 1)

    def on_all(self, world: World) -> tuple[Floats, Floats]:
        """Return the sums of losses, and the numbers of labels, over all ranks; shape [samples]
        each."""
        losses, labels = world.sum(torch.from_numpy(self._sums)).numpy()
        return losses, labels


@dataclass
class Evaluator:
    """Evaluate a model on the sets of the prepared data. Answers are generated text."""

    world: World
    data: PreparedData
    loss: TaskLoss
    build: MicroBatchBuilder
    tokenizer: PreTrainedTokenizerBase
    micro_batch_tokens: int
    packing: Packing
    max_samples: int
    max_new_tokens: int
    possible: Sequence[str] = metrics_from("Loss")
    """Metrics defined for the task."""
    virtual_tokens: int = 0
    """Virtual tokens that the tuning method prepends to every prompt."""
    stop_requested: Callable[[], bool] | None = None
    """Polled before each set; None: the evaluation cannot be interrupted."""

    def sets(
        self, split: Side, wanted: Mapping[str, Sequence[str]],
        part: Mapping[int, np.ndarray] | None = None,
    ) -> list[SetResult]:  # fmt: skip
        """Evaluate every set of a split.

        Args:
            wanted: metrics by name of the set.
            part: positions of the samples to evaluate, by number of the set; None: all.

        Raises:
            Interrupted: on all ranks, before a set, if a stop was requested on any rank.
        """
        found = []
        with evaluating(self.loss):
            for number, name in self.data.set_names(split):
                if self.stop_requested and any(self.world.on_all(self.stop_requested)):
                    raise Interrupted("Interrupted", f"stopped on request, before set {name}")
                everything = np.flatnonzero(self.data.index(split).set == number)
                positions = everything if part is None else part[number]
                found.append(self._one(split, number, positions, wanted[name]))
        return found

    def _one(
        self, split: Side, number: int, positions: np.ndarray, wanted: Sequence[str]
    ) -> SetResult:
        found = self._measure(split, positions, wanted)
        prompts = [r.prompt_ids for r in self.data.references(split, found.asked)]
        scores = self.label_scores(number, prompts, wanted)
        return SetResult(
            self.data.manifest.sets[number].name,
            len(positions),
            self.metrics(split, found, scores, wanted),
            found.losses,
            found.labels,
            found.answers,
            scores,
        )

    def metrics(
        self, split: Side, found: Measured, scores: LabelScores | None, wanted: Sequence[str]
    ) -> Metrics:
        """Return the metrics of what was measured of one set.

        Args:
            scores: log-likelihoods of the labels after the prompts of the answers, if measured.
            wanted: metrics of the set.
        """
        metrics = loss_metrics(float(found.losses.sum()), float(found.labels.sum()))
        if found.asked:
            references = self.data.references(split, found.asked)
            said = answers_to(references, [answer.text for answer in found.answers], scores)
            metrics |= text_metrics(said, wanted)
        always = [m for m in metrics_from("Loss") if m in self.possible]
        return {m: metrics[m] for m in (*wanted, *always) if m in metrics}

    def _measure(self, split: Side, positions: np.ndarray, wanted: Sequence[str]) -> Measured:
        """Return losses and answers of some samples, identical on all ranks."""
        sums = LossSums(len(positions))
        for _, micro_batch in self._micro_batches(split, positions):
            with self.world.autocast():
                sums.add(micro_batch, micro_batch_losses(self.loss, micro_batch))
        losses, labels = sums.on_all(self.world)
        if not need_answers(wanted):
            return Measured(losses, labels, [], [])
        asked = positions[: self.max_samples].tolist()
        prompts = [r.prompt_ids for r in self.data.references(split, asked)]
        return Measured(losses, labels, asked, self.generate(prompts))

    def logits(
        self, split: Side, positions: npt.NDArray[np.integer], most_labels: int
    ) -> Iterator[tuple[MicroBatch, torch.Tensor]]:
        """Yield this rank's micro-batches of some samples with their logits, shape [labels,
        vocabulary]. The number of a label is that of its sample in ``positions``.

        Args:
            most_labels: in a micro-batch, which bounds its logits; each sample must have no more.
        """
        index = self.data.index(split)
        room = self.micro_batch_tokens - self.virtual_tokens
        as_large = -(-index.supervised[positions].astype(np.int64) * room // most_labels)
        sizes = np.maximum(index.length[positions], as_large)
        for _, micro_batch in self._micro_batches(split, positions, sizes):
            with torch.no_grad(), self.world.autocast(), layout_context(micro_batch.layout):
                found: MicroBatchLosses = self.loss(micro_batch, with_logits=True)
            assert found.logits is not None, "requested by with_logits"
            yield micro_batch, found.logits

    def _micro_batches(
        self, split: Side, positions: np.ndarray, sizes: np.ndarray | None = None
    ) -> Iterator[tuple[list[int], MicroBatch]]:
        """Yield this rank's micro-batches of some samples, each with its samples' positions. The
        number of a label is that of its sample in ``positions``.

        Args:
            sizes: tokens that each sample counts in its micro-batch; None: its own.
        """
        lengths = self.data.index(split).length[positions] if sizes is None else sizes
        dealt = pack_all(
            lengths, self.micro_batch_tokens, self.world.size, self.packing, self.virtual_tokens
        )
        for micro_batch in dealt[self.world.rank]:
            progressed()
            chosen = [int(positions[i]) for i in micro_batch]
            samples = self.data.samples(split, chosen)
            made = self.build(
                samples, chosen, numbers=list(micro_batch), seed=0, step=0, device=self.world.device
            )
            yield chosen, made

    def generate(self, prompts: Sequence[Ids]) -> list[Answer]:
        """Return greedy answers to prompts, in order.

        Args:
            prompts: tokens of each, shape [tokens].
        """
        return self._batches.run(prompts, self.max_new_tokens, 1, self._answer)

    def label_scores(
        self, number: int, prompts: Sequence[Ids], wanted: Sequence[str]
    ) -> LabelScores | None:
        """Return the log-likelihoods of the labels of a set after prompts; None: no metric needs
        them. Of a prompt without room for the longest label, the beginning is cut off.

        Args:
            number: of the set.
            prompts: tokens of each, shape [tokens].
            wanted: metrics of the set.
        """
        if not prompts or OF_LABELS.isdisjoint(wanted):
            return None
        labels = self.data.manifest.sets[number].labels
        tokens = scored_tokens(labels, self.data.manifest.stop_token_ids)
        likelihoods = LabelLikelihoods(self._model, tokens, max(map(len, prompts)))
        room = self._positions() - likelihoods.more - self.virtual_tokens

        def work(batch: list[Ids]) -> list[list[float]]:
            with torch.no_grad(), self.world.autocast(), root_gathered(self.loss):
                return likelihoods([prompt[-room:] for prompt in batch])

        values = self._batches.run(prompts, likelihoods.more, likelihoods.copies, work)
        return LabelScores(labels=list(labels), tokens=list(map(len, tokens)), values=values)

    def _answer(self, prompts: Sequence[Ids]) -> list[Answer]:
        longest = max(len(p) for p in prompts)
        room = max(1, min(self.max_new_tokens, self._positions() - longest - self.virtual_tokens))
        stops = sorted({*self.data.manifest.stop_token_ids, self.tokenizer.eos_token_id})
        with torch.no_grad(), self.world.autocast(), root_gathered(self.loss):
            said = self._said(prompts, stops, room).cpu()
        texts: list[str] = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        ends = torch.isin(said, torch.tensor(stops))
        # Behind the first end token is padding, which may be an end token itself.
        tokens = (ends.cumsum(1) == 0).sum(1).tolist()
        return [Answer(text, count) for text, count in zip(texts, tokens, strict=True)]

    def _said(self, prompts: Sequence[Ids], stops: Sequence[int], most: int) -> Tensor:
        """Tokens of greedy answers, shape [prompts, tokens]. The ranks of a sharded model must
        agree at each token on whether another one follows, which transformers does."""
        model = self._model
        if model.reuses and not is_sharded(self.loss):
            return model.greedy(prompts, stops, most)
        ids, mask = padded(prompts, model.padding, self.world.device)
        out: Tensor = self.loss.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=greedy(self.tokenizer, stops, most),
            synced_gpus=is_sharded(self.loss),
        )
        return out[:, ids.shape[1] :]

    @property
    def _model(self) -> CachedModel:
        known = self.tokenizer.pad_token_id
        padding = (self.tokenizer.eos_token_id or 0) if known is None else known
        return CachedModel(
            self.loss.model, self.world.device, int(padding), virtual=bool(self.virtual_tokens),
            sharded=is_sharded(self.loss),
        )  # fmt: skip

    @property
    def _batches(self) -> PromptBatches:
        return PromptBatches(
            self.world, self.loss, shares=self._model.shares, alike=bool(self.virtual_tokens)
        )

    def _positions(self) -> int:
        """Positions of the model; very many where they have no bound."""
        model: Any = self.loss.model
        return getattr(model.config, "max_position_embeddings", None) or 1 << 40


def greedy(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], max_new_tokens: int
) -> GenerationConfig:
    """Return the config of greedy decoding that stops at each of the end tokens. The rest of the
    model's own generation config is ignored (no sampling, no penalties)."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(ends) or None,
        use_cache=True,
    )


def overall(results: Sequence[SetResult]) -> Metrics:
    """Average metrics over sets: loss weighted by tokens, other metrics by samples."""
    names = {name for r in results for name in r.metrics}
    of_loss = loss_metrics(sum(r.loss_sum for r in results), sum(r.tokens for r in results))
    metrics = {name: value for name, value in of_loss.items() if name in names}
    for name in sorted(names - metrics.keys()):
        having = [r for r in results if name in r.metrics]
        samples = sum(r.samples for r in having)
        metrics[name] = sum(r.metrics[name] * r.samples for r in having) / samples
    return metrics
