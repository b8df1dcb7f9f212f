"""A control plane of real processes: etcd, API server, controller manager, scheduler.

On its own it is a complete API on loopback and needs no root: Jobs create pods, garbage collection
and RBAC work. Nothing runs the pods; tests write their status, or ``kwok`` simulates nodes.
``real`` puts the control plane on a bridge and adds real nodes.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster import kwok, state
from cluster.api import Api, eventually
from cluster.build import API, binary
from cluster.pki import Authority
from cluster.processes import Processes
from ports import free_port

SERVICES = "10.96.0.0/16"
_FIRST_SERVICE = "10.96.0.1"  # `kubernetes.default`, the Service of the API server
_ISSUER = "https://kubernetes.default.svc.cluster.local"
_LOOPBACK = "127.0.0.1"
_serial = itertools.count(1)


class ControlPlane(Api):
    """A control plane. Use as a context manager, or call ``start`` and ``stop``.

    Args:
        address: where the API server listens. An address other than loopback is also the endpoint
            of the ``kubernetes`` Service, for pods.
        port: a free port by default.
        kwok_nodes: number of simulated nodes (see ``kwok``).
        flags: more flags of the programs, by name of the program.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        address: str = _LOOPBACK,
        port: int | None = None,
        kwok_nodes: int = 0,
        flags: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.folder = folder or state.claim(f"api-{os.getpid()}-{next(_serial)}")
        super().__init__(self.folder / "admin.kubeconfig")
        self.processes = Processes(self.folder / "processes")
        self.authority = Authority(self.folder / "pki")
        self.address = address
        self.port = port or free_port()
        self.server = f"https://{address}:{self.port}"
        self.etcd = f"http://{_LOOPBACK}:{free_port()}"
        self._kwok_nodes = kwok_nodes
        self._flags = flags or {}

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        for name in API:
            binary(name)  # raises NotBuilt before any process is started
        self.authority.create()
        self._make_certificates()
        self._start_etcd()
        self.start_api_server()
        self._start_controller_manager()
        self._start_scheduler()
        if self._kwok_nodes:
            user = self.kubeconfig_of("kwok", "kwok", "system:masters")
            kwok.start(self, user, self._kwok_nodes, self._flags.get("kwok", ()))
        eventually("the controllers work", self._default_account, within=90)

    def stop(self) -> None:
        """Stop everything and remove the folder."""
        state.release(self.folder)

    def kubeconfig_of(self, name: str, user: str, group: str = "") -> Path:
        """Write a kubeconfig for a user, whose rights are given by RBAC."""
        self.authority.client(name, user, group)
        return self.authority.kubeconfig(self.folder / f"{name}.kubeconfig", self.server, name)

    def _make_certificates(self) -> None:
        own_names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
        own_names.append("kubernetes.default.svc.cluster.local")
        addresses = {_LOOPBACK, self.address, _FIRST_SERVICE}
        self.authority.server(
            "apiserver",
            "kube-apiserver",
            [f"DNS:{name}" for name in own_names] + [f"IP:{address}" for address in addresses],
        )
        self.authority.signing_key("accounts")
        self.authority.client("kubelet-client", "kube-apiserver", "system:masters")
        self.kubeconfig_of("admin", "admin", "system:masters")

    def _start_etcd(self) -> None:
        client, peer = self.etcd, f"http://{_LOOPBACK}:{free_port()}"
        self.processes.start(
            "etcd",
            [
                binary("etcd"),
                f"--data-dir={self.folder / 'etcd'}",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
                "--unsafe-no-fsync",  # the data need not survive a crash of the machine
                "--log-level=warn",
            ],
        )

    def stop_api_server(self) -> None:
        """Kill the API server; etcd and the controllers stay."""
        self.processes.stop("kube-apiserver")

    def start_api_server(self) -> None:
        """Start the API server, and wait until it is ready."""
        self._start_api_server()
        eventually("the API server is ready", self._ready, within=180)

    def _start_api_server(self) -> None:
        pki = self.authority.folder
        # A Service endpoint may not be a loopback address: on loopback the Service has none.
        reconciler = "none" if self.address == _LOOPBACK else "lease"
        self.processes.start(
            "kube-apiserver",
            [
                binary("kube-apiserver"),
                f"--etcd-servers={self.etcd}",
                f"--bind-address={self.address}",
                f"--advertise-address={self.address}",
                f"--secure-port={self.port}",
                f"--endpoint-reconciler-type={reconciler}",
                f"--tls-cert-file={pki / 'apiserver.crt'}",
                f"--tls-private-key-file={pki / 'apiserver.key'}",
                f"--client-ca-file={self.authority.certificate}",
                f"--service-cluster-ip-range={SERVICES}",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged=true",
                f"--service-account-issuer={_ISSUER}",
                f"--service-account-key-file={pki / 'accounts.pub'}",
                f"--service-account-signing-key-file={pki / 'accounts.key'}",
                # Reach webhooks and aggregated APIs by pod address: the host has no kube-proxy.
                "--enable-aggregator-routing=true",
                "--kubelet-preferred-address-types=InternalIP",
                f"--kubelet-client-certificate={pki / 'kubelet-client.crt'}",
                f"--kubelet-client-key={pki / 'kubelet-client.key'}",
                f"--kubelet-certificate-authority={self.authority.certificate}",
                "--max-requests-inflight=2000",
                "--max-mutating-requests-inflight=1000",
                *self._flags.get("kube-apiserver", ()),
            ],
        )

    def _start_controller_manager(self) -> None:
        pki = self.authority.folder
        user = self.kubeconfig_of("kube-controller-manager", "system:kube-controller-manager")
        self.processes.start(
            "kube-controller-manager",
            [
                binary("kube-controller-manager"),
                f"--kubeconfig={user}",
                "--secure-port=0",
                "--leader-elect=false",
                "--use-service-account-credentials=true",
                f"--service-account-private-key-file={pki / 'accounts.key'}",
                f"--root-ca-file={self.authority.certificate}",
                "--kube-api-qps=1000",
                "--kube-api-burst=2000",
                # Detect a failed node in 10 s instead of 40: kubelets renew their lease every 4 s.
                "--node-monitor-period=1s",
                "--node-monitor-grace-period=10s",
                *self._flags.get("kube-controller-manager", ()),
            ],
        )

    def _start_scheduler(self) -> None:
        user = self.kubeconfig_of("kube-scheduler", "system:kube-scheduler")
        self.processes.start(
            "kube-scheduler",
            [
                binary("kube-scheduler"),
                f"--kubeconfig={user}",
                "--secure-port=0",
                "--leader-elect=false",
                "--kube-api-qps=1000",
                "--kube-api-burst=2000",
                *self._flags.get("kube-scheduler", ()),
            ],
        )

    def request(self, method: str, path: str, body: Any) -> Any:
        """Send one request as the administrator, and return the parsed response, also of a refused
        request. Much faster than kubectl."""
        connection = self._connection(timeout=30)
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def _connection(self, timeout: float) -> http.client.HTTPSConnection:
        pki = self.authority.folder
        trust = ssl.create_default_context(cafile=str(self.authority.certificate))
        trust.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        return http.client.HTTPSConnection(self.address, self.port, timeout=timeout, context=trust)

    def _ready(self) -> bool:
        """Whether /readyz returns 200. Raises Ended if etcd or the API server has died."""
        for name in ("etcd", "kube-apiserver"):
            self.processes.require(name)
        connection = self._connection(timeout=2)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            connection.close()

    def _default_account(self) -> str:
        return self.kubectl("get", "serviceaccount", "default", "-o", "name")
