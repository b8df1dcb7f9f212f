"""Images for the tests: a Debian base image with Python, and builds of Dockerfiles on it.

There is no registry: an image is built into the store, and every node started later has it.
``RealCluster.provide`` copies an image to running nodes. Pods need ``imagePullPolicy``
IfNotPresent or Never, and so a tag other than ``latest``.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import containerd, oci, state, store, system_packages
from cluster.build import binary

_RELEASE = "bookworm"
_PACKAGES = "python3,python3-pip,python3-venv,python-is-python3,ca-certificates"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# As in the official python images, where pip installs system-wide.
_BASE_CONFIG: dict[str, Any] = {
    "Env": [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG=C.UTF-8",
        "PIP_BREAK_SYSTEM_PACKAGES=1",
        "PIP_ROOT_USER_ACTION=ignore",
    ],
    "Cmd": ["python3"],
}
_LEAN_TORCH = Path(__file__).with_name("lean_torch")


def base() -> str:
    """Return the name of an image with Debian's Python (3.11) and pip; builds it once (1 min)."""
    recipe = f"{_RELEASE} {_PACKAGES} {_BASE_CONFIG}"
    name = f"localhost/fto/base:{_RELEASE}-{_short_hash(recipe.encode())}"
    system_packages.ensure()
    with store.opened() as images:
        _ensure_pause(images)
        if not images.has(name):
            with _scratch() as scratch:
                _import(images, name, _debian(scratch), _BASE_CONFIG, scratch)
            images.drop_others(name)
    return name


def torch_base(version: str) -> str:
    """Return the name of an image that adds PyTorch without its GPU libraries to ``base``; builds
    it once (2 min)."""
    recipe = b"".join(path.read_bytes() for path in sorted(_LEAN_TORCH.glob("*")))
    name = f"localhost/fto/base-torch-cpu:{version}-{_short_hash(recipe)}"
    below = base()
    with store.opened() as images:
        if not images.has(name):
            _build(images, name, _LEAN_TORCH, {"BASE": below, "TORCH": version})
            images.drop_others(name)
            images.buildctl("prune", "--all")  # the build cache is a second copy of the image
    return name


def build(
    context: Path,
    tag: str,
    build_args: Mapping[str, str] | None = None,
    *,
    dockerfile: Path | None = None,
) -> str:
    """Build a Dockerfile into the store. Returns the full name of the image.

    ``dockerfile`` is ``context``/Dockerfile by default. It must not have a ``# syntax=`` line,
    which needs a registry. Its base image must be a build argument, set to ``base()``.
    """
    name = full_name(tag)
    with store.opened() as images:
        _build(images, name, context, build_args or {}, dockerfile)
    return name


def _build(
    images: store.Store,
    name: str,
    context: Path,
    build_args: Mapping[str, str],
    dockerfile: Path | None = None,
) -> None:
    dockerfile = dockerfile or context / "Dockerfile"
    with images.kept(name):
        images.buildctl(
            "build",
            "--progress=plain",
            "--frontend=dockerfile.v0",
            f"--local=context={context}",
            f"--local=dockerfile={dockerfile.parent}",
            f"--opt=filename={dockerfile.name}",
            "--opt=image-resolve-mode=local",
            *(f"--opt=build-arg:{key}={value}" for key, value in build_args.items()),
            f"--output=type=image,name={name},unpack=true,compression=uncompressed",
        )


def ensure_pause() -> None:
    """Build the pause image, which holds a pod's namespaces, if it does not exist."""
    with store.opened() as images:
        _ensure_pause(images)


def full_name(tag: str) -> str:
    """Return the full name of a tag in the store: ``localhost/`` is added if it names no registry.

    Kubelet would otherwise complete the name with a public registry.
    """
    registry, slash, _ = tag.partition("/")
    named = slash and ("." in registry or ":" in registry or registry == "localhost")
    return tag if named else f"localhost/{tag}"


def _ensure_pause(images: store.Store) -> None:
    if images.has(containerd.PAUSE_IMAGE):
        return
    with _scratch() as scratch:
        layer = scratch / "layer.tar"
        with tarfile.open(layer, "w") as tar:
            tar.add(binary("pause"), "pause")
        _import(images, containerd.PAUSE_IMAGE, layer, {"Entrypoint": ["/pause"]}, scratch)


def _import(
    images: store.Store, name: str, layer: Path, config: dict[str, Any], scratch: Path
) -> None:
    archive = scratch / "image.tar"
    oci.write_archive(archive, name=name, layer=layer, config=config)
    images.ctr("images", "import", archive)


def _debian(scratch: Path) -> Path:
    root = scratch / "root"
    command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", _RELEASE, str(root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"debootstrap failed:\n{done.stdout[-3000:]}")
    for folder in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man"):
        subprocess.run(["find", str(root / folder), "-mindepth", "1", "-delete"], check=True)
    # Builds trust the same certificates as the host, also that of a proxy to package registries.
    if _CERTIFICATES.exists():
        shutil.copy(_CERTIFICATES, root / str(_CERTIFICATES).lstrip("/"))
    layer = scratch / "layer.tar"
    subprocess.run(["tar", "--numeric-owner", "-C", str(root), "-cf", str(layer), "."], check=True)
    return layer


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=state.cache(), prefix=".scratch-") as folder:
        yield Path(folder)
