"""The records of an object that is one JSON array, as it streams: memory holds one record.

Only strings, brackets and commas are looked at: what stands between two commas is parsed as a line
of JSON Lines is, so that both give the same records and the same faults, and a record that is no
JSON does not end the reading. A parser of streams gives others: ijson 3.6 (yajl, use_float) makes
"?" of half of a character without a word, ends at NaN and at whole numbers of more than 64 bits,
and takes memory by the square of a record's depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from finetune_trainer.failures import DataError

RECORD_BYTES: Final = 1 << 26
"""A record of more is refused: a quote or bracket that is never closed must not read on to the end.
One may end in the block that was read last."""

BLOCK: Final = 1 << 16
"""Bytes that are read at once, or as many as a long record has so far."""

SPACE: Final = b" \t\r\n"
"""What JSON takes for white space."""

# A quote alone begins a string that goes on in the next block.
_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
_QUOTE: Final = b'"'


def array_items(uri: str, stream: BinaryIO, text: bytes) -> Iterator[bytes]:
    """The items of an array, each as its text without white space around.

    Args:
        stream: stands behind ``text``.
        text: what has been read of the array behind its opening bracket.

    Raises (the iterator):
        DataError: 'MalformedObject', naming the item, where commas and brackets are not those of
            one array, or an item does not end within ``RECORD_BYTES``.
    """
    number, depth, begin, at = 1, 0, 0, 0
    while True:
        for token in _TOKEN.finditer(text, at):
            mark = token[0]
            if mark == _QUOTE:
                break
            at = token.end()
            if mark in (b"[", b"{"):
                depth += 1
            elif depth:
                depth -= mark in (b"]", b"}")
            elif mark == b"}":
                raise _broken(uri, number, "a '}' closes nothing")
            elif mark in (b",", b"]"):
                item = text[begin : token.start()].strip(SPACE)
                if item:
                    yield item
                elif mark == b"," or number > 1:
                    raise _broken(uri, number, f"there is {mark.decode()!r} where it should begin")
                if mark == b"]":
                    _check_end(uri, number, stream, text[at:])
                    return
                number, begin = number + 1, at
        text, at, begin = text[begin:], at - begin, 0
        if len(text) > RECORD_BYTES:
            why = f"it does not end within {RECORD_BYTES >> 20} MiB: a quote or bracket is open"
            raise _broken(uri, number, why)
        block = stream.read(max(BLOCK, len(text)))
        if not block:
            raise _broken(uri, number, "the object ends before the array's closing ']'")
        text += block


def _check_end(uri: str, number: int, stream: BinaryIO, text: bytes) -> None:
    while not text.strip(SPACE):
        text = stream.read(BLOCK)
        if not text:
            return
    raise _broken(uri, number, "there is text behind it and the array's closing ']'")


def _broken(uri: str, number: int, why: str) -> DataError:
    return DataError(
        "MalformedObject",
        f"{uri}, record {number}: {why}; the object must be one whole JSON array of objects, or"
        " JSON Lines: write it again",
    )
