"""Step through the header of a GGUF file.

The file is read in windows, not mapped: a mapped file that somebody truncates meanwhile (a
`cp` over it) would kill the gateway with SIGBUS. Arrays are stepped over, not decoded: the
vocabulary is most of the header, and nobody here asks for it. Counts are bounded before they
are believed, so a damaged file costs no more than a large one.
"""

from __future__ import annotations

import os
import struct
from typing import Any, Final, NamedTuple

_WINDOW_BYTES: Final = 256 << 10
_MAX_HEADER_BYTES: Final = 256 << 20  # the largest vocabularies take about 30 MiB
_MAX_STRINGS: Final = 1_500_000  # in all arrays together; tokens and merges make about 800,000

U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
# The value types of one fixed size, by their number in the file.
SCALARS: Final = {
    kind: struct.Struct(f"<{code}")
    for kind, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
INTEGER_KINDS: Final = frozenset({0, 1, 2, 3, 4, 5, 10, 11})


class InvalidGguf(ValueError):
    """No engine could load this file; the text says why and never names a path."""


class UnreadableGguf(InvalidGguf):
    """The system refused to read the file: nothing is known of its content."""


class ArrayAt(NamedTuple):
    """Where an array's items lie; most are never looked at."""

    position: int
    kind: int
    length: int


class HeaderReader:
    """Steps through the header, holding one window of it.

    Every step raises InvalidGguf where the file ends before it.
    """

    __slots__ = ("_base", "_fd", "_size", "_strings_left", "_window", "position")

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        self._base = 0
        self._window = b""
        self._strings_left = _MAX_STRINGS
        self.position = 0

    def unpack(self, what: struct.Struct) -> tuple[Any, ...]:
        """Read the values `what` describes."""
        begin = self._reserve(what.size)
        return what.unpack_from(self._window, begin)

    def u32(self) -> int:
        """Read a 32-bit count."""
        return int(self.unpack(U32)[0])

    def u64(self) -> int:
        """Read a 64-bit length."""
        return int(self.unpack(_U64)[0])

    def text(self, length: int) -> str:
        """Read `length` bytes, which the caller has bounded, as text."""
        begin = self._reserve(length)
        return self._window[begin : begin + length].decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        """Step over `count` bytes without reading them."""
        self.position += count
        if self.position > _MAX_HEADER_BYTES:
            raise InvalidGguf("header damaged: an impossible length")
        if self.position > self._size:
            raise InvalidGguf("cut short: the file ends inside its header")

    def skip_strings(self, count: int) -> None:
        """Step over an array of strings: only their lengths are looked at."""
        if count > self._strings_left:
            raise InvalidGguf("header damaged: an impossible number of strings")
        self._strings_left -= count
        unpack = _U64.unpack_from
        while count:
            at = self._reserve(8)
            window, last = self._window, len(self._window) - 8
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.position = self._base
            self.skip(at)

    def integers(self, array: ArrayAt) -> tuple[int, ...]:
        """Go back to an array that was stepped over, and decode it."""
        self.position = self._base = array.position
        self._window = b""
        return tuple(self.unpack(SCALARS[array.kind])[0] for _ in range(array.length))

    def _reserve(self, count: int) -> int:
        """Step over `count` bytes and return where in the window they begin."""
        begin = self.position - self._base
        self.skip(count)
        if begin + count > len(self._window):
            self._base = self.position - count
            self._window = os.pread(self._fd, max(count, _WINDOW_BYTES), self._base)
            if len(self._window) < count:  # it was truncated after fstat
                raise InvalidGguf("cut short: the file ends inside its header")
            return 0
        return begin
