"""The content digest: equal digests mean equal prepared data, so that jobs can reuse it.

The digest covers everything that shapes the samples. Storage access and training settings are not
part of it.
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
    slices: Sequence[str] = (),
    head: Sequence[str] = (),
) -> str:
    """Return the content digest: 32 hexadecimal digits.

    Args:
        data: its split and quality settings are covered.
        sources: in the order of the spec.
        tokenizer: sha256 of each tokenizer file, by name.
        max_length: maximum tokens of a sample.
        task: task that the samples are prepared for.
        slices: fields whose values are kept, in any order.
        head: classes of a head that is not trained.
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
                **({"canaries": True} if source.spec.canaries else {}),
            }
            for source in sources
        ],
        "tokenizer": dict(tokenizer),
        "maxLength": max_length,
        "task": task,
        "slices": sorted(slices),
        "split": data.split.to_json(),
        "quality": data.quality.to_json(),
    }
    if head:
        content["head"] = list(head)
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _template(template: Template) -> dict[str, Any]:
    """The template; a named one with its library texts, since releases may change them."""
    if template.name == "Chat":
        return {**template.to_json(), "library": CHAT_ROLES}
    entry = CATALOGUE[template.name] if template.name else None
    return {**template.to_json(), "library": entry and [entry.prompts, entry.completion]}
