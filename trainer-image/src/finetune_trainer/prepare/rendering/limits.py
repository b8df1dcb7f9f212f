"""Limits for templates: those of users and of models are untrusted programs.

Jinja's sandbox keeps a template from the system, not from computing for ever, or from writing
gigabytes. So rendering has a limit of CPU time and of memory, and its text one of length:

    loops                  a timer interrupts them
    one long operation     the kernel ends the process after twice the time: Python interrupts no
                           operation of its C code
    repetition, padding    the kernel refuses the memory
    powers                 not in templates: numbers of a billion digits take no memory at first
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import jinja2

from finetune_trainer.failures import DataError, UserError
from finetune_trainer.memory_limit import bounded_memory

SECONDS: Final = 10
"""CPU time for parsing and rendering a batch of records, which normally take 0.1 s."""
BYTES: Final = 1 << 30
"""Memory for a batch, beside what the process has."""

CHARACTERS: Final = 1 << 24
"""Maximum characters of a rendered text."""

RENDER_ERRORS: Final[tuple[type[Exception], ...]] = (
    *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError),
    *(AttributeError, RecursionError, SyntaxError),
)
"""What a template may raise for a record."""

KILLED_BY: Final = signal.SIGVTALRM
"""Signal that ends a process after twice the time."""
_AGAIN_SECONDS: Final = 1.0
"""The timer's period after it has expired: an exception may be lost in a finalizer."""


class LimitExceeded(Exception):
    """The work took too long, or too much memory. The message says which."""


@contextmanager
def limited_work() -> Iterator[None]:
    """Limit the CPU time and the memory of this process within the context.

    Only the main thread can be interrupted; in another thread, only memory is limited.

    Raises:
        LimitExceeded: a limit is exceeded.
    """
    try:
        with bounded_memory(BYTES), _limited_time():
            yield
    except MemoryError:
        raise LimitExceeded(f"needs more than {BYTES >> 20:,} MiB of memory") from None


@contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * SECONDS)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, _AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGPROF, before)


def _stop(number: int, frame: Any) -> None:
    raise LimitExceeded(f"takes more than {SECONDS} s of CPU time")


def too_costly(where: str, why: str) -> UserError:
    """Return the error for a record whose rendering exceeds a limit.

    Args:
        where: the record.
        why: see ``LimitExceeded``.
    """
    return UserError(
        "TemplateTooCostly",
        f"{where}: rendering with its template {why}; does the template (data.template,"
        " or the chat template of the model) loop, repeat or pad without bound? Correct it, or"
        " divide the record",
    )


def check_length(where: str, characters: int) -> None:
    """Refuse a rendered text that is too long.

    Raises:
        DataError: 'TemplateFailed'.
    """
    if characters > CHARACTERS:
        raise DataError(
            "TemplateFailed",
            f"{where}: the template writes {characters:,} characters, the maximum is"
            f" {CHARACTERS:,}; correct the template, or divide the record",
        )


def has_power(source: str) -> bool:
    """Whether a template raises to a power (not: whether it passes keywords by ``f(**names)``).

    Raises:
        jinja2.TemplateSyntaxError: the text is no template.
    """
    before = ""
    for _, kind, text in jinja2.Environment().lex(source):
        if kind == "whitespace":
            continue
        if (kind, text) == ("operator", "**") and before not in ("(", ","):
            return True
        before = text
    return False
