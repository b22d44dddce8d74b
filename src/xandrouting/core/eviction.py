"""Which idle engines leave: those whose loss costs least, and only as many as are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from xandrouting.core.model import EngineId

USES_HALVE_S: Final = 600.0  # a use of ten minutes ago counts half as much as one of now


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that could leave: ready, without leases, not pinned.

    `frees` is what it is charged. `uses` is how often it was asked for, older uses counting
    less (`decayed`). `reload_s` is what loading it again would take.
    """

    engine: EngineId
    frees: Mapping[str, int]
    idle_s: float
    uses: float
    reload_s: float

    @property
    def loss(self) -> float:
        """What its going costs: the reload, weighed with how soon it may be needed again.

        An engine used often and just now is likely to be; one idle for long is not, however
        much it was used before.
        """
        return self.reload_s * self.uses / (self.idle_s + 1.0)


Choose = Callable[[Mapping[str, int], Iterable[Candidate]], "list[Candidate] | None"]
"""A policy: who leaves so that nothing lacks; None: all together are too few. See `choose`."""


def decayed(uses: float, seconds: float) -> float:
    """Return what `uses` count for so many seconds later."""
    return float(uses * 0.5 ** (seconds / USES_HALVE_S))


def choose(lacking: Mapping[str, int], candidates: Iterable[Candidate]) -> list[Candidate] | None:
    """Return who leaves so that nothing lacks, the cheapest set found; None: all are too few.

    Only engines that hold something of what lacks are looked at. They are taken by loss for
    the share of the lack they make good; who turns out not to be needed stays after all.
    """
    useful = [c for c in candidates if any(c.frees.get(r, 0) > 0 for r in lacking)]
    if _left(lacking, useful):
        return None
    useful.sort(key=lambda c: (c.loss / _share(c, lacking), -c.idle_s))
    chosen: list[Candidate] = []
    left = dict(lacking)
    for candidate in useful:
        if any(candidate.frees.get(resource, 0) > 0 for resource in left):
            chosen.append(candidate)
            left = _left(left, (candidate,))
    for candidate in sorted(chosen, key=lambda c: -c.loss):
        others = [c for c in chosen if c is not candidate]
        if not _left(lacking, others):
            chosen = others
    alone = min((c for c in useful if not _left(lacking, (c,))), key=_loss, default=None)
    if alone is not None and alone.loss < sum(c.loss for c in chosen):
        return [alone]
    return chosen


def _loss(candidate: Candidate) -> float:
    return candidate.loss


def _share(candidate: Candidate, lacking: Mapping[str, int]) -> float:
    return sum(min(candidate.frees.get(r, 0), lack) / lack for r, lack in lacking.items())


def _left(lacking: Mapping[str, int], leaving: Sequence[Candidate]) -> dict[str, int]:
    """Return what lacks still once these are gone."""
    left = {}
    for resource, lack in lacking.items():
        lack -= sum(candidate.frees.get(resource, 0) for candidate in leaving)
        if lack > 0:
            left[resource] = lack
    return left
