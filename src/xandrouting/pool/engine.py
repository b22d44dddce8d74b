"""One engine as the shell holds it, and what there is to tell of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from xandrouting.core.errors import GatewayError
from xandrouting.core.events import Start
from xandrouting.core.model import EngineId, EngineSpec, Level, MemoryUse
from xandrouting.core.planner import Decision
from xandrouting.engines.base import EngineAdapter, Phase
from xandrouting.launch.base import Handle
from xandrouting.net.client import Client

DEFAULT_RETRY_S: Final = 5.0
ALMOST: Final = 0.99  # only an engine that is ready has loaded all


@dataclass(frozen=True, slots=True)
class Loading:
    """How far a load is. `fraction` is 0 to 1; None: not known yet."""

    phase: Phase
    fraction: float | None
    seconds_left: float | None


class News(StrEnum):
    """What happened to an engine."""

    STARTING = "starting"
    PROGRESS = "progress"
    READY = "ready"
    SLEEPING = "sleeping"
    FAILED = "failed"
    STOPPING = "stopping"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class EngineNews:
    """Something happened to an engine. `reason` and `decision` say why one leaves."""

    news: News
    engine: Engine
    reason: str | None = None
    decision: Decision | None = None
    error: GatewayError | None = None


@dataclass(slots=True, eq=False)
class Engine:
    """One engine as the shell holds it. Times ending in `_at` are wall time, for people."""

    start: Start  # what the scheduler asked for
    decision: Decision
    adapter: EngineAdapter
    started: float  # the loop's clock
    spelling: str  # the string a client last used for the model
    label: bytes  # for the answer's header
    client: Client | None = None
    handle: Handle | None = None
    ready: float | None = None  # the loop's clock
    loaded_at: float | None = None
    used_at: float | None = None
    memory: MemoryUse = field(default_factory=MemoryUse)
    learned: bool = False  # what it takes was noted since it is ready
    level: Level | None = None  # how it sleeps, or did before it was woken
    sleep_asked: asyncio.Event = field(default_factory=asyncio.Event)
    deeper: asyncio.Event = field(default_factory=asyncio.Event)  # it sleeps, at another level
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    stop_asked: asyncio.Event = field(default_factory=asyncio.Event)
    stop_reason: str | None = None
    granted: bool = False  # somebody has had a lease on it
    served: asyncio.Event = field(default_factory=asyncio.Event)  # and has given it back
    forced: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def load_seconds(self) -> float | None:
        """From the start of its process to the first passing probe."""
        return None if self.ready is None else self.ready - self.started

    @property
    def id(self) -> EngineId:
        """Which life of which engine."""
        return self.start.engine

    @property
    def spec(self) -> EngineSpec:
        """What was asked for first."""
        return self.start.spec

    @property
    def serves(self) -> bool:
        """Whether it is ready, and told neither to sleep nor to stop."""
        asked = self.sleep_asked.is_set() or self.stop_asked.is_set()
        return self.ready is not None and not asked

    @property
    def wakes_by_calls(self) -> bool:
        """Whether it loads by waking from a sleep that kept its process as it was."""
        return self.start.wakes and self.level is not Level.REST

    def sleep(self, level: Level) -> None:
        """Be told to sleep, or to sleep deeper."""
        self.level = level
        (self.deeper if self.sleep_asked.is_set() else self.sleep_asked).set()

    def wake(self, start: Start, decision: Decision, now: float) -> None:
        """Load again: what was known of its last load and its memory holds no more."""
        self.start, self.decision, self.started = start, decision, now
        self.ready = self.loaded_at = None
        self.memory = MemoryUse()
        self.learned = self.wakes_by_calls  # how long a load takes is not learned from a wake
        self.granted = False
        self.sleep_asked.clear()
        self.woken.set()

    def loading(self, now: float) -> Loading | None:
        """How far its load is, by its own output, its memory and what loads took before.

        None once it is ready or told to stop.
        """
        if self.ready is not None or self.stop_asked.is_set():
            return None
        elapsed_s = now - self.started
        footprint = self.decision.footprint
        whole = footprint.host_bytes + footprint.device_bytes
        taken = (self.memory.host_bytes or 0) + (self.memory.device_bytes or 0)
        tail = () if self.handle is None else self.handle.tail()
        fraction = self.adapter.progress(tail)
        if fraction is None:
            fraction = taken / whole if taken and whole else None
        seconds_left = None
        if self.decision.learned and self.decision.expected_s:
            fraction = max(fraction or 0.0, elapsed_s / self.decision.expected_s)
            seconds_left = max(0.0, self.decision.expected_s - elapsed_s)
        elif fraction:
            seconds_left = max(0.0, elapsed_s * (1.0 - fraction) / fraction)
        phase = Phase.STARTING if self.handle is None else self.adapter.phase(tail)
        return Loading(phase, None if fraction is None else min(fraction, ALMOST), seconds_left)


def described(loading: Loading) -> dict[str, Any]:
    """Return how far a load is, as answers and events show it."""
    percent = None if loading.fraction is None else round(100 * loading.fraction)
    left = None if loading.seconds_left is None else round(loading.seconds_left, 1)
    return {"phase": loading.phase, "percent": percent, "seconds_left": left}


def retry_after_s(loading: Loading) -> float:
    """Return when it is worth asking again."""
    return max(1.0, DEFAULT_RETRY_S if loading.seconds_left is None else loading.seconds_left)
