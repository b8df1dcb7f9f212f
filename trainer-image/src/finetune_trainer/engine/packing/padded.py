"""Padded micro-batches: each document is padded at its end to the longest.

For models and methods whose documents cannot be packed. The model's own kernels attend each
document; they are causal, or get a mask where there is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from finetune_trainer.engine.packing.dropout import token_keys
from finetune_trainer.engine.packing.feed import TokenMicroBatch
from finetune_trainer.engine.packing.layout import DocumentLayout, cu_seqlens_of
from finetune_trainer.engine.packing.transfer import on_device
from finetune_trainer.prepared.dataset import TokenSample

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Padded:
    """Documents padded to one length; token ids and mask on the host."""

    ids: Ints
    """Shape [documents, longest]; 0 for padding."""
    mask: Ints
    """1 for tokens, 0 for padding; shape of ``ids``."""
    layout: DocumentLayout

    @property
    def has_padding(self) -> bool:
        return not self.mask.all()


def pad_documents(
    samples: Sequence[TokenSample],
    positions: Sequence[int],
    seed: int,
    step: int,
    device: torch.device,
    keyed: bool,
) -> Padded:
    """Pad documents to the longest; without documents, return a single unsupervised token."""
    if not samples:
        samples, positions = [TokenSample(np.zeros(1, np.int32), np.zeros(1, np.bool_))], [0]
    lengths = [len(s.ids) for s in samples]
    shape = len(samples), max(lengths)
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    keys = np.zeros(shape, np.int32)
    for i, (sample, position, length) in enumerate(zip(samples, positions, lengths, strict=True)):
        ids[i, :length] = sample.ids
        mask[i, :length] = 1
        if keyed:
            keys[i, :length] = token_keys(seed, step, position, length)
    layout = DocumentLayout(
        spans=(),
        cu_seqlens=cu_seqlens_of((), device),
        max_seqlen=shape[1],
        dropout_keys=on_device(keys.reshape(-1), device) if keyed else None,
        document_lengths=on_device(np.repeat(lengths, shape[1]), device) if keyed else None,
        document_dropout_keys=on_device(keys[:, 0], device) if keyed else None,
    )
    return Padded(ids, mask, layout)


def build_padded_tokens(
    samples: Sequence[TokenSample],
    positions: Sequence[int],
    *,
    numbers: Sequence[int] | None = None,
    seed: int,
    step: int,
    device: torch.device,
    keyed: bool = True,
) -> TokenMicroBatch:
    """Build a padded micro-batch that predicts supervised tokens; arguments as of
    ``build_packed``."""
    padded = pad_documents(samples, positions, seed, step, device, keyed)
    documents, longest = padded.ids.shape
    predicts = np.zeros(padded.ids.shape, np.bool_)
    number = np.zeros(documents, np.int64)
    for i, sample in enumerate(samples):
        predicts[i, : len(sample.ids) - 1] = sample.supervised[1:]
        number[i] = 0 if numbers is None else numbers[i]
    target = np.flatnonzero(predicts)
    following = np.append(padded.ids.reshape(-1)[1:], 0)
    here = np.repeat(number, longest)[target]
    return TokenMicroBatch(
        input_ids=on_device(padded.ids, device),
        position_ids=on_device(np.tile(np.arange(longest), (documents, 1)), device),
        predict=on_device(target, device),
        labels=on_device(following[target], device),
        layout=padded.layout,
        numbers=on_device(here, device),
        numbers_here=here,
        attention_mask=on_device(padded.mask, device) if padded.has_padding else None,
    )
