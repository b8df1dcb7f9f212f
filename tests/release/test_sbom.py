"""Bills of materials of the images: valid by CycloneDX's schema, and complete."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"operator": "operator", "trainer": "trainer-image"}
OTHER_PLATFORMS = ("sys_platform == 'emscripten'", "python_full_version >= '3.12'")
STATUS = """\
Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u13
Description: GNU C Library
 of several lines

Package: removed
Status: deinstall ok config-files
Architecture: all
Version: 1
"""


@pytest.fixture(scope="module")
def boms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("sbom")
    (out / "status").write_text(STATUS)
    command = [sys.executable, ROOT / "release/sbom.py", "--out", out]
    subprocess.run([*command, "--dpkg-status", out / "status"], check=True)
    return {image: (out / f"{image}.cdx.json").read_text() for image in PARTS}


def components(text: str) -> dict[str, dict[str, Any]]:
    return {c["purl"]: c for c in json.loads(text)["components"]}


@pytest.mark.parametrize("image", PARTS)
def test_the_bill_is_valid_by_the_schema(boms: dict[str, str], image: str) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(boms[image]) is None
    broken = boms[image].replace('"library"', '"book"', 1)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None


@pytest.mark.parametrize("image", PARTS)
def test_every_pinned_package_is_listed(boms: dict[str, str], image: str) -> None:
    lines = (ROOT / PARTS[image] / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if "==" in line.partition(";")[0]]
    wanted = {
        "pkg:pypi/" + line.partition(";")[0].strip().replace("==", "@").replace("_", "-").lower()
        for line in pins
        if not line.endswith(OTHER_PLATFORMS)
    }
    assert len(wanted) > 30
    own = {"pkg:pypi/finetune-api@0.1.0", f"pkg:pypi/finetune-{image}@0.1.0"}
    listed = {re.sub("%2B", "+", purl) for purl in components(boms[image]) if ":pypi/" in purl}
    assert listed == wanted | own


@pytest.mark.parametrize("part", PARTS.values())
def test_the_python_is_the_images(part: str) -> None:
    (line,) = re.findall(r"^ARG BASE_IMAGE=.*$", (ROOT / part / "Dockerfile").read_text(), re.M)
    assert (
        f'PYTHON: Final = "{line.rpartition(":")[2].removesuffix("-slim")}"'
        in (ROOT / "release/sbom.py").read_text()
    )


def test_the_base_images_packages_are_listed_if_installed(boms: dict[str, str]) -> None:
    debian = {p: c for p, c in components(boms["operator"]).items() if p.startswith("pkg:deb/")}
    (found,) = debian.values()
    assert (found["name"], found["version"]) == ("libc6", "2.36-9+deb12u13")
    assert found["purl"] == "pkg:deb/debian/libc6@2.36-9%2Bdeb12u13?arch=amd64"
