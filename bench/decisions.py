"""How long the scheduler takes to decide, with many engines and a long queue."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import replace

from bench.stage import Effort
from bench.table import Row, show
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
)
from xandrouting.core.ledger import Ledger
from xandrouting.core.model import (
    HOST,
    Backend,
    EngineId,
    EngineSpec,
    FixedCost,
    Footprint,
    LoadOptions,
    ModelKey,
    Terms,
    Ticket,
)
from xandrouting.core.scheduler import Scheduler

GIB = 1 << 30
DECISIONS = 10_000
WAITERS = 500
SIZES = (10, 50, 200)
MODELS_PER_PLACE = 2  # half of the models are out at any time
WAIT_S = 60.0
STEP_S = 0.01


class World:
    """A scheduler whose engines start, serve and end at once when they are told to.

    As many engines are loaded as fit and as many requests wait as were asked for: each that is
    served is followed by the next.
    """

    def __init__(self, engines: int, waiters: int, *, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.scheduler = Scheduler(
            Ledger(budgets={HOST: engines * 4 * GIB}),
            fair_wait_s=1.0,
            min_residency_s=0.5,
        )
        self.models = [_model(number) for number in range(engines * MODELS_PER_PLACE)]
        self.waiters = waiters
        self.now = 0.0
        self.numbers = 0
        self.decisions = 0
        self.seconds = 0.0
        self.spent: list[float] = []
        self.held: list[Ticket] = []
        self.refused: list[Ticket] = []
        self.news: list[Event] = []
        for _ in range(4 * len(self.models)):
            self.turn()
        self.seconds, self.decisions = 0.0, 0
        self.spent.clear()

    def turn(self) -> None:
        """Let one thing happen."""
        self.now += STEP_S
        if self.news:
            self.send(self.news.pop(0))
        elif self.refused:
            self.send(Release(self.refused.pop()))
        elif self.scheduler.queued < self.waiters:
            self.numbers += 1
            spec = self.random.choice(self.models)
            wants = LoadOptions(n_ctx=self.random.choice((None, 2048, 4096)))
            self.send(Acquire(Ticket(self.numbers), replace(spec, wants=wants), None, None))
        elif self.held:
            self.held, ticket = _without(self.held, self.random.randrange(len(self.held)))
            self.send(Release(ticket))

    def send(self, event: Event) -> None:
        began = time.perf_counter()
        effects = self.scheduler.handle(event, now=self.now)
        self.scheduler.next_wakeup(now=self.now)
        took = time.perf_counter() - began
        self.spent.append(took)
        self.seconds += took
        self.decisions += 1
        for effect in effects:
            self.follow(effect)

    def follow(self, effect: Effect) -> None:
        match effect:
            case Start(engine=EngineId() as engine):
                self.news.append(EngineReady(engine))
            case Stop(engine=EngineId() as engine):
                self.news.append(EngineExited(engine))
            case Grant(ticket=ticket):
                self.held.append(ticket)
            case Refuse(ticket=ticket):
                self.refused.append(ticket)


def decisions(effort: Effort) -> list[Row]:
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    worst_ms = 0.0
    for round_ in range(effort.rounds):
        for size in SIZES:
            world = World(size, WAITERS, seed=round_)
            while world.decisions < DECISIONS:
                world.turn()
            seconds[size].append(world.seconds)
            if size == 50:
                worst_ms = max(worst_ms, max(world.spent) * 1000)
    taken = {size: statistics.median(each) for size, each in seconds.items()}
    growth = taken[200] / taken[10]
    return [
        Row(
            f"{DECISIONS:,} decisions, 50 engines, {WAITERS} waiters",
            taken[50],
            "s",
            1,
            gateway=show(taken[50], "s"),
            note=f"the slowest single one took {worst_ms:.2f} ms",
        ),
        Row(
            "the same from 10 to 200 engines",
            growth,
            "x",
            # n log n: 20 times as many, each log 200 / log 10 times as long
            20 * 2.30,
            gateway=", ".join(f"{size}: {show(each, 's')}" for size, each in taken.items()),
        ),
    ]


def _model(number: int) -> EngineSpec:
    size = (2 + number % 5) * GIB
    name = f"/models/m{number}.gguf"
    return EngineSpec(
        ModelKey(name, Backend.LLAMACPP, "cpu"),
        name,
        cost=FixedCost(Footprint(host=Terms(weights=size))),
        defaults=LoadOptions(n_ctx=4096, n_parallel=4),
    )


def _without(tickets: list[Ticket], position: int) -> tuple[list[Ticket], Ticket]:
    last = tickets.pop()
    if position == len(tickets):
        return tickets, last
    tickets[position], last = last, tickets[position]
    return tickets, last
