"""JSON of unknown size and make, read in bounded memory.

Decoded as a whole, an object of a million entries takes fifty times its text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

_PIECE_BYTES: Final = 64 << 10
_BETWEEN: Final = b" \t\r\n,"


def pieces(text: bytes, start: int, end: int, closing: bytes) -> Iterator[bytes]:
    """Yield the entries between `start` and `end` in objects of some entries each.

    `closing` is what every entry's value ends with. Whoever decodes a piece finds what is no
    entry; that the whole is JSON must be known already.
    """
    at = start
    while at < end:
        limit = min(at + _PIECE_BYTES, end)
        cut = text.rfind(closing, at, limit)
        if cut < 0:
            cut = text.find(closing, limit - len(closing), end)
        stop = end if cut < 0 else cut + len(closing)
        entries = text[at:stop].strip(_BETWEEN)
        if entries:
            yield b"{%b}" % entries
        at = stop
