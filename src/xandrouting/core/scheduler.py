"""Who gets which engine, what starts and what leaves: events in, effects out.

A plain function over values: it never awaits, logs or reads a clock. `now` is the pool's
monotonic clock, in seconds.

The rules, each tested as a property (`tests/unit/test_scheduler_machine.py`):

- A ticket ends with exactly one `Release`, whatever became of it.
- An engine with leases is stopped only by force or its own death.
- The first in the queue reserves: later requests may use ready engines, and may not start
  others past it, save those that take nothing here. When it has waited `fair_wait_s` and
  every engine is busy, one of them takes no new leases any more, so nobody waits for ever.
- One engine per key at a time; the next incarnation starts when the last one is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import assert_never

from xandrouting.core import refusals
from xandrouting.core.backoff import Backoffs
from xandrouting.core.cover import covers, fill, union
from xandrouting.core.engine_state import EngineEvent, EngineState, step
from xandrouting.core.errors import GatewayError
from xandrouting.core.events import (
    Acquire,
    Effect,
    EngineExited,
    EngineReady,
    Event,
    Grant,
    Refuse,
    Release,
    Shutdown,
    Start,
    Stop,
    Tick,
    Unload,
)
from xandrouting.core.eviction import Candidate, cheapest_first
from xandrouting.core.ledger import Ledger
from xandrouting.core.model import EngineId, EngineSpec, Footprint, LoadOptions, ModelKey, Ticket


@dataclass(frozen=True, slots=True)
class EngineView:
    """An engine as the lists show it. `idle_since` is None while it has leases or loads."""

    engine: EngineId
    spec: EngineSpec
    options: LoadOptions
    state: EngineState
    ttl_s: float
    idle_since: float | None
    active: int
    waiting: int

    def idle_deadline(self) -> float | None:
        """When its idle TTL ends; None while that clock does not run."""
        return _idle_deadline(self)


@dataclass(slots=True)
class _Engine:
    id: EngineId
    spec: EngineSpec
    wants: LoadOptions  # the union of what was asked, without defaults
    options: LoadOptions
    ttl_s: float
    state: EngineState = EngineState.STARTING
    leases: set[Ticket] = field(default_factory=set)
    idle_since: float | None = None
    last_granted: float = 0.0
    retire: str | None = None  # why it shall leave as soon as those who wait for it were served


@dataclass(frozen=True, slots=True)
class _Waiter:
    ticket: Ticket
    spec: EngineSpec
    ttl_s: float | None
    deadline: float | None
    arrived_at: float


@dataclass(frozen=True, slots=True)
class _Legacy:
    """What an engine leaves to the successor that replaces it for other options."""

    wants: LoadOptions
    ttl_s: float


class Scheduler:
    """The queue, the leases and the incarnations of one node's engines."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        default_ttl_s: float = 300.0,
        max_queue: int | None = None,
        fair_wait_s: float = 5.0,
        backoff_first_s: float = 1.0,
        backoff_max_s: float = 60.0,
    ) -> None:
        self._ledger = ledger
        self._default_ttl_s = default_ttl_s
        self._max_queue = max_queue
        self._fair_wait_s = fair_wait_s
        self._engines: dict[ModelKey, _Engine] = {}
        self._incarnations: dict[ModelKey, int] = {}
        self._tickets: dict[Ticket, _Engine | None] = {}  # None: queued or refused
        self._queue: dict[Ticket, _Waiter] = {}  # in order of arrival
        self._backoffs = Backoffs(first_s=backoff_first_s, max_s=backoff_max_s)
        self._legacies: dict[ModelKey, _Legacy] = {}
        self._closing = False

    def handle(self, event: Event, *, now: float) -> list[Effect]:
        """Take one event and return what has to be done, in order."""
        effects: list[Effect] = []
        match event:
            case Acquire():
                self._acquire(event, now, effects)
            case Release():
                self._release(event.ticket, now, effects)
            case EngineReady():
                self._ready(event.engine, now, effects)
            case EngineExited():
                self._exited(event, now, effects)
            case Unload():
                self._unload(event, now, effects)
            case Tick():
                self._tick(now, effects)
            case Shutdown():
                self._shutdown(event.force, effects)
            case _:
                assert_never(event)
        return effects

    # What the outside may read.

    def next_wakeup(self, *, now: float) -> float | None:
        """When time alone will change something; None: only an event will."""
        times = [w.deadline for w in self._queue.values() if w.deadline is not None]
        blocked = self._blocked() if self._queue else None
        if blocked is not None and blocked.arrived_at + self._fair_wait_s > now:
            times.append(blocked.arrived_at + self._fair_wait_s)
        for engine in self._engines.values():
            deadline = _idle_deadline(engine)
            if deadline is not None:
                times.append(deadline)
        return min(times, default=None)

    def views(self) -> list[EngineView]:
        """Every engine that is not gone, in the order they were started."""
        return [self._view(engine) for engine in self._engines.values()]

    def holds(self, key: ModelKey) -> bool:
        """Whether an engine of this key is not gone."""
        return key in self._engines

    def view(self, key: ModelKey) -> EngineView | None:
        """Return the engine of this key that is not gone yet."""
        engine = self._engines.get(key)
        return None if engine is None else self._view(engine)

    def failure(self, model: str, revision: str) -> GatewayError | None:
        """Return why the last start of this file failed, on any backend or device."""
        return self._backoffs.last(model, revision)

    @property
    def queued(self) -> int:
        """How many tickets wait for an engine."""
        return len(self._queue)

    @property
    def tickets(self) -> int:
        """How many tickets have not ended."""
        return len(self._tickets)

    def queue_position(self, ticket: Ticket) -> int | None:
        """How many wait before this ticket; None when it does not wait."""
        for position, queued in enumerate(self._queue):
            if queued == ticket:
                return position
        return None

    def _view(self, engine: _Engine) -> EngineView:
        return EngineView(
            engine.id,
            engine.spec,
            engine.options,
            engine.state,
            engine.ttl_s,
            engine.idle_since,
            len(engine.leases),
            sum(w.spec.key == engine.id.key for w in self._queue.values()),
        )

    # One method per event.

    def _acquire(self, ask: Acquire, now: float, effects: list[Effect]) -> None:
        if ask.ticket in self._tickets:
            raise ValueError(f"ticket {ask.ticket} is in use")
        self._tickets[ask.ticket] = None
        key = ask.spec.key
        engine = self._engines.get(key)
        if self._closing:
            effects.append(Refuse(ask.ticket, refusals.shutting_down()))
            return
        if engine is not None and _serves(engine, ask.spec):
            # Whoever waits for this key already asks for options the engine does not have.
            self._grant(ask.ticket, engine, ask.ttl_s, now, effects)
            return
        failed = self._backoffs.refusal(ask.spec, now)
        if failed is not None:
            effects.append(Refuse(ask.ticket, failed))
            return
        if self._max_queue is not None and len(self._queue) >= self._max_queue:
            effects.append(Refuse(ask.ticket, refusals.queue_full(key, self._max_queue)))
            return
        self._queue[ask.ticket] = _Waiter(ask.ticket, ask.spec, ask.ttl_s, ask.deadline, now)
        self._advance(now, effects)

    def _release(self, ticket: Ticket, now: float, effects: list[Effect]) -> None:
        engine = self._tickets.pop(ticket)
        if engine is None:
            if ticket in self._queue:
                self._leave_queue(ticket)
                self._advance(now, effects)  # the one behind may be first now
            return
        engine.leases.discard(ticket)
        if engine.leases or engine.state is EngineState.STOPPED:
            return
        if engine.state is EngineState.READY:
            engine.idle_since = now
            if self._queue:
                self._advance(now, effects)
        elif engine.state is EngineState.DRAINING:
            self._stop(engine, engine.retire or "unload", effects)

    def _ready(self, engine_id: EngineId, now: float, effects: list[Effect]) -> None:
        engine = self._current(engine_id)
        if engine is None:
            return
        engine.state = step(engine.state, EngineEvent.READY)
        if engine.state is EngineState.READY:
            engine.idle_since = now
            self._backoffs.clear(engine_id.key, engine.options)
            self._advance(now, effects)

    def _exited(self, event: EngineExited, now: float, effects: list[Effect]) -> None:
        engine = self._current(event.engine)
        if engine is None:
            return
        never_ready = engine.state is EngineState.STARTING
        engine.state = step(engine.state, EngineEvent.EXITED)
        engine.idle_since = None
        del self._engines[engine.id.key]
        if never_ready:
            error = event.failure or refusals.start_failed(engine.id.key)
            self._backoffs.note(engine.id.key, engine.options, engine.spec.revision, error, now)
            self._refuse_waiting(engine.id.key, error, effects)
        elif engine.retire == "options" and self._awaited(engine.id.key):
            self._legacies[engine.id.key] = _Legacy(engine.wants, engine.ttl_s)
        self._advance(now, effects)

    def _unload(self, event: Unload, now: float, effects: list[Effect]) -> None:
        engine = self._current(event.engine)
        if engine is None:
            return
        if event.force:
            if engine.state is EngineState.STARTING:
                self._refuse_waiting(engine.id.key, refusals.unloaded(engine.id.key), effects)
            self._stop(engine, "unload", effects, force=True)
        else:
            self._retire(engine, "unload", effects)
        self._advance(now, effects)

    def _tick(self, now: float, effects: list[Effect]) -> None:
        for waiter in list(self._queue.values()):
            if waiter.deadline is not None and waiter.deadline <= now:
                self._refuse(waiter.ticket, self._too_late(waiter, now), effects)
        for engine in self._engines.values():
            deadline = _idle_deadline(engine)
            if deadline is not None and deadline <= now:
                self._stop(engine, "idle", effects)
        self._advance(now, effects)

    def _shutdown(self, force: bool, effects: list[Effect]) -> None:
        self._closing = True
        for ticket in list(self._queue):
            self._refuse(ticket, refusals.shutting_down(), effects)
        for engine in self._engines.values():
            if force or engine.state is EngineState.STARTING:
                self._stop(engine, "shutdown", effects, force=force)
            elif engine.state is EngineState.READY:
                self._drain(engine, "shutdown", effects)

    # The queue.

    def _advance(self, now: float, effects: list[Effect]) -> None:
        """Give ready engines to those who wait for them, then start what there is room for."""
        for waiter in list(self._queue.values()):
            engine = self._engines.get(waiter.spec.key)
            if engine is not None and _serves(engine, waiter.spec):
                del self._queue[waiter.ticket]
                self._grant(waiter.ticket, engine, waiter.ttl_s, now, effects)
        for engine in list(self._engines.values()):
            if engine.retire is not None and engine.state is EngineState.READY:
                self._drain(engine, engine.retire, effects)
        blocked = False
        for waiter, served_before in self._first_of_each_key():
            if blocked and waiter.spec.footprint.engines > 0:
                continue  # an upstream takes no room, so it need not wait for those who do
            engine = self._engines.get(waiter.spec.key)
            if engine is None:
                if self._make_room(waiter, served_before, now, effects):
                    self._start(waiter.spec, effects)
                else:
                    blocked = True
            elif engine.state is EngineState.READY:  # it does not cover what this waiter asks
                self._drain(engine, "options", effects)

    def _first_of_each_key(self) -> Iterator[tuple[_Waiter, frozenset[ModelKey]]]:
        """The first waiter of each key in order, with the keys of those before it."""
        before: set[ModelKey] = set()
        for waiter in list(self._queue.values()):
            if waiter.spec.key not in before:
                yield waiter, frozenset(before)
                before.add(waiter.spec.key)

    def _blocked(self) -> _Waiter | None:
        """Return the waiter whose turn it is, if nobody is leaving to make room for it."""
        for waiter, before in self._first_of_each_key():
            if waiter.spec.key not in self._engines:
                fits = self._fits_without(waiter, before, EngineState.DRAINING)
                return None if fits else waiter
        return None

    def _make_room(
        self, waiter: _Waiter, served_before: frozenset[ModelKey], now: float, effects: list[Effect]
    ) -> bool:
        """Whether the waiter's engine may start now; if not, ask somebody to leave."""
        if self._fits_without(waiter, served_before):
            return True
        while not self._fits_without(waiter, served_before, EngineState.STOPPING):
            victim = next(iter(cheapest_first(self._idle())), None)
            if victim is None:
                break
            self._stop(self._engines[victim.engine.key], "evicted", effects)
        else:
            return False
        busy = [
            e
            for e in self._engines.values()
            if e.state is EngineState.READY and e.spec.footprint.engines > 0
        ]
        if (
            busy
            and now >= waiter.arrived_at + self._fair_wait_s
            and not self._fits_without(waiter, served_before, EngineState.DRAINING)
        ):
            self._drain(
                min(busy, key=lambda e: (len(e.leases), e.last_granted)), "evicted", effects
            )
        return False

    def _fits_without(
        self,
        waiter: _Waiter,
        served_before: frozenset[ModelKey],
        leaving: EngineState | None = None,
    ) -> bool:
        """Whether there is room once the engines that leave are gone.

        `leaving` DRAINING counts those that are already stopping too. An engine whose own
        successor is awaited by somebody before this waiter frees nothing for it.
        """
        gone = {
            None: (),
            EngineState.STOPPING: (EngineState.STOPPING,),
            EngineState.DRAINING: (EngineState.STOPPING, EngineState.DRAINING),
        }[leaving]
        present: list[Footprint] = [
            e.spec.footprint
            for e in self._engines.values()
            if e.state not in gone or e.id.key in served_before
        ]
        return self._ledger.fits(waiter.spec.footprint, present)

    def _idle(self) -> Iterable[Candidate]:
        for engine in self._engines.values():
            if engine.state is EngineState.READY and engine.idle_since is not None:
                yield Candidate(engine.id, engine.spec.footprint, engine.idle_since)

    # Engines and tickets.

    def _awaited(self, key: ModelKey) -> bool:
        return any(waiter.spec.key == key for waiter in self._queue.values())

    def _current(self, engine_id: EngineId) -> _Engine | None:
        engine = self._engines.get(engine_id.key)
        return engine if engine is not None and engine.id == engine_id else None

    def _start(self, spec: EngineSpec, effects: list[Effect]) -> None:
        key = spec.key
        incarnation = self._incarnations[key] = self._incarnations.get(key, 0) + 1
        legacy = self._legacies.pop(key, _Legacy(LoadOptions(), self._default_ttl_s))
        wants = legacy.wants
        # From the last to the first, so that the first one's wish wins a contradiction.
        for waiter in reversed(self._queue.values()):
            if waiter.spec.key == key:
                wants = union(wants, waiter.spec.wants)
        engine = _Engine(
            EngineId(key, incarnation),
            spec,
            wants,
            fill(wants, spec.defaults),
            legacy.ttl_s,
        )
        self._engines[key] = engine
        effects.append(Start(engine.id, spec, engine.options))

    def _grant(
        self,
        ticket: Ticket,
        engine: _Engine,
        ttl_s: float | None,
        now: float,
        effects: list[Effect],
    ) -> None:
        self._tickets[ticket] = engine
        engine.leases.add(ticket)
        engine.idle_since = None
        engine.last_granted = now
        if ttl_s is not None:
            engine.ttl_s = ttl_s
        effects.append(Grant(ticket, engine.id))

    def _refuse(self, ticket: Ticket, error: GatewayError, effects: list[Effect]) -> None:
        self._leave_queue(ticket)
        effects.append(Refuse(ticket, error))

    def _leave_queue(self, ticket: Ticket) -> None:
        key = self._queue.pop(ticket).spec.key
        if not self._awaited(key):
            self._legacies.pop(key, None)

    def _refuse_waiting(self, key: ModelKey, error: GatewayError, effects: list[Effect]) -> None:
        for waiter in list(self._queue.values()):
            if waiter.spec.key == key:
                self._refuse(waiter.ticket, error.again(), effects)

    def _retire(self, engine: _Engine, reason: str, effects: list[Effect]) -> None:
        """Let the engine go once those it was promised to have been served."""
        if engine.state is EngineState.READY:
            self._drain(engine, reason, effects)
        elif engine.state is EngineState.STARTING:
            if self._awaited(engine.id.key):
                engine.retire = reason
            else:
                self._stop(engine, reason, effects)

    def _drain(self, engine: _Engine, reason: str, effects: list[Effect]) -> None:
        engine.state = step(engine.state, EngineEvent.DRAIN)
        engine.retire = reason
        if not engine.leases:
            self._stop(engine, reason, effects)

    def _stop(
        self, engine: _Engine, reason: str, effects: list[Effect], *, force: bool = False
    ) -> None:
        engine.state = step(engine.state, EngineEvent.STOP)
        engine.idle_since = None
        effects.append(Stop(engine.id, reason, force))

    def _too_late(self, waiter: _Waiter, now: float) -> GatewayError:
        engine = self._engines.get(waiter.spec.key)
        loading = engine is not None and engine.state is EngineState.STARTING
        say = refusals.still_loading if loading else refusals.no_room
        return say(waiter.spec.key, now - waiter.arrived_at)


def _serves(engine: _Engine, spec: EngineSpec) -> bool:
    """Whether a request may have a lease on this engine now."""
    return (
        engine.state is EngineState.READY
        and engine.spec.revision == spec.revision  # else its file has been replaced
        and covers(engine.options, spec.wants)
    )


def _idle_deadline(engine: _Engine | EngineView) -> float | None:
    if engine.idle_since is None or engine.ttl_s == 0 or engine.state is not EngineState.READY:
        return None
    return engine.idle_since + engine.ttl_s
