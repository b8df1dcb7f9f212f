"""The cluster's DNS: one CoreDNS on the host, which pods query directly, without a Service."""

from __future__ import annotations

from string import Template
from typing import Any

from cluster.build import binary
from cluster.control_plane import ControlPlane

DOMAIN = "cluster.local"

# Short TTLs: pods of a gang look up peers whose records do not exist yet. External names get an
# immediate NXDOMAIN, in a separate block because CoreDNS runs `template` before `kubernetes`.
_COREFILE = Template(
    """
    $domain in-addr.arpa {
      bind $address
      errors
      kubernetes {
        kubeconfig $kubeconfig test
        pods insecure
        ttl 5
      }
      cache 5 {
        denial 9984 1
      }
    }
    . {
      bind $address
      template ANY ANY {
        rcode NXDOMAIN
      }
    }
    """
)


def start(plane: ControlPlane) -> None:
    """Start CoreDNS on the control plane's address."""
    plane.apply(*_rights("coredns"))
    kubeconfig = plane.kubeconfig_of("coredns", "coredns")
    corefile = plane.folder / "Corefile"
    corefile.write_text(
        _COREFILE.substitute(address=plane.address, domain=DOMAIN, kubeconfig=kubeconfig)
    )
    plane.processes.start("coredns", [binary("coredns"), f"-conf={corefile}"])


def _rights(user: str) -> list[dict[str, Any]]:
    watch = ["list", "watch"]
    return [
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": user},
            "rules": [
                {
                    "apiGroups": [""],
                    "resources": ["services", "pods", "namespaces"],
                    "verbs": watch,
                },
                {
                    "apiGroups": ["discovery.k8s.io"],
                    "resources": ["endpointslices"],
                    "verbs": watch,
                },
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": user},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": user,
            },
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        },
    ]
