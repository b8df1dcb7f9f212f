"""Streams the records of an object that is one JSON array; memory holds one record.

The scanner looks only at strings, brackets and commas. The text between two commas is parsed like a
line of JSON Lines: both formats give the same records and the same faults, and a malformed record
does not end the reading. A streaming parser differs: ijson 3.6 (yajl, use_float) silently replaces
unpaired surrogates by "?", stops at NaN and at integers of more than 64 bits, and takes memory
quadratic in the depth of a record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from finetune_trainer.failures import DataError
from finetune_trainer.prepare.reading.lines import RECORD_BYTES

BLOCK: Final = 1 << 16
"""Minimum bytes of a read. Within a long record, a read doubles the buffer."""

SPACE: Final = b" \t\r\n"
"""White space of JSON."""

# A lone quote starts a string that continues in the next block.
_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
_QUOTE: Final = b'"'


def array_items(uri: str, stream: BinaryIO, text: bytes) -> Iterator[bytes]:
    """Yield the text of each item of an array, without surrounding white space.

    Args:
        stream: positioned after ``text``.
        text: what has been read of the array after its opening bracket.

    Raises (the iterator):
        DataError: 'MalformedObject' with the item: commas and brackets do not form one array, or
            the item does not end within ``RECORD_BYTES`` (an item that ends in the last block read
            may be longer).
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
                raise _broken(uri, number, "it has an unmatched '}'")
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
    raise _broken(uri, number, "there is text after it and the array's closing ']'")


def _broken(uri: str, number: int, why: str) -> DataError:
    return DataError(
        "MalformedObject",
        f"{uri}, record {number}: {why}; the object must be one whole JSON array of objects, or"
        " JSON Lines: write it again",
    )
