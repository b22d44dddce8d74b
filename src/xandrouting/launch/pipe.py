"""What a process prints, as it comes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import IO, Final

_READ_BYTES: Final = 64 << 10


class Pipe:
    """Hands on what a pipe brings; `closed` when there will be no more.

    Not a transport: uvloop closes the pipe and then the file object on it, which closes the same
    number again. By then it may be that of a file which another thread has just opened.
    """

    def __init__(self, pipe: IO[bytes] | None, feed: Callable[[bytes], None]) -> None:
        assert pipe is not None
        self.closed = asyncio.Event()
        self._pipe = pipe
        self._feed = feed
        self._loop = asyncio.get_running_loop()
        os.set_blocking(pipe.fileno(), False)
        self._loop.add_reader(pipe.fileno(), self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._pipe.fileno(), _READ_BYTES)
        except BlockingIOError:
            return
        if data:
            self._feed(data)
        else:
            self.close()

    def close(self) -> None:
        """Listen no more."""
        if not self._pipe.closed:
            self._loop.remove_reader(self._pipe.fileno())
            self._pipe.close()
            self.closed.set()
