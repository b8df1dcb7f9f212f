"""Container images written directly: one layer and a config, in an archive for ``ctr import``."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

_OCI = "application/vnd.oci.image"


def write_archive(archive: Path, *, name: str, layer: Path, config: dict[str, Any]) -> None:
    """Write an image archive. ``layer`` is an uncompressed tar of the root file system; ``config``
    is the image's OCI config (Cmd, Env, …)."""
    layer_digest = _digest_of(layer)
    image = {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
    }
    config_blob = json.dumps(image).encode()
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": f"{_OCI}.manifest.v1+json",
        "config": _descriptor(f"{_OCI}.config.v1+json", config_blob),
        "layers": [
            {
                "mediaType": f"{_OCI}.layer.v1.tar",
                "digest": layer_digest,
                "size": layer.stat().st_size,
            }
        ],
    }
    manifest_blob = json.dumps(manifest).encode()
    named = _descriptor(f"{_OCI}.manifest.v1+json", manifest_blob)
    named["annotations"] = {"io.containerd.image.name": name}
    index = {"schemaVersion": 2, "manifests": [named]}
    with tarfile.open(archive, "w") as tar:
        _add(tar, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        _add(tar, "index.json", json.dumps(index).encode())
        _add(tar, _blob(manifest["config"]["digest"]), config_blob)
        _add(tar, _blob(named["digest"]), manifest_blob)
        tar.add(layer, _blob(layer_digest))


def _descriptor(media_type: str, blob: bytes) -> dict[str, Any]:
    digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
    return {"mediaType": media_type, "digest": digest, "size": len(blob)}


def _digest_of(file: Path) -> str:
    with file.open("rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"


def _blob(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
