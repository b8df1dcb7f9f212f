"""The table of failures against the code that reports them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import finetune_operator
import finetune_trainer
from finetune_api import failures
from finetune_api.failures import ACTIONS, BY_EXIT_CODE, CLASSES, FAILURES, ROWS, Action
from finetune_api.names import FINAL_EXIT_CODES, ExitCode, FailureClass
from finetune_trainer.devicefaults import DEVICE_FAULTS
from finetune_trainer.failures import TrainerError

OPERATOR = Path(finetune_operator.__file__).parent
TRAINER = Path(finetune_trainer.__file__).parent


@cache
def modules(folder: Path) -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in sorted(folder.rglob("*.py"))]


def name_of(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def exceptions() -> dict[str, ExitCode]:
    """Exit code of each exception of the trainer, by the name of its class."""
    found = {kind.__name__: kind.exit_code for kind in [TrainerError, *subclasses(TrainerError)]}
    for _, module in modules(TRAINER):
        for node in (n for n in ast.walk(module) if isinstance(n, ast.ClassDef)):
            for base in map(name_of, node.bases):
                if base in found:
                    found.setdefault(node.name, found[base])
    return found


def subclasses(kind: type[TrainerError]) -> Iterator[type[TrainerError]]:
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


def raised() -> Iterator[tuple[str, ExitCode, str]]:
    """Reason, exit code and place of each exception that the trainer makes with a literal
    reason."""
    kinds = exceptions()
    for path, module in modules(TRAINER):
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef) and node.name in kinds:
                for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
                    if name_of(call.func) == "__init__" and call.args:
                        yield from _literal(call, kinds[node.name], path)
            if isinstance(node, ast.Call) and name_of(node.func) in kinds and node.args:
                yield from _literal(node, kinds[name_of(node.func)], path)


def _literal(call: ast.Call, code: ExitCode, path: Path) -> Iterator[tuple[str, ExitCode, str]]:
    first = call.args[0]
    if isinstance(first, ast.Constant) and re.fullmatch("[A-Z][A-Za-z0-9]+", str(first.value)):
        yield str(first.value), code, f"{path.name}:{call.lineno}"


def literals(folder: Path) -> set[str]:
    """All strings in the code of a folder."""
    constants = (n for _, m in modules(folder) for n in ast.walk(m) if isinstance(n, ast.Constant))
    return {c.value for c in constants if isinstance(c.value, str)}


def test_every_reason_of_the_trainer_has_a_row_with_its_exit_code() -> None:
    found = list(raised())
    assert len({reason for reason, _, _ in found}) > 80, "the scan works"
    wrong = [
        f"{place}: {reason} ends with exit code {code}"
        for reason, code, place in found
        if reason not in ROWS or ROWS[reason].exit_code != code
    ]
    assert not wrong


def test_every_device_fault_has_a_row_with_an_exit_code() -> None:
    assert all(ROWS[fault.reason].exit_code is not None for fault in DEVICE_FAULTS)


def test_every_reason_of_the_operator_has_a_row() -> None:
    given = {
        call.args[0].value
        for _, module in modules(OPERATOR)
        for call in (n for n in ast.walk(module) if isinstance(n, ast.Call))
        if name_of(call.func) == "failure" and call.args and isinstance(call.args[0], ast.Constant)
    }
    assert len(given) >= 8, "the scan works"
    assert given <= set(ROWS)


def test_every_row_is_reported_by_code() -> None:
    """Kubernetes' words are passed on as they are; the first reason of an exit code is that of a
    container without a message."""
    known = literals(OPERATOR) | literals(TRAINER)
    bare = {row.reasons[0] for row in BY_EXIT_CODE.values()}
    dead = {
        reason
        for row in FAILURES
        for reason in row.reasons
        if not row.verbatim and reason not in known | bare
    }
    assert not dead


def test_the_table_is_consistent() -> None:
    reasons = [reason for row in FAILURES for reason in row.reasons]
    assert len(reasons) == len(set(reasons))
    assert set(CLASSES) == {row.failure_class for row in FAILURES} == set(get_args(FailureClass))
    assert set(ACTIONS) == set(get_args(Action))
    assert set(BY_EXIT_CODE) == set(ExitCode) - {ExitCode.OK}
    for code, row in BY_EXIT_CODE.items():
        assert row.what, code
    for row in FAILURES:
        if row.exit_code is not None and row.exit_code != ExitCode.FENCED:
            assert (row.action == "End") == (row.exit_code in FINAL_EXIT_CODES), row
        assert not row.suspects_node or row.action == "Elsewhere", row


def test_an_unknown_reason_is_treated_by_its_exit_code() -> None:
    assert failures.row_of("OfAnotherRelease", 21) is BY_EXIT_CODE[21]
    assert failures.row_of("OfAnotherRelease") is None
