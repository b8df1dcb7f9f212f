"""A causal language model that continues prompts from their keys and values.

For each new token transformers' own cache copies all keys and values, and documents that have
ended are computed until the last one has. Here the cache has room for the tokens to come, and ended
documents leave it. What the prompts of a batch begin with alike (instructions, examples) is
computed once.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from finetune_trainer.evaluate.prompt_batches import Ids, common, padded, parts_of

LEAST_SHARED: Final = 16
"""Tokens from which what prompts share has a pass of its own."""
_COPIED: Final = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers whose documents can be selected and copied."""


class _RoomyLayer(DynamicLayer):
    """A layer of a KV cache with room for further tokens.

    Args:
        room: number of tokens behind the first ones.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = room
        self._held: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See ``DynamicLayer``. Shape of the states: [documents, heads, tokens, width]."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._held is None:
            self.lazy_initialization(key_states, value_states)
            self._held = self._roomy(key_states), self._roomy(value_states)
        for held, states in zip(self._held, (key_states, value_states), strict=True):
            held[..., start:end, :] = states
        self.keys, self.values = (held[..., :end, :] for held in self._held)
        return self.keys, self.values

    @classmethod
    def holding(cls, keys: Tensor, values: Tensor, room: int) -> _RoomyLayer:
        """A layer with the keys and values of some tokens; behind them they have room."""
        layer = cls(room)
        layer.lazy_initialization(keys, values)
        layer._held = keys, values
        layer.keys, layer.values = (
            held[..., : held.shape[-2] - room, :] for held in (keys, values)
        )
        return layer

    def _roomy(self, states: Tensor) -> Tensor:
        documents, heads, tokens, width = states.shape
        return states.new_empty(documents, heads, tokens + self._room, width)

    def batch_select_indices(self, indices: Tensor) -> None:
        """See ``DynamicLayer``."""
        self._hold(lambda held: held[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See ``DynamicLayer``."""
        self._hold(lambda held: held.repeat_interleave(repeats, 0))

    def _hold(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._held is not None:
            length = self.get_seq_length()
            self._held = change(self._held[0]), change(self._held[1])
            self.keys, self.values = (held[..., :length, :] for held in self._held)


class ReadPrompts(NamedTuple):
    """Prompts that a model has read."""

    logits: Tensor
    """Behind the prompts, float32, shape [prompts, vocabulary]."""
    mask: Tensor
    """Of their tokens, with padding in front or behind what they share, shape [prompts, tokens]."""
    cache: Cache | None
    """Their keys and values; None: not kept, or not to be copied."""


class CachedModel:
    """Runs a model with its cache, with the positions of prompts that have padding.

    Args:
        model: a transformers model, or one under peft.
        padding: token of padding.
        virtual: whether the tuning method puts virtual tokens before each prompt.
        sharded: whether the model is sharded over the ranks. All must then run equally many passes,
            so that what prompts share has no pass of its own.
    """

    def __init__(
        self, model: Any, device: torch.device, padding: int, *, virtual: bool, sharded: bool
    ) -> None:
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        accepted = inspect.signature(inner.forward).parameters
        caches = "past_key_values" in accepted and not getattr(inner, "_is_stateful", False)
        layers = DynamicCache(config=inner.config).layers if caches else []
        self._model, self._config, self._device = model, inner.config, device
        self._selects = "logits_to_keep" in accepted
        self._places = "position_ids" in accepted and not virtual
        self._whole = caches and all(type(layer) is DynamicLayer for layer in layers)
        self.padding: Final = padding
        self.reuses: Final = (
            caches and not virtual and all(type(layer) in _COPIED for layer in layers)
        )
        """Whether documents of its cache can be selected and copied."""
        # Padding behind it must not count: neither in a window of tokens, nor as a position.
        self.shares: Final = self.reuses and self._whole and self._places and not sharded
        """Whether what prompts of a batch begin with alike is computed once."""
        self.vocabulary: Final = int(inner.get_input_embeddings().num_embeddings)

    def _cache(self, room: int) -> Cache:
        """An empty cache, with room for further tokens where layers keep all of them."""
        cache = DynamicCache(config=self._config)
        if self._whole:
            cache.layers = [_RoomyLayer(room) for _ in cache.layers]
        return cache

    def __call__(self, ids: Tensor, mask: Tensor, kept: int, **options: Any) -> Any:
        """Return the output of the model.

        Args:
            ids: new tokens, shape [documents, tokens].
            mask: of the cached and the new tokens, shape [documents, all tokens].
            kept: last tokens whose logits are needed.
        """
        if self._selects:
            options["logits_to_keep"] = kept
        if self._places:
            positions = mask.cumsum(1).sub(1).clamp(min=0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        return self._model(input_ids=ids, attention_mask=mask, **options)

    def read(self, prompts: Sequence[Ids], room: int, *, keep: bool) -> ReadPrompts:
        """Run prompts through the model.

        Args:
            prompts: tokens of each; with virtual tokens, of one length.
            room: tokens that will follow each prompt.
            keep: whether the cache is needed.
        """
        if self.shares:
            return self._read_in_parts(prompts, room, keep=keep)
        ids, mask = padded(prompts, self.padding, self._device)
        cache = self._cache(room) if keep and self.reuses else None
        return ReadPrompts(self._read(ids, mask, cache), mask, cache)

    def _read(self, ids: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        """Logits behind tokens, float32, shape [documents, vocabulary]."""
        options = {"past_key_values": cache} if cache is not None else {}
        out = self(ids, mask, 1, use_cache=cache is not None, **options)
        found: Tensor = out.logits[:, -1].float()
        return found

    def _read_in_parts(self, prompts: Sequence[Ids], room: int, *, keep: bool) -> ReadPrompts:
        """Read what the prompts share once, and the rest in parts of similar length."""
        shared = common(prompts) if len(prompts) > 1 else 0
        shared = shared if shared >= LEAST_SHARED else 0
        rest = [prompt[shared:] for prompt in prompts]
        first = self._cache(max(map(len, rest)) + room if shared else room)
        if shared:
            ids, mask = padded([prompts[0][:shared]], self.padding, self._device)
            self._read(ids, mask, first)
        logits, masks, caches = list[Tensor](), list[Tensor](), list[Cache]()
        for part in parts_of(list(map(len, rest))):
            ids, mask = padded(rest[part], self.padding, self._device)
            mask = torch.cat([mask.new_ones(len(mask), shared), mask], 1)
            cache = branch(first, len(mask)) if shared or keep else None
            logits.append(self._read(ids, mask, cache))
            masks.append(mask)
            caches += [cache] if keep and cache is not None else []
        longest = max(mask.shape[1] for mask in masks)
        whole = torch.cat([_apart(mask, shared, longest, 1) for mask in masks])
        merged = _merged(caches, shared, longest, room) if len(caches) > 1 else None
        return ReadPrompts(torch.cat(logits), whole, merged or (caches[0] if caches else None))

    def greedy(self, prompts: Sequence[Ids], stops: Sequence[int], most: int) -> Tensor:
        """Return greedy answers, with the token that ends each and padding behind it, shape
        [prompts, tokens]. Needs ``reuses``.

        Args:
            prompts: tokens of each.
            stops: tokens that end an answer.
            most: maximum number of tokens of an answer.
        """
        logits, mask, cache = self.read(prompts, most, keep=True)
        assert cache is not None, "a model that reuses its cache has one"
        said = torch.full((len(prompts), most), self.padding, device=self._device)
        rows, ends = (torch.tensor(each, device=self._device) for each in (range(len(said)), stops))
        ended = torch.zeros_like(rows, dtype=torch.bool)
        for step in range(most):
            tokens = logits.argmax(-1).masked_fill(ended, self.padding)
            said[rows, step] = tokens
            ended |= torch.isin(tokens, ends)
            left = len(ended) - int(ended.sum())
            if not left or step + 1 == most:
                return said[:, : step + 1]
            if left <= len(ended) // 2:
                on = (~ended).nonzero()[:, 0]
                cache.batch_select_indices(on)
                rows, tokens, mask, ended = (each[on] for each in (rows, tokens, mask, ended))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = self(tokens[:, None], mask, 1, use_cache=True, past_key_values=cache)
            logits = out.logits[:, -1].float()
        return said


def branch(cache: Cache, times: int) -> Cache:
    """Return a cache with every document several times, which grows apart from the first one:
    layers replace their tensors."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.batch_repeat_interleave(times)
    return copied


def _merged(caches: Sequence[Cache], shared: int, longest: int, room: int) -> Cache:
    """One cache of the documents of several, which are used up: see ``_apart``."""
    whole = copy.copy(caches[0])
    whole.layers = [
        _RoomyLayer.holding(
            torch.cat([_apart(layer.keys, shared, longest, -2, room) for layer in layers]),
            torch.cat([_apart(layer.values, shared, longest, -2, room) for layer in layers]),
            room,
        )
        for layers in zip(*(cache.layers for cache in caches), strict=True)
    ]
    return whole


def _apart(tokens: Tensor, shared: int, longest: int, dim: int, room: int = 0) -> Tensor:
    """Move the tokens behind the shared ones back, to end with the longest document, before room
    for further ones; between them are zeros."""
    count = tokens.shape[dim]
    shape = list(tokens.shape)
    shape[dim] = longest + room
    found = tokens.new_zeros(shape)
    found.narrow(dim, 0, shared).copy_(tokens.narrow(dim, 0, shared))
    own = count - shared
    found.narrow(dim, longest - own, own).copy_(tokens.narrow(dim, shared, own))
    return found
