"""Engines that sleep, and files that are read ahead: each line is one event and all its effects.

Models are named for their size in GiB, of the ten the machine has; one that sleeps takes a
quarter of one. An engine sleeps when it was idle for 20 seconds, and leaves after 60.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.scheduling import (
    CARD,
    GIB,
    A,
    B,
    C,
    D,
    Refused,
    asking,
    busy,
    busy_again,
    gib,
    idle,
    make_scheduler,
    model,
    nth,
    on_cards,
    reading,
    start,
    wake,
)
from xandrouting.core.engine_state import EngineState, InvalidTransition
from xandrouting.core.errors import (
    EngineStartFailed,
    InsufficientMemory,
    QueueTimeout,
    ShuttingDown,
)
from xandrouting.core.events import (
    Acquire,
    EngineExited,
    EngineReady,
    EngineSlept,
    Event,
    Grant,
    Measured,
    Pin,
    Prepare,
    Release,
    Shutdown,
    Sleep,
    Stop,
    Tick,
    Unload,
)
from xandrouting.core.model import HOST, EngineSpec, LoadOptions, MemoryUse
from xandrouting.core.planner import Verdict
from xandrouting.core.scheduler import Scheduler

ASLEEP = 0.25  # GiB


def sleeper(name: str, size: float) -> EngineSpec:
    return replace(
        model(name, host_gib=size), sleeper_bytes=gib(ASLEEP), files=(f"/models/{name}.gguf",)
    )


SIX, FIVE, FOUR, TEN = sleeper("six", 6), sleeper("five", 5), sleeper("four", 4), sleeper("ten", 10)
STUBBORN = model("stubborn", host_gib=4)  # cannot sleep
ON_CARD = replace(on_cards("on-card", 6, host_gib=1), sleeper_bytes=gib(ASLEEP))
SIX_1, SIX_2, FIVE_1, FOUR_1, TEN_1 = (
    nth(SIX, 1),
    nth(SIX, 2),
    nth(FIVE, 1),
    nth(FOUR, 1),
    nth(TEN, 1),
)
STUBBORN_1, ON_CARD_1 = nth(STUBBORN, 1), nth(ON_CARD, 1)
NO_MEMORY = InsufficientMemory("cudaMalloc failed")


def of_ten(max_engines: int | None = None, **options: object) -> Scheduler:
    settings: dict[str, object] = {"soft_idle_s": 20.0, "default_ttl_s": 60.0, **options}
    return make_scheduler(max_engines, budgets={HOST: gib(10), CARD: gib(10)}, **settings)


def suspending(scheduler: Scheduler, spec: EngineSpec) -> None:
    """Load the model at 0 and have its engine told to sleep at 20."""
    idle(scheduler, spec, since=0.0)
    assert scheduler.handle(Tick(), now=20.0) == [Sleep(nth(spec, 1))]


def sleeping(scheduler: Scheduler, spec: EngineSpec) -> None:
    """Have the model's engine asleep at 21."""
    suspending(scheduler, spec)
    assert scheduler.handle(EngineSlept(nth(spec, 1)), now=21.0) == []


def state(scheduler: Scheduler, spec: EngineSpec) -> EngineState:
    view = scheduler.view(spec.key)
    assert view is not None
    return view.state


def charged(scheduler: Scheduler, spec: EngineSpec) -> dict[str, float]:
    """Return what the ledger holds for a model's engine: GiB, and engines by the piece."""
    view = scheduler.view(spec.key)
    assert view is not None
    return {name: n if name == "engines" else n / GIB for name, n in view.charged.items()}


# Falling asleep.


def test_who_was_idle_for_long_sleeps_and_gives_its_memory_back() -> None:
    scheduler = of_ten()
    idle(scheduler, SIX, since=0.0)
    assert scheduler.next_wakeup(now=0.0) == 20.0
    assert scheduler.handle(Tick(), now=19.9) == []
    assert scheduler.handle(Tick(), now=20.0) == [Sleep(SIX_1)]
    assert state(scheduler, SIX) is EngineState.SUSPENDING
    assert charged(scheduler, SIX) == {"engines": 1, HOST: 6}
    assert scheduler.next_wakeup(now=20.0) is None
    assert scheduler.handle(EngineSlept(SIX_1), now=21.0) == []
    assert state(scheduler, SIX) is EngineState.SLEEPING
    assert charged(scheduler, SIX) == {HOST: ASLEEP}
    assert scheduler.next_wakeup(now=21.0) == 60.0


def test_who_takes_nothing_while_it_sleeps_is_charged_nothing() -> None:
    scheduler, spec = of_ten(), replace(SIX, sleeper_bytes=0)
    sleeping(scheduler, spec)
    assert charged(scheduler, spec) == {HOST: 0}


def test_a_request_begins_the_time_anew() -> None:
    scheduler = of_ten()
    idle(scheduler, SIX, since=0.0)
    assert scheduler.handle(Acquire(A, SIX), now=20.0) == [Grant(A, SIX_1)]
    assert scheduler.handle(Tick(), now=50.0) == []
    assert scheduler.handle(Release(A), now=50.0) == []
    assert scheduler.handle(Tick(), now=69.9) == []
    assert scheduler.handle(Tick(), now=70.0) == [Sleep(SIX_1)]


def test_who_was_loaded_for_nobody_sleeps_too() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, SIX), now=0.0)
    scheduler.handle(Release(A), now=1.0)
    scheduler.handle(EngineReady(SIX_1), now=2.0)
    assert scheduler.handle(Tick(), now=22.0) == [Sleep(SIX_1)]


def test_at_once_is_a_time() -> None:
    scheduler = of_ten(soft_idle_s=0.0)
    idle(scheduler, SIX, since=5.0)
    assert scheduler.next_wakeup(now=5.0) == 5.0
    assert scheduler.handle(Tick(), now=5.0) == [Sleep(SIX_1)]
    assert scheduler.next_wakeup(now=5.0) is None


def test_who_cannot_sleep_stays_awake() -> None:
    scheduler = of_ten()
    idle(scheduler, STUBBORN, since=0.0)
    assert scheduler.next_wakeup(now=0.0) == 60.0
    assert scheduler.handle(Tick(), now=59.0) == []


def test_nobody_sleeps_where_no_time_is_set() -> None:
    scheduler = of_ten(soft_idle_s=None)
    idle(scheduler, SIX, since=0.0)
    assert scheduler.next_wakeup(now=0.0) == 60.0
    assert scheduler.handle(Tick(), now=59.0) == []


def test_who_is_pinned_stays_awake_until_it_is_not() -> None:
    scheduler = of_ten()
    idle(scheduler, SIX, since=0.0)
    assert scheduler.handle(Pin(SIX.key.model, pinned=True), now=1.0) == []
    assert scheduler.next_wakeup(now=1.0) is None
    assert scheduler.handle(Tick(), now=100.0) == []
    assert scheduler.handle(Pin(SIX.key.model, pinned=False), now=100.0) == []
    assert scheduler.next_wakeup(now=100.0) == 20.0
    assert scheduler.handle(Tick(), now=30.0) == [Sleep(SIX_1)]


def test_a_ttl_that_ends_first_ends_it() -> None:
    scheduler = of_ten(soft_idle_s=60.0, default_ttl_s=10.0)
    idle(scheduler, SIX, since=0.0)
    assert scheduler.next_wakeup(now=0.0) == 10.0
    assert scheduler.handle(Tick(), now=10.0) == [Stop(SIX_1, "idle")]
    assert scheduler.next_wakeup(now=10.0) is None


def test_where_both_times_have_passed_it_leaves_and_does_not_sleep_first() -> None:
    scheduler = of_ten()
    idle(scheduler, SIX, since=0.0)
    assert scheduler.handle(Tick(), now=60.0) == [Stop(SIX_1, "idle")]


# While it sleeps.


def test_the_ttl_goes_on_while_it_sleeps() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    assert scheduler.handle(Tick(), now=59.9) == []
    assert scheduler.handle(Tick(), now=60.0) == [Stop(SIX_1, "idle")]
    assert scheduler.handle(EngineExited(SIX_1), now=60.1) == []
    assert scheduler.views() == []


def test_a_ttl_that_ends_while_it_falls_asleep_ends_it_then() -> None:
    scheduler = of_ten()
    suspending(scheduler, SIX)
    assert scheduler.handle(Tick(), now=60.0) == []
    assert scheduler.handle(EngineSlept(SIX_1), now=61.0) == []
    assert scheduler.next_wakeup(now=61.0) == 60.0
    assert scheduler.handle(Tick(), now=61.0) == [Stop(SIX_1, "idle")]


def test_without_a_ttl_it_sleeps_on() -> None:
    scheduler = of_ten(default_ttl_s=0.0)
    sleeping(scheduler, SIX)
    assert scheduler.next_wakeup(now=21.0) is None
    assert scheduler.handle(Tick(), now=1e6) == []


def test_who_is_pinned_while_it_sleeps_sleeps_on_and_leaves_for_nobody() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    scheduler.handle(Pin(SIX.key.model, pinned=True), now=22.0)
    assert scheduler.next_wakeup(now=22.0) is None
    assert scheduler.handle(Tick(), now=100.0) == []
    assert scheduler.handle(Acquire(A, TEN), now=100.0) == [Refused(A, InsufficientMemory)]
    assert scheduler.handle(Acquire(B, SIX), now=100.0) == [wake(SIX)]


def test_its_model_is_not_held_while_it_sleeps() -> None:
    scheduler = of_ten()
    assert not scheduler.holds(SIX.key)
    idle(scheduler, SIX, since=0.0)
    assert scheduler.holds(SIX.key)
    scheduler.handle(Tick(), now=20.0)
    assert not scheduler.holds(SIX.key)
    scheduler.handle(EngineSlept(SIX_1), now=21.0)
    assert not scheduler.holds(SIX.key)
    scheduler.handle(Acquire(A, SIX), now=22.0)
    assert scheduler.holds(SIX.key)


def test_it_takes_no_place_among_those_that_are_limited() -> None:
    scheduler = of_ten(max_engines=1)
    sleeping(scheduler, SIX)
    assert scheduler.handle(Acquire(A, FOUR), now=22.0) == [start(FOUR)]
    scheduler.handle(EngineReady(FOUR_1), now=23.0)
    scheduler.handle(Release(A), now=23.0)
    assert scheduler.handle(Acquire(B, SIX), now=24.0) == [
        Prepare(SIX),
        Stop(FOUR_1, "evicted"),
    ]
    assert scheduler.handle(EngineExited(FOUR_1), now=25.0) == [wake(SIX)]


def test_it_is_charged_what_it_is_measured_to_take() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    use = MemoryUse(gib(0.5), gib(0.5), ())
    scheduler.handle(Measured((reading(HOST, 10, 9.5),), {SIX_1: use}), now=22.0)
    assert charged(scheduler, SIX) == {HOST: 0.5}
    scheduler.handle(Measured((), {SIX_1: MemoryUse()}), now=23.0)
    assert charged(scheduler, SIX) == {HOST: 0.5}


def test_what_its_process_keeps_of_a_card_is_charged() -> None:
    scheduler = of_ten()
    sleeping(scheduler, ON_CARD)
    use = MemoryUse(gib(0.5), gib(0.5), ((CARD, gib(0.5)),))
    scheduler.handle(Measured((reading(CARD, 10, 9.5),), {ON_CARD_1: use}), now=22.0)
    assert charged(scheduler, ON_CARD) == {HOST: 0.5, CARD: 0.5}
    too_much = on_cards("nine-and-more", 9.75)
    assert scheduler.handle(Acquire(A, too_much), now=23.0) == [Stop(ON_CARD_1, "evicted")]


def test_what_it_took_before_it_slept_does_not_count_once_it_is_awake() -> None:
    scheduler = of_ten()
    idle(scheduler, FIVE, since=0.0)
    scheduler.handle(Measured((), {FIVE_1: MemoryUse(gib(8), gib(8), ())}), now=1.0)
    assert charged(scheduler, FIVE) == {"engines": 1, HOST: 8}
    scheduler.handle(Tick(), now=20.0)
    scheduler.handle(Measured((), {FIVE_1: MemoryUse(gib(1), gib(1), ())}), now=20.5)
    assert charged(scheduler, FIVE) == {"engines": 1, HOST: 8}  # it has not said that it is done
    scheduler.handle(EngineSlept(FIVE_1), now=21.0)
    assert scheduler.handle(Acquire(A, FIVE, works=False), now=22.0) == [wake(FIVE)]
    assert charged(scheduler, FIVE) == {"engines": 1, HOST: 5}
    scheduler.handle(EngineReady(FIVE_1), now=23.0)
    scheduler.handle(Release(A), now=23.0)
    scheduler.handle(Measured((), {FIVE_1: MemoryUse(gib(4), gib(4), ())}), now=24.0)
    assert charged(scheduler, FIVE) == {"engines": 1, HOST: 5}  # its first request takes the rest


def test_where_nobody_tells_whose_a_card_s_memory_is_others_keep_theirs_meanwhile() -> None:
    scheduler = of_ten()
    untold = {ON_CARD_1: MemoryUse(0, 0, None)}
    idle(scheduler, ON_CARD, since=0.0)
    scheduler.handle(Measured((reading(CARD, 10, 1),), untold), now=1.0)  # 6 and 3 of others
    scheduler.handle(Tick(), now=20.0)
    scheduler.handle(Measured((reading(CARD, 10, 7),), untold), now=20.5)  # its 6 are free
    [card] = scheduler.devices()
    assert card.others_bytes == gib(3)
    scheduler.handle(EngineSlept(ON_CARD_1), now=21.0)
    assert scheduler.handle(Acquire(A, ON_CARD), now=22.0) == [wake(ON_CARD, placement=(CARD,))]
    scheduler.handle(Measured((reading(CARD, 10, 5),), untold), now=22.5)  # it has 2 of its 6
    [card] = scheduler.devices()
    assert card.others_bytes == gib(3)


def test_spare_processes_count_as_free() -> None:
    scheduler = of_ten()
    scheduler.handle(Measured((reading(HOST, 10, 7),), spare_bytes=gib(2)), now=0.0)
    [host] = scheduler.devices()
    assert (host.others_bytes, host.free_bytes) == (gib(1), gib(9))
    assert scheduler.handle(Acquire(A, TEN), now=1.0) == [Refused(A, InsufficientMemory)]
    scheduler.handle(Measured((reading(HOST, 10, 7),), spare_bytes=gib(3)), now=2.0)
    assert scheduler.handle(Acquire(B, TEN), now=3.0) == [start(TEN)]


# Waking.


def test_a_request_wakes_it() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    assert scheduler.handle(Acquire(A, SIX), now=30.0) == [wake(SIX)]
    assert state(scheduler, SIX) is EngineState.STARTING
    assert charged(scheduler, SIX) == {"engines": 1, HOST: 6}
    assert scheduler.handle(Acquire(B, SIX), now=31.0) == []
    assert scheduler.handle(EngineReady(SIX_1), now=32.0) == [Grant(A, SIX_1), Grant(B, SIX_1)]
    scheduler.handle(Release(A), now=40.0)
    scheduler.handle(Release(B), now=40.0)
    assert scheduler.handle(Tick(), now=60.0) == [Sleep(SIX_1)]


def test_who_falls_asleep_is_woken_once_it_does() -> None:
    scheduler = of_ten()
    suspending(scheduler, SIX)
    assert scheduler.handle(Acquire(A, SIX), now=20.5) == []
    assert scheduler.handle(EngineSlept(SIX_1), now=21.0) == [wake(SIX)]
    assert scheduler.handle(EngineReady(SIX_1), now=22.0) == [Grant(A, SIX_1)]


def test_it_keeps_its_ttl() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, SIX, ttl_s=30.0), now=0.0)
    scheduler.handle(EngineReady(SIX_1), now=0.0)
    scheduler.handle(Release(A), now=0.0)
    scheduler.handle(Tick(), now=20.0)
    scheduler.handle(EngineSlept(SIX_1), now=21.0)
    scheduler.handle(Acquire(B, SIX), now=25.0)
    scheduler.handle(EngineReady(SIX_1), now=26.0)
    scheduler.handle(Release(B), now=27.0)
    assert scheduler.handle(Tick(), now=57.0) == [Stop(SIX_1, "idle")]


def test_it_wakes_with_what_it_had_and_what_is_asked() -> None:
    scheduler = of_ten()
    sleeping(scheduler, asking(SIX, n_ctx=4096))
    asked = asking(SIX, embeddings=True)
    decision = scheduler.plan(asked, now=30.0)
    assert (decision.verdict, decision.options) == (
        Verdict.LOAD,
        LoadOptions(n_ctx=4096, embeddings=True),
    )
    assert scheduler.handle(Acquire(A, asked), now=30.0) == [wake(asked, n_ctx=4096)]
    assert scheduler.handle(Acquire(B, asking(SIX, n_ctx=4096)), now=31.0) == []
    assert scheduler.handle(EngineReady(SIX_1), now=32.0) == [Grant(A, SIX_1), Grant(B, SIX_1)]


def test_it_wakes_with_another_file() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    newer = replace(FOUR, key=SIX.key, revision="newer")
    assert scheduler.handle(Acquire(A, newer), now=30.0) == [wake(newer)]
    assert charged(scheduler, SIX) == {"engines": 1, HOST: 4}
    assert scheduler.handle(EngineReady(SIX_1), now=31.0) == [Grant(A, SIX_1)]


def test_waking_waits_for_room_as_a_load_does() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    busy(scheduler, A, FIVE, now=30.0)
    assert scheduler.plan(SIX, now=31.0).verdict is Verdict.WAIT
    assert scheduler.handle(Acquire(B, SIX), now=31.0) == [Prepare(SIX)]
    assert scheduler.handle(Acquire(C, FOUR), now=32.0) == []  # it would fit, but came later
    assert scheduler.handle(Release(A), now=33.0) == [Stop(FIVE_1, "evicted")]
    assert scheduler.handle(EngineExited(FIVE_1), now=35.0) == [wake(SIX), start(FOUR)]


def test_it_needs_only_what_it_has_not() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    busy(scheduler, A, FOUR, now=30.0)
    assert scheduler.plan(SIX, now=31.0).verdict is Verdict.LOAD
    assert scheduler.handle(Acquire(B, SIX), now=31.0) == [wake(SIX)]


def test_while_it_waits_for_room_its_ttl_does_not_end_it() -> None:
    scheduler = of_ten(fair_wait_s=1e6)
    sleeping(scheduler, SIX)
    busy(scheduler, A, FIVE, now=30.0)
    scheduler.handle(Acquire(B, SIX), now=31.0)
    assert scheduler.handle(Tick(), now=70.0) == []
    assert scheduler.next_wakeup(now=70.0) == 31.0 + 1e6
    scheduler.handle(Release(B), now=71.0)
    assert scheduler.next_wakeup(now=71.0) == 60.0
    assert scheduler.handle(Tick(), now=71.0) == [Stop(SIX_1, "idle")]


def test_what_does_not_fit_any_more_is_refused_and_sleeps_on() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    scheduler.handle(Measured((reading(HOST, 10, 5),)), now=22.0)
    assert not scheduler.fits(SIX, now=23.0)
    assert scheduler.plan(SIX, now=23.0).verdict is Verdict.NEVER
    assert scheduler.handle(Acquire(A, SIX), now=23.0) == [Refused(A, InsufficientMemory)]
    assert state(scheduler, SIX) is EngineState.SLEEPING


def test_what_stops_to_fit_while_it_falls_asleep_is_refused_then() -> None:
    scheduler = of_ten()
    suspending(scheduler, SIX)
    scheduler.handle(Acquire(A, SIX), now=20.5)
    assert scheduler.handle(Acquire(B, FIVE), now=20.6) == [Prepare(FIVE)]
    assert scheduler.handle(Measured((reading(HOST, 10, 5.5),)), now=20.7) == []
    assert scheduler.handle(EngineSlept(SIX_1), now=21.0) == [
        Refused(A, InsufficientMemory),
        start(FIVE),
    ]


def test_a_dry_run_for_one_that_falls_asleep_tells_how_it_will_be_loaded() -> None:
    scheduler = of_ten()
    suspending(scheduler, SIX)
    assert scheduler.plan(SIX, now=20.5).verdict is Verdict.LOAD
    assert scheduler.plan(FIVE, now=20.5).verdict is Verdict.WAIT
    assert scheduler.handle(Acquire(A, FIVE), now=20.6) == [Prepare(FIVE)]
    assert scheduler.handle(EngineSlept(SIX_1), now=21.0) == [start(FIVE)]


def test_who_gives_up_while_it_falls_asleep_is_told_so() -> None:
    scheduler = of_ten()
    suspending(scheduler, SIX)
    scheduler.handle(Acquire(A, SIX, deadline=20.8), now=20.5)
    assert scheduler.handle(Tick(), now=20.8) == [Refused(A, QueueTimeout)]
    assert scheduler.handle(EngineSlept(SIX_1), now=21.0) == []
    assert state(scheduler, SIX) is EngineState.SLEEPING


def test_a_wake_nobody_waits_for_any_more_is_stopped() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    scheduler.handle(Acquire(A, SIX), now=30.0)
    scheduler.handle(Acquire(B, SIX), now=30.0)
    assert scheduler.handle(Release(A, cancel=True), now=31.0) == []
    assert scheduler.handle(Release(B, cancel=True), now=31.0) == [Stop(SIX_1, "cancelled")]


def test_a_wait_for_one_that_falls_asleep_can_be_taken_back() -> None:
    scheduler = of_ten()
    suspending(scheduler, SIX)
    scheduler.handle(Acquire(A, SIX), now=20.5)
    assert scheduler.handle(Release(A, cancel=True), now=20.6) == []
    assert scheduler.handle(EngineSlept(SIX_1), now=21.0) == []
    assert state(scheduler, SIX) is EngineState.SLEEPING


def test_a_wake_that_fails_is_a_failed_start() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    scheduler.handle(Acquire(A, SIX), now=30.0)
    assert scheduler.handle(EngineExited(SIX_1), now=31.0) == [Refused(A, EngineStartFailed)]
    assert scheduler.handle(Acquire(B, SIX), now=31.5) == [Refused(B, EngineStartFailed, 0.5)]
    assert scheduler.handle(Acquire(C, SIX), now=32.0) == [start(SIX, 2)]


def test_a_wake_that_runs_out_of_memory_is_tried_once_more_as_a_new_engine() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    idle(scheduler, FOUR, since=30.0)
    scheduler.handle(Acquire(A, SIX), now=31.0)
    assert scheduler.handle(EngineExited(SIX_1, NO_MEMORY), now=32.0) == [Stop(FOUR_1, "evicted")]
    assert scheduler.handle(EngineExited(FOUR_1), now=33.0) == [start(SIX, 2)]


@pytest.mark.parametrize("asleep", [False, True])
def test_for_a_second_try_those_that_sleep_leave_too(asleep: bool) -> None:
    scheduler = of_ten()
    (sleeping if asleep else suspending)(scheduler, FOUR)
    assert scheduler.handle(Acquire(A, SIX), now=22.0) == [start(SIX)]
    assert scheduler.handle(EngineExited(SIX_1, NO_MEMORY), now=23.0) == [Stop(FOUR_1, "evicted")]
    assert scheduler.handle(EngineExited(FOUR_1), now=24.0) == [start(SIX, 2)]


# Leaving.


def test_who_sleeps_leaves_before_one_that_is_loaded() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    idle(scheduler, FOUR, since=30.0)
    six = model("other-six", host_gib=6)
    assert scheduler.handle(Acquire(A, six), now=31.0) == [Stop(SIX_1, "evicted")]
    assert scheduler.handle(EngineExited(SIX_1), now=32.0) == [start(six)]


def test_a_sleeper_is_no_great_loss_however_long_its_load_takes() -> None:
    scheduler = of_ten()
    idle(scheduler, STUBBORN, since=0.0)
    sleeping(scheduler, SIX)
    six = model("other-six", host_gib=6)
    assert scheduler.handle(Acquire(A, six), now=22.0) == [Stop(SIX_1, "evicted")]


def test_a_sleeper_does_not_linger_for_those_who_used_it() -> None:
    scheduler = of_ten(soft_idle_s=0.0, min_residency_s=100.0, fair_wait_s=1000.0)
    busy_again(scheduler, A, SIX)
    assert scheduler.handle(Acquire(B, TEN), now=0.5) == [Prepare(TEN)]
    assert scheduler.handle(Release(A), now=1.0) == []
    assert scheduler.handle(Tick(), now=1.0) == [Sleep(SIX_1)]
    assert scheduler.handle(EngineSlept(SIX_1), now=1.1) == [Stop(SIX_1, "evicted")]


def test_while_one_falls_asleep_nobody_leaves_for_the_same_room() -> None:
    scheduler = of_ten()
    suspending(scheduler, SIX)
    idle(scheduler, STUBBORN, since=20.2)
    assert scheduler.handle(Acquire(A, FIVE), now=20.5) == [Prepare(FIVE)]
    assert scheduler.handle(EngineSlept(SIX_1), now=21.0) == [start(FIVE)]


def test_who_falls_asleep_leaves_where_that_is_not_enough() -> None:
    scheduler = of_ten()
    suspending(scheduler, SIX)
    assert scheduler.handle(Acquire(A, TEN), now=20.5) == [Prepare(TEN)]
    assert scheduler.handle(EngineSlept(SIX_1), now=21.0) == [Stop(SIX_1, "evicted")]
    assert scheduler.handle(EngineExited(SIX_1), now=22.0) == [start(TEN)]


@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize(
    ("event", "effect"),
    [
        (Unload(SIX_1), Stop(SIX_1, "unload")),
        (Unload(SIX_1, force=True), Stop(SIX_1, "unload", force=True)),
        (Shutdown(), Stop(SIX_1, "shutdown")),
        (Shutdown(force=True), Stop(SIX_1, "shutdown", force=True)),
    ],
)
def test_it_is_stopped_at_once_and_late_news_of_its_sleep_is_harmless(
    event: Event, effect: Stop, asleep: bool
) -> None:
    scheduler = of_ten()
    (sleeping if asleep else suspending)(scheduler, SIX)
    assert scheduler.handle(event, now=22.0) == [effect]
    assert scheduler.handle(EngineSlept(SIX_1), now=23.0) == []
    assert state(scheduler, SIX) is EngineState.STOPPING
    assert scheduler.handle(EngineExited(SIX_1), now=24.0) == []
    assert scheduler.handle(EngineSlept(SIX_1), now=25.0) == []


def test_who_waits_for_one_that_is_unloaded_gets_the_next() -> None:
    scheduler = of_ten()
    suspending(scheduler, SIX)
    scheduler.handle(Acquire(A, SIX), now=20.5)
    assert scheduler.handle(Unload(SIX_1), now=20.6) == [Stop(SIX_1, "unload")]
    assert scheduler.handle(EngineExited(SIX_1), now=21.0) == [start(SIX, 2)]


def test_a_wake_ends_with_a_shutdown() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    scheduler.handle(Acquire(A, SIX), now=30.0)
    assert scheduler.handle(Shutdown(), now=31.0) == [
        Refused(A, ShuttingDown),
        Stop(SIX_1, "shutdown"),
    ]


@pytest.mark.parametrize("asleep", [False, True])
def test_its_death_is_no_failed_start(asleep: bool) -> None:
    scheduler = of_ten()
    (sleeping if asleep else suspending)(scheduler, SIX)
    assert scheduler.handle(EngineExited(SIX_1), now=22.0) == []
    assert scheduler.handle(Acquire(A, SIX), now=22.0) == [start(SIX, 2)]


def test_its_death_while_somebody_waits_for_it_brings_the_next() -> None:
    scheduler = of_ten()
    suspending(scheduler, SIX)
    scheduler.handle(Acquire(A, SIX), now=20.5)
    assert scheduler.handle(EngineExited(SIX_1), now=21.0) == [start(SIX, 2)]


def test_who_sleeps_twice_is_our_own_mistake() -> None:
    scheduler = of_ten()
    sleeping(scheduler, SIX)
    with pytest.raises(InvalidTransition, match="slept while sleeping"):
        scheduler.handle(EngineSlept(SIX_1), now=22.0)


# Reading ahead.


def test_a_load_that_waits_for_room_is_read_ahead_once() -> None:
    scheduler = of_ten()
    idle(scheduler, FIVE, since=0.0)
    assert scheduler.handle(Acquire(A, SIX), now=1.0) == [Prepare(SIX), Stop(FIVE_1, "evicted")]
    assert scheduler.handle(Acquire(B, SIX), now=1.5) == []
    assert scheduler.handle(Tick(), now=2.0) == []
    assert scheduler.handle(EngineExited(FIVE_1), now=3.0) == [start(SIX)]


def test_one_that_waits_for_those_in_use_is_read_ahead_too() -> None:
    scheduler = of_ten(fair_wait_s=5.0)
    busy(scheduler, A, FIVE)
    assert scheduler.handle(Acquire(B, SIX), now=1.0) == [Prepare(SIX)]
    assert scheduler.handle(Tick(), now=6.0) == []
    assert scheduler.handle(Release(A), now=7.0) == [Stop(FIVE_1, "evicted")]
    assert scheduler.handle(EngineExited(FIVE_1), now=8.0) == [start(SIX)]


def test_what_there_is_room_for_is_not_read_ahead() -> None:
    assert of_ten().handle(Acquire(A, SIX), now=0.0) == [start(SIX)]


def test_what_has_no_files_is_not_read_ahead() -> None:
    scheduler = of_ten()
    idle(scheduler, SIX, since=0.0)
    stubborn = replace(STUBBORN, key=model("big").key, cost=SIX.cost)
    assert scheduler.handle(Acquire(A, stubborn), now=1.0) == [Stop(SIX_1, "evicted")]


def test_only_the_first_in_the_queue_is_read_ahead() -> None:
    scheduler = of_ten()
    busy(scheduler, A, FIVE)
    assert scheduler.handle(Acquire(B, SIX), now=1.0) == [Prepare(SIX)]
    assert scheduler.handle(Acquire(C, TEN), now=2.0) == []
    assert scheduler.handle(Release(B), now=3.0) == [Prepare(TEN)]
    assert scheduler.handle(Acquire(D, SIX), now=4.0) == []


def test_a_line_that_was_given_up_is_read_ahead_anew() -> None:
    scheduler = of_ten()
    busy(scheduler, A, FIVE)
    assert scheduler.handle(Acquire(B, SIX), now=1.0) == [Prepare(SIX)]
    assert scheduler.handle(Release(B), now=2.0) == []
    assert scheduler.handle(Acquire(C, SIX), now=3.0) == [Prepare(SIX)]


def test_an_engine_replaced_for_other_options_is_not_read_ahead() -> None:
    scheduler = of_ten()
    idle(scheduler, SIX, since=0.0)
    larger = asking(SIX, n_ctx=8192)
    assert scheduler.handle(Acquire(A, larger), now=1.0) == [Stop(SIX_1, "options")]
    assert scheduler.handle(EngineExited(SIX_1), now=2.0) == [start(larger, 2)]


def test_what_does_not_fit_is_not_read_ahead() -> None:
    scheduler = of_ten()
    assert scheduler.handle(Acquire(A, sleeper("eleven", 11)), now=0.0) == [
        Refused(A, InsufficientMemory)
    ]
