"""The run spec of a published model with a remedy, from its manifest.json and metrics.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from finetune_api.remedy import Scan
from finetune_api.run_spec import CONTRACT_VERSION, RunSpec
from finetune_api.spec import parse_spec
from finetune_trainer.failures import UserError
from finetune_trainer.publish.run_facts import METRICS_FILE
from finetune_trainer.storage.objects import ObjectStore
from finetune_trainer.storage.published import MANIFEST, published_file, read_published


def read_run_spec(
    store: ObjectStore, uri: str, scan: Scan | None = None, points: Sequence[str] = ()
) -> RunSpec:
    """Return the run spec of a published model, with a remedy.

    Args:
        uri: folder of the model.
        scan, points: of the remedy; absent: those of the run's spec, else the defaults.

    Raises:
        UserError: 'ModelNotFound', 'PublishedFileGone'; 'NotTrained', the model is a point already.
        InvalidSpec: the remedy does not go with the run, or its points are no points.
    """
    uri = uri.rstrip("/")
    found = read_published(store, uri)
    if found is None:
        raise UserError("ModelNotFound", f"{uri}/{MANIFEST} does not exist: no run published it")
    manifest = found[0]
    if manifest.point_of is not None:
        raise UserError(
            "NotTrained",
            f"{uri} is a point between two models already; give the model of run"
            f" {manifest.point_of}, which it was made from",
        )
    raw = json.loads(published_file(store, uri, manifest, METRICS_FILE))
    given: dict[str, Any] = {"scan": scan} if scan else {}
    given |= {"points": list(points)} if points else {}
    spec: dict[str, Any] = raw["spec"]
    evaluation = spec.setdefault("evaluation", {})
    evaluation["remedy"] = {"scan": "Interpolation"} | evaluation.get("remedy", {}) | given
    if "source" not in spec["model"]:
        # The other job may have published another model since then.
        spec["model"] = {"source": raw["baseModel"]} | {
            key: value for key, value in spec["model"].items() if key == "storage"
        }
    return RunSpec(
        version=CONTRACT_VERSION, job=manifest.job, run=manifest.run, spec=parse_spec(spec)
    )
