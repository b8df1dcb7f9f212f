"""Volume claims as pods see them: ``pvc://claim/path`` lies below one mount point."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from finetune_api.names import ENV_PVC_ROOT, PVC_ROOT
from finetune_trainer.failures import UserError


def claim_path(uri: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Path of a ``pvc://claim/path`` address in this pod.

    Raises:
        UserError: 'InvalidAddress' where the path leaves the claim.
    """
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    if ".." in (claim, *path.split("/")):
        raise UserError("InvalidAddress", f"{uri}: '..' is not allowed in the path of a claim")
    return Path(environ.get(ENV_PVC_ROOT, PVC_ROOT)) / claim / path
