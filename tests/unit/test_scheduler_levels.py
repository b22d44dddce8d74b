"""Engines that sleep at a level: each line is one event and all its effects.

A machine has 20 GiB of main memory and a card of ten. `SEVEN` takes seven of the card, five of
them weights, and one of main memory. It was seen to load in 60 s; it sleeps after 20 idle ones and
leaves after 200.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.scheduling import (
    CARD,
    GIB,
    ONE_CARD,
    A,
    B,
    C,
    Refused,
    asking,
    busy,
    gib,
    growing,
    idle,
    make_scheduler,
    model,
    nth,
    on_cards,
    reading,
    start,
    wake,
)
from xandrouting.core.engine_state import EngineState
from xandrouting.core.errors import EngineStartFailed, InsufficientMemory
from xandrouting.core.events import (
    Acquire,
    EngineExited,
    EngineReady,
    EngineSlept,
    Grant,
    Measured,
    Prepare,
    Release,
    Sleep,
    SleepFailed,
    Start,
    Stop,
    Tick,
    Unload,
)
from xandrouting.core.figures import FigureKey, Figures
from xandrouting.core.model import (
    ENGINES,
    HOST,
    Figure,
    FixedCost,
    Footprint,
    Level,
    LoadOptions,
    MemoryUse,
    Terms,
)
from xandrouting.core.planner import Verdict
from xandrouting.core.scheduler import Scheduler
from xandrouting.core.weigher import PROCESS_S

OFFLOADED, DROPPED = Level.OFFLOADED, Level.DROPPED
SEVEN = replace(
    growing(
        "seven",
        FixedCost(Footprint(host=Terms(overhead=gib(1)), device=Terms(gib(5), gib(2)))),
        ONE_CARD,
    ),
    defaults=LoadOptions(),
    sleep_levels=(OFFLOADED, DROPPED),
    files=("/models/seven.gguf",),
    learned_as="seven",
)
SEVEN_1, SEVEN_2 = nth(SEVEN, 1), nth(SEVEN, 2)
FIVE, FIVE_1 = on_cards("five", 5), nth(on_cards("five", 5), 1)
FOUND = MemoryUse(gib(6.5), gib(6.5), ((CARD, gib(0.5)),))  # offloaded, and a context
COLD_S = 60.0


def of_both(main_gib: float = 20, max_engines: int | None = None, **options: object) -> Scheduler:
    once = FigureKey("seven", SEVEN.key.device, 1, LoadOptions(n_ctx=1))
    settings: dict[str, object] = {
        "soft_idle_s": 20.0,
        "default_ttl_s": 200.0,
        "figures": Figures([(once, Figure(gib(1), gib(7), COLD_S))]),
        **options,
    }
    return make_scheduler(max_engines, budgets={HOST: gib(main_gib), CARD: gib(10)}, **settings)


def asleep(scheduler: Scheduler, use: MemoryUse = FOUND) -> None:
    """Have it asleep at 21, its weights in main memory."""
    idle(scheduler, SEVEN, since=0.0)
    assert scheduler.handle(Tick(), now=20.0) == [Sleep(SEVEN_1, OFFLOADED)]
    assert scheduler.handle(EngineSlept(SEVEN_1, use), now=21.0) == []


def state(scheduler: Scheduler) -> EngineState:
    view = scheduler.view(SEVEN.key)
    assert view is not None
    return view.state


def level(scheduler: Scheduler) -> Level | None:
    view = scheduler.view(SEVEN.key)
    assert view is not None
    return view.level


def charged(scheduler: Scheduler) -> dict[str, float]:
    view = scheduler.view(SEVEN.key)
    assert view is not None
    return {d: n / GIB for d, n in view.charged.items() if d != ENGINES}


def waking() -> Start:
    return wake(SEVEN, placement=(CARD,))


# Falling asleep.


def test_it_takes_the_room_for_its_weights_and_then_what_it_is_seen_to_keep() -> None:
    scheduler = of_both()
    idle(scheduler, SEVEN, since=0.0)
    assert charged(scheduler) == {HOST: 1, CARD: 7}
    [effect] = scheduler.handle(Tick(), now=20.0)
    assert effect == Sleep(SEVEN_1, OFFLOADED)
    assert isinstance(effect, Sleep)
    assert effect.rung is not None
    assert not effect.rung.measured
    assert charged(scheduler) == {HOST: 6, CARD: 7}
    assert level(scheduler) is OFFLOADED
    assert scheduler.handle(EngineSlept(SEVEN_1, FOUND), now=21.0) == []
    assert state(scheduler) is EngineState.SLEEPING
    assert charged(scheduler) == {HOST: 6.5, CARD: 0.5}
    scheduler.handle(Measured((), {SEVEN_1: MemoryUse(gib(6.25), gib(6.25), None)}), now=22.0)
    assert charged(scheduler) == {HOST: 6.25, CARD: 0.5}  # of the card nobody told anew


def test_where_nothing_was_seen_it_is_charged_what_it_must_have() -> None:
    scheduler = of_both()
    asleep(scheduler, MemoryUse())
    assert charged(scheduler) == {HOST: 6}


def test_the_room_for_its_weights_is_nobody_else_s() -> None:
    scheduler = of_both(main_gib=8)
    idle(scheduler, SEVEN, since=0.0)
    scheduler.handle(Tick(), now=20.0)
    assert scheduler.handle(Acquire(A, model("three", host_gib=3)), now=20.5) == []
    scheduler.handle(EngineSlept(SEVEN_1, FOUND), now=21.0)


def test_where_main_memory_is_short_its_weights_are_dropped_and_it_sleeps_no_deeper() -> None:
    scheduler = of_both(main_gib=5)
    idle(scheduler, SEVEN, since=0.0)
    assert scheduler.handle(Tick(), now=20.0) == [Sleep(SEVEN_1, DROPPED)]
    assert charged(scheduler) == {HOST: 1, CARD: 7}
    scheduler.handle(EngineSlept(SEVEN_1, MemoryUse()), now=21.0)
    assert charged(scheduler) == {HOST: 1}
    assert scheduler.next_wakeup(now=21.0) == 200.0


def test_where_no_level_is_worth_it_it_stays_awake_until_it_was_used_again() -> None:
    scheduler = of_both()
    idle(scheduler, SEVEN, since=0.0)
    for failed in (OFFLOADED, DROPPED):
        scheduler._weigher.ladder.note_failed(SEVEN, failed)
    assert scheduler.next_wakeup(now=0.0) == 20.0
    assert scheduler.handle(Tick(), now=20.0) == []
    assert scheduler.next_wakeup(now=20.0) == 200.0
    scheduler.handle(Acquire(A, SEVEN), now=30.0)
    scheduler.handle(Release(A), now=30.0)
    assert scheduler.next_wakeup(now=30.0) == 50.0


def test_what_took_no_memory_off_the_card_is_dropped_then_stopped() -> None:
    scheduler = of_both()
    idle(scheduler, SEVEN, since=0.0)
    scheduler.handle(Tick(), now=20.0)
    assert scheduler.handle(SleepFailed(SEVEN_1), now=24.0) == [Sleep(SEVEN_1, DROPPED)]
    assert charged(scheduler) == {HOST: 6, CARD: 7}
    assert scheduler.handle(SleepFailed(SEVEN_1), now=28.0) == [Stop(SEVEN_1, "sleep_failed")]
    assert scheduler.handle(SleepFailed(SEVEN_1), now=28.5) == []  # it leaves already
    assert scheduler.handle(EngineExited(SEVEN_1), now=29.0) == []
    assert scheduler.handle(SleepFailed(SEVEN_1), now=29.5) == []
    assert scheduler.handle(Acquire(A, SEVEN), now=30.0) == [start(SEVEN, 2, placement=(CARD,))]


def test_who_does_not_answer_is_stopped_at_once() -> None:
    scheduler = of_both()
    idle(scheduler, SEVEN, since=0.0)
    scheduler.handle(Tick(), now=20.0)
    scheduler.handle(Acquire(A, SEVEN), now=22.0)
    assert scheduler.handle(SleepFailed(SEVEN_1, hopeless=True), now=30.0) == [
        Stop(SEVEN_1, "sleep_failed")
    ]
    assert scheduler.handle(EngineExited(SEVEN_1), now=31.0) == [start(SEVEN, 2, placement=(CARD,))]


# Sleeping deeper.


def test_after_as_long_again_it_sleeps_deeper() -> None:
    scheduler = of_both(max_engines=1)
    asleep(scheduler)
    scheduler.handle(Acquire(A, model("small")), now=22.0)  # which takes the one place there is
    assert scheduler.next_wakeup(now=22.0) == 41.0
    assert scheduler.handle(Tick(), now=41.0) == [Sleep(SEVEN_1, DROPPED)]
    assert charged(scheduler) == {HOST: 6.5, CARD: 7}  # it wakes in between
    assert scheduler.handle(EngineSlept(SEVEN_1, MemoryUse(gib(1), 0, ())), now=43.0) == []
    assert charged(scheduler) == {HOST: 1}
    assert scheduler.next_wakeup(now=43.0) == 200.0


def test_nobody_leaves_for_that() -> None:
    scheduler = of_both()
    asleep(scheduler)
    idle(scheduler, FIVE, since=22.0)
    assert scheduler.handle(Tick(), now=41.0) == []
    assert scheduler.next_wakeup(now=41.0) == 200.0
    assert level(scheduler) is OFFLOADED


def test_who_is_awaited_does_not_sleep_deeper() -> None:
    scheduler = of_both()
    asleep(scheduler)
    busy(scheduler, A, FIVE, now=22.0)
    assert scheduler.handle(Acquire(B, SEVEN), now=23.0) == [Prepare(SEVEN)]
    assert scheduler.handle(Tick(), now=60.0) == []


def test_it_leaves_for_others_who_need_main_memory() -> None:
    scheduler = of_both()
    asleep(scheduler)
    assert scheduler.handle(Acquire(A, model("big", host_gib=15)), now=22.0) == [
        Stop(SEVEN_1, "evicted")
    ]


def test_what_is_lost_with_it_is_what_waking_would_have_saved() -> None:
    scheduler = of_both()
    asleep(scheduler)
    [victim] = scheduler.plan(model("big", host_gib=15), now=22.0).victims
    assert victim.reload_s == pytest.approx(COLD_S - (0.1 + 5 * GIB / 5e9))
    scheduler._weigher.ladder.note_woken(SEVEN, OFFLOADED, wake_s=60.0)
    [victim] = scheduler.plan(model("big", host_gib=15), now=22.0).victims
    assert victim.reload_s == PROCESS_S


# Waking.


def test_a_request_wakes_it_and_the_next_one_knows_what_that_takes() -> None:
    scheduler = of_both()
    asleep(scheduler)
    assert scheduler.plan(SEVEN, now=30.0).verdict is Verdict.LOAD
    [effect] = scheduler.handle(Acquire(A, SEVEN), now=30.0)
    assert effect == waking()
    view = scheduler.view(SEVEN.key)
    assert view is not None
    assert view.level is None
    assert view.decision.expected_s == pytest.approx(0.1 + 5 * GIB / 5e9)
    assert not view.decision.learned
    assert charged(scheduler) == {HOST: 1, CARD: 7}
    assert scheduler.handle(EngineReady(SEVEN_1), now=30.5) == [Grant(A, SEVEN_1)]
    scheduler.handle(Release(A), now=31.0)
    [sleep] = scheduler.handle(Tick(), now=51.0)
    assert isinstance(sleep, Sleep)
    assert sleep.rung is not None
    assert (sleep.rung.wake_s, sleep.rung.measured, sleep.rung.sleep_s) == (0.5, True, 1.0)
    scheduler.handle(EngineSlept(SEVEN_1, FOUND), now=52.0)
    scheduler.handle(Acquire(A, SEVEN), now=53.0)
    view = scheduler.view(SEVEN.key)
    assert view is not None
    assert (view.decision.expected_s, view.decision.learned) == (0.5, True)


def test_it_waits_for_room_where_it_was() -> None:
    scheduler = of_both()
    asleep(scheduler)
    idle(scheduler, FIVE, since=22.0)
    assert scheduler.handle(Acquire(A, SEVEN), now=23.0) == [
        Prepare(SEVEN),
        Stop(FIVE_1, "evicted"),
    ]
    assert scheduler.handle(EngineExited(FIVE_1), now=24.0) == [waking()]


def test_one_that_does_not_wake_is_replaced_with_what_it_had() -> None:
    scheduler = of_both()
    large = asking(SEVEN, max_model_len=8192)
    scheduler.handle(Acquire(A, large, ttl_s=500.0), now=0.0)
    scheduler.handle(EngineReady(SEVEN_1), now=0.0)
    scheduler.handle(Release(A), now=0.0)
    scheduler.handle(Tick(), now=20.0)
    scheduler.handle(EngineSlept(SEVEN_1, FOUND), now=21.0)
    assert scheduler.handle(Acquire(A, SEVEN), now=30.0) == [
        wake(SEVEN, placement=(CARD,), max_model_len=8192)
    ]
    scheduler.handle(Acquire(B, SEVEN), now=31.0)
    failure = EngineStartFailed("it hangs")
    assert scheduler.handle(EngineExited(SEVEN_1, failure), now=60.0) == [
        start(SEVEN, 2, placement=(CARD,), max_model_len=8192)
    ]
    assert scheduler.failure(SEVEN.key.model, SEVEN.revision) is None
    assert scheduler.handle(EngineReady(SEVEN_2), now=90.0) == [
        Grant(A, SEVEN_2),
        Grant(B, SEVEN_2),
    ]
    scheduler.handle(Release(A), now=90.0)
    scheduler.handle(Release(B), now=90.0)
    assert scheduler.handle(Tick(), now=110.0) == [Sleep(SEVEN_2, DROPPED)]
    view = scheduler.view(SEVEN.key)
    assert view is not None
    assert view.ttl_s == 500.0


def test_one_that_does_not_wake_for_nobody_is_gone() -> None:
    scheduler = of_both()
    asleep(scheduler)
    scheduler.handle(Acquire(A, SEVEN), now=30.0)
    scheduler.handle(Release(A), now=30.1)
    assert scheduler.handle(EngineExited(SEVEN_1), now=31.0) == []
    assert scheduler.views() == []


def test_a_fresh_one_that_fails_too_is_a_failed_start() -> None:
    scheduler = of_both()
    asleep(scheduler)
    scheduler.handle(Acquire(A, SEVEN), now=30.0)
    scheduler.handle(EngineExited(SEVEN_1), now=31.0)
    failure = EngineStartFailed("no such file")
    assert scheduler.handle(EngineExited(SEVEN_2, failure), now=32.0) == [
        Refused(A, EngineStartFailed)
    ]


def test_other_options_are_had_by_a_fresh_one() -> None:
    scheduler = of_both()
    asleep(scheduler)
    larger = asking(SEVEN, max_model_len=8192)
    assert scheduler.plan(larger, now=30.0).verdict is Verdict.RELOAD
    assert scheduler.handle(Acquire(A, larger), now=30.0) == [Stop(SEVEN_1, "options")]
    assert scheduler.handle(EngineExited(SEVEN_1), now=31.0) == [
        start(larger, 2, placement=(CARD,))
    ]


def test_another_file_is_loaded_by_a_fresh_one() -> None:
    scheduler = of_both()
    asleep(scheduler)
    newer = replace(SEVEN, revision="newer")
    assert scheduler.handle(Acquire(A, newer), now=30.0) == [Stop(SEVEN_1, "options")]
    assert scheduler.handle(EngineExited(SEVEN_1), now=31.0) == [start(newer, 2, placement=(CARD,))]


def test_what_has_no_room_any_more_though_all_leave_is_refused_and_sleeps_on() -> None:
    scheduler = of_both()
    asleep(scheduler)
    scheduler.handle(Measured((reading(CARD, 10, 4),), {SEVEN_1: FOUND}), now=22.0)
    assert scheduler.handle(Acquire(A, SEVEN), now=23.0) == [Refused(A, InsufficientMemory)]
    assert state(scheduler) is EngineState.SLEEPING


def test_an_unload_ends_it_while_it_sleeps_deeper() -> None:
    scheduler = of_both()
    asleep(scheduler)
    scheduler.handle(Tick(), now=41.0)
    assert scheduler.handle(Unload(SEVEN_1), now=42.0) == [Stop(SEVEN_1, "unload")]
    assert scheduler.handle(EngineSlept(SEVEN_1, FOUND), now=43.0) == []
    assert scheduler.handle(EngineExited(SEVEN_1), now=44.0) == []


def test_who_comes_while_it_falls_asleep_waits_for_that() -> None:
    scheduler = of_both()
    idle(scheduler, SEVEN, since=0.0)
    scheduler.handle(Tick(), now=20.0)
    assert scheduler.handle(Acquire(A, SEVEN), now=20.5) == []
    assert scheduler.handle(Acquire(C, FIVE), now=20.6) == []  # which would fit and came later
    assert scheduler.handle(EngineSlept(SEVEN_1, FOUND), now=21.0) == [waking()]
