"""What the scheduler is told, and what it asks for: two closed sets of values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from xandrouting.core.errors import GatewayError
from xandrouting.core.ladder import Rung
from xandrouting.core.model import (
    DeviceReading,
    EngineId,
    EngineSpec,
    Level,
    LoadOptions,
    MemoryUse,
    Placement,
    Ticket,
)
from xandrouting.core.planner import Decision


@dataclass(frozen=True, slots=True)
class Acquire:
    """A request wants an engine. `ttl_s` None: it does not say; 0: never unload when idle.

    `deadline` is when it gives up waiting, `queue_deadline` when it does if its engine has not
    even begun to start by then; None: it waits for as long as it takes. `works`: the engine
    will be asked for something; a mere load only wants it there.
    """

    ticket: Ticket
    spec: EngineSpec
    ttl_s: float | None = None
    deadline: float | None = None
    queue_deadline: float | None = None
    works: bool = True


@dataclass(frozen=True, slots=True)
class Release:
    """The end of a ticket: served, refused, or its client left.

    A load that was begun for it goes on, unless `cancel` takes it back: then it ends, if
    nobody else waits for it.
    """

    ticket: Ticket
    cancel: bool = False


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The engine's probe passed."""

    engine: EngineId


@dataclass(frozen=True, slots=True)
class EngineSlept:
    """The engine has given its memory back and waits to be woken.

    `use` is what it was then seen to keep; nothing is known of one that only rests.
    """

    engine: EngineId
    use: MemoryUse = field(default_factory=MemoryUse)


@dataclass(frozen=True, slots=True)
class SleepFailed:
    """The engine was told to sleep and its memory is not free.

    `hopeless`: it did not even answer, so no other level is worth a try.
    """

    engine: EngineId
    hopeless: bool = False


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine serves no more and is on its way out; its memory still counts."""

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
class Pin:
    """From now on this model is never a victim and has no TTL, or is like any other again."""

    model: str
    pinned: bool = True


@dataclass(frozen=True, slots=True)
class Measured:
    """The memory was measured: each device, and what the engines take that could be read.

    `spare_bytes` of main memory are processes that wait for a load. They are given up when
    memory is short, so they count as free.
    """

    devices: tuple[DeviceReading, ...]
    engines: Mapping[EngineId, MemoryUse] = field(default_factory=dict)
    spare_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Take no new work and let every engine go: after its leases, or with `force` at once."""

    force: bool = False


Event: TypeAlias = (
    Acquire
    | Release
    | EngineReady
    | EngineSlept
    | SleepFailed
    | EngineLost
    | EngineExited
    | Unload
    | Pin
    | Measured
    | Tick
    | Shutdown
)


@dataclass(frozen=True, slots=True)
class Start:
    """Start this engine with these options, all of them settled; or wake it, if it sleeps.

    Every start and every eviction carries the decision that led to it.
    """

    engine: EngineId
    spec: EngineSpec
    options: LoadOptions
    placement: Placement = ()
    wakes: bool = False
    decision: Decision | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Prepare:
    """This model is to be loaded once there is room: have its files read ahead."""

    spec: EngineSpec


@dataclass(frozen=True, slots=True)
class Sleep:
    """Have this engine give its memory back and wait, or sleep deeper than it does.

    `rung` is what the level was chosen by; None: there was nothing to choose.
    """

    engine: EngineId
    level: Level = Level.REST
    rung: Rung | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Stop:
    """End this engine.

    `reason` is `idle`, `evicted`, `options`, `unload`, `cancelled`, `shutdown` or
    `sleep_failed`.
    """

    engine: EngineId
    reason: str
    force: bool = False
    decision: Decision | None = field(default=None, compare=False, repr=False)


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


Effect: TypeAlias = Start | Prepare | Sleep | Stop | Grant | Refuse
