"""The images of the tests: a Debian with Python to build on, and what Dockerfiles make of it.

There is no registry: an image is built into the store, and every node that is made later has it.
``RealCluster.provide`` brings one to nodes that run already. Pods need ``imagePullPolicy``
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
# As in the python images of the registries, where pip installs for the whole system.
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
    """The name of an image with Debian's Python (3.11) and pip; makes it if need be (1 min)."""
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
    """The name of an image like ``base`` with PyTorch, less what only a GPU would use (2 min)."""
    recipe = b"".join(path.read_bytes() for path in sorted(_LEAN_TORCH.glob("*")))
    name = f"localhost/fto/base-torch-cpu:{version}-{_short_hash(recipe)}"
    below = base()
    with store.opened() as images:
        if not images.has(name):
            _build(images, name, _LEAN_TORCH, {"BASE": below, "TORCH": version})
            images.drop_others(name)
            images.buildctl("prune", "--all")  # a second copy of what is in the image
    return name


def build(
    context: Path,
    tag: str,
    build_args: Mapping[str, str] | None = None,
    *,
    dockerfile: Path | None = None,
) -> str:
    """Build a Dockerfile into the store; returns the full name of the image.

    ``dockerfile`` is ``context``/Dockerfile if not given. It must not have a ``# syntax=`` line,
    which asks a registry, and its base has to come by a build argument, from ``base``.
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
    """The image that holds a pod's namespaces; without it no pod starts."""
    with store.opened() as images:
        _ensure_pause(images)


def full_name(tag: str) -> str:
    """A tag as it is in the store: one that names no registry is of ``localhost``.

    Kubelet would look for it in a public registry otherwise, by its complete name.
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
    # Builds reach package registries as this machine does, also through a proxy that it trusts.
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
