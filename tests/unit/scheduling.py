"""Values and small words the scheduler's tests share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from xandrouting.core.cover import fill
from xandrouting.core.errors import GatewayError
from xandrouting.core.events import Acquire, EngineReady, Refuse, Release, Start
from xandrouting.core.ledger import Ledger
from xandrouting.core.model import (
    Backend,
    Cost,
    DeviceReading,
    EngineId,
    EngineSpec,
    FixedCost,
    Footprint,
    LoadOptions,
    ModelKey,
    Placement,
    Terms,
    Ticket,
)
from xandrouting.core.scheduler import Scheduler

GIB: Final = 2**30
CARD, CARD_1 = "cuda:0", "cuda:1"
ONE_CARD: tuple[Placement, ...] = ((CARD,),)
TWO_CARDS: tuple[Placement, ...] = ((CARD,), (CARD_1,), (CARD, CARD_1))  # one alone, else both


def gib(amount: float) -> int:
    """Return so many GiB in bytes."""
    return int(amount * GIB)


@dataclass(frozen=True, slots=True)
class GrowingCost:
    """Weights, and a cache that grows with context and slots; each layer takes its share of both.

    `cache_gib` is of one slot, for each 1,024 tokens stored as f16.
    """

    weights_gib: float
    cache_gib: float
    layers: int = 0

    def footprint(self, options: LoadOptions, cards: int = 1) -> Footprint:
        cache_gib = self.cache_gib * (options.n_parallel or 1) * (options.n_ctx or 2048) / 1024
        if options.cache_type_k == "q8_0":
            cache_gib /= 2
        asked = options.n_gpu_layers
        there = self.layers if asked in (None, -1) else asked
        share = there / self.layers if self.layers else 0.0
        terms = [
            Terms(weights=gib(self.weights_gib * part), kv_cache=gib(cache_gib * part))
            for part in (1 - share, share)
        ]
        return Footprint(host=terms[0], device=terms[1])


def model(
    name: str, *, engines: int = 1, host_gib: float = 0, defaults: LoadOptions | None = None
) -> EngineSpec:
    return EngineSpec(
        ModelKey(f"/models/{name}.gguf", Backend.LLAMACPP, "cpu"),
        f"/models/{name}.gguf",
        defaults=LoadOptions(n_ctx=2048) if defaults is None else defaults,
        cost=FixedCost(Footprint(engines, host=Terms(weights=gib(host_gib)))),
    )


def growing(name: str, cost: Cost, placements: tuple[Placement, ...] = ((),)) -> EngineSpec:
    """Return a model whose size follows from its options, with four slots unless asked."""
    device = "cuda" if placements != ((),) else "cpu"
    layers = -1 if device == "cuda" else 0
    return EngineSpec(
        ModelKey(f"/models/{name}.gguf", Backend.LLAMACPP, device),
        f"/models/{name}.gguf",
        defaults=LoadOptions(
            n_ctx=1024,
            n_gpu_layers=layers,
            n_parallel=4,
            cache_type_k="f16",
            cache_type_v="f16",
        ),
        cost=cost,
        placements=placements,
    )


def on_cards(
    name: str,
    device_gib: float,
    *,
    host_gib: float = 0,
    placements: tuple[Placement, ...] = ONE_CARD,
) -> EngineSpec:
    """Return a model of a fixed size that runs on accelerators."""
    footprint = Footprint(host=Terms(weights=gib(host_gib)), device=Terms(weights=gib(device_gib)))
    return replace(growing(name, FixedCost(footprint), placements), defaults=LoadOptions())


def reading(
    device: str, capacity_gib: float, available_gib: float, *, stale: bool = False
) -> DeviceReading:
    return DeviceReading(device, f"a {device}", gib(capacity_gib), gib(available_gib), stale=stale)


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


def start(
    spec: EngineSpec, incarnation: int = 1, *, placement: Placement = (), **options: Any
) -> Start:
    """Return the start of an engine with the spec's own options, save those given here."""
    settled = replace(fill(spec.wants, spec.defaults), **options)
    return Start(nth(spec, incarnation), spec, settled, placement)


def wake(
    spec: EngineSpec, incarnation: int = 1, *, placement: Placement = (), **options: Any
) -> Start:
    """Return the same of one that sleeps."""
    return replace(start(spec, incarnation, placement=placement, **options), wakes=True)


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


def make_scheduler(
    max_engines: int | None = None,
    *,
    budgets: Mapping[str, int] | None = None,
    **options: Any,
) -> Scheduler:
    return Scheduler(Ledger(max_engines=max_engines, budgets=budgets), **options)


def busy(scheduler: Scheduler, ticket: Ticket, spec: EngineSpec, *, now: float = 0.0) -> None:
    """Load the spec's first engine for the ticket, which keeps its lease."""
    scheduler.handle(Acquire(ticket, spec), now=now)
    scheduler.handle(EngineReady(nth(spec, 1)), now=now)


def busy_again(scheduler: Scheduler, ticket: Ticket, spec: EngineSpec) -> None:
    """Load the spec's first engine for a ticket that lets it go and comes back at once."""
    busy(scheduler, ticket, spec)
    scheduler.handle(Release(ticket), now=0.0)
    scheduler.handle(Acquire(ticket, spec), now=0.0)


def idle(scheduler: Scheduler, spec: EngineSpec, *, since: float) -> None:
    """Load the spec's first engine and let it go again."""
    passing = Ticket(-1)
    busy(scheduler, passing, spec, now=since)
    scheduler.handle(Release(passing), now=since)


def idle_qwen(*, since: float, ttl_s: float = 60.0, **options: Any) -> Scheduler:
    scheduler = make_scheduler(default_ttl_s=ttl_s, **options)
    idle(scheduler, QWEN, since=since)
    return scheduler
