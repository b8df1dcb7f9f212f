"""Dropout keyed by the sample, independent of the process that trains it.

The mask of an element is a hash of (seed, step, sample, position in the document, layer, feature).
Masks are therefore the same at any number of processes, under any packing, in recomputation and
after a resume, and no generator state is saved. On a GPU one Triton kernel computes and applies
the mask (``fuseddropout``); elsewhere PyTorch operators do, with the same masks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine.packing.fuseddropout import has_kernel, keyed_dropout
from finetune_trainer.engine.packing.layout import DocumentLayout, current_layout

_MASK32 = 0xFFFFFFFF
_NOISE_LAYER = 0
"""Layer number of the NEFTune noise; dropouts count from 1."""
_BLOCKS = frozenset(("self_attn", "attention", "mlp", "feed_forward", "fc2"))
"""Module names of attention and feed-forward blocks; ``fc2`` is the last layer of a feed-forward
block that has no module of its own (OPT)."""


def draws(spec: FineTuneJobSpec) -> bool:
    """Return whether training under a spec draws dropout or noise, so that micro-batches need
    dropout keys."""
    lora = spec.method.lora
    return (
        float(spec.training.dropout) > 0
        or float(spec.training.neftune_alpha) > 0
        or (lora is not None and float(lora.dropout) > 0)
    )


def token_keys(seed: int, step: int, sample: int, length: int) -> npt.NDArray[np.int32]:
    """Return the dropout key of each token of a document in a step: 32 random bits, shape [length].

    SplitMix64 finalizer (Steele et al. 2014) over the mixed integers.
    """
    with np.errstate(over="ignore"):
        x = np.full(length, np.uint64(seed & _MASK32))
        for part in (step, sample):
            x = _splitmix(x + np.uint64(part + 1) * np.uint64(0x9E3779B97F4A7C15))
        x = _splitmix(x + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03))
    return (x >> np.uint64(32)).astype(np.uint32).view(np.int32)


def _splitmix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _signed(bits: int) -> int:
    """Return the int32 with the same 32 bits."""
    return (bits & _MASK32) - ((bits & 0x80000000) << 1)


def salt_of(layer: int) -> int:
    """Return the salt of a layer: 32 bits, as an int32, so that layers draw different values."""
    return _signed(layer * 0x9E3779B1)


def keep_mask(keys: Tensor, features: int, salt: Tensor | int, probability: float) -> Tensor:
    """Return which elements are kept: bool, shape [*keys.shape, features]."""
    return draw(keys, features, salt) >= int(probability * 2**32) - 2**31


def draw(keys: Tensor, features: int, salt: Tensor | int) -> Tensor:
    """Return random values of a layer's elements, uniform over all of int32; shape
    [*keys.shape, features].

    MurmurHash3 finalizer (32 bit) in int32, where products wrap around as in unsigned integers.
    The last operation shifts the range from [0, 2**32) to [-2**31, 2**31).
    """
    feature = torch.arange(1, features + 1, device=keys.device, dtype=torch.int32)
    h = (keys[..., None] ^ salt) + feature * _signed(0x85EBCA77)
    for bits, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h ^= _shifted(h, bits)
        h *= _signed(factor)
    h ^= _shifted(h, 16)
    h ^= -(2**31)
    return h


def _shifted(h: Tensor, bits: int) -> Tensor:
    """Shift right as an unsigned integer; an int32 shift would repeat the sign bit."""
    return (h >> bits) & ((1 << (32 - bits)) - 1)


class KeyedDropout(nn.Module):
    """Dropout by the keys of the current layout.

    Input: [documents, tokens, features] (a packed sequence is [1, tokens, features]), [tokens,
    features], or the pooled vectors of a padded micro-batch, [documents, features]. The module is
    the identity in evaluation mode and outside of ``layout_context`` (generation).
    """

    p = 0.0
    """Read by attention modules that drop probabilities themselves. Attention probabilities have no
    keys, so they are not dropped."""

    def __init__(self, probability: float, layer: int) -> None:
        super().__init__()
        self.probability = probability
        self.salt: Tensor
        self.layer = layer
        # A tensor, so that compiled code is the same for all layers.
        salt = torch.tensor(salt_of(layer), dtype=torch.int32)
        self.register_buffer("salt", salt, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        layout = current_layout()
        if not self.training or self.probability == 0.0 or layout is None:
            return x
        keys = _keys_of(x, layout)
        if keys is None:
            return x
        if has_kernel(x):
            dropped: Tensor = keyed_dropout(x, keys, self.salt, self.probability)
            return dropped
        keep = keep_mask(keys, x.shape[-1], self.salt, self.probability)
        # Virtual tokens before a document (prompt tuning) have no keys and are kept.
        scaled = x / (1.0 - self.probability)
        if missing := x.shape[-2] - keep.shape[-2]:
            keep = pad(keep, (0, 0, missing, 0), value=True)
            scaled = torch.cat([x[..., :missing, :], scaled[..., missing:, :]], -2)
        return torch.where(keep, scaled, 0.0)

    def extra_repr(self) -> str:
        return f"probability={self.probability}, layer={self.layer}"


def _keys_of(x: Tensor, layout: DocumentLayout) -> Tensor | None:
    """Return the keys of the vectors of ``x``, shape [documents, tokens] or [vectors]; None where
    the vectors are neither tokens nor documents. (Attention probabilities, four dimensions, are
    not dropped.)

    Raises:
        RuntimeError: where the micro-batch was built without keys.
    """
    if layout.dropout_keys is None:
        raise RuntimeError("dropout in a micro-batch without keys: build it with keyed=True")
    if x.ndim == 3:
        return layout.dropout_keys.view(len(x), -1)
    known = (layout.dropout_keys, layout.document_dropout_keys) if x.ndim == 2 else ()
    return next((keys for keys in known if keys is not None and len(keys) == len(x)), None)


def key_dropouts(model: nn.Module, block_probability: float) -> int:
    """Replace every dropout of a model by keyed dropout. Where the model has none (Llama-like
    models), add dropout after its attention and feed-forward blocks.

    An adapter's ``nn.Dropout`` keeps its probability; the others get ``block_probability``. Returns
    the number of dropouts with ``block_probability``, replaced or added.
    """
    count = blocks = 0
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            # Some models have an Identity in place of a dropout of probability 0.
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
    """Add noise to an embedding's output in training (NEFTune; see ``spec.training.neftuneAlpha``),
    drawn like dropout by the keys of the current layout."""

    def hook(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        layout = current_layout()
        if not module.training or layout is None:
            return output
        if layout.dropout_keys is None or layout.document_lengths is None:
            raise RuntimeError("noise in a micro-batch without keys: build it with keyed=True")
        width = output.shape[-1]
        noise = draw(layout.dropout_keys, width, salt_of(_NOISE_LAYER)).double() * 2.0**-31
        size = alpha / (layout.document_lengths * width).double().sqrt()
        return output + (noise * size[:, None]).to(output.dtype).view(output.shape)

    embedding.register_forward_hook(hook)


def _drop_output(module: nn.Module, dropout: KeyedDropout) -> None:
    module.add_module("output_dropout", dropout)

    def hook(_module: nn.Module, _args: object, output: object) -> object:
        if isinstance(output, tuple):
            return (dropout(output[0]), *output[1:])
        return dropout(output)

    module.register_forward_hook(hook)
