"""What may exist at once. For now a count; bytes per device will be weighed here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xandrouting.core.model import Footprint


@dataclass(frozen=True, slots=True)
class Ledger:
    """Admission by the number of engines; None: no limit.

    The scheduler asks it with the footprints of engines, and never counts by itself.
    """

    max_engines: int | None

    def fits(self, wanted: Footprint, present: Iterable[Footprint]) -> bool:
        """Whether `wanted` may exist beside `present`."""
        if self.max_engines is None or wanted.engines == 0:
            return True
        return wanted.engines + sum(f.engines for f in present) <= self.max_engines
