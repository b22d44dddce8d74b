"""Which idle engine leaves first. For now the one idle for longest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xandrouting.core.model import EngineId, Footprint


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that could leave: ready and without leases."""

    engine: EngineId
    footprint: Footprint
    idle_since: float


def cheapest_first(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Order candidates by what their loss costs, the cheapest first."""
    return sorted((c for c in candidates if c.footprint.engines > 0), key=lambda c: c.idle_since)
