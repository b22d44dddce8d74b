"""When a server that was not there is asked again: values and times, the caller has the clock."""

from __future__ import annotations

from typing import Final

FIRST_S: Final = 1.0
MAX_S: Final = 60.0
REFUSE_S: Final = 5.0  # it may have been started meanwhile: nobody is refused unasked for longer
MAX_DOUBLINGS: Final = 64  # 2.0**1024 is an OverflowError


def pause_s(failures: int) -> float:
    """Return how long to wait after so many failures in a row."""
    return min(FIRST_S * 2.0 ** min(failures - 1, MAX_DOUBLINGS), MAX_S)


class Circuit:
    """Whether requests are refused unasked, because one before could make no connection.

    Only requests open it, so that the first after a while always tries.
    """

    def __init__(self) -> None:
        self.reason: str | None = None  # why the last connection failed; None: it did not
        self._failures = 0
        self._until = 0.0

    def failed(self, reason: str, now: float) -> None:
        """Open it, for longer with each failure in a row; those of one moment are one."""
        self.reason = reason
        if now < self._until:
            return
        self._failures += 1
        self._until = now + min(pause_s(self._failures), REFUSE_S)

    def reached(self) -> None:
        """Close it: a connection was made."""
        self._failures = 0
        self._until = 0.0
        self.reason = None

    def open_s(self, now: float) -> float:
        """Return for how long it stays open; 0.0: it is closed, or somebody may try again."""
        return 0.0 if self.reason is None else max(0.0, self._until - now)
