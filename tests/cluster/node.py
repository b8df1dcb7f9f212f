"""One node: a machine with containerd, kubelet and kube-proxy."""

from __future__ import annotations

import json
import signal
from typing import Any

import yaml

from cluster import containerd, dns, host
from cluster.build import binary
from cluster.control_plane import ControlPlane
from cluster.machine import Machine
from cluster.network import PODS, Network, Place

PROGRAMS = ("containerd", "kubelet", "kube-proxy")


class Node:
    """A node. It can be powered off and started again; its disk persists."""

    def __init__(self, place: Place, plane: ControlPlane, network: Network) -> None:
        self.name = place.name
        self.place = place
        self.machine = Machine(place.name, plane.folder / place.name, plane.processes)
        self._plane = plane
        self._network = network

    def prepare(self) -> None:
        """Write the configuration, which persists over restarts. The image store exists already."""
        folder = self.machine.folder
        host.make_cgroup(self._cgroup, self._plane.folder)
        names = [f"DNS:{self.name}", f"IP:{self.place.address}"]
        self._plane.authority.server(f"{self.name}-server", self.name, names)
        self._plane.kubeconfig_of(self.name, f"system:node:{self.name}", "system:nodes")
        self._plane.kubeconfig_of(f"{self.name}-proxy", "system:kube-proxy")
        (folder / "kubelet.yaml").write_text(yaml.safe_dump(self._kubelet()))
        (folder / "kube-proxy.yaml").write_text(yaml.safe_dump(self._kube_proxy()))
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        interfaces = self.machine.lib / "cni-config"
        interfaces.mkdir(parents=True)
        (interfaces / "10-pods.conflist").write_text(json.dumps(self._pod_network()))

    def start(self) -> None:
        """Power the node on; kubelet registers it within seconds."""
        machine = self.machine
        machine.power_on(network=True)
        self._network.connect(self.place, machine.first_process)
        machine.execute("sysctl", "-qw", "net.ipv4.ip_forward=1")
        containerd.start(machine, containerd.FOR_NODES)
        machine.start(
            "kubelet",
            [
                binary("kubelet"),
                f"--config={machine.folder / 'kubelet.yaml'}",
                f"--kubeconfig={self._plane.folder / f'{self.name}.kubeconfig'}",
                f"--hostname-override={self.name}",
                f"--node-ip={self.place.address}",
            ],
        )
        machine.start(
            "kube-proxy",
            [
                binary("kube-proxy"),
                f"--config={machine.folder / 'kube-proxy.yaml'}",
                f"--hostname-override={self.name}",
            ],
        )

    def require_programs(self) -> None:
        """Raise Ended, with the end of its log, if a program of the node has ended."""
        for program in PROGRAMS:
            self.machine.processes.require(f"{self.name}.{program}")

    def report(self) -> str:
        """Return the ends of the logs of the node's programs."""
        logs = [f"{self.name}.{program}" for program in PROGRAMS]
        return "\n".join(f"-- {log}\n{self.machine.processes.tail(log)}" for log in logs)

    def power_off(self) -> None:
        """Kill all processes of the node, those of its pods too."""
        self.machine.power_off()

    def freeze_kubelet(self) -> None:
        """Stop kubelet by SIGSTOP, so that the node sends no heartbeats while its pods keep
        running."""
        self.machine.signal("kubelet", signal.SIGSTOP)

    def thaw_kubelet(self) -> None:
        self.machine.signal("kubelet", signal.SIGCONT)

    @property
    def _cgroup(self) -> str:
        return f"fto-{self.name}"

    def _kubelet(self) -> dict[str, Any]:
        pki = self._plane.authority.folder
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self._plane.authority.certificate)},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(pki / f"{self.name}-server.crt"),
            "tlsPrivateKeyFile": str(pki / f"{self.name}-server.key"),
            "containerRuntimeEndpoint": f"unix://{containerd.SOCKET}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "clusterDNS": [self._plane.address],
            "clusterDomain": dns.DOMAIN,
            "resolvConf": str(self.machine.folder / "resolv.conf"),
            # With the controller manager's grace period, a failed node is detected in 10 s.
            "nodeStatusUpdateFrequency": "4s",
            "nodeLeaseDurationSeconds": 12,
            # The disk is the host's and may be nearly full; evicted images cannot be pulled again.
            "evictionHard": {
                "memory.available": "100Mi",
                "nodefs.available": "1%",
                "imagefs.available": "1%",
            },
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
        }

    def _kube_proxy(self) -> dict[str, Any]:
        kubeconfig = self._plane.folder / f"{self.name}-proxy.kubeconfig"
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clientConnection": {"kubeconfig": str(kubeconfig)},
            "clusterCIDR": PODS,
            # Connection tracking limits are set on the host; a namespace cannot change them.
            "conntrack": {"maxPerCore": 0, "min": 0},
        }

    def _pod_network(self) -> dict[str, Any]:
        # Point-to-point links instead of a bridge: all traffic is routed, and so passes
        # kube-proxy's rules even between pods of one node.
        addresses = {
            "type": "host-local",
            "ranges": [[{"subnet": self.place.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": "/run/cni-addresses",
        }
        return {
            "cniVersion": "1.0.0",
            "name": "pods",
            "plugins": [
                {"type": "ptp", "ipMasq": False, "ipam": addresses},
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }
