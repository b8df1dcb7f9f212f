"""A certificate authority for one cluster, and its kubeconfigs; uses ``openssl``."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml

_DAYS = "30"


class Authority:
    """A certificate authority. Its folder has ``ca.crt``, and ``NAME.crt`` and ``NAME.key`` of each
    certificate that it signed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create(self) -> None:
        """Create the authority's certificate and key; call once per cluster."""
        self.folder.mkdir(mode=0o700, parents=True)
        may_sign = ["-addext", "basicConstraints=critical,CA:TRUE"]
        may_sign += ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
        self._request("ca", "/CN=finetune-test-ca", "-x509", "-days", _DAYS, *may_sign)

    @property
    def certificate(self) -> Path:
        return self.folder / "ca.crt"

    def server(self, name: str, common_name: str, alternatives: Sequence[str]) -> None:
        """Issue a server certificate; ``alternatives`` are like ``DNS:localhost``,
        ``IP:127.0.0.1``."""
        usage = f"extendedKeyUsage=serverAuth\nsubjectAltName={','.join(alternatives)}\n"
        self._sign(name, f"/CN={common_name}", usage)

    def client(self, name: str, common_name: str, organization: str = "") -> None:
        """Issue a client certificate: the common name is the user, the organization the group."""
        subject = f"/O={organization}" if organization else ""
        self._sign(name, f"{subject}/CN={common_name}", "extendedKeyUsage=clientAuth\n")

    def signing_key(self, name: str) -> None:
        """Create ``NAME.key`` and ``NAME.pub``, for service account tokens."""
        key = self.folder / f"{name}.key"
        _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
        _openssl("ec", "-in", key, "-pubout", "-out", self.folder / f"{name}.pub")

    def kubeconfig(self, path: Path, server: str, client: str) -> Path:
        """Write a self-contained kubeconfig: certificates and key are inline."""

        def inline(name: str) -> str:
            return base64.b64encode((self.folder / name).read_bytes()).decode()

        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "test",
                    "cluster": {"server": server, "certificate-authority-data": inline("ca.crt")},
                }
            ],
            "users": [
                {
                    "name": client,
                    "user": {
                        "client-certificate-data": inline(f"{client}.crt"),
                        "client-key-data": inline(f"{client}.key"),
                    },
                }
            ],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": client}}],
            "current-context": "test",
        }
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    def _sign(self, name: str, subject: str, extensions: str) -> None:
        at = self.folder / name
        request, wanted = at.with_suffix(".csr"), at.with_suffix(".ext")
        wanted.write_text(f"keyUsage=digitalSignature\n{extensions}")
        self._request(name, subject, out=request)
        by = ["-CA", self.certificate, "-CAkey", self.folder / "ca.key", "-CAcreateserial"]
        signed = ["-extfile", wanted, "-days", _DAYS, "-out", at.with_suffix(".crt")]
        _openssl("x509", "-req", "-in", request, *by, *signed)

    def _request(self, name: str, subject: str, *more: str, out: Path | None = None) -> None:
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
        files = ["-keyout", self.folder / f"{name}.key", "-out", out or self.folder / f"{name}.crt"]
        _openssl("req", *key, "-subj", subject, *files, *more)


def _openssl(*arguments: object) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]} failed: {done.stderr}")
