"""The content digest: equal digests mean equal prepared data, so that one job reuses another's.

Everything that shapes the samples goes in; how the data is reached and what is trained on it do
not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_api.sources import Data
from finetune_api.tasks import TaskName
from finetune_api.templates import Template
from finetune_trainer.prepare.reading.sources import Source
from finetune_trainer.prepare.rendering.catalogue import CATALOGUE, CHAT_ROLES
from finetune_trainer.prepared.manifest import FORMAT_VERSION


def content_digest(
    data: Data,
    sources: Sequence[Source],
    tokenizer: Mapping[str, str],
    max_length: int,
    task: TaskName,
) -> str:
    """32 hexadecimal digits over all that prepared data depends on.

    Args:
        data: for split and quality.
        sources: in the order of the spec.
        tokenizer: sha256 of each tokenizer file, by name.
        max_length: most tokens of a sample.
        task: what the samples are for.
    """
    content: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "sources": [
            {
                "side": source.side,
                "name": source.name,
                "objects": [[o.uri, o.etag, o.size] for o in source.objects],
                "format": source.spec.format,
                "template": source.spec.template and _template(source.spec.template),
                "retrieval": source.spec.retrieval and source.spec.retrieval.to_json(),
            }
            for source in sources
        ],
        "tokenizer": dict(tokenizer),
        "maxLength": max_length,
        "task": task,
        "split": data.split.to_json(),
        "quality": data.quality.to_json(),
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _template(template: Template) -> dict[str, Any]:
    """The template, with the library's texts where it has a name: releases may change them."""
    if template.name == "Chat":
        return {**template.to_json(), "library": CHAT_ROLES}
    entry = CATALOGUE[template.name] if template.name else None
    return {**template.to_json(), "library": entry and [entry.prompts, entry.completion]}
