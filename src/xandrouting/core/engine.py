"""One engine as the scheduler holds it, and as the lists show it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from xandrouting.core.cover import covers
from xandrouting.core.engine_state import EngineEvent, EngineState, step
from xandrouting.core.habit import Habit
from xandrouting.core.ledger import Amounts
from xandrouting.core.model import (
    HOST,
    EngineId,
    EngineSpec,
    Footprint,
    Level,
    LoadOptions,
    MemoryUse,
    Placement,
    Ticket,
)
from xandrouting.core.planner import Decision


@dataclass(slots=True)
class Engine:
    """One life of one engine. Times are the scheduler's clock."""

    id: EngineId
    spec: EngineSpec
    wants: LoadOptions  # the union of what was asked, without defaults
    options: LoadOptions
    placement: Placement
    footprint: Footprint
    decision: Decision
    ttl_s: float
    habit: Habit = field(default_factory=Habit)  # its model's, and the next life's too
    state: EngineState = EngineState.STARTING
    leases: set[Ticket] = field(default_factory=set)
    ready_at: float | None = None
    idle_since: float | None = None
    granted_at: float | None = None  # the last time in this life; None: never
    most: Counter[str] = field(default_factory=Counter)  # bytes it was ever measured to take
    worked: bool = False
    settled: bool = False  # it has worked, so what was measured is all it takes
    retire: str | None = None  # why it shall leave as soon as those who wait for it were served
    leaves_for: Decision | None = None  # whose place it makes when it has ended its leases
    level: Level | None = None  # how it sleeps, is told to, or slept before it loads now; None: not
    told_at: float | None = None  # when it was told to sleep or to load, the last time
    slept_at: float | None = None
    stays: bool = False  # until it is used again it sleeps no deeper than it does
    kept: Amounts = field(default_factory=dict)  # bytes of the accelerators, while it sleeps

    @property
    def counts(self) -> bool:
        """Whether it takes a place here; an upstream does not."""
        return self.footprint.engines > 0

    @property
    def is_idle(self) -> bool:
        """Whether it is ready or sleeps, or is about to, and has no leases."""
        return self.idle_since is not None

    @property
    def sleeps(self) -> bool:
        """Whether its model is not in memory, or on its way out."""
        return self.state in (EngineState.SUSPENDING, EngineState.SLEEPING)

    @property
    def rests(self) -> bool:
        """Whether it sleeps, and may wake with other options than it had."""
        return self.sleeps and self.level is Level.REST

    @property
    def wakes_as_it_was(self) -> bool:
        """Whether it sleeps in a way that no other options can be had by waking it."""
        return self.sleeps and self.level is not Level.REST

    @property
    def wakes_from(self) -> Level | None:
        """From which of these ways it wakes now; None: it does not."""
        wakes = self.state is EngineState.STARTING and self.level is not Level.REST
        return self.level if wakes else None

    def serves(self, spec: EngineSpec) -> bool:
        """Whether a request may have a lease on it now."""
        return self.state is EngineState.READY and self.does_for(spec)

    def will_serve(self, spec: EngineSpec) -> bool:
        """Whether a request may have a lease on it once it is ready."""
        return self.state is EngineState.STARTING and self.does_for(spec)

    def does_for(self, spec: EngineSpec) -> bool:
        """Whether what it was started with covers what is asked."""
        return (
            self.spec.revision == spec.revision  # another: its file has been replaced
            and spec.wants.tensor_parallel_size in (None, len(self.placement))
            and covers(self.options, spec.wants)
        )

    def lend(self, ticket: Ticket, now: float, *, works: bool) -> None:
        """Give it one more lease; one that `works` has it take all its memory."""
        self.leases.add(ticket)
        self.idle_since = None
        self.stays = False
        self.habit.granted(now)
        self.granted_at = now
        self.worked = self.worked or works

    def idle_deadline(self) -> float | None:
        """When its idle TTL ends; None while that clock does not run."""
        return _idle_deadline(self.state, self.idle_since, self.ttl_s)

    def sleep_deadline(self, soft_idle_s: float) -> float | None:
        """When it has been idle for long enough to sleep, or deeper; None: it does not."""
        if self.stays or not self.spec.levels:
            return None
        since = self.slept_at if self.state is EngineState.SLEEPING else None
        if self.state is EngineState.READY:
            since = self.idle_since
        return None if since is None else since + soft_idle_s

    def fall_asleep(self, level: Level, now: float) -> None:
        """Be told to sleep, or to sleep deeper."""
        self.state = step(self.state, EngineEvent.SLEEP)
        self.level, self.told_at = level, now

    def sleep(self, use: MemoryUse, now: float) -> None:
        """Be asleep; `use` is what was seen of it then."""
        self.slept_at = now
        self.stays = self.level is self.spec.levels[-1]
        self.kept = dict(use.devices or ())

    def wake(self, spec: EngineSpec, wants: LoadOptions, decision: Decision, now: float) -> None:
        """Load again, as decided anew: what it was seen to take before says nothing now."""
        self.state = step(self.state, EngineEvent.WAKE)
        self.told_at, self.slept_at, self.stays = now, None, False
        self.spec, self.wants, self.decision = spec, wants, decision
        self.options, self.placement = decision.options, decision.placement
        self.footprint = decision.footprint
        self.idle_since = self.ready_at = None
        self.most.clear()
        self.worked = self.settled = False

    def charge_for(self, use: MemoryUse) -> Amounts | None:
        """Return what to charge it, now that it was seen to take this; None: as before.

        Until it has worked and rests, what was promised to it counts too: an engine takes some
        of its memory only with its first request. One that starts keeps what it was promised.
        """
        if self.state is EngineState.SLEEPING and use.host_bytes is not None:
            # Its process may keep a little of the accelerators too, such as a CUDA context.
            devices = self.kept if use.devices is None else dict(use.devices)
            return {HOST: use.host_bytes, **devices}
        if self.state not in (EngineState.READY, EngineState.DRAINING):
            return None
        if use.host_bytes is not None:
            self.most[HOST] = max(self.most[HOST], use.host_bytes)
        for device, taken in use.devices or ():
            self.most[device] = max(self.most[device], taken)
        self.settled = self.settled or (self.worked and not self.leases)
        charge = dict(self.footprint.demands(self.placement))
        for device, most in self.most.items():
            charge[device] = most if self.settled else max(most, charge.get(device, 0))
        return charge


@dataclass(frozen=True, slots=True)
class EngineView:
    """An engine as the lists show it. `idle_since` is None while it has leases or loads.

    `charged` is what the ledger holds for it, by device; `level` is how it sleeps, if it does.
    """

    engine: EngineId
    spec: EngineSpec
    options: LoadOptions
    placement: Placement
    state: EngineState
    ttl_s: float
    pinned: bool
    idle_since: float | None
    active: int
    waiting: int
    charged: Amounts
    decision: Decision
    level: Level | None = None

    def idle_deadline(self) -> float | None:
        """When its idle TTL ends; None while that clock does not run."""
        if self.pinned:
            return None
        return _idle_deadline(self.state, self.idle_since, self.ttl_s)


def _idle_deadline(state: EngineState, idle_since: float | None, ttl_s: float) -> float | None:
    if idle_since is None or ttl_s == 0 or state not in (EngineState.READY, EngineState.SLEEPING):
        return None
    return idle_since + ttl_s
