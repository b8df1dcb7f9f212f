"""Bills of materials (SBOM) of the two images, as CycloneDX 1.6 in JSON.

``python release/sbom.py --out DIR`` writes operator.cdx.json and trainer.cdx.json: the parts of
this project, and every pinned package that the Dockerfiles install on x86-64 (of the trainer with
``EXTRA=gpu``, whose packages the plain image lacks). ``--dpkg-status FILE`` adds the Debian
packages of the base image; FILE is the image's /var/lib/dpkg/status.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Final

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
IMAGES: Final = {
    "operator": ("finetune-operator", ("crds", "operator")),
    "trainer": ("finetune-trainer", ("crds", "trainer-image")),
}
"""By file name: the image's name, and the parts of this project in it. The last part has the
requirements.txt."""
PYTHON: Final = "3.11"
"""Python of the Dockerfiles' default base image."""
_PLATFORM: Final = {
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.0",
}


def bom(image: str, dpkg_status: str | None = None) -> Bom:
    """Return the bill of materials of an image; ``dpkg_status``: Debian packages, as dpkg lists
    them."""
    name, parts = IMAGES[image]
    projects = [tomllib.loads((ROOT / p / "pyproject.toml").read_text())["project"] for p in parts]
    whole = Component(
        name=name,
        version=projects[-1]["version"],
        type=ComponentType.CONTAINER,
        bom_ref=f"image:{name}",
    )
    packages = [_pypi(project["name"], project["version"]) for project in projects]
    packages += [_pypi(need.name, _version(need)) for need in pinned(parts[-1])]
    packages += _debian(dpkg_status) if dpkg_status else []
    made = Bom(components=packages)
    made.metadata.component = whole
    made.register_dependency(whole, packages)
    return made


def pinned(part: str) -> Iterator[Requirement]:
    """The packages of a part's requirements.txt that pip installs in the image."""
    for line in (ROOT / part / "requirements.txt").read_text().splitlines():
        text = line.partition(" #")[0].strip()
        if text and not text.startswith("#"):
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate(_PLATFORM):
                yield need


def _version(need: Requirement) -> str:
    (pin,) = need.specifier
    if pin.operator != "==":
        raise ValueError(f"{need}: requirements.txt must pin a version; run make lock")
    return pin.version


def _pypi(name: str, version: str) -> Component:
    url = PackageURL("pypi", name=canonicalize_name(name), version=version)
    return _library(name, version, url)


def _debian(status: str) -> list[Component]:
    fields = [HeaderParser().parsestr(text) for text in status.strip().split("\n\n")]
    installed = [f for f in fields if str(f["Status"]).endswith(" installed")]
    return [
        _library(
            str(f["Package"]),
            str(f["Version"]),
            PackageURL(
                "deb", "debian", f["Package"], f["Version"], {"arch": str(f["Architecture"])}
            ),
        )
        for f in installed
    ]


def _library(name: str, version: str, url: PackageURL) -> Component:
    return Component(
        name=name, version=version, purl=url, type=ComponentType.LIBRARY, bom_ref=url.to_string()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--dpkg-status", type=Path, help="of the base image; absent: not listed")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    status = arguments.dpkg_status.read_text() if arguments.dpkg_status else None
    for image in IMAGES:
        path = arguments.out / f"{image}.cdx.json"
        path.write_text(JsonV1Dot6(bom(image, status)).output_as_string(indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
