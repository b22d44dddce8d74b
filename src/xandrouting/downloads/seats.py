"""Seats: which of the gateways that share a data directory has which downloads.

A seat is a lock file. A gateway takes the first one that is free and has it until its process
ends, however that ends.
"""

from __future__ import annotations

import fcntl
import itertools
import os
from pathlib import Path
from typing import Final

FIRST: Final = 1


class Seats:
    """The seats of one data directory. `path` is the first one's file, `….2` the second's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[int, int] = {}

    def take_first(self) -> int:
        """Take the first seat that is free, and return its number."""
        return next(number for number in itertools.count(FIRST) if self.take(number))

    def take(self, number: int) -> bool:
        """Take a seat unless another process has it; where nothing can be locked nobody has."""
        if number in self._held:
            return True
        name = self._path.name if number == FIRST else f"{self._path.name}.{number}"
        try:
            # No child inherits it: the seat would be taken for as long as that lives.
            fd = os.open(self._path.with_name(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError:
            pass  # a filesystem without locks
        self._held[number] = fd
        return True

    def close(self) -> None:
        """Leave them."""
        while self._held:
            os.close(self._held.popitem()[1])
