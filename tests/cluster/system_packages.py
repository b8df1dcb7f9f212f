"""Debian packages with the programs that nodes, image builds and tests of pages need."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

CNI_PLUGINS = Path("/usr/lib/cni")

# A program or file that shows that a package is installed, and Debian's name of the package.
_NEEDED = {
    "containerd": "containerd",
    "runc": "runc",
    str(CNI_PLUGINS / "ptp"): "containernetworking-plugins",
    "nft": "nftables",
    "iptables": "iptables",
    "ipset": "ipset",
    "ip": "iproute2",
    "mount": "mount",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "debootstrap": "debootstrap",
    "chromium": "chromium",
}


def ensure() -> None:
    """Install missing packages by apt-get, without output. Raises RuntimeError without root or
    apt-get, and if the installation fails."""
    missing = [package for sign, package in _NEEDED.items() if not shutil.which(sign)]
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise RuntimeError(f"missing here: {', '.join(missing)} (Debian's names); install them")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # Keep the containerd package from starting a daemon on the host.
    no_services = Path("/usr/sbin/policy-rc.d")
    ours = not no_services.exists()
    if ours:
        no_services.write_text("#!/bin/sh\nexit 101\n")
        no_services.chmod(0o755)
    try:
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            done = subprocess.run(
                ["apt-get", "-qq", *arguments], env=environment, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"apt-get {' '.join(arguments)}: {done.stderr}{done.stdout}")
    finally:
        if ours:
            no_services.unlink()
