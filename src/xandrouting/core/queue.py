"""Who waits for which engine: one line for each, in the order of arrival."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from xandrouting.core.events import Acquire
from xandrouting.core.model import EngineId, EngineSpec, ModelKey, Ticket
from xandrouting.core.planner import Victim


@dataclass(frozen=True, slots=True)
class Waiter:
    """One who waits. `number` counts arrivals."""

    ticket: Ticket
    spec: EngineSpec
    ttl_s: float | None
    arrived_at: float
    number: int
    works: bool


@dataclass(slots=True)
class Line:
    """Those who wait for one engine. A line is never empty.

    `victims` have left for it already. `after` are engines whose memory a second try waits
    for, `tried_again` whether it was one. `prepared`: its files are being read ahead.
    """

    waiters: dict[Ticket, Waiter] = field(default_factory=dict)
    victims: tuple[Victim, ...] = ()
    after: set[EngineId] = field(default_factory=set)
    tried_again: bool = False
    prepared: bool = False

    @property
    def first(self) -> Waiter:
        """Who came first of those still here."""
        return next(iter(self.waiters.values()))


class _Deadline(NamedTuple):
    at: float
    ticket: Ticket
    of_queue: bool


class Queue:
    """All lines together, and when who gives up."""

    def __init__(self) -> None:
        self._lines: dict[ModelKey, Line] = {}
        self._keys: dict[Ticket, ModelKey] = {}
        self._deadlines: list[_Deadline] = []  # a heap; those of tickets that left count no more
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, ask: Acquire, now: float) -> None:
        """Let a request wait at the end of its line."""
        self._arrivals += 1
        key = ask.spec.key
        waiter = Waiter(ask.ticket, ask.spec, ask.ttl_s, now, self._arrivals, ask.works)
        self._lines.setdefault(key, Line()).waiters[ask.ticket] = waiter
        self._keys[ask.ticket] = key
        if ask.deadline is not None:
            heapq.heappush(self._deadlines, _Deadline(ask.deadline, ask.ticket, of_queue=False))
        if ask.queue_deadline is not None:
            due = _Deadline(ask.queue_deadline, ask.ticket, of_queue=True)
            heapq.heappush(self._deadlines, due)

    def leave(self, ticket: Ticket) -> ModelKey:
        """Take one out and return whose line it was in."""
        key = self._keys.pop(ticket)
        line = self._lines[key]
        del line.waiters[ticket]
        if not line.waiters:
            del self._lines[key]
        return key

    def line(self, key: ModelKey) -> Line | None:
        """Return those who wait for this engine; None: nobody does."""
        return self._lines.get(key)

    def lines(self) -> list[Line]:
        """Return every line, in the order in which their first came."""
        return sorted(self._lines.values(), key=lambda line: line.first.number)

    def find(self, ticket: Ticket) -> Waiter | None:
        """Return who waits with this ticket."""
        key = self._keys.get(ticket)
        return None if key is None else self._lines[key].waiters[ticket]

    def tickets(self) -> list[Ticket]:
        """Return the tickets of all who wait, in the order of arrival."""
        return list(self._keys)

    def position(self, ticket: Ticket) -> int | None:
        """How many came before this one and wait still; None when it does not wait."""
        me = self.find(ticket)
        if me is None:
            return None
        return sum(
            waiter.number < me.number
            for line in self._lines.values()
            for waiter in line.waiters.values()
        )

    def due(self, now: float) -> Iterator[tuple[Waiter, bool]]:
        """Take off the deadlines that have passed: whose, and whether of the queue only."""
        while self._deadlines and self._deadlines[0].at <= now:
            deadline = heapq.heappop(self._deadlines)
            waiter = self.find(deadline.ticket)
            if waiter is not None:
                yield waiter, deadline.of_queue

    def next_deadline(self) -> float | None:
        """When the next one gives up, unless it is served before."""
        while self._deadlines and self._deadlines[0].ticket not in self._keys:
            heapq.heappop(self._deadlines)
        return self._deadlines[0].at if self._deadlines else None
