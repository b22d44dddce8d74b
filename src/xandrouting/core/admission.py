"""Who of those who wait gets an engine now: line by line, in the order of arrival.

A line that has to wait for room holds back those behind it, which would take that room again
and again. `prospects.py` plans; what is done about a plan is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

from xandrouting.core import refusals
from xandrouting.core.cover import union
from xandrouting.core.engine import Engine
from xandrouting.core.engine_state import EngineState
from xandrouting.core.errors import GatewayError
from xandrouting.core.events import Effect, Prepare, Refuse, Start, Stop
from xandrouting.core.fleet import Fleet
from xandrouting.core.model import ENGINES, EngineId, LoadOptions, ModelKey, Ticket
from xandrouting.core.planner import Decision, Plan, Surroundings, Verdict
from xandrouting.core.prospects import Prospects, planned, woken
from xandrouting.core.queue import Line, Queue, Waiter
from xandrouting.core.turns import Turns
from xandrouting.core.weigher import Weigher


@dataclass(frozen=True, slots=True)
class _Legacy:
    """What an engine leaves to the successor that replaces it for other options."""

    wants: LoadOptions
    ttl_s: float


class _Outcome(Enum):
    """What became of a line when it was its turn."""

    SERVED = auto()  # its engine loads, or makes way for one that does for it
    BLOCKS = auto()  # it waits for room: nobody behind it may take any
    REFUSED = auto()  # its first got no engine: who is first may be another now


class Admission:
    """The lines of the queue, and what those in them inherit."""

    def __init__(
        self, queue: Queue, fleet: Fleet, prospects: Prospects, weigher: Weigher, turns: Turns
    ) -> None:
        self.look_again_at: float | None = None  # when time alone may help the first in the queue
        self._queue = queue
        self._fleet = fleet
        self._prospects = prospects
        self._weigher = weigher
        self._turns = turns
        self._legacies: dict[ModelKey, _Legacy] = {}

    def leave(self, ticket: Ticket) -> ModelKey:
        """Take one out of its line and return whose it was."""
        key = self._queue.leave(ticket)
        if self._queue.line(key) is None:
            self._legacies.pop(key, None)
        return key

    def refuse(self, ticket: Ticket, error: GatewayError) -> Refuse:
        """Tell one who waits that there is no engine for it."""
        self.leave(ticket)
        return Refuse(ticket, error)

    def refuse_line(self, key: ModelKey, error: GatewayError) -> list[Refuse]:
        """Tell everybody who waits for an engine, each by an error of its own."""
        line = self._queue.line(key)
        waiting = [] if line is None else list(line.waiters)
        return [self.refuse(ticket, error.again()) for ticket in waiting]

    def close(self) -> list[Refuse]:
        """Tell everybody who waits that the gateway is ending."""
        self.look_again_at = None
        return [self.refuse(t, refusals.shutting_down()) for t in self._queue.tickets()]

    def bequeath(self, engine: Engine) -> None:
        """Have the successor of an engine that is gone serve the same wishes, if one is awaited."""
        if self._queue.line(engine.id.key) is not None:
            self._legacies[engine.id.key] = _Legacy(engine.wants, engine.ttl_s)

    def forget(self, engine_id: EngineId) -> None:
        """Let nobody wait any more for an engine's end."""
        for line in self._queue.lines():
            line.after.discard(engine_id)

    def try_again(self, engine: Engine) -> list[Stop]:
        """Let all who may leave go for an engine that ran out of memory; empty: nothing helps.

        It took more than was known. Its line waits until they are gone; this is done once.
        """
        line = self._queue.line(engine.id.key)
        if line is None or line.tried_again:
            return []
        taken = {r for r, n in engine.footprint.demands(engine.placement) if n and r != ENGINES}
        charge_of = self._weigher.ledger.charge_of
        idle = [
            e for e in self._fleet.movable() if e.is_idle and any(map(charge_of(e.id).get, taken))
        ]
        if idle:
            line.tried_again = True
            line.after = {e.id for e in idle}
        return [self._fleet.stop(e, "evicted", decision=engine.decision) for e in idle]

    def advance(self, now: float) -> list[Effect]:
        """Start what there is room for, in the order of arrival."""
        effects: list[Effect] = []
        while not self._advanced(now, effects):
            pass  # somebody was refused
        return effects

    def _advanced(self, now: float, effects: list[Effect]) -> bool:
        """Go through the lines once; False: one lost its first, so look again from the start."""
        self.look_again_at = None
        if not self._queue:
            return True
        blocked = False
        promised: set[ModelKey] = set()  # whose successors have their predecessors' room
        for line in self._queue.lines():
            key = line.first.spec.key
            if blocked and key.is_local:
                continue  # an upstream takes no room, so it need not wait for those who do
            engine = self._fleet.get(key)
            if engine is not None and engine.state not in (
                EngineState.READY,
                EngineState.SLEEPING,
            ):
                promised.add(key)
                continue
            if line.after:  # it ran out of memory, and those it waits for are not gone yet
                blocked = True
                continue
            outcome = self._admit(line, engine, promised, now, effects)
            if outcome is _Outcome.REFUSED:
                return False
            blocked = blocked or outcome is _Outcome.BLOCKS
        return True

    def _admit(
        self,
        line: Line,
        engine: Engine | None,
        promised: set[ModelKey],
        now: float,
        effects: list[Effect],
    ) -> _Outcome:
        """Get a line its engine, or nearer to it.

        `engine` has its key: it is ready and does not cover what is asked, or it sleeps.
        """
        first = line.first
        spec = first.spec
        among = self._prospects.among(
            spec, now, arrived_at=first.arrived_at, promised=promised, replaced=engine
        )
        wants, found = self._plan_for(line, engine, among)
        waking = None if engine is None else woken(engine, spec, among)
        if engine is not None and waking is not None:
            wants, found = engine.wants, waking
        if found.verdict is Verdict.NEVER:
            # It fitted when it came; other programs have taken the memory since.
            error = self._prospects.too_large(spec, wants, found, among)
            effects.append(self.refuse(first.ticket, error))
            return _Outcome.REFUSED
        if engine is not None and waking is None and not engine.rests:
            effects += self._fleet.replace(engine)  # it does not cover what is asked
            promised.add(spec.key)
            return _Outcome.SERVED
        if spec.files and found.verdict is not Verdict.LOAD and not line.prepared:
            line.prepared = True
            effects.append(Prepare(spec))
        if found.verdict is Verdict.WAIT:
            effects += self._make_fair(first, wants, found, among, promised, now)
            return _Outcome.BLOCKS
        decision = self._prospects.explained(spec, wants, found, among)
        line.victims += decision.victims
        if found.victims:
            effects += self._evict(decision)
            return _Outcome.BLOCKS
        effects.append(self._load(line, wants, decision, engine, now))
        return _Outcome.SERVED

    def _plan_for(
        self, line: Line, engine: Engine | None, among: Surroundings
    ) -> tuple[LoadOptions, Plan]:
        """Return what the line's next engine shall serve, and how it can be had.

        Everybody's wishes united where that fits, else those of the first alone.
        """
        first = line.first.spec
        legacy = self._legacies.get(first.key)
        wants = LoadOptions() if legacy is None else legacy.wants
        if engine is not None:
            wants = engine.wants
        # From the last to the first, so that the first one's wish wins a contradiction.
        for waiter in reversed(line.waiters.values()):
            wants = union(wants, waiter.spec.wants)
        return planned((wants, first.wants), first, among)

    def _make_fair(
        self,
        first: Waiter,
        wants: LoadOptions,
        found: Plan,
        among: Surroundings,
        promised: set[ModelKey],
        now: float,
    ) -> list[Stop]:
        """See to it that who waits for engines in use does not wait for ever."""
        spec = first.spec
        amounts = self._weigher.amounts(spec, found.options, found.placement)
        going = [
            engine
            for engine in self._fleet
            if engine.state is EngineState.DRAINING and engine.id.key not in promised
        ]
        draining, self.look_again_at = self._turns.fair(
            self._fleet.movable(), first, amounts, among, going, now
        )
        stops: list[Stop] = []
        if draining:
            decision = self._prospects.explained(spec, wants, found, among)
            for engine in draining:
                engine.leaves_for = decision
                stops += self._fleet.drain(engine, "evicted")
        return stops

    def _evict(self, decision: Decision) -> list[Stop]:
        stops = []
        for victim in decision.victims:
            engine = self._fleet.current(victim.engine)
            assert engine is not None
            stops.append(self._fleet.stop(engine, "evicted", decision=decision))
        return stops

    def _load(
        self,
        line: Line,
        wants: LoadOptions,
        decision: Decision,
        sleeper: Engine | None,
        now: float,
    ) -> Start:
        """Start a new engine for the line, or wake the one that sleeps."""
        spec = line.first.spec
        if line.victims:
            decision = replace(decision, verdict=Verdict.EVICT, victims=line.victims)
        if sleeper is not None:
            return self._fleet.wake(sleeper, spec, wants, decision, now)
        legacy = self._legacies.pop(spec.key, None)
        ttl_s = None if legacy is None else legacy.ttl_s
        return self._fleet.start(spec, wants, decision, ttl_s=ttl_s)
