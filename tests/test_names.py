"""Names that were replaced by the field's words stay away, in code, API and docs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVERYWHERE = ("",)
TRAINER = ("trainer-image/src", "tests/trainer", "benchmarks")
OLD: dict[str, tuple[str, ...]] = {
    # precision
    r"PureBF16": EVERYWHERE,
    # memory profile, activation tracker
    r"rehears\w*|Rehears\w*|rehearsed_attention": EVERYWHERE,
    r"\b[Ll]edger\b": EVERYWHERE,
    # placeholders
    r"\b\w*[Hh]ollow\w*|make_solid|make_room|materialize_on_host": EVERYWHERE,
    r"\b(load_base|empty_base|placeholder_base)\b": EVERYWHERE,
    # packed sequences and micro-batches
    r"\b(RowLayout|RowTensors|TokenRow|PaddedRow|RowLosses|RowSize|RowBuilder)\b": EVERYWHERE,
    r"\b(build_row|row_context|current_row|row_tokens\w*|row_losses|rowsize)\b": EVERYWHERE,
    r"\bOffsets\b|\boffsets_of\b|_by_offsets": EVERYWHERE,
    r"engine[./]rows\b": EVERYWHERE,
    # data parallelism, process groups
    r"\b[Ll]aying(_of)?\b": EVERYWHERE,
    r"\b(from_first|first_of_node|sharing_rows|_word_channel)\b": EVERYWHERE,
    r"\b[Gg]angs?\b|\w+_gang\b|\bgang_\w+": ("trainer-image/src/finetune_trainer/engine",),
    # run spec
    r"\bRunOrder\b|\bOrderView\b|FINETUNE_ORDER|order\.json|ORDER_(PATH|KEY)": EVERYWHERE,
    r"\b(parse|read|load|write|make)_order\b": EVERYWHERE,
    # checkpoints
    r"\b(Commit|CorruptCommit|CommitReader|CommitWriter|commitfiles|commitstore)\b": TRAINER,
    r"\b(commit_uri|commits_given_up|given_up|let_go|heed)\b": EVERYWHERE,
    r"\bwhatever=": EVERYWHERE,
    # base model
    r"\b[Uu]ntuned\b": EVERYWHERE,
    # files and records of the run
    r"seen\.json|rehearsals\.json|\bworkerfiles\b": EVERYWHERE,
    r"\b(ModelPlace|SamplePlace)\b": EVERYWHERE,
    # termination message
    r"\b[Ll]ast words?\b|\blast_word\b|NoLastWord": EVERYWHERE,
    r"\bgangSeconds\b|\bgang_seconds\b": EVERYWHERE,
}
SELF = "tests/test_names.py"
HISTORY = "CHANGELOG.md"
"""It tells what the names were."""


def files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return [name for name in listed if name not in (SELF, HISTORY) and (ROOT / name).exists()]


@pytest.mark.parametrize("pattern", OLD)
def test_an_old_name_is_gone(pattern: str) -> None:
    old = re.compile(pattern)
    found = []
    for name in files():
        if not name.startswith(OLD[pattern]):
            continue
        path = ROOT / name
        if re.search(pattern, name):
            found.append(name)
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            found += [f"{name}:{number}: {match[0]}" for match in old.finditer(line)]
    assert not found, found[:20]
