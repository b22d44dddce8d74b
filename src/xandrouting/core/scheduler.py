"""Who gets which engine, what starts and what leaves: events in, effects out.

A plain function over values: it never awaits, logs or reads a clock. `now` is the pool's
monotonic clock, in seconds.

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
from dataclasses import dataclass, replace
from typing import assert_never

from xandrouting.core import planner, refusals
from xandrouting.core.backoff import Backoffs
from xandrouting.core.cover import fill, union
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
    Prepare,
    Refuse,
    Release,
    Shutdown,
    Sleep,
    SleepFailed,
    Start,
    Stop,
    Tick,
    Unload,
)
from xandrouting.core.eviction import Choose, choose
from xandrouting.core.figures import Figures
from xandrouting.core.habit import Habit
from xandrouting.core.ladder import Rung
from xandrouting.core.ledger import DeviceState, Ledger
from xandrouting.core.model import (
    ENGINES,
    EngineId,
    EngineSpec,
    Level,
    LoadOptions,
    ModelKey,
    Ticket,
)
from xandrouting.core.planner import Decision, Plan, Surroundings, Verdict, Victim
from xandrouting.core.queue import Line, Queue, Waiter
from xandrouting.core.turns import Turns
from xandrouting.core.weigher import Together, Weigher


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
        self._ledger = ledger
        self._weigher = Weigher(ledger, Figures() if figures is None else figures, choose)
        self._default_ttl_s = default_ttl_s
        self._soft_idle_s = soft_idle_s  # None: no engine sleeps
        self._max_queue = max_queue
        self._turns = Turns(self._weigher, fair_wait_s=fair_wait_s, min_residency_s=min_residency_s)
        self._engines: dict[ModelKey, Engine] = {}
        self._incarnations: dict[ModelKey, int] = {}
        self._habits: dict[ModelKey, Habit] = {}
        self._tickets: dict[Ticket, Engine | None] = {}  # None: queued or refused
        self._queue = Queue()
        self._look_again_at: float | None = None  # when time alone may help the first in the queue
        self._backoffs = Backoffs(first_s=backoff_first_s, max_s=backoff_max_s)
        self._legacies: dict[ModelKey, _Legacy] = {}
        self._pinned: set[str] = set()
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
        times = [self._queue.next_deadline(), self._look_again_at]
        for engine in self._engines.values():
            times += [self._idle_deadline(engine), self._sleep_deadline(engine)]
        return min((at for at in times if at is not None), default=None)

    def plan(self, spec: EngineSpec, *, now: float) -> Decision:
        """Return what would become of a request for `spec` if nobody waited, and change nothing."""
        engine = self._engines.get(spec.key)
        among = self._among(spec, now, arrived_at=now, replaced=engine)
        if engine is None:
            wants, found = _planned((spec.wants,), spec, among)
        elif engine.serves(spec):
            wants, found = engine.wants, Plan(Verdict.HIT, engine.options, engine.placement)
        elif engine.will_serve(spec):
            wants, found = engine.wants, Plan(Verdict.WAIT, engine.options, engine.placement)
        elif (waking := _woken(engine, spec, among)) is not None:
            wants, found = engine.wants, waking
        elif engine.rests:
            wants, found = _planned((union(engine.wants, spec.wants), spec.wants), spec, among)
        else:
            wants, found = _planned((self._successor_of(engine, spec), spec.wants), spec, among)
            if found.verdict is not Verdict.NEVER:
                leaves = engine.state in (EngineState.DRAINING, EngineState.STOPPING)
                verdict = Verdict.WAIT if leaves else Verdict.RELOAD
                found = replace(found, verdict=verdict)
        return self._weigher.explained(spec, wants, found, among, self.devices())

    def _successor_of(self, engine: Engine, spec: EngineSpec) -> LoadOptions:
        """Return what the next engine is asked for: one that is replaced hands on its wishes."""
        leaves = engine.state in (EngineState.DRAINING, EngineState.STOPPING)
        if leaves and engine.retire != "options":
            return spec.wants
        return union(engine.wants, spec.wants)

    def fits(self, spec: EngineSpec, *, now: float) -> bool:
        """Whether a request for `spec` would be served at all, if not at once."""
        among = self._among(spec, now, arrived_at=now, replaced=self._engines.get(spec.key))
        return planner.fits_at_all(spec, spec.wants, among)

    def fit_together(self, specs: Iterable[EngineSpec]) -> Together:
        """Return whether engines of all these models could be there at once."""
        return self._weigher.together(specs)

    def devices(self) -> tuple[DeviceState, ...]:
        """Return the ledger's lines, main memory first."""
        return self._ledger.states(
            e.id for e in self._engines.values() if e.state is EngineState.STARTING
        )

    def views(self) -> list[EngineView]:
        """Every engine that is not gone, in the order they were started."""
        return [self._view(engine) for engine in self._engines.values()]

    def holds(self, key: ModelKey) -> bool:
        """Whether an engine of this key has its model in memory, or will have without us."""
        engine = self._engines.get(key)
        return engine is not None and not engine.sleeps

    def view(self, key: ModelKey) -> EngineView | None:
        """Return the engine of this key that is not gone yet."""
        engine = self._engines.get(key)
        return None if engine is None else self._view(engine)

    def failure(self, model: str, revision: str) -> GatewayError | None:
        """Return why the last start of this file failed, on any backend or device."""
        return self._backoffs.last(model, revision)

    @property
    def pinned(self) -> frozenset[str]:
        """The models that are pinned, loaded or not."""
        return frozenset(self._pinned)

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
            engine.id.key.model in self._pinned,
            engine.idle_since,
            len(engine.leases),
            0 if line is None else len(line.waiters),
            self._ledger.charge_of(engine.id),
            engine.decision,
            engine.level if engine.sleeps else None,
        )

    # One method per event.

    def _acquire(self, ask: Acquire, now: float, effects: list[Effect]) -> None:
        if ask.ticket in self._tickets:
            raise ValueError(f"ticket {ask.ticket} is in use")
        self._tickets[ask.ticket] = None
        key = ask.spec.key
        self._habits.setdefault(key, Habit()).asked(now)
        engine = self._engines.get(key)
        if engine is not None and not self._closing and engine.serves(ask.spec):
            # Whoever waits for this key already asks for options the engine does not have.
            self._grant(ask, engine, now, effects)
            return
        refusal = self._refusal(ask.spec, engine, now)
        if refusal is not None:
            effects.append(Refuse(ask.ticket, refusal))
            return
        self._queue.add(ask, now)
        self._advance(now, effects)

    def _release(self, event: Release, now: float, effects: list[Effect]) -> None:
        ticket = event.ticket
        engine = self._tickets.pop(ticket)
        if engine is None:
            if self._queue.find(ticket) is not None:
                key = self._leave_line(ticket)
                loading = self._engines.get(key)
                if (
                    event.cancel
                    and loading is not None
                    and loading.state is EngineState.STARTING
                    and self._queue.line(key) is None
                ):
                    self._stop(loading, "cancelled", effects)
                self._advance(now, effects)  # the one behind may be first now
            return
        engine.leases.discard(ticket)
        if engine.leases or engine.state is EngineState.STOPPED:
            return
        engine.habit.rests(now)
        if engine.state is EngineState.READY:
            engine.idle_since = now
        elif engine.state is EngineState.DRAINING:
            self._stop(engine, engine.retire or "unload", effects, decision=engine.leaves_for)
        if self._queue:
            self._advance(now, effects)

    def _ready(self, engine_id: EngineId, now: float, effects: list[Effect]) -> None:
        engine = self._current(engine_id)
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
                self._leave_line(waiter.ticket)
                self._grant(waiter, engine, now, effects)
        if engine.retire is not None:
            self._drain(engine, engine.retire, effects)
        self._advance(now, effects)

    def _slept(self, event: EngineSlept, now: float, effects: list[Effect]) -> None:
        engine = self._current(event.engine)
        if engine is None:
            return
        engine.state = step(engine.state, EngineEvent.SLEPT)
        if engine.state is not EngineState.SLEEPING:
            return
        engine.sleep(event.use, now)
        self._weigher.slept(engine, event.use, now)
        self._advance(now, effects)

    def _sleep_failed(self, event: SleepFailed, now: float, effects: list[Effect]) -> None:
        engine = self._current(event.engine)
        if engine is None or engine.state is not EngineState.SUSPENDING:
            return
        assert engine.level is not None
        self._weigher.ladder.note_failed(engine.spec, engine.level)
        rung = None if event.hopeless else self._weigher.next_rung(engine)
        if rung is None:
            self._stop(engine, "sleep_failed", effects)
        else:
            self._put_to_sleep(engine, rung, now, effects)

    def _lost(self, engine_id: EngineId, now: float, effects: list[Effect]) -> None:
        engine = self._current(engine_id)
        if engine is None or engine.state in (EngineState.STARTING, EngineState.STOPPING):
            return  # it is lent to nobody
        engine.state = step(engine.state, EngineEvent.STOP)
        engine.idle_since = None
        self._advance(now, effects)

    def _exited(self, event: EngineExited, now: float, effects: list[Effect]) -> None:
        engine = self._current(event.engine)
        if engine is None:
            return
        never_ready = engine.state is EngineState.STARTING
        wakes_from = engine.wakes_from
        engine.state = step(engine.state, EngineEvent.EXITED)
        engine.idle_since = None
        del self._engines[engine.id.key]
        self._ledger.release(engine.id)
        for line in self._queue.lines():
            line.after.discard(engine.id)
        if wakes_from is not None:
            # Not held against its model: those who wait get a fresh one.
            self._weigher.ladder.note_failed(engine.spec, wakes_from)
            self._bequeath(engine)
        elif never_ready:
            self._start_failed(engine, event.failure, now, effects)
        elif engine.retire == "options":
            self._bequeath(engine)
        self._advance(now, effects)

    def _start_failed(
        self, engine: Engine, failure: GatewayError | None, now: float, effects: list[Effect]
    ) -> None:
        key = engine.id.key
        line = self._queue.line(key)
        if isinstance(failure, InsufficientMemory) and line is not None and not line.tried_again:
            # It took more than was known. Once more, with everybody gone who may leave.
            taken = {r for r, n in engine.footprint.demands(engine.placement) if n and r != ENGINES}
            idle = [
                e
                for e in self._movable()
                if e.is_idle and any(map(self._ledger.charge_of(e.id).get, taken))
            ]
            if idle:
                line.tried_again = True
                line.after = {e.id for e in idle}
                for victim in idle:
                    self._stop(victim, "evicted", effects, decision=engine.decision)
                return
        error = failure or refusals.start_failed(key)
        # Held against what was asked for, though slots or layers were given up meanwhile.
        asked = fill(engine.wants, engine.spec.defaults)
        self._backoffs.note(key, asked, engine.spec.revision, error, now)
        self._refuse_line(key, error, effects)

    def _unload(self, event: Unload, now: float, effects: list[Effect]) -> None:
        engine = self._current(event.engine)
        if engine is None:
            return
        if event.force:
            if engine.state is EngineState.STARTING:
                self._refuse_line(engine.id.key, refusals.unloaded(engine.id.key), effects)
            self._stop(engine, "unload", effects, force=True)
        else:
            self._retire(engine, "unload", effects)
        self._advance(now, effects)

    def _pin(self, event: Pin, now: float, effects: list[Effect]) -> None:
        if event.pinned:
            self._pinned.add(event.model)
        else:
            self._pinned.discard(event.model)
        self._advance(now, effects)

    def _measured(self, event: Measured, now: float, effects: list[Effect]) -> None:
        engines = {engine.id: engine for engine in self._engines.values()}
        self._weigher.measured(event.devices, event.engines, engines, event.spare_bytes)
        self._advance(now, effects)

    def _tick(self, now: float, effects: list[Effect]) -> None:
        for waiter, of_queue in list(self._queue.due(now)):
            key = waiter.spec.key
            engine = self._engines.get(key)
            loading = engine is not None and engine.will_serve(waiter.spec)
            if not (of_queue and loading) and self._queue.find(waiter.ticket) is not None:
                say = refusals.still_loading if loading else refusals.no_room
                self._refuse(waiter.ticket, say(key, now - waiter.arrived_at), effects)
        for engine in self._engines.values():
            deadline = self._idle_deadline(engine)
            if deadline is not None and deadline <= now:
                self._stop(engine, "idle", effects)
                continue
            deadline = self._sleep_deadline(engine)
            if deadline is not None and deadline <= now:
                rung = self._weigher.next_rung(engine)
                if rung is None:
                    engine.stays = True
                else:
                    self._put_to_sleep(engine, rung, now, effects)
        self._advance(now, effects)

    def _shutdown(self, force: bool, effects: list[Effect]) -> None:
        self._closing = True
        for ticket in self._queue.tickets():
            self._refuse(ticket, refusals.shutting_down(), effects)
        self._look_again_at = None
        for engine in self._engines.values():
            if force or engine.state is EngineState.STARTING:
                self._stop(engine, "shutdown", effects, force=force)
            elif engine.sleeps:
                self._stop(engine, "shutdown", effects)
            elif engine.state is EngineState.READY:
                self._drain(engine, "shutdown", effects)

    # The queue.

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
        among = self._among(spec, now, arrived_at=now, replaced=engine)
        return self._too_large(spec, spec.wants, planner.never(spec, spec.wants, among), among)

    def _too_large(
        self, spec: EngineSpec, wants: LoadOptions, never: Plan, among: Surroundings
    ) -> GatewayError:
        decision = self._weigher.explained(spec, wants, never, among, self.devices())
        return refusals.too_large(decision)

    def _advance(self, now: float, effects: list[Effect]) -> None:
        """Start what there is room for, in the order of arrival."""
        while not self._advanced(now, effects):
            pass  # somebody was refused: who is first may be another now

    def _advanced(self, now: float, effects: list[Effect]) -> bool:
        """Go through the lines once; False: one lost its first, so look again from the start."""
        self._look_again_at = None
        if not self._queue:
            return True
        blocked = False
        promised: set[ModelKey] = set()  # whose successors have their predecessors' room
        for line in self._queue.lines():
            spec = line.first.spec
            engine = self._engines.get(spec.key)
            if blocked and spec.key.is_local:
                continue  # an upstream takes no room, so it need not wait for those who do
            if engine is not None and engine.state not in (
                EngineState.READY,
                EngineState.SLEEPING,
            ):
                promised.add(spec.key)
                continue
            if line.after:  # it ran out of memory, and those it waits for are not gone yet
                blocked = True
                continue
            arrived_at = line.first.arrived_at
            among = self._among(
                spec, now, arrived_at=arrived_at, promised=promised, replaced=engine
            )
            wants, found = self._plan_for(line, engine, among)
            waking = None if engine is None else _woken(engine, spec, among)
            if engine is not None and waking is not None:
                wants, found = engine.wants, waking
            if found.verdict is Verdict.NEVER:
                # It fitted when it came; other programs have taken the memory since.
                error = self._too_large(spec, wants, found, among)
                self._refuse(line.first.ticket, error, effects)
                return False
            if engine is not None and waking is None and not engine.rests:
                self._replace(engine, effects)  # it does not cover what is asked
                promised.add(spec.key)
                continue
            if spec.files and found.verdict is not Verdict.LOAD and not line.prepared:
                line.prepared = True
                effects.append(Prepare(spec))
            if found.verdict is Verdict.WAIT:
                self._make_fair(line.first, wants, found, among, promised, now, effects)
                blocked = True
            else:
                decision = self._weigher.explained(spec, wants, found, among, self.devices())
                for victim in found.victims:
                    leaving = self._engines[victim.engine.key]
                    self._stop(leaving, "evicted", effects, decision=decision)
                line.victims += decision.victims
                if found.victims:
                    blocked = True
                else:
                    decision = _having_evicted(decision, line.victims)
                    self._start(spec, wants, decision, engine, now, effects)
        return True

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
        return _planned((wants, first.wants), first, among)

    def _make_fair(
        self,
        first: Waiter,
        wants: LoadOptions,
        found: Plan,
        among: Surroundings,
        promised: set[ModelKey],
        now: float,
        effects: list[Effect],
    ) -> None:
        """See to it that who waits for engines in use does not wait for ever."""
        amounts = self._weigher.amounts(first.spec, found.options, found.placement)
        going = [
            engine
            for engine in self._engines.values()
            if engine.state is EngineState.DRAINING and engine.id.key not in promised
        ]
        draining, self._look_again_at = self._turns.fair(
            self._movable(), first, amounts, among, going, now
        )
        if draining:
            decision = self._weigher.explained(first.spec, wants, found, among, self.devices())
            for engine in draining:
                engine.leaves_for = decision
                self._drain(engine, "evicted", effects)

    def _movable(self) -> list[Engine]:
        """Return the engines that may be asked to leave for others: ready ones and sleepers."""
        return [
            engine
            for engine in self._engines.values()
            if (engine.state is EngineState.READY or engine.sleeps)
            and engine.counts
            and engine.id.key.model not in self._pinned
        ]

    def _among(
        self,
        spec: EngineSpec,
        now: float,
        *,
        arrived_at: float,
        promised: Iterable[ModelKey] = (),
        replaced: Engine | None = None,
    ) -> Surroundings:
        """Return what a load is planned among.

        Engines of `promised` keys keep their room for their successors; `replaced` is the
        engine that the planned one takes the place of.
        """
        leaving, staying, candidates = [], [], []
        for engine in self._engines.values():
            if engine is replaced or engine.state in (
                EngineState.STOPPING,
                EngineState.SUSPENDING,
            ):
                if engine.id.key not in promised:
                    leaving.append(engine)
            elif engine.state is EngineState.DRAINING:
                continue
            elif engine.id.key.model in self._pinned:
                staying.append(engine)
            elif (
                engine.is_idle
                and engine.counts
                and self._turns.leaves_at(engine, arrived_at) <= now
            ):
                candidates.append(self._weigher.candidate(engine, now))
        return self._weigher.among(
            spec,
            leaving=leaving,
            staying=staying,
            candidates=candidates,
            woken=replaced if replaced is not None and replaced.sleeps else None,
        )

    # Engines and tickets.

    def _current(self, engine_id: EngineId) -> Engine | None:
        engine = self._engines.get(engine_id.key)
        return engine if engine is not None and engine.id == engine_id else None

    def _start(
        self,
        spec: EngineSpec,
        wants: LoadOptions,
        decision: Decision,
        sleeper: Engine | None,
        now: float,
        effects: list[Effect],
    ) -> None:
        """Start a new engine of the spec's key, or wake the one that sleeps."""
        engine = self._new_engine(spec, wants, decision) if sleeper is None else sleeper
        if sleeper is not None:
            decision = self._weigher.waking(sleeper, decision)
            sleeper.wake(spec, wants, decision, now)
        self._ledger.charge(engine.id, dict(engine.footprint.demands(engine.placement)))
        effects.append(
            Start(
                engine.id,
                spec,
                engine.options,
                engine.placement,
                wakes=sleeper is not None,
                decision=decision,
            )
        )

    def _new_engine(self, spec: EngineSpec, wants: LoadOptions, decision: Decision) -> Engine:
        key = spec.key
        incarnation = self._incarnations[key] = self._incarnations.get(key, 0) + 1
        legacy = self._legacies.pop(key, None)
        engine = self._engines[key] = Engine(
            EngineId(key, incarnation),
            spec,
            wants,
            decision.options,
            decision.placement,
            decision.footprint,
            decision,
            self._default_ttl_s if legacy is None else legacy.ttl_s,
            self._habits[key],
        )
        return engine

    def _replace(self, engine: Engine, effects: list[Effect]) -> None:
        """Let the engine go for one of its key with other options."""
        if engine.sleeps:
            engine.retire = "options"
            self._stop(engine, "options", effects)
        else:
            self._drain(engine, "options", effects)

    def _bequeath(self, engine: Engine) -> None:
        """Have the successor of an engine that is gone serve the same wishes, if one is awaited."""
        if self._queue.line(engine.id.key) is not None:
            self._legacies[engine.id.key] = _Legacy(engine.wants, engine.ttl_s)

    def _put_to_sleep(self, engine: Engine, rung: Rung, now: float, effects: list[Effect]) -> None:
        self._weigher.suspends(engine, rung)
        engine.fall_asleep(rung.level, now)
        effects.append(Sleep(engine.id, rung.level, None if rung.level is Level.REST else rung))

    def _grant(
        self, ask: Acquire | Waiter, engine: Engine, now: float, effects: list[Effect]
    ) -> None:
        self._tickets[ask.ticket] = engine
        engine.lend(ask.ticket, now, works=ask.works)
        if ask.ttl_s is not None:
            engine.ttl_s = ask.ttl_s
        effects.append(Grant(ask.ticket, engine.id))

    def _refuse(self, ticket: Ticket, error: GatewayError, effects: list[Effect]) -> None:
        self._leave_line(ticket)
        effects.append(Refuse(ticket, error))

    def _leave_line(self, ticket: Ticket) -> ModelKey:
        key = self._queue.leave(ticket)
        if self._queue.line(key) is None:
            self._legacies.pop(key, None)
        return key

    def _refuse_line(self, key: ModelKey, error: GatewayError, effects: list[Effect]) -> None:
        line = self._queue.line(key)
        for ticket in [] if line is None else list(line.waiters):
            self._refuse(ticket, error.again(), effects)

    def _retire(self, engine: Engine, reason: str, effects: list[Effect]) -> None:
        """Let the engine go once those it was promised to have been served."""
        if engine.state is EngineState.READY:
            self._drain(engine, reason, effects)
        elif engine.state is EngineState.STARTING and self._queue.line(engine.id.key) is not None:
            engine.retire = reason
        elif engine.state is EngineState.STARTING or engine.sleeps:
            self._stop(engine, reason, effects)

    def _drain(self, engine: Engine, reason: str, effects: list[Effect]) -> None:
        engine.state = step(engine.state, EngineEvent.DRAIN)
        engine.retire = reason
        if not engine.leases:
            self._stop(engine, reason, effects)

    def _stop(
        self,
        engine: Engine,
        reason: str,
        effects: list[Effect],
        *,
        force: bool = False,
        decision: Decision | None = None,
    ) -> None:
        engine.state = step(engine.state, EngineEvent.STOP)
        engine.idle_since = None
        effects.append(Stop(engine.id, reason, force, decision))

    def _idle_deadline(self, engine: Engine) -> float | None:
        if engine.id.key.model in self._pinned:
            return None
        if engine.sleeps and self._queue.line(engine.id.key) is not None:
            return None  # it will be woken as soon as there is room
        return engine.idle_deadline()

    def _sleep_deadline(self, engine: Engine) -> float | None:
        if self._soft_idle_s is None or engine.id.key.model in self._pinned:
            return None
        if engine.sleeps and self._queue.line(engine.id.key) is not None:
            return None
        return engine.sleep_deadline(self._soft_idle_s)


def _having_evicted(decision: Decision, victims: tuple[Victim, ...]) -> Decision:
    """Return the decision of a load with those who have left for it."""
    if not victims:
        return decision
    return replace(decision, verdict=Verdict.EVICT, victims=victims)


def _woken(engine: Engine, spec: EngineSpec, among: Surroundings) -> Plan | None:
    """Return how a sleeper can be woken that wakes as it was; None: it is of no use for this."""
    if not engine.wakes_as_it_was or not engine.does_for(spec):
        return None
    there = replace(spec, placements=(engine.placement,))
    found = planner.plan(there, engine.options, among)
    return None if found.verdict is Verdict.NEVER else found


def _planned(
    wishes: Iterable[LoadOptions], spec: EngineSpec, among: Surroundings
) -> tuple[LoadOptions, Plan]:
    """Return the first of the wishes that can be met, and how; else the last, and why not."""
    *others, last = dict.fromkeys(wishes)
    for wants in others:
        found = planner.plan(spec, wants, among)
        if found.verdict is not Verdict.NEVER:
            return wants, found
    return last, planner.plan(spec, last, among)
