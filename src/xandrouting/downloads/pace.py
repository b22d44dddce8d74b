"""How fast bytes come, from how many there were at which time."""

from __future__ import annotations

import math
from typing import Final

WINDOW_S: Final = 5.0  # what was longer ago hardly counts
_SHORTEST_S: Final = 0.05


class Pace:
    """An average over the last seconds. Times are monotonic; `total` only grows."""

    def __init__(self, now: float) -> None:
        self._at = now
        self._total = 0
        self._bytes_per_s: float | None = None

    def moved(self, total: int, now: float) -> None:
        """Take the bytes that came since the start."""
        past_s = now - self._at
        if total == 0:
            self._at = now  # it has not begun: the way to the hub says nothing of the pace
        if total == 0 or past_s < _SHORTEST_S:
            return
        rate = (total - self._total) / past_s
        self._total, self._at = total, now
        if self._bytes_per_s is None:
            self._bytes_per_s = rate
        else:
            weight = 1 - math.exp(-past_s / WINDOW_S)
            self._bytes_per_s += weight * (rate - self._bytes_per_s)

    @property
    def bytes_per_s(self) -> float | None:
        """The average; None: nothing was told yet."""
        return self._bytes_per_s

    def eta_s(self, left_bytes: int) -> float | None:
        """Return how long what is left takes at this pace; None: nobody can say."""
        if self._bytes_per_s is None or self._bytes_per_s < 1:
            return None
        return left_bytes / self._bytes_per_s
