"""Dropout that depends on what is trained, not on who trains it.

The mask of an element is a hash of (seed, step, sample, position in the document, layer, feature).
So it is the same at any number of processes, under any packing, in a recomputation and after a
resume, and no generator state has to be kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from finetune_trainer.engine.rows.layout import RowLayout, current_row

_MASK32 = 0xFFFFFFFF
_NOISE_LAYER = 0
"""Dropouts count from 1."""
_BLOCKS = frozenset(("self_attn", "attention", "mlp", "feed_forward", "fc2"))
"""Names of attention and feed-forward blocks, or of the last layer of one that has no module of its
own (OPT)."""


def token_keys(seed: int, step: int, sample: int, length: int) -> npt.NDArray[np.int64]:
    """Random 32-bit key of each token of a document in a step, shape [length].

    SplitMix64 finalizer (Steele et al. 2014) over the mixed integers.
    """
    with np.errstate(over="ignore"):
        x = np.full(length, np.uint64(seed & _MASK32))
        for part in (step, sample):
            x = _splitmix(x + np.uint64(part + 1) * np.uint64(0x9E3779B97F4A7C15))
        x = _splitmix(x + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03))
    return (x >> np.uint64(32)).astype(np.int64)


def _splitmix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def salt_of(layer: int) -> int:
    """What makes the numbers of a layer its own, below 2**32."""
    return (layer * 0x9E3779B1) & _MASK32


def keep_mask(keys: Tensor, features: int, salt: Tensor | int, probability: float) -> Tensor:
    """Which elements are kept: bool, shape [tokens, features]."""
    return draw(keys, features, salt) >= int(probability * 2**32)


def draw(keys: Tensor, features: int, salt: Tensor | int) -> Tensor:
    """Random 32-bit numbers of the elements of a layer: int64, shape [tokens, features].

    The finalizer of MurmurHash3 (32 bit), in 64-bit integers whose low halves are exact.
    """
    feature = torch.arange(1, features + 1, device=keys.device, dtype=torch.int64)
    h = (keys[:, None] ^ salt) + feature[None, :] * 0x85EBCA77
    h = h & _MASK32
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK32
    return h ^ (h >> 16)


class KeyedDropout(nn.Module):
    """Drops elements of [rows, tokens, features] or [tokens, features], and of what is pooled of
    the documents of a padded row, [documents, features], by the keys of the row in work.

    Outside of a training row (evaluation, generation) it does nothing.
    """

    p = 0.0
    """What attention reads, to drop probabilities by itself: those are not dropped, by no key."""

    def __init__(self, probability: float, layer: int) -> None:
        super().__init__()
        self.probability = probability
        self.salt: Tensor
        self.layer = layer
        # A tensor, so that compiled code is the same for all layers.
        self.register_buffer("salt", torch.tensor(salt_of(layer)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        row = current_row()
        if not self.training or self.probability == 0.0 or row is None:
            return x
        keys = _keys_of(x, row)
        if keys is None:
            return x
        keep = keep_mask(keys, x.shape[-1], self.salt, self.probability)
        # Virtual tokens before the document (prompt tuning) have no keys, and are kept.
        keep = pad(keep, (0, 0, x[..., 0].numel() - len(keep), 0), value=True)
        return x * keep.view(x.shape).to(x.dtype) / (1.0 - self.probability)

    def extra_repr(self) -> str:
        return f"probability={self.probability}, layer={self.layer}"


def _keys_of(x: Tensor, row: RowLayout) -> Tensor | None:
    """Keys of the vectors of ``x``; None where it is of neither tokens nor documents. (Attention
    probabilities, four dimensions, are not dropped, in packed rows or others.)"""
    if x.ndim == 3:
        return row.keys
    known = (row.keys, row.document_keys) if x.ndim == 2 else ()
    return next((keys for keys in known if keys is not None and len(keys) == len(x)), None)


def key_dropouts(model: nn.Module, block_probability: float) -> int:
    """Make every dropout of a model keyed, and add dropout behind its attention and feed-forward
    blocks where the model has none of its own there (as Llama-like models do not).

    ``nn.Dropout`` modules keep their probability if it is the adapter's, else they get
    ``block_probability``. Returns the number of those that got it, or were added with it.
    """
    count = blocks = 0
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            # Some models leave a place for a dropout empty where its probability is 0.
            empty = type(child) is nn.Identity and child_name.endswith(("drop", "dropout"))
            if type(child) is not nn.Dropout and not empty:
                continue
            adapter = "lora_dropout" in f"{name}.{child_name}"
            blocks += not adapter
            probability = child.p if adapter else block_probability
            count += 1
            setattr(module, child_name, KeyedDropout(probability, count))
    if block_probability > 0 and not blocks:
        for name, module in list(model.named_modules()):
            *above, own = name.split(".")
            if own in _BLOCKS and not _BLOCKS.intersection(above):
                count, blocks = count + 1, blocks + 1
                _drop_output(module, KeyedDropout(block_probability, count))
    return blocks


def add_noise(embedding: nn.Module, alpha: float) -> None:
    """Noise on what an embedding gives, while training (NEFTune; see
    ``spec.training.neftuneAlpha``): drawn as dropout is, by the keys of the row in work."""

    def hook(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        row = current_row()
        if not module.training or row is None:
            return output
        width = output.shape[-1]
        noise = draw(row.keys, width, salt_of(_NOISE_LAYER)).double() * 2.0**-31 - 1.0
        size = alpha / (row.lengths * width).double().sqrt()
        return output + (noise * size[:, None]).to(output.dtype).view(output.shape)

    embedding.register_forward_hook(hook)


def _drop_output(module: nn.Module, dropout: KeyedDropout) -> None:
    module.add_module("output_dropout", dropout)

    def hook(_module: nn.Module, _args: object, output: object) -> object:
        if isinstance(output, tuple):
            return (dropout(output[0]), *output[1:])
        return dropout(output)

    module.register_forward_hook(hook)
