"""The publish stage: from the chosen commit to a model that others load, with its report.

result.json + commit + base model → adapter/ and/or merged/
    → metrics.json, report.html, README.md → manifest.json (last) → latest.json
"""

from finetune_trainer.publish.pipeline import publish

__all__ = ["publish"]
