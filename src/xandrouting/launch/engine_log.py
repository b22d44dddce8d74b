"""What an engine prints, cut into lines."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from xandrouting.core.model import EngineId

Hear = Callable[[EngineId, str], None]
"""Takes each line an engine prints."""

TAIL_LINES: Final = 200
TAIL_CHARACTERS: Final = 2_000  # of each line
_LINE_BYTES: Final = 64 * 1024  # of a line that does not end, the rest is dropped


class EngineLog:
    """The last lines an engine printed, and whether one of them said what is waited for."""

    def __init__(self, hear: Hear) -> None:
        self.printed_bytes = 0
        self.engine: EngineId | None = None  # None: it is nobody's yet
        self._hear = hear
        self._said = asyncio.Event()
        self._awaited: str | None = None
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._rest = b""

    def expect(self, line: str | None) -> None:
        """From now on `said` waits for a line that begins so; None: for nothing."""
        self._awaited, self._said = line, asyncio.Event()
        if line is None:
            self._said.set()

    async def said(self) -> None:
        """Wait for the line that was expected last."""
        await self._said.wait()

    def feed(self, data: bytes) -> None:
        """Take what came, lines cut anywhere."""
        self.printed_bytes += len(data)
        first, *others = data.split(b"\n")
        self._rest = (self._rest + first)[:_LINE_BYTES]
        for piece in others:
            self._add(self._rest)
            self._rest = piece[:_LINE_BYTES]

    def close(self) -> None:
        """Keep the last line even if nothing ended it."""
        if self._rest:
            self._add(self._rest)
        self._rest = b""

    def tail(self) -> Sequence[str]:
        """Return the last whole lines, oldest first."""
        return tuple(self._lines)

    def _add(self, raw: bytes) -> None:
        # As a terminal shows it: a progress bar's last state, not all of them.
        shown = raw.rstrip(b"\r").rpartition(b"\r")[2]
        line = shown.decode(errors="replace")[:TAIL_CHARACTERS]
        self._lines.append(line)
        if self.engine is not None:
            self._hear(self.engine, line)
        if self._awaited is not None and line.startswith(self._awaited):
            self._said.set()
