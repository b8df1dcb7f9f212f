"""4-bit base weights by bitsandbytes: NF4 with double quantisation (Dettmers et al. 2023,
arXiv:2305.14314).

Every start quantises the base again. The same weights give the same bits, so no quantised
weights are saved.
"""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the quantisation settings of linear layers; ``dtype`` is their compute type."""
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
