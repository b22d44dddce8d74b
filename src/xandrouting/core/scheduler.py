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
from typing import TypeAlias, assert_never

from xandrouting.core.cover import covers, fill, union
from xandrouting.core.engine_state import EngineEvent, EngineState, step
from xandrouting.core.errors import (
    EngineStartFailed,
    EngineUnloaded,
    GatewayError,
    LoadingTimeout,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from xandrouting.core.eviction import Candidate, cheapest_first
from xandrouting.core.ledger import Ledger
from xandrouting.core.model import EngineId, EngineSpec, Footprint, LoadOptions, ModelKey, Ticket


@dataclass(frozen=True, slots=True)
class Acquire:
    """A request wants an engine. `ttl_s` None: it does not say; 0: never unload when idle.

    `deadline` is when it gives up waiting; None: it waits for as long as it takes.
    """

    ticket: Ticket
    spec: EngineSpec
    ttl_s: float | None = None
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """The end of a ticket: served, refused, or its client left."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The engine's probe passed."""

    engine: EngineId


@dataclass(frozen=True, slots=True)
class EngineExited:
    """The engine's process tree is gone. `failure` says why it never became ready."""

    engine: EngineId
    failure: GatewayError | None = None


@dataclass(frozen=True, slots=True)
class Unload:
    """Somebody wishes the engine gone: after its leases, or with `force` at once."""

    engine: EngineId
    force: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Take no new work and let every engine go: after its leases, or with `force` at once."""

    force: bool = False


Event: TypeAlias = Acquire | Release | EngineReady | EngineExited | Unload | Tick | Shutdown


@dataclass(frozen=True, slots=True)
class Start:
    """Start this engine with these options, all of them settled."""

    engine: EngineId
    spec: EngineSpec
    options: LoadOptions


@dataclass(frozen=True, slots=True)
class Stop:
    """End this engine; `reason` is `idle`, `evicted`, `options`, `unload` or `shutdown`."""

    engine: EngineId
    reason: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """The ticket holds a lease on this engine from now on."""

    ticket: Ticket
    engine: EngineId


@dataclass(frozen=True, slots=True)
class Refuse:
    """The ticket gets no engine. It still ends with its `Release`."""

    ticket: Ticket
    error: GatewayError


Effect: TypeAlias = Start | Stop | Grant | Refuse


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
        if self.idle_since is None or self.ttl_s == 0 or self.state is not EngineState.READY:
            return None
        return self.idle_since + self.ttl_s


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

    def idle_deadline(self) -> float | None:
        if self.idle_since is None or self.ttl_s == 0 or self.state is not EngineState.READY:
            return None
        return self.idle_since + self.ttl_s


@dataclass(frozen=True, slots=True)
class _Waiter:
    ticket: Ticket
    spec: EngineSpec
    ttl_s: float | None
    deadline: float | None
    arrived_at: float


@dataclass(frozen=True, slots=True)
class _Backoff:
    """Why a key's last start failed, and until when nobody tries again."""

    error: GatewayError
    revision: str
    failures: int
    until: float

    def holds(self, revision: str, now: float) -> bool:
        return self.revision == revision and now < self.until


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
        self._backoff_first_s = backoff_first_s
        self._backoff_max_s = backoff_max_s
        self._engines: dict[ModelKey, _Engine] = {}
        self._incarnations: dict[ModelKey, int] = {}
        self._tickets: dict[Ticket, _Engine | None] = {}  # None: queued or refused
        self._queue: dict[Ticket, _Waiter] = {}  # in order of arrival
        self._backoffs: dict[ModelKey, _Backoff] = {}
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
            deadline = engine.idle_deadline()
            if deadline is not None:
                times.append(deadline)
        return min(times, default=None)

    def views(self) -> list[EngineView]:
        """Every engine that is not gone, in the order they were started."""
        return [self._view(engine) for engine in self._engines.values()]

    def view(self, key: ModelKey) -> EngineView | None:
        """Return the engine of this key that is not gone yet."""
        engine = self._engines.get(key)
        return None if engine is None else self._view(engine)

    def failure(self, model: str, revision: str) -> GatewayError | None:
        """Return why the last start of this file failed, on any backend or device."""
        for key, backoff in self._backoffs.items():
            if key.model == model and backoff.revision == revision:
                return backoff.error
        return None

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
            effects.append(Refuse(ask.ticket, _shutting_down()))
            return
        if (
            engine is not None
            and engine.state is EngineState.READY
            and covers(engine.options, ask.spec.wants)
        ):
            # Whoever waits for this key already asks for options the engine does not have.
            self._grant(ask.ticket, engine, ask.ttl_s, now, effects)
            return
        backoff = self._backoffs.get(key)
        if engine is None and backoff is not None and backoff.holds(ask.spec.revision, now):
            left_s = backoff.until - now
            effects.append(Refuse(ask.ticket, backoff.error.again(retry_after_s=left_s)))
            return
        if self._max_queue is not None and len(self._queue) >= self._max_queue:
            effects.append(Refuse(ask.ticket, _queue_full(key, self._max_queue)))
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
            self._backoffs.pop(engine_id.key, None)
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
            error = event.failure or _start_failed(engine.id.key)
            self._note_failure(engine, error, now)
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
                self._refuse_waiting(engine.id.key, _unloaded(engine.id.key), effects)
            self._stop(engine, "unload", effects, force=True)
        else:
            self._retire(engine, "unload", effects)
        self._advance(now, effects)

    def _tick(self, now: float, effects: list[Effect]) -> None:
        for waiter in list(self._queue.values()):
            if waiter.deadline is not None and waiter.deadline <= now:
                self._refuse(waiter.ticket, self._too_late(waiter, now), effects)
        for engine in self._engines.values():
            deadline = engine.idle_deadline()
            if deadline is not None and deadline <= now:
                self._stop(engine, "idle", effects)
        self._advance(now, effects)

    def _shutdown(self, force: bool, effects: list[Effect]) -> None:
        self._closing = True
        for ticket in list(self._queue):
            self._refuse(ticket, _shutting_down(), effects)
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
            if (
                engine is not None
                and engine.state is EngineState.READY
                and covers(engine.options, waiter.spec.wants)
            ):
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

    # Failures.

    def _note_failure(self, engine: _Engine, error: GatewayError, now: float) -> None:
        before = self._backoffs.get(engine.id.key)
        failures = 1
        if before is not None and before.revision == engine.spec.revision:
            failures = before.failures + 1
        doublings = min(failures - 1, 64)  # 2.0**1024 is an OverflowError, after a day of failures
        wait_s = min(self._backoff_first_s * 2.0**doublings, self._backoff_max_s)
        self._backoffs[engine.id.key] = _Backoff(
            error, engine.spec.revision, failures, now + wait_s
        )

    def _too_late(self, waiter: _Waiter, now: float) -> GatewayError:
        waited_s = now - waiter.arrived_at
        model = waiter.spec.key.model
        engine = self._engines.get(waiter.spec.key)
        if engine is not None and engine.state is EngineState.STARTING:
            return LoadingTimeout(
                f"{model} is still loading after {waited_s:.0f} s. Ask again: the load goes on.",
                retry_after_s=5.0,
            )
        return QueueTimeout(
            f"No place for {model} became free in {waited_s:.0f} s. "
            "Ask again later, unload another model, or raise max_loaded.",
            retry_after_s=10.0,
        )


def _shutting_down() -> GatewayError:
    return ShuttingDown("The server is shutting down and takes no new requests.", retry_after_s=5.0)


def _queue_full(key: ModelKey, limit: int) -> GatewayError:
    return QueueFull(
        f"{limit} requests wait already; {key.model} cannot be queued. Ask again later.",
        retry_after_s=5.0,
    )


def _start_failed(key: ModelKey) -> GatewayError:
    return EngineStartFailed(f"The engine of {key.model} ended before it was ready.")


def _unloaded(key: ModelKey) -> GatewayError:
    return EngineUnloaded(f"{key.model} was unloaded by force while it was loading.")
