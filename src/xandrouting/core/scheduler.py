"""Who gets which engine, what starts and what leaves: events in, effects out.

A plain function over values: it never awaits, logs or reads a clock. `now` is the pool's
monotonic clock, in seconds. What an event means is here, with the tickets; the engines are in
`fleet.py`, those who wait in `admission.py`, and what they may hope for in `prospects.py`.

The rules, each tested as a property (`tests/unit/test_scheduler_machine.py`):

- A ticket ends with exactly one `Release`, whatever became of it.
- An engine with leases is stopped only by force or its own death; a pinned one is no victim.
- Nothing is promised beyond the ledger's limits, and nobody leaves for what cannot fit.
- The first in the queue reserves: later requests may use ready engines, and may not start
  others past it, save those that take nothing here. When it has waited `fair_wait_s` and
  every engine is busy, one of them takes no new leases any more, so nobody waits for ever.
- Two models that share one place do not take turns with every request (`turns.py`).
- One engine per key at a time; the next incarnation starts when the last one is gone.
- One that was idle for `soft_idle_s` sleeps, if it can: it keeps its process and gives back
  its memory; how deep, `ladder.py` says. Waking it is a load like any other, with a place in
  the queue and in the ledger. One that does not wake is replaced by a fresh one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from xandrouting.core import refusals
from xandrouting.core.admission import Admission
from xandrouting.core.backoff import Backoffs
from xandrouting.core.cover import fill
from xandrouting.core.engine import Engine, EngineView
from xandrouting.core.engine_state import EngineEvent, EngineState, step
from xandrouting.core.errors import GatewayError, InsufficientMemory
from xandrouting.core.events import (
    Acquire,
    Effect,
    EngineExited,
    EngineLost,
    EngineReady,
    EngineSlept,
    Event,
    Grant,
    Measured,
    Pin,
    Refuse,
    Release,
    Shutdown,
    SleepFailed,
    Tick,
    Unload,
)
from xandrouting.core.eviction import Choose, choose
from xandrouting.core.figures import Figures
from xandrouting.core.fleet import Fleet
from xandrouting.core.ledger import DeviceState, Ledger
from xandrouting.core.model import EngineId, EngineSpec, ModelKey, Ticket
from xandrouting.core.planner import Decision
from xandrouting.core.prospects import Prospects
from xandrouting.core.queue import Queue, Waiter
from xandrouting.core.turns import Turns
from xandrouting.core.weigher import Together, Weigher


class Scheduler:
    """The queue, the leases and the incarnations of one node's engines."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        figures: Figures | None = None,
        choose: Choose = choose,
        default_ttl_s: float = 300.0,
        soft_idle_s: float | None = None,
        max_queue: int | None = None,
        fair_wait_s: float = 5.0,
        min_residency_s: float = 0.0,
        backoff_first_s: float = 1.0,
        backoff_max_s: float = 60.0,
    ) -> None:
        self._weigher = Weigher(ledger, Figures() if figures is None else figures, choose)
        self._queue = Queue()
        self._fleet = Fleet(
            self._weigher, self._queue, default_ttl_s=default_ttl_s, soft_idle_s=soft_idle_s
        )
        turns = Turns(self._weigher, fair_wait_s=fair_wait_s, min_residency_s=min_residency_s)
        self._prospects = Prospects(self._weigher, turns, self._fleet)
        self._admission = Admission(self._queue, self._fleet, self._prospects, self._weigher, turns)
        self._max_queue = max_queue
        self._tickets: dict[Ticket, Engine | None] = {}  # None: queued or refused
        self._backoffs = Backoffs(first_s=backoff_first_s, max_s=backoff_max_s)
        self._closing = False

    def handle(self, event: Event, *, now: float) -> list[Effect]:
        """Take one event and return what has to be done, in order."""
        effects: list[Effect] = []
        match event:
            case Acquire():
                self._acquire(event, now, effects)
            case Release():
                self._release(event, now, effects)
            case EngineReady():
                self._ready(event.engine, now, effects)
            case EngineSlept():
                self._slept(event, now, effects)
            case SleepFailed():
                self._sleep_failed(event, now, effects)
            case EngineLost():
                self._lost(event.engine, now, effects)
            case EngineExited():
                self._exited(event, now, effects)
            case Unload():
                self._unload(event, now, effects)
            case Pin():
                self._pin(event, now, effects)
            case Measured():
                self._measured(event, now, effects)
            case Tick():
                self._tick(now, effects)
            case Shutdown():
                self._shutdown(event.force, effects)
            case _:
                assert_never(event)
        return effects

    # What the outside may read.

    def next_wakeup(self, *, now: float) -> float | None:  # noqa: ARG002 - what is past is gone
        """When time alone will change something; None: only an event will."""
        times = [self._queue.next_deadline(), self._admission.look_again_at]
        for engine in self._fleet:
            times += [self._fleet.idle_deadline(engine), self._fleet.sleep_deadline(engine)]
        return min((at for at in times if at is not None), default=None)

    def plan(self, spec: EngineSpec, *, now: float) -> Decision:
        """Return what would become of a request for `spec` if nobody waited, and change nothing."""
        return self._prospects.decide(spec, now)

    def fits(self, spec: EngineSpec, *, now: float) -> bool:
        """Whether a request for `spec` would be served at all, if not at once."""
        return self._prospects.fits(spec, now)

    def fit_together(self, specs: Iterable[EngineSpec]) -> Together:
        """Return whether engines of all these models could be there at once."""
        return self._weigher.together(specs)

    def devices(self) -> tuple[DeviceState, ...]:
        """Return the ledger's lines, main memory first."""
        return self._fleet.devices()

    def views(self) -> list[EngineView]:
        """Every engine that is not gone, in the order they were started."""
        return [self._view(engine) for engine in self._fleet]

    def holds(self, key: ModelKey) -> bool:
        """Whether an engine of this key has its model in memory, or will have without us."""
        engine = self._fleet.get(key)
        return engine is not None and not engine.sleeps

    def view(self, key: ModelKey) -> EngineView | None:
        """Return the engine of this key that is not gone yet."""
        engine = self._fleet.get(key)
        return None if engine is None else self._view(engine)

    def failure(self, model: str, revision: str) -> GatewayError | None:
        """Return why the last start of this file failed, on any backend or device."""
        return self._backoffs.last(model, revision)

    @property
    def pinned(self) -> frozenset[str]:
        """The models that are pinned, loaded or not."""
        return frozenset(self._fleet.pinned)

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
        return self._queue.position(ticket)

    def _view(self, engine: Engine) -> EngineView:
        line = self._queue.line(engine.id.key)
        return EngineView(
            engine.id,
            engine.spec,
            engine.options,
            engine.placement,
            engine.state,
            engine.ttl_s,
            engine.id.key.model in self._fleet.pinned,
            engine.idle_since,
            len(engine.leases),
            0 if line is None else len(line.waiters),
            self._weigher.ledger.charge_of(engine.id),
            engine.decision,
            engine.level if engine.sleeps else None,
        )

    # One method per event.

    def _acquire(self, ask: Acquire, now: float, effects: list[Effect]) -> None:
        if ask.ticket in self._tickets:
            raise ValueError(f"ticket {ask.ticket} is in use")
        self._tickets[ask.ticket] = None
        key = ask.spec.key
        self._fleet.asked(key, now)
        engine = self._fleet.get(key)
        if engine is not None and not self._closing and engine.serves(ask.spec):
            # Whoever waits for this key already asks for options the engine does not have.
            self._grant(ask, engine, now, effects)
            return
        refusal = self._refusal(ask.spec, engine, now)
        if refusal is not None:
            effects.append(Refuse(ask.ticket, refusal))
            return
        self._queue.add(ask, now)
        effects += self._admission.advance(now)

    def _release(self, event: Release, now: float, effects: list[Effect]) -> None:
        ticket = event.ticket
        engine = self._tickets.pop(ticket)
        if engine is None:
            if self._queue.find(ticket) is not None:
                key = self._admission.leave(ticket)
                loading = self._fleet.get(key)
                if (
                    event.cancel
                    and loading is not None
                    and loading.state is EngineState.STARTING
                    and self._queue.line(key) is None
                ):
                    effects.append(self._fleet.stop(loading, "cancelled"))
                effects += self._admission.advance(now)  # the one behind may be first now
            return
        engine.leases.discard(ticket)
        if engine.leases or engine.state is EngineState.STOPPED:
            return
        engine.habit.rests(now)
        if engine.state is EngineState.READY:
            engine.idle_since = now
        elif engine.state is EngineState.DRAINING:
            reason = engine.retire or "unload"
            effects.append(self._fleet.stop(engine, reason, decision=engine.leaves_for))
        if self._queue:
            effects += self._admission.advance(now)

    def _ready(self, engine_id: EngineId, now: float, effects: list[Effect]) -> None:
        engine = self._fleet.current(engine_id)
        if engine is None:
            return
        woken_from = engine.wakes_from
        engine.state = step(engine.state, EngineEvent.READY)
        if engine.state is not EngineState.READY:
            return
        if woken_from is not None:
            assert engine.told_at is not None
            self._weigher.ladder.note_woken(engine.spec, woken_from, wake_s=now - engine.told_at)
        engine.level = None
        engine.idle_since = engine.ready_at = now
        self._backoffs.clear(engine_id.key, fill(engine.wants, engine.spec.defaults))
        line = self._queue.line(engine_id.key)
        for waiter in [] if line is None else list(line.waiters.values()):
            if engine.serves(waiter.spec):
                self._admission.leave(waiter.ticket)
                self._grant(waiter, engine, now, effects)
        if engine.retire is not None:
            effects += self._fleet.drain(engine, engine.retire)
        effects += self._admission.advance(now)

    def _slept(self, event: EngineSlept, now: float, effects: list[Effect]) -> None:
        engine = self._fleet.current(event.engine)
        if engine is None:
            return
        engine.state = step(engine.state, EngineEvent.SLEPT)
        if engine.state is not EngineState.SLEEPING:
            return
        engine.sleep(event.use, now)
        self._weigher.slept(engine, event.use, now)
        effects += self._admission.advance(now)

    def _sleep_failed(self, event: SleepFailed, now: float, effects: list[Effect]) -> None:
        engine = self._fleet.current(event.engine)
        if engine is None or engine.state is not EngineState.SUSPENDING:
            return
        assert engine.level is not None
        self._weigher.ladder.note_failed(engine.spec, engine.level)
        rung = None if event.hopeless else self._weigher.next_rung(engine)
        if rung is None:
            effects.append(self._fleet.stop(engine, "sleep_failed"))
        else:
            effects.append(self._fleet.put_to_sleep(engine, rung, now))

    def _lost(self, engine_id: EngineId, now: float, effects: list[Effect]) -> None:
        engine = self._fleet.current(engine_id)
        if engine is None or engine.state in (EngineState.STARTING, EngineState.STOPPING):
            return  # it is lent to nobody
        self._fleet.lose(engine)
        effects += self._admission.advance(now)

    def _exited(self, event: EngineExited, now: float, effects: list[Effect]) -> None:
        engine = self._fleet.current(event.engine)
        if engine is None:
            return
        never_ready = engine.state is EngineState.STARTING
        wakes_from = engine.wakes_from
        self._fleet.bury(engine)
        self._admission.forget(engine.id)
        if wakes_from is not None:
            # Not held against its model: those who wait get a fresh one.
            self._weigher.ladder.note_failed(engine.spec, wakes_from)
            self._admission.bequeath(engine)
        elif never_ready:
            self._start_failed(engine, event.failure, now, effects)
        elif engine.retire == "options":
            self._admission.bequeath(engine)
        effects += self._admission.advance(now)

    def _start_failed(
        self, engine: Engine, failure: GatewayError | None, now: float, effects: list[Effect]
    ) -> None:
        if isinstance(failure, InsufficientMemory):
            leaving = self._admission.try_again(engine)
            if leaving:
                effects += leaving
                return
        key = engine.id.key
        error = failure or refusals.start_failed(key)
        # Held against what was asked for, though slots or layers were given up meanwhile.
        asked = fill(engine.wants, engine.spec.defaults)
        self._backoffs.note(key, asked, engine.spec.revision, error, now)
        effects += self._admission.refuse_line(key, error)

    def _unload(self, event: Unload, now: float, effects: list[Effect]) -> None:
        engine = self._fleet.current(event.engine)
        if engine is None:
            return
        if event.force:
            if engine.state is EngineState.STARTING:
                key = engine.id.key
                effects += self._admission.refuse_line(key, refusals.unloaded(key))
            effects.append(self._fleet.stop(engine, "unload", force=True))
        else:
            effects += self._fleet.retire(engine, "unload")
        effects += self._admission.advance(now)

    def _pin(self, event: Pin, now: float, effects: list[Effect]) -> None:
        if event.pinned:
            self._fleet.pinned.add(event.model)
        else:
            self._fleet.pinned.discard(event.model)
        effects += self._admission.advance(now)

    def _measured(self, event: Measured, now: float, effects: list[Effect]) -> None:
        engines = {engine.id: engine for engine in self._fleet}
        self._weigher.measured(event.devices, event.engines, engines, event.spare_bytes)
        effects += self._admission.advance(now)

    def _tick(self, now: float, effects: list[Effect]) -> None:
        for waiter, of_queue in list(self._queue.due(now)):
            key = waiter.spec.key
            engine = self._fleet.get(key)
            loading = engine is not None and engine.will_serve(waiter.spec)
            if not (of_queue and loading) and self._queue.find(waiter.ticket) is not None:
                say = refusals.still_loading if loading else refusals.no_room
                error = say(key, now - waiter.arrived_at)
                effects.append(self._admission.refuse(waiter.ticket, error))
        for engine in self._fleet:
            deadline = self._fleet.idle_deadline(engine)
            if deadline is not None and deadline <= now:
                effects.append(self._fleet.stop(engine, "idle"))
                continue
            deadline = self._fleet.sleep_deadline(engine)
            if deadline is not None and deadline <= now:
                rung = self._weigher.next_rung(engine)
                if rung is None:
                    engine.stays = True
                else:
                    effects.append(self._fleet.put_to_sleep(engine, rung, now))
        effects += self._admission.advance(now)

    def _shutdown(self, force: bool, effects: list[Effect]) -> None:
        self._closing = True
        effects += self._admission.close()
        for engine in self._fleet:
            if force or engine.state is EngineState.STARTING:
                effects.append(self._fleet.stop(engine, "shutdown", force=force))
            elif engine.sleeps:
                effects.append(self._fleet.stop(engine, "shutdown"))
            elif engine.state is EngineState.READY:
                effects += self._fleet.drain(engine, "shutdown")

    def _refusal(self, spec: EngineSpec, engine: Engine | None, now: float) -> GatewayError | None:
        """Return why a request need not wait at all."""
        if self._closing:
            return refusals.shutting_down()
        failed = self._backoffs.refusal(spec, now)
        if failed is not None:
            return failed
        if self._max_queue is not None and len(self._queue) >= self._max_queue:
            return refusals.queue_full(spec.key, self._max_queue)
        if (engine is not None and engine.will_serve(spec)) or self.fits(spec, now=now):
            return None
        return self._prospects.refusal(spec, now)

    def _grant(
        self, ask: Acquire | Waiter, engine: Engine, now: float, effects: list[Effect]
    ) -> None:
        self._tickets[ask.ticket] = engine
        engine.lend(ask.ticket, now, works=ask.works)
        if ask.ttl_s is not None:
            engine.ttl_s = ask.ttl_s
        effects.append(Grant(ask.ticket, engine.id))
