"""What the requests were, counted. Cheap enough to be asked on every one of them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from typing import Final

BUCKETS_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Counts by upper bound, as Prometheus wants them; the last is for what is larger still."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.total += seconds


class RequestStats:
    """Counters since the start."""

    def __init__(self) -> None:
        self.started_at = time.time()
        self._started = time.monotonic()
        self.hits = 0  # found a ready engine
        self.misses = 0  # had to wait for one
        self.active = 0
        self.cancelled = 0  # the client left before the end
        self.answered: Counter[tuple[str, int]] = Counter()  # by path and status
        self.stream_errors = 0  # broke off after the status line
        self.first_byte = Histogram()  # seconds from the request to the first byte of the body
        self.queue_wait = Histogram()  # seconds without an engine
        self.duration = Histogram()

    @property
    def served(self) -> int:
        """How many requests got an engine."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Hits by served, 0 when nothing was served."""
        return self.hits / self.served if self.served else 0.0

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started
