"""A control plane of real processes: etcd, API server, controller manager, scheduler.

Started like this it is a whole API on loopback and needs no root: Jobs make pods, owners are
garbage-collected, RBAC holds. Only nothing runs the pods; tests write their status, or ``kwok``
plays the nodes. ``nodes`` puts it on a bridge and adds real ones.
"""

from __future__ import annotations

import http.client
import itertools
import os
import ssl
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster import kwok, state
from cluster.api import Api, eventually
from cluster.build import API, binary
from cluster.pki import Authority
from cluster.processes import Processes
from ports import free_port

SERVICES = "10.96.0.0/16"
_FIRST_SERVICE = "10.96.0.1"  # the API server's own, `kubernetes.default`
_ISSUER = "https://kubernetes.default.svc.cluster.local"
_LOOPBACK = "127.0.0.1"
_serial = itertools.count(1)


class ControlPlane(Api):
    """Use as a context manager, or call ``start`` and ``stop``.

    ``address`` is where the API server listens; on anything but loopback it also becomes the
    endpoint of the ``kubernetes`` Service, for pods. ``port`` is a free one if not given. With
    ``kwok_nodes``, there are that many make-believe nodes (see ``kwok``).
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        address: str = _LOOPBACK,
        port: int | None = None,
        kwok_nodes: int = 0,
    ) -> None:
        self.folder = folder or state.claim(f"api-{os.getpid()}-{next(_serial)}")
        super().__init__(self.folder / "admin.kubeconfig")
        self.processes = Processes(self.folder / "processes")
        self.authority = Authority(self.folder / "pki")
        self.address = address
        self.port = port or free_port()
        self.server = f"https://{address}:{self.port}"
        self._etcd = f"http://{_LOOPBACK}:{free_port()}"
        self._kwok_nodes = kwok_nodes

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
            binary(name)  # raises NotBuilt before anything runs
        self.authority.create()
        self._make_certificates()
        self._start_etcd()
        self._start_api_server()
        eventually("the API server is ready", self._ready, within=90)
        self._start_controller_manager()
        self._start_scheduler()
        if self._kwok_nodes:
            kwok.start(self, self.kubeconfig_of("kwok", "kwok", "system:masters"), self._kwok_nodes)
        eventually("the controllers work", self._default_account, within=90)

    def stop(self) -> None:
        """Stop everything and remove the folder."""
        state.release(self.folder)

    def kubeconfig_of(self, name: str, user: str, group: str = "") -> Path:
        """A new kubeconfig for that user, who may do what RBAC allows them."""
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
        client, peer = self._etcd, f"http://{_LOOPBACK}:{free_port()}"
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
                "--unsafe-no-fsync",  # nothing in there has to survive the machine
                "--log-level=warn",
            ],
        )

    def _start_api_server(self) -> None:
        pki = self.authority.folder
        # The Service's endpoint may not be a loopback address, so there it stays without one.
        reconciler = "none" if self.address == _LOOPBACK else "lease"
        self.processes.start(
            "kube-apiserver",
            [
                binary("kube-apiserver"),
                f"--etcd-servers={self._etcd}",
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
                # Webhooks and aggregated APIs are reached by pod address: this machine has no
                # kube-proxy of its own.
                "--enable-aggregator-routing=true",
                "--kubelet-preferred-address-types=InternalIP",
                f"--kubelet-client-certificate={pki / 'kubelet-client.crt'}",
                f"--kubelet-client-key={pki / 'kubelet-client.key'}",
                f"--kubelet-certificate-authority={self.authority.certificate}",
                "--max-requests-inflight=2000",
                "--max-mutating-requests-inflight=1000",
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
                # A node that fails is noticed in 10 s, not 40: kubelets renew every 4 s.
                "--node-monitor-period=1s",
                "--node-monitor-grace-period=10s",
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
            ],
        )

    def _ready(self) -> bool:
        """Whether /readyz says so; raises at once if a process of ours has died."""
        for name in ("etcd", "kube-apiserver"):
            self.processes.require(name)
        pki = self.authority.folder
        trust = ssl.create_default_context(cafile=str(self.authority.certificate))
        trust.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        connection = http.client.HTTPSConnection(self.address, self.port, timeout=2, context=trust)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            connection.close()

    def _default_account(self) -> str:
        return self.kubectl("get", "serviceaccount", "default", "-o", "name")
