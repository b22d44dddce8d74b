"""The engines of one node that are not gone, and each step of their lives.

A step changes the engine and what it is charged, and returns the effects that make it true.
When to take it is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

from xandrouting.core.engine import Engine
from xandrouting.core.engine_state import EngineEvent, EngineState, step
from xandrouting.core.events import Sleep, Start, Stop
from xandrouting.core.habit import Habit
from xandrouting.core.ladder import Rung
from xandrouting.core.ledger import DeviceState
from xandrouting.core.model import EngineId, EngineSpec, Level, LoadOptions, ModelKey
from xandrouting.core.planner import Decision
from xandrouting.core.queue import Queue
from xandrouting.core.weigher import Weigher


class Fleet:
    """One engine per key at most, in the order they were started.

    The queue is only read: whose engine is awaited. `soft_idle_s` None: no engine sleeps.
    """

    def __init__(
        self, weigher: Weigher, queue: Queue, *, default_ttl_s: float, soft_idle_s: float | None
    ) -> None:
        self.pinned: set[str] = set()  # models, loaded or not
        self._weigher = weigher
        self._queue = queue
        self._default_ttl_s = default_ttl_s
        self._soft_idle_s = soft_idle_s
        self._engines: dict[ModelKey, Engine] = {}
        self._incarnations: dict[ModelKey, int] = {}
        self._habits: dict[ModelKey, Habit] = {}

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines.values())

    def get(self, key: ModelKey) -> Engine | None:
        """Return the engine of this key that is not gone yet."""
        return self._engines.get(key)

    def current(self, engine_id: EngineId) -> Engine | None:
        """Return this very incarnation; None: it is gone, and what is told of it is late."""
        engine = self._engines.get(engine_id.key)
        return engine if engine is not None and engine.id == engine_id else None

    def movable(self) -> list[Engine]:
        """Return the engines that may be asked to leave for others: ready ones and sleepers."""
        return [
            engine
            for engine in self
            if (engine.state is EngineState.READY or engine.sleeps)
            and engine.counts
            and engine.id.key.model not in self.pinned
        ]

    def devices(self) -> tuple[DeviceState, ...]:
        """Return the ledger's lines, main memory first."""
        return self._weigher.ledger.states(e.id for e in self if e.state is EngineState.STARTING)

    def idle_deadline(self, engine: Engine) -> float | None:
        """When its idle TTL ends; None while that clock does not run."""
        if engine.id.key.model in self.pinned:
            return None
        if engine.sleeps and self._is_awaited(engine):
            return None  # it will be woken as soon as there is room
        return engine.idle_deadline()

    def sleep_deadline(self, engine: Engine) -> float | None:
        """When it has been idle for long enough to sleep, or deeper; None: it does not."""
        if self._soft_idle_s is None or engine.id.key.model in self.pinned:
            return None
        if engine.sleeps and self._is_awaited(engine):
            return None
        return engine.sleep_deadline(self._soft_idle_s)

    def _is_awaited(self, engine: Engine) -> bool:
        return self._queue.line(engine.id.key) is not None

    # The steps of a life, from its start to its end.

    def asked(self, key: ModelKey, now: float) -> None:
        """Note that somebody wants this engine, whether or not it is there."""
        self._habits.setdefault(key, Habit()).asked(now)

    def start(
        self, spec: EngineSpec, wants: LoadOptions, decision: Decision, *, ttl_s: float | None
    ) -> Start:
        """Begin a new life under a key that was asked for; `ttl_s` None: as by default."""
        key = spec.key
        incarnation = self._incarnations[key] = self._incarnations.get(key, 0) + 1
        engine = self._engines[key] = Engine(
            EngineId(key, incarnation),
            spec,
            wants,
            decision.options,
            decision.placement,
            decision.footprint,
            decision,
            self._default_ttl_s if ttl_s is None else ttl_s,
            self._habits[key],
        )
        return self._load(engine)

    def wake(
        self, engine: Engine, spec: EngineSpec, wants: LoadOptions, decision: Decision, now: float
    ) -> Start:
        """Have a sleeper load, as decided anew."""
        engine.wake(spec, wants, self._weigher.waking(engine, decision), now)
        return self._load(engine, wakes=True)

    def _load(self, engine: Engine, *, wakes: bool = False) -> Start:
        charge = dict(engine.footprint.demands(engine.placement))
        self._weigher.ledger.charge(engine.id, charge)
        return Start(
            engine.id,
            engine.spec,
            engine.options,
            engine.placement,
            wakes=wakes,
            decision=engine.decision,
        )

    def put_to_sleep(self, engine: Engine, rung: Rung, now: float) -> Sleep:
        """Have an idle engine sleep, or a sleeper deeper."""
        self._weigher.suspends(engine, rung)
        engine.fall_asleep(rung.level, now)
        return Sleep(engine.id, rung.level, None if rung.level is Level.REST else rung)

    def replace(self, engine: Engine) -> list[Stop]:
        """Let the engine go for one of its key with other options."""
        if not engine.sleeps:
            return self.drain(engine, "options")
        engine.retire = "options"
        return [self.stop(engine, "options")]

    def retire(self, engine: Engine, reason: str) -> list[Stop]:
        """Let the engine go once those it was promised to have been served."""
        if engine.state is EngineState.READY:
            return self.drain(engine, reason)
        if engine.state is EngineState.STARTING and self._is_awaited(engine):
            engine.retire = reason
        elif engine.state is EngineState.STARTING or engine.sleeps:
            return [self.stop(engine, reason)]
        return []

    def drain(self, engine: Engine, reason: str) -> list[Stop]:
        """Let the engine go once it has ended its leases."""
        engine.state = step(engine.state, EngineEvent.DRAIN)
        engine.retire = reason
        return [] if engine.leases else [self.stop(engine, reason)]

    def stop(
        self,
        engine: Engine,
        reason: str,
        *,
        force: bool = False,
        decision: Decision | None = None,
    ) -> Stop:
        """End the engine; its memory counts until it has exited."""
        self.lose(engine)
        return Stop(engine.id, reason, force, decision)

    def lose(self, engine: Engine) -> None:
        """Take an engine for one that is ending: by itself, or because it is told to."""
        engine.state = step(engine.state, EngineEvent.STOP)
        engine.idle_since = None

    def bury(self, engine: Engine) -> None:
        """Take an engine out that has exited: its key and its memory are free again."""
        engine.state = step(engine.state, EngineEvent.EXITED)
        engine.idle_since = None
        del self._engines[engine.id.key]
        self._weigher.ledger.release(engine.id)
