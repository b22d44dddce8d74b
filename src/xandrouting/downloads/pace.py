"""How fast bytes come, from how many there were at which time."""

from __future__ import annotations

from collections import deque
from typing import Final

WINDOW_S: Final = 3.0
_SHORTEST_S: Final = 0.05


class Pace:
    """The average of the last `WINDOW_S`. Times are monotonic; `total` only grows."""

    def __init__(self, now: float) -> None:
        self._told = deque([(now, 0)])  # times and totals

    def moved(self, total: int, now: float) -> None:
        """Take the bytes that came since the start."""
        if total == 0:
            self._told.clear()  # it has not begun: the way to the hub says nothing of the pace
        elif now - self._told[-1][0] < _SHORTEST_S:
            return
        self._told.append((now, total))
        while len(self._told) > 2 and self._told[1][0] <= now - WINDOW_S:
            self._told.popleft()

    @property
    def bytes_per_s(self) -> float | None:
        """The average; None: nothing was told yet."""
        (began, before), (now, total) = self._told[0], self._told[-1]
        return None if began == now else (total - before) / (now - began)

    def eta_s(self, left_bytes: int) -> float | None:
        """Return how long what is left takes at this pace; None: nobody can say."""
        rate = self.bytes_per_s
        return left_bytes / rate if rate else None
