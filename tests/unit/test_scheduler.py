"""The scheduler as values: each line is one event and all its effects."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.scheduling import (
    LLAMA,
    LLAMA_1,
    MISTRAL,
    MISTRAL_1,
    QWEN,
    QWEN_1,
    QWEN_2,
    QWEN_3,
    UPSTREAM,
    UPSTREAM_1,
    A,
    B,
    C,
    D,
    Refused,
    asking,
    busy,
    idle,
    idle_qwen,
    make_scheduler,
    model,
    nth,
    start,
)
from xandrouting.core.engine import EngineView
from xandrouting.core.engine_state import EngineState, InvalidTransition
from xandrouting.core.errors import (
    EngineStartFailed,
    EngineUnloaded,
    InsufficientMemory,
    InvalidRequest,
    LoadingTimeout,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from xandrouting.core.events import (
    Acquire,
    EngineExited,
    EngineReady,
    Grant,
    Release,
    Shutdown,
    Stop,
    Tick,
    Unload,
)
from xandrouting.core.model import ENGINES, HOST, LoadOptions, Ticket
from xandrouting.core.scheduler import Scheduler

# Loading on demand, and hits.


def test_a_request_loads_what_is_not_there() -> None:
    scheduler = make_scheduler()
    assert scheduler.handle(Acquire(A, QWEN), now=0.0) == [start(QWEN)]
    assert scheduler.handle(EngineReady(QWEN_1), now=2.0) == [Grant(A, QWEN_1)]
    assert scheduler.handle(Release(A), now=3.0) == []
    assert scheduler.tickets == 0


def test_a_ready_engine_is_lent_at_once_and_to_many() -> None:
    scheduler = idle_qwen(since=0.0)
    assert scheduler.handle(Acquire(A, QWEN), now=1.0) == [Grant(A, QWEN_1)]
    assert scheduler.handle(Acquire(B, QWEN), now=1.0) == [Grant(B, QWEN_1)]


def test_one_load_serves_all_who_wait_in_order() -> None:
    scheduler = make_scheduler()
    assert scheduler.handle(Acquire(A, QWEN), now=0.0) == [start(QWEN)]
    assert scheduler.handle(Acquire(B, QWEN), now=1.0) == []
    assert scheduler.handle(Acquire(C, QWEN), now=2.0) == []
    assert [scheduler.queue_position(t) for t in (A, B, C, D)] == [0, 1, 2, None]
    assert scheduler.handle(EngineReady(QWEN_1), now=3.0) == [
        Grant(A, QWEN_1),
        Grant(B, QWEN_1),
        Grant(C, QWEN_1),
    ]
    assert scheduler.queued == 0


def test_different_models_load_side_by_side() -> None:
    scheduler = make_scheduler()
    assert scheduler.handle(Acquire(A, QWEN), now=0.0) == [start(QWEN)]
    assert scheduler.handle(Acquire(B, LLAMA), now=0.0) == [start(LLAMA)]
    assert scheduler.handle(EngineReady(LLAMA_1), now=1.0) == [Grant(B, LLAMA_1)]


def test_a_load_goes_on_when_its_client_leaves() -> None:
    scheduler = make_scheduler(default_ttl_s=60.0)
    assert scheduler.handle(Acquire(A, QWEN), now=0.0) == [start(QWEN)]
    assert scheduler.handle(Release(A), now=1.0) == []
    assert scheduler.handle(EngineReady(QWEN_1), now=2.0) == []
    assert scheduler.handle(Tick(), now=62.0) == [Stop(QWEN_1, "idle")]


def test_a_ticket_in_use_is_our_own_mistake() -> None:
    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    with pytest.raises(ValueError, match="ticket 1 is in use"):
        scheduler.handle(Acquire(A, LLAMA), now=0.0)


# Idle TTL.


def test_ttl_runs_from_the_end_of_the_last_request() -> None:
    scheduler = idle_qwen(since=0.0, ttl_s=60.0)
    scheduler.handle(Acquire(A, QWEN), now=50.0)
    scheduler.handle(Acquire(B, QWEN), now=51.0)
    assert scheduler.handle(Release(A), now=55.0) == []
    assert scheduler.handle(Tick(), now=500.0) == []
    assert scheduler.handle(Release(B), now=500.0) == []
    assert scheduler.handle(Tick(), now=559.9) == []
    assert scheduler.handle(Tick(), now=560.0) == [Stop(QWEN_1, "idle")]
    assert scheduler.handle(Tick(), now=561.0) == []


def test_ttl_zero_is_never() -> None:
    scheduler = make_scheduler(default_ttl_s=60.0)
    scheduler.handle(Acquire(A, QWEN, ttl_s=0.0), now=0.0)
    scheduler.handle(EngineReady(QWEN_1), now=0.0)
    scheduler.handle(Release(A), now=0.0)
    assert scheduler.next_wakeup(now=0.0) is None
    assert scheduler.handle(Tick(), now=1e9) == []


def test_the_newest_request_s_ttl_counts() -> None:
    scheduler = idle_qwen(since=0.0, ttl_s=60.0)
    scheduler.handle(Acquire(A, QWEN, ttl_s=10.0), now=0.0)
    scheduler.handle(Acquire(B, QWEN, ttl_s=20.0), now=1.0)
    scheduler.handle(Release(B), now=2.0)
    scheduler.handle(Release(A), now=3.0)  # the older one ends last: its 10 s do not count
    assert scheduler.next_wakeup(now=3.0) == 23.0


def test_a_request_that_does_not_say_keeps_the_ttl() -> None:
    scheduler = idle_qwen(since=0.0, ttl_s=60.0)
    for ticket, ttl_s in [(A, 10.0), (B, None)]:
        scheduler.handle(Acquire(ticket, QWEN, ttl_s=ttl_s), now=0.0)
        scheduler.handle(Release(ticket), now=0.0)
    assert scheduler.next_wakeup(now=0.0) == 10.0


def test_request_arriving_with_the_deadline_wins() -> None:
    scheduler = idle_qwen(since=0.0)
    assert scheduler.handle(Acquire(B, QWEN), now=60.0) == [Grant(B, QWEN_1)]
    assert scheduler.handle(Tick(), now=60.0) == []


def test_tick_before_the_request_makes_it_wait_for_the_next_incarnation() -> None:
    scheduler = idle_qwen(since=0.0)
    assert scheduler.handle(Tick(), now=60.0) == [Stop(QWEN_1, "idle")]
    assert scheduler.handle(Acquire(B, QWEN), now=60.0) == []
    assert scheduler.handle(EngineExited(QWEN_1), now=62.0) == [start(QWEN, 2)]
    assert scheduler.handle(EngineReady(QWEN_2), now=64.0) == [Grant(B, QWEN_2)]


# Unloading by wish.


def test_unload_of_an_idle_engine_stops_it() -> None:
    scheduler = idle_qwen(since=0.0)
    assert scheduler.handle(Unload(QWEN_1), now=1.0) == [Stop(QWEN_1, "unload")]
    assert scheduler.handle(EngineExited(QWEN_1), now=2.0) == []
    assert scheduler.views() == []


def test_unload_of_a_busy_engine_drains_it_first() -> None:
    scheduler = idle_qwen(since=0.0)
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    scheduler.handle(Acquire(B, QWEN), now=0.0)
    assert scheduler.handle(Unload(QWEN_1), now=1.0) == []
    assert scheduler.handle(Unload(QWEN_1), now=1.0) == []
    assert scheduler.handle(Release(A), now=2.0) == []
    assert scheduler.handle(Release(B), now=3.0) == [Stop(QWEN_1, "unload")]
    assert scheduler.handle(Unload(QWEN_1), now=4.0) == []


def test_request_during_drain_and_stop_gets_the_next_incarnation() -> None:
    scheduler = idle_qwen(since=0.0)
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    scheduler.handle(Unload(QWEN_1), now=1.0)
    assert scheduler.handle(Acquire(B, QWEN), now=2.0) == []
    assert scheduler.handle(Release(A), now=3.0) == [Stop(QWEN_1, "unload")]
    assert scheduler.handle(Acquire(C, QWEN), now=4.0) == []
    assert scheduler.handle(EngineExited(QWEN_1), now=5.0) == [start(QWEN, 2)]
    assert scheduler.handle(EngineReady(QWEN_2), now=6.0) == [Grant(B, QWEN_2), Grant(C, QWEN_2)]


def test_forced_unload_of_a_busy_engine_does_not_wait_for_leases() -> None:
    scheduler = idle_qwen(since=0.0)
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    assert scheduler.handle(Unload(QWEN_1, force=True), now=1.0) == [
        Stop(QWEN_1, "unload", force=True)
    ]
    assert scheduler.handle(Release(A), now=1.1) == []
    assert scheduler.handle(EngineExited(QWEN_1), now=2.0) == []
    assert scheduler.tickets == 0


def test_forced_unload_of_a_draining_engine_ends_the_drain() -> None:
    scheduler = idle_qwen(since=0.0)
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    scheduler.handle(Unload(QWEN_1), now=1.0)
    assert scheduler.handle(Unload(QWEN_1, force=True), now=2.0) == [
        Stop(QWEN_1, "unload", force=True)
    ]


def test_forced_unload_of_a_starting_engine_refuses_those_who_wait_for_it() -> None:
    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    scheduler.handle(Acquire(B, LLAMA), now=0.0)
    assert scheduler.handle(Unload(QWEN_1, force=True), now=1.0) == [
        Refused(A, EngineUnloaded),
        Stop(QWEN_1, "unload", force=True),
    ]
    assert scheduler.handle(EngineExited(QWEN_1), now=2.0) == []
    assert scheduler.handle(EngineReady(LLAMA_1), now=2.0) == [Grant(B, LLAMA_1)]


def test_forced_unload_of_a_stopping_engine_hurries_it() -> None:
    scheduler = idle_qwen(since=0.0)
    assert scheduler.handle(Unload(QWEN_1), now=1.0) == [Stop(QWEN_1, "unload")]
    assert scheduler.handle(Acquire(A, QWEN), now=1.0) == []
    assert scheduler.handle(Unload(QWEN_1, force=True), now=2.0) == [
        Stop(QWEN_1, "unload", force=True)
    ]
    # Who came after the first unload waits for the next engine, not for this one.
    assert scheduler.handle(EngineExited(QWEN_1), now=2.1) == [start(QWEN, 2)]


def test_unload_of_a_starting_engine_serves_those_who_wait_first() -> None:
    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    assert scheduler.handle(Unload(QWEN_1), now=1.0) == []
    assert scheduler.handle(Acquire(B, QWEN), now=1.5) == []
    assert scheduler.handle(EngineReady(QWEN_1), now=2.0) == [Grant(A, QWEN_1), Grant(B, QWEN_1)]
    assert scheduler.handle(Acquire(C, QWEN), now=2.0) == []
    assert scheduler.handle(Release(A), now=3.0) == []
    assert scheduler.handle(Release(B), now=3.0) == [Stop(QWEN_1, "unload")]


def test_unload_of_a_starting_engine_whose_clients_leave_stops_it_when_ready() -> None:
    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    assert scheduler.handle(Unload(QWEN_1), now=1.0) == []
    assert scheduler.handle(Release(A), now=1.5) == []
    assert scheduler.handle(EngineReady(QWEN_1), now=2.0) == [Stop(QWEN_1, "unload")]


def test_unload_of_a_starting_engine_nobody_waits_for_stops_it() -> None:
    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    scheduler.handle(Release(A), now=0.5)
    assert scheduler.handle(Unload(QWEN_1), now=1.0) == [Stop(QWEN_1, "unload")]


def test_readiness_that_crosses_the_stop_changes_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    scheduler.handle(Unload(QWEN_1, force=True), now=1.0)
    scheduler.handle(Acquire(B, QWEN), now=1.0)
    assert scheduler.handle(EngineReady(QWEN_1), now=1.1) == []
    assert scheduler.handle(EngineExited(QWEN_1), now=2.0) == [start(QWEN, 2)]


# Room: a limit on how many engines there are, and who leaves for whom.


def test_the_engine_idle_for_longest_leaves_for_a_new_one() -> None:
    scheduler = make_scheduler(2)
    idle(scheduler, QWEN, since=1.0)
    idle(scheduler, LLAMA, since=0.0)
    assert scheduler.handle(Acquire(A, MISTRAL), now=5.0) == [Stop(LLAMA_1, "evicted")]
    assert scheduler.handle(EngineExited(LLAMA_1), now=6.0) == [start(MISTRAL)]


def test_nobody_else_is_evicted_while_one_is_leaving() -> None:
    scheduler = make_scheduler(2)
    idle(scheduler, QWEN, since=0.0)
    idle(scheduler, LLAMA, since=1.0)
    assert scheduler.handle(Acquire(A, MISTRAL), now=5.0) == [Stop(QWEN_1, "evicted")]
    assert scheduler.handle(Acquire(B, MISTRAL), now=5.0) == []
    assert scheduler.handle(Tick(), now=50.0) == []
    assert scheduler.handle(Release(B), now=50.0) == []


def test_an_engine_that_stops_for_another_reason_makes_room_too() -> None:
    scheduler = make_scheduler(2)
    idle(scheduler, QWEN, since=0.0)
    idle(scheduler, LLAMA, since=1.0)
    assert scheduler.handle(Unload(LLAMA_1), now=4.0) == [Stop(LLAMA_1, "unload")]
    assert scheduler.handle(Acquire(A, MISTRAL), now=5.0) == []
    assert scheduler.handle(EngineExited(LLAMA_1), now=6.0) == [start(MISTRAL)]


def test_a_place_promised_to_its_own_next_incarnation_is_no_room() -> None:
    scheduler = make_scheduler(2)
    idle(scheduler, QWEN, since=0.0)
    idle(scheduler, LLAMA, since=1.0)
    scheduler.handle(Unload(QWEN_1), now=2.0)
    assert scheduler.handle(Acquire(A, QWEN), now=3.0) == []
    assert scheduler.handle(Acquire(B, MISTRAL), now=3.0) == [Stop(LLAMA_1, "evicted")]
    assert scheduler.handle(EngineExited(QWEN_1), now=4.0) == [start(QWEN, 2)]
    assert scheduler.handle(EngineExited(LLAMA_1), now=4.0) == [start(MISTRAL)]


def test_as_many_leave_as_a_large_one_needs() -> None:
    giant = model("giant", engines=2)
    scheduler = make_scheduler(3)
    for since, spec in enumerate((QWEN, LLAMA, MISTRAL)):
        idle(scheduler, spec, since=float(since))
    assert scheduler.handle(Acquire(A, giant), now=5.0) == [
        Stop(QWEN_1, "evicted"),
        Stop(LLAMA_1, "evicted"),
    ]
    assert scheduler.handle(EngineExited(QWEN_1), now=6.0) == []
    assert scheduler.handle(EngineExited(LLAMA_1), now=6.0) == [start(giant)]


def test_a_busy_engine_is_not_evicted() -> None:
    scheduler = make_scheduler(1, fair_wait_s=5.0)
    busy(scheduler, A, QWEN)
    assert scheduler.handle(Acquire(B, LLAMA), now=1.0) == []
    assert scheduler.handle(Tick(), now=5.9) == []
    assert scheduler.handle(Release(A), now=5.9) == [Stop(QWEN_1, "evicted")]
    assert scheduler.handle(EngineExited(QWEN_1), now=6.0) == [start(LLAMA)]


def test_who_caused_a_load_is_served_before_the_engine_can_be_evicted() -> None:
    scheduler = make_scheduler(1)
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    assert scheduler.handle(Acquire(B, LLAMA), now=0.0) == []
    assert scheduler.handle(EngineReady(QWEN_1), now=2.0) == [Grant(A, QWEN_1)]
    assert scheduler.handle(Release(A), now=3.0) == [Stop(QWEN_1, "evicted")]


def test_an_engine_nobody_waits_for_any_more_is_evicted_when_ready() -> None:
    scheduler = make_scheduler(1)
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    scheduler.handle(Acquire(B, LLAMA), now=0.0)
    scheduler.handle(Release(A), now=1.0)
    assert scheduler.handle(EngineReady(QWEN_1), now=2.0) == [Stop(QWEN_1, "evicted")]


def test_the_head_of_the_queue_reserves() -> None:
    scheduler = make_scheduler(2, fair_wait_s=100.0)
    busy(scheduler, A, QWEN)
    busy(scheduler, B, LLAMA)
    assert scheduler.handle(Acquire(C, MISTRAL), now=1.0) == []
    # Later requests may use what is ready …
    hit, other, larger = Ticket(11), Ticket(12), Ticket(13)
    assert scheduler.handle(Acquire(hit, QWEN), now=2.0) == [Grant(hit, QWEN_1)]
    # … and neither start nor reload anything past the first.
    assert scheduler.handle(Acquire(other, model("other")), now=3.0) == []
    assert scheduler.handle(Acquire(larger, asking(LLAMA, n_ctx=4096)), now=3.0) == []
    assert scheduler.handle(Release(B), now=4.0) == [Stop(LLAMA_1, "evicted")]
    assert scheduler.handle(EngineExited(LLAMA_1), now=5.0) == [start(MISTRAL)]


def test_when_the_head_leaves_the_next_one_is_first() -> None:
    scheduler = make_scheduler(2, fair_wait_s=100.0)
    giant = model("giant", engines=2)
    busy(scheduler, A, QWEN)
    assert scheduler.handle(Acquire(B, giant), now=1.0) == []
    assert scheduler.handle(Acquire(C, LLAMA), now=2.0) == []
    assert scheduler.handle(Release(B), now=3.0) == [start(LLAMA)]


def test_a_blocked_head_does_not_hold_back_what_takes_no_room() -> None:
    scheduler = make_scheduler(1, fair_wait_s=100.0)
    busy(scheduler, A, QWEN)
    assert scheduler.handle(Acquire(B, LLAMA), now=1.0) == []
    assert scheduler.handle(Acquire(C, UPSTREAM), now=2.0) == [start(UPSTREAM)]
    assert scheduler.handle(EngineReady(UPSTREAM_1), now=3.0) == [Grant(C, UPSTREAM_1)]


def test_after_fair_wait_a_busy_engine_is_drained_for_the_head() -> None:
    scheduler = make_scheduler(1, fair_wait_s=5.0)
    busy(scheduler, A, QWEN)
    assert scheduler.handle(Acquire(B, LLAMA), now=1.0) == []
    assert scheduler.next_wakeup(now=1.0) == 6.0
    assert scheduler.handle(Tick(), now=6.0) == []  # drains: nobody is sent away
    assert scheduler.next_wakeup(now=6.0) is None
    assert scheduler.handle(Acquire(C, QWEN), now=7.0) == []
    assert scheduler.handle(Release(A), now=8.0) == [Stop(QWEN_1, "evicted")]
    assert scheduler.handle(EngineExited(QWEN_1), now=9.0) == [start(LLAMA)]
    assert scheduler.handle(EngineReady(LLAMA_1), now=10.0) == [Grant(B, LLAMA_1)]
    assert scheduler.handle(Release(B), now=11.0) == [Stop(LLAMA_1, "evicted")]
    assert scheduler.handle(EngineExited(LLAMA_1), now=12.0) == [start(QWEN, 2)]


def test_the_least_used_engine_is_drained_and_only_as_many_as_needed() -> None:
    scheduler = make_scheduler(3, fair_wait_s=5.0)
    busy(scheduler, A, QWEN, now=0.0)
    busy(scheduler, B, LLAMA, now=2.0)
    busy(scheduler, C, MISTRAL, now=1.0)
    scheduler.handle(Acquire(D, QWEN), now=3.0)
    scheduler.handle(Acquire(Ticket(11), model("other")), now=4.0)
    scheduler.handle(Tick(), now=9.0)
    scheduler.handle(Tick(), now=20.0)
    # qwen has two leases; of the others mistral was asked for less lately.
    assert _states(scheduler) == ["ready", "ready", "draining"]


def test_an_engine_still_loading_is_not_drained() -> None:
    scheduler = make_scheduler(1, fair_wait_s=5.0)
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    scheduler.handle(Acquire(B, LLAMA), now=0.0)
    assert scheduler.handle(Tick(), now=5.0) == []
    # Once it is ready, the head has waited for long enough.
    assert scheduler.handle(EngineReady(QWEN_1), now=9.0) == [Grant(A, QWEN_1)]
    assert scheduler.handle(Acquire(C, QWEN), now=9.0) == []
    assert scheduler.handle(Release(A), now=10.0) == [Stop(QWEN_1, "evicted")]


def test_what_takes_no_room_is_never_limited_nor_evicted() -> None:
    scheduler = make_scheduler(1)
    idle(scheduler, UPSTREAM, since=0.0)
    assert scheduler.handle(Acquire(A, QWEN), now=1.0) == [start(QWEN)]
    scheduler.handle(EngineReady(QWEN_1), now=2.0)
    assert scheduler.handle(Acquire(B, LLAMA), now=3.0) == []
    assert scheduler.handle(Tick(), now=20.0) == []
    assert _states(scheduler) == ["ready", "draining"]


# Options.


def test_options_an_engine_covers_are_a_hit() -> None:
    scheduler = idle_qwen(since=0.0)
    assert scheduler.handle(Acquire(A, asking(QWEN, n_ctx=2048)), now=1.0) == [Grant(A, QWEN_1)]
    assert scheduler.handle(Acquire(B, asking(QWEN, n_ctx=512)), now=1.0) == [Grant(B, QWEN_1)]


def test_options_it_does_not_cover_reload_it_after_its_leases() -> None:
    scheduler = make_scheduler()
    busy(scheduler, A, QWEN)
    larger = asking(QWEN, n_ctx=4096)
    assert scheduler.handle(Acquire(B, larger), now=1.0) == []
    assert scheduler.handle(Acquire(C, QWEN), now=2.0) == []
    assert scheduler.handle(Release(A), now=3.0) == [Stop(QWEN_1, "options")]
    assert scheduler.handle(EngineExited(QWEN_1), now=4.0) == [start(larger, 2)]
    assert scheduler.handle(EngineReady(QWEN_2), now=5.0) == [Grant(B, QWEN_2), Grant(C, QWEN_2)]


def test_an_idle_engine_is_reloaded_at_once() -> None:
    scheduler = idle_qwen(since=0.0)
    assert scheduler.handle(Acquire(A, asking(QWEN, n_gpu_layers=0)), now=1.0) == [
        Stop(QWEN_1, "options")
    ]


def test_two_clients_in_turn_cause_one_reload() -> None:
    scheduler = make_scheduler()
    small, large = asking(QWEN, n_ctx=2048), asking(QWEN, n_ctx=4096)
    scheduler.handle(Acquire(A, small), now=0.0)
    scheduler.handle(EngineReady(QWEN_1), now=0.0)
    scheduler.handle(Release(A), now=0.0)
    assert scheduler.handle(Acquire(B, large), now=1.0) == [Stop(QWEN_1, "options")]
    assert scheduler.handle(EngineExited(QWEN_1), now=1.0) == [start(large, 2)]
    assert scheduler.handle(EngineReady(QWEN_2), now=2.0) == [Grant(B, QWEN_2)]
    assert scheduler.handle(Release(B), now=3.0) == []
    for n, spec in enumerate([small, large] * 3, start=10):
        assert scheduler.handle(Acquire(Ticket(n), spec), now=4.0) == [Grant(Ticket(n), QWEN_2)]
        assert scheduler.handle(Release(Ticket(n)), now=5.0) == []


def test_the_next_incarnation_serves_what_the_last_one_was_asked_for() -> None:
    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, asking(QWEN, n_ctx=8192, n_parallel=4)), now=0.0)
    scheduler.handle(EngineReady(QWEN_1), now=0.0)
    scheduler.handle(Release(A), now=0.0)
    embedding = asking(QWEN, n_ctx=1024, embeddings=True)
    assert scheduler.handle(Acquire(B, embedding), now=1.0) == [Stop(QWEN_1, "options")]
    assert scheduler.handle(EngineExited(QWEN_1), now=1.0) == [
        start(embedding, 2, n_ctx=8192, n_parallel=4)
    ]


def test_defaults_fill_what_nobody_asked_and_are_not_inherited_as_wishes() -> None:
    scheduler = idle_qwen(since=0.0)
    changed = replace(asking(QWEN, n_gpu_layers=0), defaults=LoadOptions(n_ctx=1024))
    assert scheduler.handle(Acquire(A, changed), now=1.0) == [Stop(QWEN_1, "options")]
    assert scheduler.handle(EngineExited(QWEN_1), now=1.0) == [
        start(changed, 2, n_ctx=1024, n_gpu_layers=0)
    ]


def test_one_load_is_for_all_who_wait_and_the_first_wins_a_contradiction() -> None:
    scheduler = make_scheduler(1)
    busy(scheduler, A, LLAMA)
    first = asking(QWEN, n_ctx=2048, n_gpu_layers=10)
    scheduler.handle(Acquire(B, first), now=1.0)
    scheduler.handle(Acquire(C, asking(QWEN, n_ctx=4096, n_gpu_layers=20)), now=1.0)
    scheduler.handle(Acquire(D, asking(QWEN, embeddings=True)), now=1.0)
    scheduler.handle(Release(A), now=2.0)
    assert scheduler.handle(EngineExited(LLAMA_1), now=3.0) == [
        start(first, n_ctx=4096, n_gpu_layers=10, embeddings=True)
    ]
    assert scheduler.handle(EngineReady(QWEN_1), now=4.0) == [Grant(B, QWEN_1), Grant(D, QWEN_1)]
    assert scheduler.handle(Release(B), now=5.0) == []
    assert scheduler.handle(Release(D), now=5.0) == [Stop(QWEN_1, "options")]
    [restart] = scheduler.handle(EngineExited(QWEN_1), now=6.0)
    assert restart.options == LoadOptions(n_ctx=4096, n_gpu_layers=20, embeddings=True)


def test_what_a_starting_engine_will_not_cover_waits_for_the_one_after() -> None:
    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    larger = asking(QWEN, n_ctx=4096)
    assert scheduler.handle(Acquire(B, larger), now=1.0) == []
    assert scheduler.handle(EngineReady(QWEN_1), now=2.0) == [Grant(A, QWEN_1)]
    assert scheduler.handle(Acquire(C, QWEN), now=2.5) == []
    assert scheduler.handle(Release(A), now=3.0) == [Stop(QWEN_1, "options")]
    assert scheduler.handle(EngineExited(QWEN_1), now=4.0) == [start(larger, 2)]


def test_the_replaced_engine_s_ttl_is_inherited() -> None:
    scheduler = make_scheduler(default_ttl_s=60.0)
    scheduler.handle(Acquire(A, QWEN, ttl_s=7.0), now=0.0)
    scheduler.handle(EngineReady(QWEN_1), now=0.0)
    scheduler.handle(Release(A), now=0.0)
    scheduler.handle(Acquire(B, asking(QWEN, n_ctx=4096)), now=1.0)
    scheduler.handle(EngineExited(QWEN_1), now=1.0)
    scheduler.handle(EngineReady(QWEN_2), now=2.0)
    scheduler.handle(Release(B), now=3.0)
    assert scheduler.next_wakeup(now=3.0) == 10.0


def test_nothing_is_inherited_once_nobody_waits_for_the_replacement() -> None:
    scheduler = make_scheduler(1)
    scheduler.handle(Acquire(A, asking(QWEN, n_ctx=8192)), now=0.0)
    scheduler.handle(EngineReady(QWEN_1), now=0.0)
    scheduler.handle(Release(A), now=0.0)
    assert scheduler.handle(Acquire(B, asking(QWEN, embeddings=True)), now=1.0) == [
        Stop(QWEN_1, "options")
    ]
    assert scheduler.handle(Release(B), now=1.0) == []
    assert scheduler.handle(EngineExited(QWEN_1), now=2.0) == []
    assert scheduler.handle(Acquire(C, QWEN), now=3.0) == [start(QWEN, 2)]


def test_an_engine_that_left_for_another_reason_leaves_nothing_behind() -> None:
    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, asking(QWEN, n_ctx=8192), ttl_s=7.0), now=0.0)
    scheduler.handle(EngineReady(QWEN_1), now=0.0)
    scheduler.handle(Unload(QWEN_1), now=1.0)
    scheduler.handle(Acquire(B, QWEN), now=1.0)
    scheduler.handle(Release(A), now=2.0)
    assert scheduler.handle(EngineExited(QWEN_1), now=3.0) == [start(QWEN, 2)]


# Failures.


def test_a_failed_start_refuses_all_who_wait_for_it() -> None:
    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    scheduler.handle(Acquire(B, asking(QWEN, n_ctx=4096)), now=0.0)
    scheduler.handle(Acquire(C, LLAMA), now=0.0)
    failure = InsufficientMemory("qwen does not fit.")
    effects = scheduler.handle(EngineExited(QWEN_1, failure), now=2.0)
    assert effects == [Refused(A, InsufficientMemory), Refused(B, InsufficientMemory)]
    # Each raises an instance of its own: a raised error keeps its traceback.
    assert len({id(effect.error) for effect in effects} | {id(failure)}) == 3
    assert scheduler.handle(EngineReady(LLAMA_1), now=3.0) == [Grant(C, LLAMA_1)]


def test_a_failed_start_leaves_its_place_to_the_next() -> None:
    scheduler = make_scheduler(1)
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    scheduler.handle(Acquire(B, LLAMA), now=0.0)
    assert scheduler.handle(EngineExited(QWEN_1), now=2.0) == [
        Refused(A, EngineStartFailed),
        start(LLAMA),
    ]


def test_after_a_failure_nobody_tries_again_for_a_while() -> None:
    scheduler = make_scheduler(backoff_first_s=1.0)
    _fail(scheduler, QWEN_1, at=10.0)
    assert scheduler.handle(Acquire(A, QWEN), now=10.25) == [
        Refused(A, EngineStartFailed, retry_after_s=0.75)
    ]
    assert scheduler.handle(Release(A), now=10.25) == []
    assert scheduler.handle(Acquire(B, LLAMA), now=10.25) == [start(LLAMA)]
    assert scheduler.handle(Acquire(C, QWEN), now=11.0) == [start(QWEN, 2)]


def test_backoff_doubles_up_to_its_limit() -> None:
    scheduler = make_scheduler(backoff_first_s=1.0, backoff_max_s=5.0)
    now = 0.0
    for n, wait_s in enumerate([1.0, 2.0, 4.0, 5.0, 5.0], start=1):
        _fail(scheduler, nth(QWEN, n), at=now)
        assert _refused_for(scheduler, now=now) == wait_s
        now += wait_s


def test_a_model_that_fails_for_days_is_still_only_refused() -> None:
    scheduler = make_scheduler(backoff_first_s=1.0, backoff_max_s=60.0)
    for n in range(1, 1100):
        _fail(scheduler, nth(QWEN, n), at=n * 60.0)
    assert _refused_for(scheduler, now=1099 * 60.0) == 60.0


def test_a_success_resets_the_backoff() -> None:
    scheduler = make_scheduler(backoff_first_s=1.0)
    _fail(scheduler, QWEN_1, at=0.0)
    _fail(scheduler, QWEN_2, at=1.0)
    scheduler.handle(Acquire(A, QWEN), now=3.0)
    scheduler.handle(EngineReady(QWEN_3), now=4.0)
    scheduler.handle(Release(A), now=4.0)
    scheduler.handle(EngineExited(QWEN_3), now=5.0)
    _fail(scheduler, nth(QWEN, 4), at=6.0)
    assert _refused_for(scheduler, now=6.0) == 1.0


def test_a_failure_is_not_held_against_another_revision() -> None:
    scheduler = make_scheduler(backoff_first_s=1.0)
    _fail(scheduler, QWEN_1, at=0.0)
    mended = replace(QWEN, revision="mended")
    assert scheduler.handle(Acquire(A, mended), now=0.5) == [start(mended, 2)]
    assert scheduler.handle(EngineExited(QWEN_2), now=0.6) == [Refused(A, EngineStartFailed)]
    assert scheduler.handle(Acquire(B, mended), now=0.6) == [
        Refused(B, EngineStartFailed, retry_after_s=1.0)  # its first failure, not the second
    ]


def test_a_failure_is_not_held_against_other_options() -> None:
    scheduler = make_scheduler(backoff_first_s=1.0)
    huge = asking(QWEN, n_ctx=10_000_000)
    scheduler.handle(Acquire(A, huge), now=0.0)
    scheduler.handle(EngineExited(QWEN_1, EngineStartFailed("too large")), now=0.25)
    assert scheduler.handle(Acquire(B, QWEN), now=0.25) == [start(QWEN, 2)]
    scheduler.handle(EngineReady(QWEN_2), now=0.5)
    # The running engine is not given up for options that failed a moment ago.
    assert scheduler.handle(Acquire(C, huge), now=0.5) == [
        Refused(C, EngineStartFailed, retry_after_s=0.75)
    ]
    assert scheduler.failure(QWEN.key.model, "") is None


def test_a_replaced_file_is_loaded_anew() -> None:
    scheduler = idle_qwen(since=0.0)
    replaced = replace(QWEN, revision="newer")
    assert scheduler.handle(Acquire(A, replaced), now=1.0) == [Stop(QWEN_1, "options")]
    assert scheduler.handle(EngineExited(QWEN_1), now=2.0) == [start(replaced, 2)]
    assert scheduler.handle(EngineReady(QWEN_2), now=3.0) == [Grant(A, QWEN_2)]


def test_a_start_that_was_stopped_is_no_failure() -> None:
    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    scheduler.handle(Unload(QWEN_1, force=True), now=1.0)
    scheduler.handle(EngineExited(QWEN_1, EngineStartFailed("killed")), now=2.0)
    assert scheduler.handle(Acquire(B, QWEN), now=2.0) == [start(QWEN, 2)]


def test_a_crash_keeps_the_leases_until_they_are_released() -> None:
    scheduler = make_scheduler()
    busy(scheduler, A, QWEN)
    assert scheduler.handle(EngineExited(QWEN_1), now=1.0) == []
    assert scheduler.tickets == 1
    assert scheduler.handle(Acquire(B, QWEN), now=1.0) == [start(QWEN, 2)]
    assert scheduler.handle(EngineReady(QWEN_2), now=2.0) == [Grant(B, QWEN_2)]
    assert scheduler.handle(Release(A), now=3.0) == []  # not one of the new engine's leases
    assert scheduler.views()[0].active == 1
    assert scheduler.tickets == 1


def test_a_crash_while_draining_starts_the_next_one_for_those_who_wait() -> None:
    scheduler = make_scheduler()
    busy(scheduler, A, QWEN)
    larger = asking(QWEN, n_ctx=4096)
    scheduler.handle(Acquire(B, larger), now=1.0)
    assert scheduler.handle(EngineExited(QWEN_1), now=2.0) == [start(larger, 2)]
    assert scheduler.handle(Release(A), now=3.0) == []


def test_news_of_an_earlier_incarnation_is_ignored() -> None:
    scheduler = idle_qwen(since=0.0)
    scheduler.handle(EngineExited(QWEN_1), now=1.0)
    for late in (EngineReady(QWEN_1), EngineExited(QWEN_1), Unload(QWEN_1, force=True)):
        assert scheduler.handle(late, now=1.0) == []
    scheduler.handle(Acquire(A, QWEN), now=2.0)
    for late in (EngineReady(QWEN_1), EngineExited(QWEN_1), Unload(QWEN_1, force=True)):
        assert scheduler.handle(late, now=2.0) == []
    assert _states(scheduler) == ["starting"]


def test_news_that_cannot_be_raises() -> None:
    scheduler = idle_qwen(since=0.0)
    with pytest.raises(InvalidTransition, match="ready while ready"):
        scheduler.handle(EngineReady(QWEN_1), now=1.0)


def test_the_last_failure_of_a_file_can_be_asked_for_until_it_loads() -> None:
    scheduler = make_scheduler(backoff_first_s=1.0)
    assert scheduler.failure(QWEN.key.model, "") is None
    _fail(scheduler, QWEN_1, at=0.0)
    assert isinstance(scheduler.failure(QWEN.key.model, ""), EngineStartFailed)
    assert scheduler.failure(QWEN.key.model, "mended") is None
    assert scheduler.failure(LLAMA.key.model, "") is None
    scheduler.handle(Acquire(A, QWEN), now=1.0)
    scheduler.handle(EngineReady(QWEN_2), now=2.0)
    assert scheduler.failure(QWEN.key.model, "") is None


def test_options_that_cannot_be_are_no_failure_of_the_model() -> None:
    scheduler = make_scheduler(backoff_first_s=1.0)
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    scheduler.handle(EngineExited(QWEN_1, InvalidRequest("too long")), now=1.0)
    assert scheduler.failure(QWEN.key.model, "") is None
    assert scheduler.handle(Acquire(B, QWEN), now=999.0) == [Refused(B, InvalidRequest)]
    mended = replace(QWEN, revision="mended")
    assert scheduler.handle(Acquire(C, mended), now=999.0) == [start(mended, 2)]


# Waiting has an end.


def test_a_deadline_while_it_loads() -> None:
    scheduler = make_scheduler()
    scheduler.handle(Acquire(A, QWEN, deadline=10.0), now=0.0)
    scheduler.handle(Acquire(B, QWEN), now=0.0)
    assert scheduler.next_wakeup(now=0.0) == 10.0
    assert scheduler.handle(Tick(), now=9.9) == []
    assert scheduler.handle(Tick(), now=10.0) == [Refused(A, LoadingTimeout, retry_after_s=5.0)]
    assert scheduler.handle(EngineReady(QWEN_1), now=11.0) == [Grant(B, QWEN_1)]


def test_a_deadline_while_it_waits_for_room() -> None:
    scheduler = make_scheduler(1, fair_wait_s=100.0)
    busy(scheduler, A, QWEN)
    scheduler.handle(Acquire(B, LLAMA, deadline=10.0), now=1.0)
    assert scheduler.handle(Tick(), now=10.0) == [Refused(B, QueueTimeout, retry_after_s=10.0)]
    assert scheduler.handle(Release(A), now=11.0) == []  # nobody needs its place any more


def test_a_deadline_while_the_last_incarnation_leaves() -> None:
    scheduler = idle_qwen(since=0.0)
    scheduler.handle(Unload(QWEN_1), now=0.0)
    scheduler.handle(Acquire(A, QWEN, deadline=1.0), now=0.0)
    assert scheduler.handle(Tick(), now=1.0) == [Refused(A, QueueTimeout)]
    assert scheduler.handle(EngineExited(QWEN_1), now=2.0) == []


def test_the_one_behind_a_missed_deadline_moves_up() -> None:
    scheduler = make_scheduler(2, fair_wait_s=100.0)
    busy(scheduler, A, QWEN)
    scheduler.handle(Acquire(B, model("giant", engines=2), deadline=5.0), now=1.0)
    scheduler.handle(Acquire(C, LLAMA), now=2.0)
    assert scheduler.handle(Tick(), now=5.0) == [Refused(B, QueueTimeout), start(LLAMA)]


def test_the_queue_has_a_limit() -> None:
    scheduler = make_scheduler(max_queue=2)
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    scheduler.handle(Acquire(B, QWEN), now=0.0)
    assert scheduler.handle(Acquire(C, QWEN), now=0.0) == [Refused(C, QueueFull, retry_after_s=5.0)]
    scheduler.handle(Release(B), now=1.0)
    assert scheduler.handle(Acquire(D, QWEN), now=1.0) == []
    assert scheduler.tickets == 3  # a refused ticket has not ended yet
    assert scheduler.handle(Release(C), now=1.0) == []
    assert scheduler.tickets == 2


def test_a_full_queue_does_not_keep_anybody_from_a_ready_engine() -> None:
    scheduler = idle_qwen(since=0.0, max_queue=1)
    scheduler.handle(Acquire(A, LLAMA), now=0.0)
    assert scheduler.handle(Acquire(B, QWEN), now=0.0) == [Grant(B, QWEN_1)]


# The end.


def test_shutdown_refuses_drains_and_stops() -> None:
    scheduler = make_scheduler()
    idle(scheduler, QWEN, since=0.0)
    busy(scheduler, A, LLAMA)
    scheduler.handle(Acquire(B, MISTRAL), now=0.0)
    assert scheduler.handle(Shutdown(), now=1.0) == [
        Refused(B, ShuttingDown),
        Stop(QWEN_1, "shutdown"),
        Stop(MISTRAL_1, "shutdown"),
    ]
    assert scheduler.handle(Acquire(C, LLAMA), now=2.0) == [Refused(C, ShuttingDown)]
    assert scheduler.handle(Shutdown(), now=2.0) == []
    assert scheduler.handle(Release(A), now=3.0) == [Stop(LLAMA_1, "shutdown")]
    for engine in (QWEN_1, LLAMA_1, MISTRAL_1):
        assert scheduler.handle(EngineExited(engine), now=4.0) == []
    assert scheduler.views() == []


def test_forced_shutdown_waits_for_no_lease_and_hurries_those_who_leave() -> None:
    scheduler = make_scheduler()
    idle(scheduler, QWEN, since=0.0)
    busy(scheduler, A, LLAMA)
    assert scheduler.handle(Shutdown(), now=1.0) == [Stop(QWEN_1, "shutdown")]
    assert scheduler.handle(Shutdown(force=True), now=2.0) == [
        Stop(QWEN_1, "shutdown", force=True),
        Stop(LLAMA_1, "shutdown", force=True),
    ]
    assert scheduler.handle(Release(A), now=3.0) == []


# What the outside may read.


def test_an_engine_s_names() -> None:
    assert QWEN_3.label == "llamacpp/cpu#3"
    assert str(QWEN_3) == "/models/qwen.gguf@llamacpp/cpu#3"


def test_options_in_a_log_line_are_those_that_are_set() -> None:
    assert str(LoadOptions(n_ctx=2048, n_gpu_layers=0)) == "n_ctx=2048 n_gpu_layers=0"
    assert str(LoadOptions()) == ""


def test_next_wakeup_is_the_first_thing_time_alone_will_do() -> None:
    scheduler = make_scheduler(2, fair_wait_s=5.0, default_ttl_s=60.0)
    assert scheduler.next_wakeup(now=0.0) is None
    idle(scheduler, QWEN, since=0.0)
    assert scheduler.next_wakeup(now=0.0) == 60.0  # its TTL
    scheduler.handle(Acquire(A, QWEN), now=0.0)
    busy(scheduler, B, LLAMA, now=0.0)
    assert scheduler.next_wakeup(now=0.0) is None
    scheduler.handle(Acquire(C, MISTRAL), now=10.0)
    scheduler.handle(Acquire(D, model("other"), deadline=18.0), now=11.0)
    assert scheduler.next_wakeup(now=11.0) == 15.0  # the head's fair wait; only the head's
    scheduler.handle(Tick(), now=15.0)
    assert scheduler.next_wakeup(now=15.0) == 18.0  # the other's deadline
    scheduler.handle(Tick(), now=18.0)
    assert scheduler.next_wakeup(now=18.0) is None


def test_nobody_is_woken_for_a_head_for_whom_somebody_is_leaving() -> None:
    scheduler = make_scheduler(1, fair_wait_s=5.0)
    idle(scheduler, QWEN, since=0.0)
    scheduler.handle(Acquire(A, LLAMA), now=0.0)
    assert scheduler.next_wakeup(now=0.0) is None


def test_views_show_each_engine_and_who_waits_for_it() -> None:
    scheduler = make_scheduler(default_ttl_s=60.0)
    [drains_by] = scheduler.handle(Acquire(A, QWEN), now=1.0)
    scheduler.handle(EngineReady(QWEN_1), now=1.0)
    scheduler.handle(Acquire(B, asking(QWEN, n_ctx=4096)), now=2.0)
    [rests_by] = scheduler.handle(Acquire(C, LLAMA), now=3.0)
    scheduler.handle(EngineReady(LLAMA_1), now=3.0)
    scheduler.handle(Release(C), now=3.0)
    rests = EngineView(
        LLAMA_1,
        LLAMA,
        options=LoadOptions(n_ctx=2048),
        placement=(),
        state=EngineState.READY,
        ttl_s=60.0,
        pinned=False,
        idle_since=3.0,
        active=0,
        waiting=0,
        charged={ENGINES: 1, HOST: 0},
        decision=rests_by.decision,
    )
    drains = replace(
        rests,
        engine=QWEN_1,
        spec=QWEN,
        state=EngineState.DRAINING,
        idle_since=None,
        active=1,
        waiting=1,
        decision=drains_by.decision,
    )
    assert scheduler.views() == [drains, rests]
    assert scheduler.view(QWEN.key) == drains
    assert scheduler.view(MISTRAL.key) is None
    assert (scheduler.holds(QWEN.key), scheduler.holds(MISTRAL.key)) == (True, False)
    assert drains.idle_deadline() is None
    assert rests.idle_deadline() == 63.0
    assert replace(rests, ttl_s=0.0).idle_deadline() is None
    assert replace(rests, pinned=True).idle_deadline() is None
    assert replace(rests, state=EngineState.STOPPING).idle_deadline() is None


def _states(scheduler: Scheduler) -> list[str]:
    return [view.state for view in scheduler.views()]


def _fail(scheduler: Scheduler, engine, *, at: float) -> None:
    """Let the start of this incarnation of qwen fail."""
    ticket = Ticket(-2)
    assert scheduler.handle(Acquire(ticket, QWEN), now=at) == [start(QWEN, engine.incarnation)]
    assert scheduler.handle(EngineExited(engine), now=at) == [Refused(ticket, EngineStartFailed)]
    assert scheduler.handle(Release(ticket), now=at) == []


def _refused_for(scheduler: Scheduler, *, now: float) -> float | None:
    ticket = Ticket(-3)
    [refusal] = scheduler.handle(Acquire(ticket, QWEN), now=now)
    scheduler.handle(Release(ticket), now=now)
    return refusal.error.retry_after_s
