"""Taking turns: when an engine in use leaves for those who wait.

Who came while an engine was in use lets it be used for `min_residency_s`, or until nobody asks
it for `LINGER_S`, if it was asked for again so soon the last time: two models that share one
place do not swap with every request, and one that was asked a single thing keeps nobody waiting.
Who came after it went idle does not wait. And who has waited `fair_wait_s` for
engines that are never idle has the fewest of them drained that will do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from xandrouting.core.engine import Engine
from xandrouting.core.ledger import Amounts
from xandrouting.core.planner import Surroundings
from xandrouting.core.queue import Waiter
from xandrouting.core.weigher import Weigher

LINGER_S: Final = 1.0  # a client that asks in a loop is back sooner


class Turns:
    """The two times that keep turns long enough and short enough."""

    def __init__(self, weigher: Weigher, *, fair_wait_s: float, min_residency_s: float) -> None:
        self._weigher = weigher
        self._fair_wait_s = fair_wait_s
        self._min_residency_s = min_residency_s

    def leaves_at(self, engine: Engine, arrived_at: float) -> float:
        """From when on an idle engine may leave for one who came at `arrived_at`."""
        since, ready_at = engine.idle_since, engine.ready_at
        assert since is not None
        assert ready_at is not None
        if engine.sleeps or engine.granted_at is None or arrived_at >= since:
            return since
        if not engine.habit.comes_back_within(LINGER_S):
            return since
        return min(ready_at + self._min_residency_s, since + LINGER_S)

    def fair(
        self,
        movable: Sequence[Engine],
        first: Waiter,
        amounts: Amounts,
        among: Surroundings,
        going: Iterable[Engine],
        now: float,
    ) -> tuple[list[Engine], float | None]:
        """Return who takes no new leases from now on, and when to look again.

        `first` waits for `amounts`; `among` is what its load was planned among, `going` are
        engines that leave once they have ended their leases.
        """
        leaving = Counter(among.leaving)
        for candidate in among.candidates:
            leaving.update(candidate.frees)
        lingering = {
            engine.id: leaves_at
            for engine in movable
            if engine.is_idle and (leaves_at := self.leaves_at(engine, first.arrived_at)) > now
        }
        leaving += self._weigher.charges(going)
        leaving += self._weigher.charges(e for e in movable if e.id in lingering)
        times = list(lingering.values())
        draining = []
        for engine in self._fewest_that_help([e for e in movable if e.leases], amounts, leaving):
            times.append(self._drains_at(engine, first))
            if times[-1] <= now:
                draining.append(engine)
        return draining, min((at for at in times if at > now), default=None)

    def _drains_at(self, engine: Engine, first: Waiter) -> float:
        """From when on a busy engine takes no new leases, for the first in the queue."""
        assert engine.ready_at is not None
        fair_at = first.arrived_at + self._fair_wait_s
        return max(fair_at, engine.ready_at + self._min_residency_s)

    def _fewest_that_help(
        self, busy: Iterable[Engine], amounts: Amounts, leaving: Counter[str]
    ) -> list[Engine]:
        """Return those that have to go too, the ones with the fewest leases first."""
        ledger = self._weigher.ledger
        lacking = ledger.lacks(amounts, freed=leaving)
        chosen: list[Engine] = []
        for engine in sorted(busy, key=lambda e: (len(e.leases), e.granted_at)):
            charge = ledger.charge_of(engine.id)
            if any(charge.get(resource) for resource in lacking):
                chosen.append(engine)
                leaving.update(charge)
                lacking = ledger.lacks(amounts, freed=leaving)
        if lacking:
            return []  # one that loads has it: nobody need go before that one can
        needed = []
        for engine in chosen:
            charge = ledger.charge_of(engine.id)
            leaving.subtract(charge)
            if ledger.lacks(amounts, freed=leaving):
                leaving.update(charge)
                needed.append(engine)
        return needed
