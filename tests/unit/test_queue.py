"""Who waits for which engine."""

from __future__ import annotations

from tests.unit.scheduling import LLAMA, QWEN, A, B, C, D
from xandrouting.core.events import Acquire
from xandrouting.core.model import EngineSpec, Ticket
from xandrouting.core.queue import Queue


def queue_of(*asks: tuple[Ticket, EngineSpec], now: float = 0.0) -> Queue:
    queue = Queue()
    for ticket, spec in asks:
        queue.add(Acquire(ticket, spec), now)
    return queue


def due(queue: Queue, now: float) -> list[tuple[Ticket, bool]]:
    return [(waiter.ticket, of_queue) for waiter, of_queue in queue.due(now)]


def test_an_empty_queue() -> None:
    queue = Queue()
    assert len(queue) == 0
    assert queue.lines() == queue.tickets() == []
    assert queue.line(QWEN.key) is queue.find(A) is queue.position(A) is None
    assert queue.next_deadline() is None
    assert due(queue, 1e9) == []


def test_one_line_for_each_engine_in_the_order_of_arrival() -> None:
    queue = queue_of((A, LLAMA), (B, QWEN), (C, LLAMA), now=7.0)
    assert [list(line.waiters) for line in queue.lines()] == [[A, C], [B]]
    assert queue.line(QWEN.key) is queue.lines()[1]
    assert queue.tickets() == [A, B, C]
    assert len(queue) == 3
    waiter = queue.find(C)
    assert waiter is not None
    assert (waiter.spec, waiter.arrived_at, waiter.number) == (LLAMA, 7.0, 3)


def test_a_line_is_as_old_as_its_first_who_is_still_here() -> None:
    queue = queue_of((A, LLAMA), (B, QWEN), (C, LLAMA))
    assert queue.leave(A) == LLAMA.key
    assert [line.first.ticket for line in queue.lines()] == [B, C]


def test_a_line_ends_with_its_last() -> None:
    queue = queue_of((A, LLAMA), (B, QWEN))
    first = queue.lines()[0]
    first.tried_again = True
    queue.leave(A)
    assert queue.line(LLAMA.key) is None
    queue.add(Acquire(C, LLAMA), 1.0)
    assert [line.tried_again for line in queue.lines()] == [False, False]
    assert queue.tickets() == [B, C]


def test_a_position_counts_who_came_before_whatever_they_wait_for() -> None:
    queue = queue_of((A, LLAMA), (B, QWEN), (C, LLAMA))
    assert [queue.position(t) for t in (A, B, C, D)] == [0, 1, 2, None]
    queue.leave(A)
    assert [queue.position(t) for t in (A, B, C, D)] == [None, 0, 1, None]


def test_a_deadline_is_told_once_when_it_has_come() -> None:
    queue = Queue()
    queue.add(Acquire(A, QWEN, deadline=5.0), 0.0)
    queue.add(Acquire(B, QWEN, deadline=3.0), 0.0)
    queue.add(Acquire(C, QWEN), 0.0)
    assert queue.next_deadline() == 3.0
    assert due(queue, 2.9) == []
    assert due(queue, 3.0) == [(B, False)]
    assert queue.next_deadline() == 5.0
    assert due(queue, 9.0) == [(A, False)]
    assert queue.next_deadline() is None
    assert len(queue) == 3  # to let them go is the scheduler's


def test_two_deadlines_are_two() -> None:
    queue = Queue()
    queue.add(Acquire(A, QWEN, deadline=5.0, queue_deadline=3.0), 0.0)
    assert due(queue, 4.0) == [(A, True)]
    assert due(queue, 5.0) == [(A, False)]


def test_whose_ticket_has_left_is_not_due_and_wakes_nobody() -> None:
    queue = Queue()
    queue.add(Acquire(A, QWEN, deadline=3.0), 0.0)
    queue.add(Acquire(B, QWEN, deadline=4.0), 0.0)
    queue.add(Acquire(C, QWEN, deadline=5.0), 0.0)
    queue.leave(A)
    queue.leave(B)
    assert queue.next_deadline() == 5.0
    queue.leave(C)
    assert queue.next_deadline() is None


def test_whose_ticket_has_left_is_not_due_either_where_nobody_asked_for_the_next() -> None:
    queue = Queue()
    queue.add(Acquire(A, QWEN, deadline=3.0), 0.0)
    queue.add(Acquire(B, QWEN, deadline=4.0), 0.0)
    queue.leave(A)
    assert due(queue, 9.0) == [(B, False)]
