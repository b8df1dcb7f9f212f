"""Configuration and tokenizer of a model folder. The folder is untrusted.

Only code of this image runs: Python files of a model (``auto_map``) are never loaded, and weights
are read from safetensors files alone (``weight_reader``), never from pickles. A configuration is
checked before transformers builds lists of its numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from finetune_trainer.failures import UserError

CONFIG: Final = "config.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
SMALL_BYTES: Final = 64 << 20
"""Maximum bytes of a file of configuration or tokenizer; the largest tokenizers have 35 MB."""
CONFIG_BYTES: Final = 8 << 20
"""Maximum bytes of config.json: a classifier names its classes there."""

MAXIMA: Final[tuple[tuple[re.Pattern[str], int], ...]] = (
    (re.compile(r"layers?$|^n_layer|depth$"), 1 << 12),
    (re.compile(r"experts|heads$|^n_head"), 1 << 16),
    (re.compile(r"_size$|_dim$|^d_|^n_embd$|^dim$|^num_labels$"), 1 << 24),
    (re.compile(r"positions?(_embeddings)?$|^n_ctx$"), 1 << 31),
)
"""Maximum of the whole numbers of config.json, by a pattern of their names: far above any model,
far below what makes building the model's structure take hours or all memory."""


def load_config(folder: Path) -> PreTrainedConfig:
    """Load the configuration of a folder, without the folder's own code."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, without the folder's own code."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False
    )
    return tokenizer


def check_size(source: str, name: str, size: int) -> None:
    """Refuse a file of configuration or tokenizer that is too large to be one.

    Raises:
        UserError: 'UnsupportedModel'.
    """
    limit = CONFIG_BYTES if name == CONFIG else SMALL_BYTES
    if size > limit:
        raise UserError(
            "UnsupportedModel",
            f"{source}/{name}: {size:,} bytes; at most {limit:,} are read of a file of a model's"
            " configuration or tokenizer. Remove it from the folder if it is something else",
        )


def check_config(source: str, folder: Path) -> None:
    """Check config.json and tokenizer_config.json before transformers reads them.

    Raises:
        UserError: 'UnsupportedModel', with the file and the field.
    """
    for name in (CONFIG, TOKENIZER_CONFIG):
        if not (folder / name).exists():
            continue
        found = _read(f"{source}/{name}", folder / name)
        if "auto_map" in found:
            raise UserError(
                "UnsupportedModel",
                f"{source}/{name}: the model has code of its own (auto_map), which is never run:"
                " use a model that transformers knows, or convert it to one and remove auto_map",
            )
        if name == CONFIG:
            _check_numbers(f"{source}/{name}", found)


def _read(where: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError("UnsupportedModel", f"{where}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError("UnsupportedModel", f"{where}: must hold one JSON object")
    return found


def _check_numbers(where: str, config: dict[str, Any]) -> None:
    for name, value in _numbers(config):
        for pattern, most in MAXIMA:
            if pattern.search(name) and not 0 <= abs(value) <= most:
                raise UserError(
                    "UnsupportedModel",
                    f"{where}: {name} is {value:.3g}, at most {most:,} is supported",
                )


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield names and values of all numbers, also of the parts of a composite model."""
    waiting = [config]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif isinstance(value, int | float):
                yield name, value
