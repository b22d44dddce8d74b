"""What eviction costs: traces of requests, through the real scheduler, in virtual time.

Each trace is replayed for each policy with the same models, arrivals and service times:

- "ours": the scheduler with the defaults of its settings;
- "LRU": as many idle engines leave as make room, the one unused for longest first, and a loaded
  one may leave as soon as it is idle (no residency);
- "count LRU": the same with a limit of engines instead of bytes, as many as fit whichever they are:
  what the limit has to be where only a count can be set.

All three share the queue and its `fair_wait_s`: without it the first in the queue could wait for
ever behind an engine that is never idle, and LRU itself says nothing about that. An engine loads
by itself at the speed below, however many load at once, and serves any number of requests.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, Self

from bench.stage import Effort
from bench.table import Row, show
from xandrouting.core import eviction
from xandrouting.core.events import (
    Acquire,
    Effect,
    EngineExited,
    EngineReady,
    Event,
    Grant,
    Refuse,
    Release,
    Start,
    Stop,
    Tick,
)
from xandrouting.core.eviction import Candidate, Choose
from xandrouting.core.ledger import Ledger
from xandrouting.core.model import (
    HOST,
    Backend,
    EngineId,
    EngineSpec,
    FixedCost,
    Footprint,
    ModelKey,
    Terms,
    Ticket,
)
from xandrouting.core.scheduler import Scheduler
from xandrouting.settings import Settings

GIB: Final = 1 << 30
START_S: Final = 0.5
LOAD_BYTES_PER_S: Final = 1.5e9
STOP_S: Final = 0.1

SEEDS_PER_ROUND: Final = 4  # the p99 of one seed hangs on a dozen waits

SIZES_GIB: Final = (1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 14, 16)
BUDGET_BYTES: Final = sum(SIZES_GIB) * GIB // 3


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its client sends it so long after its last answer, the first after time 0."""

    after_s: float
    spec: EngineSpec
    takes_s: float


@dataclass(frozen=True, slots=True)
class Trace:
    """What clients ask, each one thing after the other, of models that share one budget."""

    clients: tuple[tuple[Ask, ...], ...]
    models: tuple[EngineSpec, ...]
    budget_bytes: int

    @property
    def always_fit(self) -> int:
        """How many engines fit, whichever they are."""
        sizes = sorted((weights(spec) for spec in self.models), reverse=True)
        return sum(total <= self.budget_bytes for total in accumulate(sizes))


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    choose: Choose
    min_residency_s: float
    by_count: bool = False

    def scheduler(self, trace: Trace) -> Scheduler:
        return Scheduler(
            Ledger(max_engines=trace.always_fit)
            if self.by_count
            else Ledger(budgets={HOST: trace.budget_bytes}),
            choose=self.choose,
            default_ttl_s=0.0,
            fair_wait_s=_default("fair_wait_s"),
            min_residency_s=self.min_residency_s,
        )


@dataclass(slots=True)
class Outcome:
    """What became of one trace. `waits_s` is from each arrival to its grant, by ticket."""

    waits_s: dict[Ticket, float] = field(default_factory=dict)
    switches: int = 0
    loaded_bytes: int = 0
    refused: int = 0
    most_engines: int = 0
    most_bytes: int = 0
    ended_at: float = 0.0


class Replay:
    """One scheduler, and a heap of what is going to happen."""

    def __init__(self, trace: Trace, scheduler: Scheduler) -> None:
        self.outcome = Outcome()
        self._scheduler = scheduler
        self._now = 0.0
        self._coming: list[tuple[float, int, Event]] = []
        self._numbers = 0
        self._clients = [iter(asks) for asks in trace.clients]
        self._open: dict[Ticket, tuple[int, Ask, float]] = {}  # client, request, arrival
        self._engines: dict[EngineId, int] = {}  # its weights, until it has exited
        self._started: set[ModelKey] = set()
        for client in range(len(self._clients)):
            self._next(client)

    def run(self) -> Outcome:
        while (event := self._next_event()) is not None:
            if isinstance(event, EngineExited):
                del self._engines[event.engine]
            for effect in self._scheduler.handle(event, now=self._now):
                self._follow(effect)
            if isinstance(event, Release):
                self._next(self._open.pop(event.ticket)[0])
        assert not self._open, "somebody waits for ever"
        self.outcome.ended_at = self._now
        return self.outcome

    def _next_event(self) -> Event | None:
        """Move the clock to what happens next and return it; None: nothing will any more."""
        wakeup = self._scheduler.next_wakeup(now=self._now)
        if self._coming and (wakeup is None or self._coming[0][0] <= wakeup):
            self._now, _, event = heapq.heappop(self._coming)
            return event
        if wakeup is None:
            return None
        self._now = max(self._now, wakeup)
        return Tick()

    def _next(self, client: int) -> None:
        """Have a client ask its next, if there is one."""
        ask = next(self._clients[client], None)
        if ask is not None:
            ticket = Ticket(self._numbers)
            self._open[ticket] = client, ask, self._now + ask.after_s
            self._after(ask.after_s, Acquire(ticket, ask.spec))

    def _after(self, seconds: float, event: Event) -> None:
        self._numbers += 1  # what comes at the same time happens in the order it was foreseen
        heapq.heappush(self._coming, (self._now + seconds, self._numbers, event))

    def _follow(self, effect: Effect) -> None:
        outcome = self.outcome
        match effect:
            case Start(engine=engine, spec=spec):
                size = self._engines[engine] = weights(spec)
                outcome.switches += engine.key in self._started
                self._started.add(engine.key)
                outcome.loaded_bytes += size
                outcome.most_engines = max(outcome.most_engines, len(self._engines))
                outcome.most_bytes = max(outcome.most_bytes, sum(self._engines.values()))
                self._after(load_s(spec), EngineReady(engine))
            case Stop(engine=engine):
                self._after(STOP_S, EngineExited(engine))
            case Grant(ticket=ticket):
                _, ask, arrived_at = self._open[ticket]
                assert ticket not in outcome.waits_s
                outcome.waits_s[ticket] = self._now - arrived_at
                self._after(ask.takes_s, Release(ticket))
            case Refuse(ticket=ticket):
                outcome.refused += 1
                self._after(0.0, Release(ticket))
            case _:
                raise AssertionError(effect)


def lru(lacking: Mapping[str, int], candidates: Iterable[Candidate]) -> list[Candidate] | None:
    """Return those unused for longest, as many as it takes; None: all are too few."""
    left = dict(lacking)
    leaving = []
    for candidate in sorted(candidates, key=lambda c: -c.idle_s):
        if any(candidate.frees.get(resource) for resource in left):
            leaving.append(candidate)
            freed = candidate.frees
            left = {r: n - freed.get(r, 0) for r, n in left.items() if n > freed.get(r, 0)}
    return None if left else leaving


def _default(setting: str) -> float:
    return float(Settings.model_fields[setting].default)


POLICIES: Final = (
    Policy("ours", eviction.choose, min_residency_s=_default("min_residency_s")),
    Policy("LRU", lru, min_residency_s=0.0),
    Policy("count LRU", lru, min_residency_s=0.0, by_count=True),
)


def zipf(seed: int) -> Trace:
    """1,000 requests, one each 6 s; of 12 models the n-th best liked is asked 1/n as often."""
    rng = random.Random(seed)
    models = _models(rng)
    popularity = [1 / (rank + 1) for rank in range(len(models))]
    at_s = 0.0
    clients = []
    for spec in rng.choices(models, popularity, k=1000):
        at_s += rng.expovariate(1 / 6.0)
        clients.append((Ask(at_s, spec, _service_s(rng)),))
    return Trace(tuple(clients), models, BUDGET_BYTES)


def bursts(seed: int) -> Trace:
    """5 users, each with 10 sessions: 5 to 30 requests to one model, then after a rest another."""
    rng = random.Random(seed)
    models = _models(rng)
    clients = []
    for _ in range(5):
        asks: list[Ask] = []
        spec = rng.choice(models)
        for _ in range(10):
            spec = rng.choice([model for model in models if model is not spec])
            asks.append(Ask(rng.expovariate(1 / 60.0), spec, _service_s(rng)))
            asks += [
                Ask(rng.lognormvariate(math.log(2.0), 0.6), spec, _service_s(rng))
                for _ in range(rng.randint(4, 29))
            ]
        clients.append(tuple(asks))
    return Trace(tuple(clients), models, BUDGET_BYTES)


def alternating(seed: int) -> Trace:
    """2 clients that ask 200 times as soon as they are answered, and of their models one fits."""
    rng = random.Random(seed)
    models = model("a", 8 * GIB), model("b", 8 * GIB)
    clients = [
        tuple(Ask(rng.uniform(0.05, 0.5), spec, _service_s(rng)) for _ in range(200))
        for spec in models
    ]
    return Trace(tuple(clients), models, 12 * GIB)


def daily(seed: int) -> Trace:
    """90 minutes: the smallest each 4 s, the two largest each 5 minutes, others each minute."""
    rng = random.Random(seed)
    models = _models(rng, shuffled=False)
    small, *middling, large, largest = models
    clients = []
    for some, each_s in (((small,), 4.0), (middling, 60.0), ((large, largest), 300.0)):
        at_s = rng.expovariate(1 / each_s)
        while at_s < 5400.0:
            clients.append((Ask(at_s, rng.choice(some), _service_s(rng)),))
            at_s += rng.expovariate(1 / each_s)
    return Trace(tuple(clients), models, BUDGET_BYTES)


TRACES: Final[Mapping[str, Callable[[int], Trace]]] = {
    "zipf": zipf,
    "bursts": bursts,
    "alternating": alternating,
    "daily": daily,
}


def simulate(effort: Effort) -> list[Row]:
    rows: list[Row] = []
    refused = 0
    for name, trace_of in TRACES.items():
        traces = [trace_of(seed) for seed in range(effort.rounds * SEEDS_PER_ROUND)]
        outcomes = {policy.name: [replay(trace, policy) for trace in traces] for policy in POLICIES}
        refused += sum(outcome.refused for each in outcomes.values() for outcome in each)
        rows += _rows(name, {policy: Summary.of(each) for policy, each in outcomes.items()})
    return [*rows, Row("simulated requests refused", refused, "", 0)]


@dataclass(frozen=True, slots=True)
class Summary:
    """All seeds of one trace with one policy: waits together, the rest on average."""

    switches: float
    p50_s: float
    p99_s: float
    mean_s: float
    loaded_gib: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Self:
        waits_s = sorted(wait_s for outcome in outcomes for wait_s in outcome.waits_s.values())
        return cls(
            statistics.mean(outcome.switches for outcome in outcomes),
            _percentile(waits_s, 0.50),
            _percentile(waits_s, 0.99),
            statistics.mean(waits_s),
            statistics.mean(outcome.loaded_bytes for outcome in outcomes) / GIB,
        )

    def __str__(self) -> str:
        return (
            f"{self.switches:,.0f} switches, {show(self.loaded_gib, 'GiB')} loaded, "
            f"wait p50 {show(self.p50_s, 's')}, mean {show(self.mean_s, 's')}"
        )


def _rows(name: str, summaries: Mapping[str, Summary]) -> Iterator[Row]:
    for policy, summary in summaries.items():
        yield Row(f"{name}, {policy}: p99 wait", summary.p99_s, "s", gateway=str(summary))
    ours, *others = summaries.values()
    least_s = min(other.p99_s for other in others)
    least_gib = min(other.loaded_gib for other in others)
    yield Row(f"{name}: p99 wait, to the best of the others", ours.p99_s / least_s, "x", 1)
    yield Row(
        f"{name}: bytes loaded, to the least of the others", ours.loaded_gib / least_gib, "x", 1
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[math.ceil(share * len(ordered)) - 1]


def replay(trace: Trace, policy: Policy) -> Outcome:
    return Replay(trace, policy.scheduler(trace)).run()


def model(name: str, size_bytes: int) -> EngineSpec:
    return EngineSpec(
        ModelKey(name, Backend.LLAMACPP, "cpu"),
        name,
        cost=FixedCost(Footprint(host=Terms(weights=size_bytes))),
    )


def weights(spec: EngineSpec) -> int:
    return spec.cost.footprint(spec.defaults).host.weights


def load_s(spec: EngineSpec) -> float:
    return START_S + weights(spec) / LOAD_BYTES_PER_S


def _models(rng: random.Random, *, shuffled: bool = True) -> tuple[EngineSpec, ...]:
    sizes = rng.sample(SIZES_GIB, len(SIZES_GIB)) if shuffled else SIZES_GIB
    return tuple(model(f"m{number}", size * GIB) for number, size in enumerate(sizes))


def _service_s(rng: random.Random) -> float:
    return rng.lognormvariate(math.log(2.0), 0.5)
