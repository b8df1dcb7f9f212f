"""Base weights in 4 bits, by bitsandbytes: NormalFloat with doubly quantised constants (Dettmers et
al. 2023, arXiv:2305.14314).

Every start quantises the base anew, and the same weights give the same bits: nothing of it is kept.
"""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How linear layers are quantised; ``dtype`` is that of their products."""
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
