"""Probe of the arguments that a model passes to its attention, on a copy on the meta device.

Attention of packed sequences (``attention.attend``) supports queries, keys, values, the scale of
the scores and a window. An architecture may use more: capped scores, sinks, a bias, a learned mask,
or a window that is only in the mask, which packed sequences do not have. The probe runs one forward
pass of the copy, with an attention and masks that record their arguments and compute nothing, and
finds such differences before training. It needs neither weights nor memory, and takes seconds at
most.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune_trainer.engine.packing.attention import sees

_PROBE: Final = "finetune_probe"
_TOKENS: Final = 4096
"""Tokens of the forward pass; some architectures select among keys only where there are many."""
_KEYS: Final = 1 << 20
"""Keys at which masks are compared: more than any sample, or window within a sample, has."""
_QUERIES: Final = (0, 1, 2, 3, 1000, _KEYS // 2 + 1, _KEYS - 1)
_HARMLESS: Final = {"position_ids", "cache_position", "output_router_logits"}
"""Keyword arguments of attention that do not affect its result."""

MaskFunction = Callable[..., Any]
"""Maps index tensors of batch, head, query and key to whether the query sees the key, in their
broadcast shape."""

_known: Final[dict[tuple[type, str], str | None]] = {}
"""Results of ``obstacle``, by model class and configuration."""


def unknown(keywords: Mapping[str, Any]) -> list[str]:
    """Return the keyword arguments of an attention call that ``attention.attend`` does not
    support."""
    return [
        name
        for name, value in keywords.items()
        if name not in _HARMLESS
        and value is not None
        and value is not (name == "is_causal")  # flags whose value ``attend`` implements
    ]


def obstacle(model: PreTrainedModel) -> str | None:
    """Return the difference between a model's attention and ``attention.attend``; None: none."""
    key = type(model), model.config.to_json_string()
    if key not in _known:
        _known[key] = _look(model)
    return _known[key]


def _look(model: PreTrainedModel) -> str | None:
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    tokens = min(getattr(text, "max_position_embeddings", None) or _TOKENS, _TOKENS)
    # Given a token mask, transformers does not read position values, which meta tensors lack.
    notes = _Notes(torch.ones(1, tokens, dtype=torch.bool, device="meta"))
    ALL_ATTENTION_FUNCTIONS.register(_PROBE, notes.attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_PROBE, notes.mask)
    try:
        with torch.device("meta"):
            empty: Any = type(model)._from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation=_PROBE
            )
            ids = torch.zeros(1, tokens, dtype=torch.long)
            positions = torch.arange(tokens)[None]
        with torch.no_grad():
            empty.eval()(
                input_ids=ids, position_ids=positions, attention_mask=notes.whole, use_cache=False
            )
        return notes.obstacle(text.num_hidden_layers)
    except Exception as error:  # a model that cannot be probed is not packed
        return f"its attention could not be probed ({type(error).__name__}: {error})"
    finally:  # transformers keeps the registered methods, and with them the masks
        notes.forget()


def _storage(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage, which its views share."""
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class _Mask:
    """A mask on the meta device that the model was given, without values."""

    made: Tensor
    function: MaskFunction
    """The values that it stands for."""

    def is_in(self, found: Tensor) -> bool:
        """Return whether a tensor is this mask, unmodified (or a view of all of it)."""
        return (
            found.shape[-2:] == self.made.shape[-2:]
            and found.stride()[-2:] == self.made.stride()[-2:]
            and found._version == 0
        )

    def is_of(self, window: int | None) -> bool:
        """Return whether the mask equals the mask of ``attention.attend`` for a window."""
        queries, keys = torch.tensor(_QUERIES, device="cpu"), torch.arange(_KEYS, device="cpu")
        first = torch.zeros(1, 1, dtype=torch.long, device="cpu")
        seen = self.function(first, first, queries[:, None], keys[None, :])
        return torch.equal(seen.expand(len(queries), len(keys)), sees(queries, keys, window))


@dataclass
class _Notes:
    """Record of a model's calls of attention."""

    whole: Tensor
    """The token mask that the model is given, which masks no token."""
    calls: int = 0
    strange: set[str] = field(default_factory=set)
    _masks: dict[int, _Mask] = field(default_factory=dict)
    """Masks by storage."""
    _used: set[tuple[int, int | None]] = field(default_factory=set)
    """Storage of each mask that reached attention, with the window of that call."""

    def is_whole(self, mask: Tensor) -> bool:
        """Return whether a token mask is the one that the model was given, or a view of it."""
        return mask.shape == self.whole.shape and _storage(mask) == _storage(self.whole)

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: MaskFunction = causal_mask_function,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Make and record a mask; signature of transformers' mask functions."""
        made = torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")
        if q_offset or kv_offset or attention_mask is None or not self.is_whole(attention_mask):
            self.strange.add("a mask over part of the tokens")
        self._masks[_storage(made)] = _Mask(made, mask_function)
        return made

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        """Record a call of attention; signature of transformers' attention functions."""
        self.calls += 1
        self.strange.update(unknown(keywords))
        batch, heads, tokens, _ = query.shape
        if key.shape[2] != tokens or value.shape[2] != tokens or heads % key.shape[1]:
            self.strange.add("a number of keys or key heads that does not match the queries")
        mask = None if attention_mask is None else self._masks.get(_storage(attention_mask))
        if attention_mask is None or mask is None or not mask.is_in(attention_mask):
            self.strange.add("a custom mask")
        else:
            self._used.add((_storage(attention_mask), sliding_window))
        return query.new_empty(batch, tokens, heads, value.shape[-1]), None

    def forget(self) -> None:
        """Release the masks."""
        self._masks.clear()

    def obstacle(self, layers: int) -> str | None:
        """Return the recorded difference from ``attention.attend``; None: none."""
        if self.strange:
            return f"its attention is given {', '.join(sorted(self.strange))}"
        if self.calls < layers:
            return f"its {layers} layers call attention {self.calls} times"
        for storage, window in self._used:
            if not self._masks[storage].is_of(window):
                return f"its mask differs from that of its window ({window})"
        return None
