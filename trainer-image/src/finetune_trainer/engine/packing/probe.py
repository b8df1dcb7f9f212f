"""What a model hands to its attention, seen on an empty copy of it.

Attention of rows (``attention.attend``) knows queries, keys, values, the scale of the scores and a
window. An architecture may say more: scores that are capped, sinks, a bias, a mask that it learns,
or a window that stands in the mask alone, which no row has. So the copy is run forward once, by an
attention and by masks that take note and compute nothing, and what is not alike is found before
anything is trained. It takes neither weights nor memory, and seconds at most.
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
"""Tokens of the pass; some architectures choose among keys only where there are many."""
_KEYS: Final = 1 << 20
"""Keys at which masks are looked at: more than any sample, or window within one, has."""
_QUERIES: Final = (0, 1, 2, 3, 1000, _KEYS // 2 + 1, _KEYS - 1)
_HARMLESS: Final = {"position_ids", "cache_position", "output_router_logits"}
"""Keywords of attention that say nothing about its result."""

MaskFunction = Callable[..., Any]
"""Of batch, head, query and key, as tensors: whether it is seen, in their common shape."""

_known: Final[dict[tuple[type, str], str | None]] = {}
"""What was found of models of a class and a configuration."""


def unknown(keywords: Mapping[str, Any]) -> list[str]:
    """Which keywords of a call of attention the attention of rows knows nothing of."""
    return [
        name
        for name, value in keywords.items()
        if name not in _HARMLESS
        and value is not None
        and value is not (name == "is_causal")  # flags that say what rows do anyhow
    ]


def obstacle(model: PreTrainedModel) -> str | None:
    """What of a model's attention the attention of rows would not do; None: it is the same."""
    key = type(model), model.config.to_json_string()
    if key not in _known:
        _known[key] = _look(model)
    return _known[key]


def _look(model: PreTrainedModel) -> str | None:
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    tokens = min(getattr(text, "max_position_embeddings", None) or _TOKENS, _TOKENS)
    # With a mask of their tokens given, transformers looks at no values of positions.
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
    except Exception as error:  # what cannot be seen is not trusted
        return f"its attention could not be looked at ({type(error).__name__}: {error})"
    finally:  # what transformers goes on holding holds nothing
        notes.forget()


def _storage(tensor: Tensor) -> int:
    """Identity of what a tensor is a view of."""
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class _Mask:
    """A mask that the model was given, of no values."""

    made: Tensor
    function: MaskFunction
    """What it stands for."""

    def is_in(self, found: Tensor) -> bool:
        """Whether a tensor is this mask as it was made (or a view of all of it)."""
        return (
            found.shape[-2:] == self.made.shape[-2:]
            and found.stride()[-2:] == self.made.stride()[-2:]
            and found._version == 0
        )

    def is_of(self, window: int | None) -> bool:
        """Whether it shows what the attention of rows shows."""
        queries, keys = torch.tensor(_QUERIES, device="cpu"), torch.arange(_KEYS, device="cpu")
        first = torch.zeros(1, 1, dtype=torch.long, device="cpu")
        seen = self.function(first, first, queries[:, None], keys[None, :])
        return torch.equal(seen.expand(len(queries), len(keys)), sees(queries, keys, window))


@dataclass
class _Notes:
    """What reached attention."""

    whole: Tensor
    """The mask of tokens that the model is given, which leaves none out."""
    calls: int = 0
    strange: set[str] = field(default_factory=set)
    _masks: dict[int, _Mask] = field(default_factory=dict)
    """By storage."""
    _used: set[tuple[int, int | None]] = field(default_factory=set)
    """Masks, and the windows that came with them."""

    def is_whole(self, mask: Tensor) -> bool:
        """Whether a mask of tokens is the one that the model was given, or a view of it."""
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
        """As transformers asks for a mask of an attention."""
        made = torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")
        if q_offset or kv_offset or attention_mask is None or not self.is_whole(attention_mask):
            self.strange.add("a mask of some tokens")
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
        """As transformers calls attention."""
        self.calls += 1
        self.strange.update(unknown(keywords))
        batch, heads, tokens, _ = query.shape
        if key.shape[2] != tokens or value.shape[2] != tokens or heads % key.shape[1]:
            self.strange.add("keys that are not one to a token")
        mask = None if attention_mask is None else self._masks.get(_storage(attention_mask))
        if attention_mask is None or mask is None or not mask.is_in(attention_mask):
            self.strange.add("a mask of its own")
        else:
            self._used.add((_storage(attention_mask), sliding_window))
        return query.new_empty(batch, tokens, heads, value.shape[-1]), None

    def forget(self) -> None:
        """Let go of the masks."""
        self._masks.clear()

    def obstacle(self, layers: int) -> str | None:
        """What was noted that the attention of rows would not do."""
        if self.strange:
            return f"its attention is given {', '.join(sorted(self.strange))}"
        if self.calls < layers:
            return f"its {layers} layers call attention {self.calls} times"
        for storage, window in self._used:
            if not self._masks[storage].is_of(window):
                return f"its mask is another than its window ({window}) says"
        return None
