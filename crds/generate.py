"""Generate the CRD, the chart's copy of it, and the reference from the models.

``python crds/generate.py`` writes the files; ``--check`` fails with a diff if a file is stale.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

import yaml

from finetune_api.crd import crd
from finetune_api.podtemplate import allowed_parts
from finetune_api.reference import reference

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Generated from the models in crds/ by `make generate`: edit those.\n"


def generated() -> dict[Path, str]:
    """Return the text of every generated file by path."""
    text = HEADER + yaml.safe_dump(crd(), sort_keys=False, width=100, allow_unicode=True)
    return {
        ROOT / "crds/finetunejob.crd.yaml": text,
        ROOT / "charts/finetune-operator/files/finetunejob.crd.yaml": text,
        ROOT / "charts/finetune-operator/files/podtemplate.yaml": HEADER
        + yaml.safe_dump(allowed_parts(), width=100),
        ROOT / "docs/reference.md": reference(),
    }


def difference(path: Path, wanted: str) -> str:
    """Return the unified diff from a file to its wanted text; empty if they are equal."""
    current = path.read_text() if path.exists() else ""
    name = str(path.relative_to(ROOT))
    lines = difflib.unified_diff(
        current.splitlines(keepends=True),
        wanted.splitlines(keepends=True),
        fromfile=name,
        tofile=f"{name} (generated)",
    )
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if stale")
    arguments = parser.parse_args()
    stale = {path: text for path, text in generated().items() if difference(path, text)}
    for path, text in stale.items():
        if arguments.check:
            sys.stdout.write(difference(path, text))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    if arguments.check and stale:
        print("stale: run `make generate`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
