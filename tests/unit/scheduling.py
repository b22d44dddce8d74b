"""Values and small words the scheduler's tests share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from xandrouting.core.cover import fill
from xandrouting.core.errors import GatewayError
from xandrouting.core.events import Acquire, EngineReady, Refuse, Release, Start
from xandrouting.core.ledger import Ledger
from xandrouting.core.model import (
    Backend,
    EngineId,
    EngineSpec,
    FixedCost,
    Footprint,
    LoadOptions,
    ModelKey,
    Ticket,
)
from xandrouting.core.scheduler import Scheduler


def model(name: str, *, engines: int = 1, defaults: LoadOptions | None = None) -> EngineSpec:
    return EngineSpec(
        ModelKey(f"/models/{name}.gguf", Backend.LLAMACPP, "cpu"),
        f"/models/{name}.gguf",
        defaults=LoadOptions(n_ctx=2048) if defaults is None else defaults,
        cost=FixedCost(Footprint(engines=engines)),
    )


def asking(spec: EngineSpec, **wants: Any) -> EngineSpec:
    """Return the spec of a request for the same engine that asks for these options."""
    return replace(spec, wants=LoadOptions(**wants))


def nth(spec: EngineSpec, incarnation: int) -> EngineId:
    return EngineId(spec.key, incarnation)


QWEN, LLAMA, MISTRAL = model("qwen"), model("llama"), model("mistral")
UPSTREAM = EngineSpec(
    ModelKey("ollama", Backend.UPSTREAM, "remote"),
    "http://127.0.0.1:11434",
    cost=FixedCost(Footprint(engines=0)),
)
QWEN_1, QWEN_2, QWEN_3 = nth(QWEN, 1), nth(QWEN, 2), nth(QWEN, 3)
LLAMA_1, MISTRAL_1, UPSTREAM_1 = nth(LLAMA, 1), nth(MISTRAL, 1), nth(UPSTREAM, 1)

A, B, C, D = (Ticket(n) for n in range(1, 5))


def start(spec: EngineSpec, incarnation: int = 1, **options: Any) -> Start:
    """Return the start of an engine with the spec's own options, save those given here."""
    settled = replace(fill(spec.wants, spec.defaults), **options)
    return Start(nth(spec, incarnation), spec, settled)


@dataclass(frozen=True, slots=True, eq=False)
class Refused:
    """Equals a Refuse of this ticket with an error of this type, whatever its words."""

    ticket: Ticket
    error: type[GatewayError]
    retry_after_s: float | None = None  # None: not looked at

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Refuse)
            and other.ticket == self.ticket
            and type(other.error) is self.error
            and self.retry_after_s in (None, other.error.retry_after_s)
        )

    __hash__ = None  # type: ignore[assignment]


def make_scheduler(max_engines: int | None = None, **options: Any) -> Scheduler:
    return Scheduler(Ledger(max_engines=max_engines), **options)


def busy(scheduler: Scheduler, ticket: Ticket, spec: EngineSpec, *, now: float = 0.0) -> None:
    """Load the spec's first engine for the ticket, which keeps its lease."""
    scheduler.handle(Acquire(ticket, spec), now=now)
    scheduler.handle(EngineReady(nth(spec, 1)), now=now)


def idle(scheduler: Scheduler, spec: EngineSpec, *, since: float) -> None:
    """Load the spec's first engine and let it go again."""
    passing = Ticket(-1)
    busy(scheduler, passing, spec, now=since)
    scheduler.handle(Release(passing), now=since)


def idle_qwen(*, since: float, ttl_s: float = 60.0, **options: Any) -> Scheduler:
    scheduler = make_scheduler(default_ttl_s=ttl_s, **options)
    idle(scheduler, QWEN, since=since)
    return scheduler
