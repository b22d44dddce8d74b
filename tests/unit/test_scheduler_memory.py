"""The scheduler where memory is short: each line is one event and all its effects.

Models are named for their size in GiB; the machine has ten unless a test says otherwise.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.scheduling import (
    CARD,
    CARD_1,
    GIB,
    TWO_CARDS,
    UPSTREAM,
    UPSTREAM_1,
    A,
    B,
    C,
    D,
    GrowingCost,
    Refused,
    asking,
    busy,
    busy_again,
    gib,
    growing,
    idle,
    make_scheduler,
    model,
    nth,
    on_cards,
    reading,
    start,
)
from xandrouting.core.errors import (
    EngineStartFailed,
    InsufficientMemory,
    LoadingTimeout,
    QueueTimeout,
)
from xandrouting.core.events import (
    Acquire,
    EngineExited,
    EngineReady,
    Event,
    Grant,
    Measured,
    Pin,
    Refuse,
    Release,
    Start,
    Stop,
    Tick,
    Unload,
)
from xandrouting.core.figures import Figures
from xandrouting.core.model import (
    HOST,
    EngineId,
    EngineSpec,
    Figure,
    LoadOptions,
    MemoryUse,
    Ticket,
)
from xandrouting.core.planner import Verdict
from xandrouting.core.refusals import ASK_AGAIN_S
from xandrouting.core.scheduler import Scheduler
from xandrouting.core.turns import LINGER_S

ONE, THREE, FOUR, FIVE = (
    model(name, host_gib=size)
    for size, name in [(1, "one"), (3, "three"), (4, "four"), (5, "five")]
)
SIX, EIGHT, ELEVEN = (
    model(name, host_gib=size) for size, name in [(6, "six"), (8, "eight"), (11, "eleven")]
)
ALSO_THREE = model("also-three", host_gib=3)
THREE_1, FOUR_1, FIVE_1, SIX_1, SIX_2, EIGHT_1, ALSO_THREE_1 = (
    *(nth(spec, 1) for spec in (THREE, FOUR, FIVE, SIX)),
    nth(SIX, 2),
    nth(EIGHT, 1),
    nth(ALSO_THREE, 1),
)
CARD_SIX, CARD_FIVE = on_cards("card-six", 6), on_cards("card-five", 5)
CARD_SIX_1, CARD_FIVE_1 = nth(CARD_SIX, 1), nth(CARD_FIVE, 1)
# The weights take 4, and each slot 1 for each 1,024 tokens: 8 with its own four slots.
SLOTTED = growing("slotted", GrowingCost(4, 1))
SLOTTED_1, SLOTTED_2, SLOTTED_3 = (nth(SLOTTED, n) for n in (1, 2, 3))
NO_MEMORY = InsufficientMemory("cudaMalloc failed")


def of_ten(max_engines: int | None = None, **options: object) -> Scheduler:
    return make_scheduler(max_engines, budgets={HOST: gib(10), CARD: gib(10)}, **options)


def host(available_gib: float) -> Measured:
    """Return what a machine of ten tells."""
    return Measured((reading(HOST, 10, available_gib),))


def uses(engine: EngineId, host_gib: float, *, others_gib: float = 0) -> Measured:
    """Return that an engine was seen to take this of ten, and other programs that."""
    use = MemoryUse(gib(host_gib), gib(host_gib), ())
    return Measured((reading(HOST, 10, 10 - host_gib - others_gib),), {engine: use})


def charged(scheduler: Scheduler, spec: EngineSpec, device: str = HOST) -> float:
    """Return what the ledger holds for a model's engine, in GiB."""
    view = scheduler.view(spec.key)
    assert view is not None
    return view.charged.get(device, 0) / GIB


def states(scheduler: Scheduler) -> list[str]:
    return [view.state for view in scheduler.views()]


# Room.


def test_models_are_loaded_beside_each_other_while_they_fit() -> None:
    scheduler = of_ten()
    assert scheduler.handle(Acquire(A, THREE), now=0.0) == [start(THREE)]
    assert scheduler.handle(Acquire(B, ALSO_THREE), now=0.0) == [start(ALSO_THREE)]
    assert scheduler.handle(Acquire(C, FOUR), now=0.0) == [start(FOUR)]
    assert scheduler.handle(Acquire(D, ONE), now=0.0) == []


def test_what_is_promised_to_those_that_start_is_not_promised_again() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, SIX), now=0.0)
    assert scheduler.handle(Acquire(B, FIVE), now=0.0) == []
    assert scheduler.handle(EngineReady(SIX_1), now=1.0) == [Grant(A, SIX_1)]
    assert scheduler.handle(Release(A), now=2.0) == [Stop(SIX_1, "evicted")]
    assert scheduler.handle(EngineExited(SIX_1), now=3.0) == [start(FIVE)]


def test_only_as_many_leave_as_are_needed() -> None:
    scheduler = of_ten()
    for spec in (THREE, ALSO_THREE, FOUR):
        idle(scheduler, spec, since=0.0)
    assert scheduler.handle(Acquire(A, FOUR), now=5.0) == [Grant(A, FOUR_1)]
    assert scheduler.handle(Acquire(B, FIVE), now=5.0) == [
        Stop(THREE_1, "evicted"),
        Stop(ALSO_THREE_1, "evicted"),
    ]
    assert scheduler.handle(EngineExited(ALSO_THREE_1), now=6.0) == []
    assert scheduler.handle(EngineExited(THREE_1), now=6.0) == [start(FIVE)]


def test_the_one_that_is_there_again_soonest_leaves() -> None:
    slow, quick = (replace(spec, learned_as=spec.key.model) for spec in (THREE, FOUR))
    figures = Figures()
    figures.note(slow.learned_as, "cpu", 0, slow.defaults, Figure(gib(3), 0, load_s=50.0))
    figures.note(quick.learned_as, "cpu", 0, quick.defaults, Figure(gib(4), 0, load_s=2.0))
    scheduler = of_ten(figures=figures)
    idle(scheduler, slow, since=0.0)
    idle(scheduler, quick, since=0.0)
    assert scheduler.handle(Acquire(A, FIVE), now=5.0) == [Stop(FOUR_1, "evicted")]


def test_the_one_asked_for_less_often_leaves() -> None:
    scheduler = of_ten()
    for spec in (THREE, ALSO_THREE, FOUR):
        idle(scheduler, spec, since=0.0)
    for spec in (THREE, FOUR, FOUR):
        scheduler.handle(Acquire(A, spec), now=1.0)
        scheduler.handle(Release(A), now=1.0)
    scheduler.handle(Acquire(A, ALSO_THREE), now=1.0)
    assert scheduler.handle(Release(A), now=1.5) == []
    scheduler.handle(Acquire(A, ALSO_THREE), now=1.5)
    assert scheduler.handle(Release(A), now=1.5) == []
    # also-three was used as often as four and loads faster; three was used once less.
    assert scheduler.handle(Acquire(B, ONE), now=2.0) == [Stop(THREE_1, "evicted")]


def test_what_is_used_by_nobody_leaves_first_whatever_it_costs() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, SIX), now=0.0)
    scheduler.handle(Release(A), now=0.0)
    scheduler.handle(EngineReady(SIX_1), now=9.0)
    idle(scheduler, FOUR, since=1.0)
    assert scheduler.handle(Acquire(B, THREE), now=10.0) == [Stop(SIX_1, "evicted")]


def test_who_leaves_is_on_the_device_that_lacks() -> None:
    scheduler = of_ten()
    idle(scheduler, EIGHT, since=0.0)
    idle(scheduler, CARD_SIX, since=50.0)
    assert scheduler.handle(Acquire(A, CARD_FIVE), now=50.0) == [Stop(CARD_SIX_1, "evicted")]
    assert scheduler.handle(EngineExited(CARD_SIX_1), now=51.0) == [
        start(CARD_FIVE, placement=(CARD,))
    ]
    assert scheduler.handle(Acquire(B, SIX), now=52.0) == [Stop(EIGHT_1, "evicted")]


def test_an_engine_takes_of_main_memory_and_of_a_card() -> None:
    both = on_cards("both", 5, host_gib=4)
    scheduler = of_ten()
    idle(scheduler, FOUR, since=0.0)
    idle(scheduler, CARD_SIX, since=0.0)
    busy(scheduler, A, THREE)
    effects = scheduler.handle(Acquire(B, both), now=5.0)
    assert set(effects) == {Stop(FOUR_1, "evicted"), Stop(CARD_SIX_1, "evicted")}


def test_each_goes_to_the_card_with_the_most_room() -> None:
    scheduler = make_scheduler(budgets={CARD: gib(10), CARD_1: gib(12)})
    first, second, third = (
        on_cards(name, 5, placements=TWO_CARDS) for name in ("first", "second", "third")
    )
    assert scheduler.handle(Acquire(A, first), now=0.0) == [start(first, placement=(CARD_1,))]
    assert scheduler.handle(Acquire(B, second), now=0.0) == [start(second, placement=(CARD,))]
    assert scheduler.handle(Acquire(C, third), now=0.0) == [start(third, placement=(CARD_1,))]


def test_what_is_too_large_for_one_card_is_charged_to_both() -> None:
    scheduler = make_scheduler(budgets={CARD: gib(10), CARD_1: gib(12)})
    large = on_cards("large", 16, placements=TWO_CARDS)
    assert scheduler.handle(Acquire(A, large), now=0.0) == [start(large, placement=(CARD, CARD_1))]
    assert [charged(scheduler, large, device) for device in (CARD, CARD_1)] == [8.0, 8.0]
    small = on_cards("small", 3, placements=TWO_CARDS)
    assert scheduler.handle(Acquire(B, small), now=0.0) == [start(small, placement=(CARD_1,))]


def test_busy_engines_never_leave() -> None:
    scheduler = of_ten(fair_wait_s=5.0)
    busy(scheduler, A, SIX)
    idle(scheduler, THREE, since=0.0)
    assert scheduler.handle(Acquire(B, FIVE), now=1.0) == []
    assert scheduler.handle(Tick(), now=100.0) == []
    assert scheduler.handle(Release(A), now=101.0) == [Stop(SIX_1, "evicted")]


def test_idle_engines_that_would_not_suffice_stay() -> None:
    scheduler = of_ten(fair_wait_s=100.0)
    busy(scheduler, A, SIX)
    idle(scheduler, THREE, since=0.0)
    assert scheduler.handle(Acquire(B, FIVE), now=1.0) == []
    assert states(scheduler) == ["ready", "ready"]
    assert scheduler.handle(Acquire(C, THREE), now=2.0) == [Grant(C, THREE_1)]


def test_a_limit_of_engines_holds_however_much_memory_is_free() -> None:
    scheduler = of_ten(max_engines=1)
    idle(scheduler, ONE, since=0.0)
    assert scheduler.handle(Acquire(A, THREE), now=1.0) == [Stop(nth(ONE, 1), "evicted")]
    assert scheduler.handle(EngineExited(nth(ONE, 1)), now=2.0) == [start(THREE)]


def test_an_upstream_takes_no_memory_and_frees_none() -> None:
    scheduler = of_ten()
    busy(scheduler, A, SIX)
    idle(scheduler, UPSTREAM, since=0.0)
    assert scheduler.handle(Acquire(B, FIVE), now=1.0) == []
    assert scheduler.handle(Acquire(C, UPSTREAM), now=2.0) == [Grant(C, UPSTREAM_1)]


def test_slots_are_given_up_where_nobody_can_leave() -> None:
    scheduler = of_ten()
    busy(scheduler, A, FOUR)
    assert scheduler.handle(Acquire(B, SLOTTED), now=1.0) == [start(SLOTTED, n_parallel=2)]
    assert charged(scheduler, SLOTTED) == 6.0
    scheduler.handle(EngineReady(SLOTTED_1), now=2.0)
    # It is a hit for who does not ask for slots, and a reload for who does.
    assert scheduler.handle(Acquire(C, SLOTTED), now=3.0) == [Grant(C, SLOTTED_1)]
    assert scheduler.plan(asking(SLOTTED, n_parallel=4), now=3.0).verdict is Verdict.RELOAD


def test_a_failure_of_what_was_loaded_with_fewer_slots_is_held_against_it_too() -> None:
    scheduler = of_ten(backoff_first_s=1.0)
    busy(scheduler, A, FOUR)
    scheduler.handle(Acquire(B, SLOTTED), now=1.0)
    assert scheduler.handle(EngineExited(SLOTTED_1), now=2.0) == [Refused(B, EngineStartFailed)]
    assert scheduler.handle(Acquire(C, SLOTTED), now=2.5) == [
        Refused(C, EngineStartFailed, retry_after_s=0.5)
    ]


def test_each_start_and_each_eviction_says_why() -> None:
    scheduler = of_ten()
    idle(scheduler, FOUR, since=100.0)
    idle(scheduler, THREE, since=100.0)
    [stop] = scheduler.handle(Acquire(A, SIX), now=109.0)
    assert isinstance(stop, Stop)
    assert stop.decision is not None
    assert (stop.decision.verdict, stop.decision.model) == (Verdict.EVICT, SIX.key.model)
    [victim] = stop.decision.victims
    assert (victim.engine, victim.frees[HOST], victim.idle_s) == (THREE_1, gib(3), 9.0)
    assert victim.uses == pytest.approx(0.5 ** (9 / 600))
    assert victim.score == pytest.approx(victim.reload_s * victim.uses / 10.0)
    [begun] = scheduler.handle(EngineExited(THREE_1), now=110.0)
    assert isinstance(begun, Start)
    assert begun.decision is not None
    assert (begun.decision.verdict, begun.decision.model) == (Verdict.EVICT, SIX.key.model)
    assert begun.decision.victims == (victim,)  # the load tells who left for it, too
    view = scheduler.view(SIX.key)
    assert view is not None
    assert view.decision is begun.decision


def test_an_eviction_of_an_engine_that_was_busy_says_why_too() -> None:
    scheduler = of_ten(fair_wait_s=5.0)
    busy(scheduler, A, SIX)
    scheduler.handle(Acquire(B, FIVE), now=0.0)
    scheduler.handle(Tick(), now=5.0)
    [stop] = scheduler.handle(Release(A), now=6.0)
    assert isinstance(stop, Stop)
    assert stop.decision is not None
    assert stop.decision.model == FIVE.key.model


# The head of the queue.


def test_nobody_starts_past_the_head() -> None:
    scheduler = of_ten(fair_wait_s=100.0)
    busy(scheduler, A, THREE)
    busy(scheduler, B, ALSO_THREE)
    assert scheduler.handle(Acquire(C, SIX), now=1.0) == []
    assert scheduler.handle(Acquire(D, ONE), now=2.0) == []  # 4 are free
    assert scheduler.handle(Release(A), now=3.0) == [Stop(THREE_1, "evicted")]
    assert scheduler.handle(EngineExited(THREE_1), now=4.0) == [start(SIX), start(ONE)]


def test_when_the_head_leaves_the_next_one_may_start() -> None:
    scheduler = of_ten(fair_wait_s=100.0)
    busy(scheduler, A, SIX)
    scheduler.handle(Acquire(B, FIVE), now=1.0)
    scheduler.handle(Acquire(C, FOUR), now=2.0)
    assert scheduler.handle(Release(B), now=3.0) == [start(FOUR)]


def test_only_as_many_busy_engines_are_drained_as_the_head_needs() -> None:
    scheduler = of_ten(fair_wait_s=5.0)
    busy(scheduler, A, ONE)
    busy(scheduler, B, EIGHT)
    scheduler.handle(Acquire(C, EIGHT), now=0.0)
    scheduler.handle(Acquire(D, FIVE), now=0.0)
    scheduler.handle(Tick(), now=5.0)
    # one is asked for less, but eight alone frees enough.
    assert states(scheduler) == ["ready", "draining"]


def test_nobody_busy_is_drained_while_a_load_holds_what_the_head_needs() -> None:
    scheduler = of_ten(fair_wait_s=5.0)
    busy(scheduler, A, ONE)
    scheduler.handle(Acquire(B, EIGHT), now=0.0)
    assert scheduler.handle(Acquire(C, FIVE), now=0.0) == []
    scheduler.handle(Tick(), now=5.0)
    assert states(scheduler) == ["ready", "starting"]
    assert scheduler.handle(EngineReady(EIGHT_1), now=6.0) == [Grant(B, EIGHT_1)]
    assert states(scheduler) == ["ready", "draining"]


def test_a_busy_engine_on_another_device_is_not_drained() -> None:
    scheduler = of_ten(fair_wait_s=5.0)
    busy(scheduler, A, CARD_SIX)
    busy(scheduler, B, SIX)
    scheduler.handle(Acquire(C, FIVE), now=0.0)
    scheduler.handle(Tick(), now=5.0)
    assert states(scheduler) == ["ready", "draining"]


def test_what_its_own_successor_will_take_is_no_room() -> None:
    scheduler = of_ten()
    idle(scheduler, SIX, since=0.0)
    idle(scheduler, THREE, since=0.0)
    scheduler.handle(Unload(SIX_1), now=1.0)
    assert scheduler.handle(Acquire(A, SIX), now=1.0) == []
    assert scheduler.handle(Acquire(B, FOUR), now=1.0) == [Stop(THREE_1, "evicted")]
    assert scheduler.handle(EngineExited(SIX_1), now=2.0) == [start(SIX, 2)]
    assert scheduler.handle(EngineExited(THREE_1), now=2.0) == [start(FOUR)]


# What can never fit.


def test_what_can_never_fit_is_refused_at_once_and_nobody_leaves() -> None:
    scheduler = of_ten()
    idle(scheduler, THREE, since=0.0)
    [refusal] = scheduler.handle(Acquire(A, ELEVEN), now=1.0)
    assert refusal == Refused(A, InsufficientMemory)
    assert isinstance(refusal, Refuse)
    assert refusal.error.details is not None
    assert refusal.error.details["needed_bytes"] == gib(11)
    assert refusal.error.details["lacking_bytes"] == {HOST: gib(1)}
    assert states(scheduler) == ["ready"]
    assert scheduler.queued == 0
    assert scheduler.handle(Release(A), now=1.0) == []


def test_what_can_never_fit_does_not_wait_behind_others_either() -> None:
    scheduler = of_ten(fair_wait_s=100.0)
    busy(scheduler, A, SIX)
    scheduler.handle(Acquire(B, FIVE), now=0.0)
    assert scheduler.handle(Acquire(C, ELEVEN), now=0.0) == [Refused(C, InsufficientMemory)]


def test_a_running_engine_is_not_given_up_for_options_that_can_never_fit() -> None:
    scheduler = of_ten()
    idle(scheduler, SLOTTED, since=0.0)
    huge = asking(SLOTTED, n_ctx=8192)
    [refusal] = scheduler.handle(Acquire(A, huge), now=1.0)
    assert isinstance(refusal, Refuse)
    assert refusal.error.message.endswith(
        "What would fit: n_ctx 4096; cache_type_k q8_0, cache_type_v q8_0."
    )
    assert scheduler.handle(Acquire(B, SLOTTED), now=1.0) == [Grant(B, SLOTTED_1)]


def test_options_may_grow_into_the_room_of_the_engine_they_replace() -> None:
    scheduler = of_ten()
    idle(scheduler, asking(SLOTTED, n_parallel=1), since=0.0)
    scheduler.handle(Pin(SLOTTED.key.model), now=0.0)
    larger = asking(SLOTTED, n_ctx=4096)
    assert scheduler.handle(Acquire(A, larger), now=1.0) == [Stop(SLOTTED_1, "options")]
    assert scheduler.handle(EngineExited(SLOTTED_1), now=2.0) == [start(larger, 2, n_parallel=1)]


def test_where_a_pinned_model_is_in_the_way_asking_again_may_help() -> None:
    scheduler = of_ten()
    scheduler.handle(host(10), now=0.0)
    scheduler.handle(Pin(SIX.key.model), now=0.0)
    idle(scheduler, SIX, since=0.0)
    assert scheduler.handle(Acquire(A, FIVE), now=1.0) == [
        Refused(A, InsufficientMemory, retry_after_s=ASK_AGAIN_S)
    ]


def test_the_queue_s_limit_comes_before_the_memory_s() -> None:
    scheduler = of_ten(max_queue=0)
    [refusal] = scheduler.handle(Acquire(A, ELEVEN), now=0.0)
    assert isinstance(refusal, Refuse)
    assert refusal.error.code == "queue_full"


# What is measured.


def test_what_an_earlier_load_took_counts_and_not_the_estimate() -> None:
    learned = replace(THREE, learned_as="three@1")
    figures = Figures()
    figures.note("three@1", "cpu", 0, learned.defaults, Figure(gib(7), 0, 2.5))
    scheduler = of_ten(figures=figures)
    idle(scheduler, FOUR, since=0.0)
    [stop] = scheduler.handle(Acquire(A, learned), now=1.0)
    assert stop == Stop(FOUR_1, "evicted")
    [begun] = scheduler.handle(EngineExited(FOUR_1), now=2.0)
    assert begun == start(learned)
    assert isinstance(begun, Start)
    assert begun.decision is not None
    assert (begun.decision.learned, begun.decision.expected_s) == (True, 2.5)
    assert charged(scheduler, learned) == 7.0


def test_an_earlier_load_with_other_options_tells_only_its_seconds() -> None:
    learned = replace(THREE, learned_as="three@1")
    figures = Figures()
    figures.note("three@1", "cpu", 0, LoadOptions(n_ctx=1), Figure(gib(7), 0, 2.5))
    decision = of_ten(figures=figures).plan(learned, now=0.0)
    assert (decision.learned, decision.expected_s) == (False, 2.5)
    assert decision.footprint.host_bytes == gib(3)


def test_an_engine_is_charged_what_it_takes_once_it_has_worked() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, SIX), now=0.0)
    assert scheduler.handle(uses(SIX_1, 9), now=1.0) == []
    assert charged(scheduler, SIX) == 6.0  # it starts: it keeps what it was promised
    scheduler.handle(EngineReady(SIX_1), now=2.0)
    assert scheduler.handle(uses(SIX_1, 2), now=3.0) == []
    assert charged(scheduler, SIX) == 6.0  # it has not worked: it may take the rest yet
    scheduler.handle(Release(A), now=4.0)
    assert scheduler.handle(uses(SIX_1, 3), now=5.0) == []
    assert charged(scheduler, SIX) == 3.0
    assert scheduler.handle(Acquire(B, FIVE), now=6.0) == [start(FIVE)]


def test_more_than_was_promised_counts_at_once() -> None:
    scheduler = of_ten()
    busy(scheduler, A, THREE)
    scheduler.handle(uses(THREE_1, 7), now=1.0)
    assert charged(scheduler, THREE) == 7.0
    assert scheduler.handle(Acquire(B, FOUR), now=2.0) == []


def test_the_most_it_ever_took_counts() -> None:
    scheduler = of_ten()
    busy(scheduler, A, SIX)
    scheduler.handle(uses(SIX_1, 5), now=1.0)
    scheduler.handle(Release(A), now=2.0)
    scheduler.handle(uses(SIX_1, 3), now=3.0)
    assert charged(scheduler, SIX) == 5.0
    scheduler.handle(Acquire(A, SIX), now=4.0)
    scheduler.handle(uses(SIX_1, 8), now=5.0)  # it has worked before: no promise counts any more
    assert charged(scheduler, SIX) == 8.0


def test_who_was_never_used_keeps_what_it_was_promised() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, SIX), now=0.0)
    scheduler.handle(Release(A), now=0.0)
    scheduler.handle(EngineReady(SIX_1), now=1.0)
    scheduler.handle(uses(SIX_1, 2), now=2.0)
    assert charged(scheduler, SIX) == 6.0


def test_an_engine_that_drains_is_measured_and_one_that_stops_is_not() -> None:
    scheduler = of_ten()
    busy(scheduler, A, SIX)
    scheduler.handle(Unload(SIX_1), now=1.0)
    scheduler.handle(uses(SIX_1, 7), now=2.0)
    assert charged(scheduler, SIX) == 7.0
    scheduler.handle(Release(A), now=3.0)
    scheduler.handle(uses(SIX_1, 1), now=4.0)
    assert charged(scheduler, SIX) == 7.0


def test_each_device_is_measured_for_itself() -> None:
    scheduler = of_ten()
    both = on_cards("both", 5, host_gib=2)
    busy(scheduler, A, both)
    scheduler.handle(Release(A), now=1.0)
    use = MemoryUse(gib(1), gib(1), ((CARD, gib(6)), (CARD_1, gib(0.5))))
    scheduler.handle(Measured((), {nth(both, 1): use}), now=2.0)
    assert [charged(scheduler, both, device) for device in (HOST, CARD, CARD_1)] == [1, 6, 0.5]


def test_what_cannot_be_read_is_charged_as_before() -> None:
    scheduler = of_ten()
    idle(scheduler, SIX, since=0.0)
    scheduler.handle(uses(SIX_1, 3), now=1.0)
    scheduler.handle(Measured((), {SIX_1: MemoryUse()}), now=2.0)
    assert charged(scheduler, SIX) == 3.0


def test_news_of_an_engine_that_is_gone_is_no_charge() -> None:
    scheduler = of_ten()
    idle(scheduler, SIX, since=0.0)
    scheduler.handle(EngineExited(SIX_1), now=1.0)
    assert scheduler.handle(uses(SIX_1, 6), now=2.0) == []
    [state] = scheduler.devices()
    assert (state.used_bytes, state.others_bytes) == (0, 0)


def test_the_ledger_is_shown_with_what_starts_as_reserved() -> None:
    scheduler = of_ten()
    scheduler.handle(host(8), now=0.0)
    busy(scheduler, A, THREE)
    scheduler.handle(Acquire(B, FOUR), now=0.0)
    [state] = scheduler.devices()
    assert (state.reserved_bytes, state.used_bytes) == (gib(4), gib(3))
    assert (state.others_bytes, state.free_bytes) == (gib(2), gib(1))


# Other programs.


def test_what_others_take_is_promised_to_nobody() -> None:
    scheduler = of_ten()
    assert scheduler.handle(host(5), now=0.0) == []
    assert scheduler.handle(Acquire(A, SIX), now=1.0) == [
        Refused(A, InsufficientMemory, retry_after_s=ASK_AGAIN_S)
    ]
    assert scheduler.handle(Acquire(B, FIVE), now=1.0) == [start(FIVE)]


def test_idle_engines_leave_for_what_others_took() -> None:
    scheduler = of_ten()
    idle(scheduler, THREE, since=0.0)
    scheduler.handle(uses(THREE_1, 3, others_gib=2), now=1.0)
    assert scheduler.handle(Acquire(A, SIX), now=2.0) == [Stop(THREE_1, "evicted")]


def test_who_waits_is_refused_when_others_took_what_it_needs() -> None:
    scheduler = of_ten(fair_wait_s=100.0)
    busy(scheduler, A, FIVE)
    assert scheduler.handle(Acquire(B, EIGHT), now=1.0) == []
    assert scheduler.handle(Acquire(C, THREE), now=1.0) == []
    assert scheduler.handle(host(2), now=2.0) == [
        Refused(B, InsufficientMemory, retry_after_s=ASK_AGAIN_S),
        Refused(C, InsufficientMemory, retry_after_s=ASK_AGAIN_S),
    ]


def test_the_one_behind_who_is_refused_may_start() -> None:
    scheduler = of_ten(fair_wait_s=100.0)
    busy(scheduler, A, FIVE)
    scheduler.handle(Acquire(B, EIGHT), now=1.0)
    scheduler.handle(Acquire(C, ONE), now=1.0)
    assert scheduler.handle(uses(FIVE_1, 5, others_gib=3.5), now=2.0) == [
        Refused(B, InsufficientMemory),
        start(ONE),
    ]


def test_memory_that_comes_back_wakes_the_head() -> None:
    scheduler = of_ten(fair_wait_s=100.0)
    busy(scheduler, A, THREE)
    scheduler.handle(uses(THREE_1, 3, others_gib=2), now=1.0)
    assert scheduler.handle(Acquire(B, SIX), now=2.0) == []
    assert scheduler.handle(uses(THREE_1, 3), now=3.0) == [start(SIX)]


def test_a_smaller_wish_outlives_a_larger_one_that_fits_no_more() -> None:
    scheduler = make_scheduler(fair_wait_s=100.0)
    scheduler.handle(Measured((reading(HOST, 16, 16),)), now=0.0)
    busy(scheduler, A, SIX)
    large, small = asking(SLOTTED, n_ctx=8192, n_parallel=1), asking(SLOTTED, n_parallel=1)
    assert scheduler.handle(Acquire(B, large), now=1.0) == []
    assert scheduler.handle(Acquire(C, small), now=1.0) == []
    use = {SIX_1: MemoryUse(gib(6), gib(6), ())}
    assert scheduler.handle(Measured((reading(HOST, 16, 2),), use), now=2.0) == [
        Refused(B, InsufficientMemory)
    ]
    assert scheduler.handle(Release(A), now=3.0) == [Stop(SIX_1, "evicted")]
    assert scheduler.handle(EngineExited(SIX_1), now=4.0) == [start(small)]


def test_a_running_engine_is_not_given_up_for_what_fits_no_more() -> None:
    scheduler = make_scheduler()
    scheduler.handle(Measured((reading(HOST, 16, 16),)), now=0.0)
    small, large = asking(SLOTTED, n_parallel=1), asking(SLOTTED, n_ctx=8192, n_parallel=1)
    assert scheduler.handle(Acquire(A, small), now=0.0) == [start(small)]
    assert scheduler.handle(Acquire(B, large), now=0.0) == []
    scheduler.handle(Measured((reading(HOST, 16, 8),)), now=1.0)
    assert scheduler.handle(EngineReady(SLOTTED_1), now=2.0) == [
        Grant(A, SLOTTED_1),
        Refused(B, InsufficientMemory),
    ]


def test_who_asks_for_what_is_loading_already_waits_for_it_whatever_others_take() -> None:
    scheduler = of_ten()
    assert scheduler.handle(Acquire(A, SIX), now=0.0) == [start(SIX)]
    scheduler.handle(host(4), now=1.0)
    assert scheduler.handle(Acquire(B, SIX), now=2.0) == []
    assert scheduler.handle(EngineReady(SIX_1), now=3.0) == [Grant(A, SIX_1), Grant(B, SIX_1)]


def test_where_nobody_tells_whose_a_card_s_memory_is_engines_are_believed() -> None:
    scheduler = of_ten()
    idle(scheduler, CARD_FIVE, since=0.0)
    untold = {CARD_FIVE_1: MemoryUse(0, 0, None)}
    scheduler.handle(Measured((reading(CARD, 10, 4),), untold), now=1.0)
    [state] = scheduler.devices()
    assert state.others_bytes == gib(1)
    assert scheduler.handle(Acquire(A, CARD_SIX), now=2.0) == [Stop(CARD_FIVE_1, "evicted")]


def test_where_nobody_tells_whose_a_card_s_memory_is_a_load_is_not_somebody_else() -> None:
    scheduler = of_ten()
    assert scheduler.handle(Acquire(A, CARD_SIX), now=0.0) == [start(CARD_SIX, placement=(CARD,))]
    untold = {CARD_SIX_1: MemoryUse(0, 0, None)}
    scheduler.handle(Measured((reading(CARD, 10, 4.5),), untold), now=1.0)  # it has 5.5 of its 6
    assert scheduler.handle(Acquire(B, CARD_FIVE), now=2.0) == []


def test_an_engine_that_was_only_loaded_keeps_its_promise() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, SIX, works=False), now=0.0)
    scheduler.handle(EngineReady(SIX_1), now=1.0)
    scheduler.handle(Release(A), now=1.0)
    scheduler.handle(uses(SIX_1, 5), now=2.0)
    assert charged(scheduler, SIX) == 6  # its first request will take the rest
    scheduler.handle(Acquire(B, SIX), now=3.0)
    scheduler.handle(Release(B), now=4.0)
    scheduler.handle(uses(SIX_1, 5.5), now=5.0)
    assert charged(scheduler, SIX) == 5.5


# Out of memory at load, though it should have fitted.


def test_it_is_tried_once_more_with_the_idle_ones_gone() -> None:
    scheduler = of_ten()
    idle(scheduler, THREE, since=0.0)
    assert scheduler.handle(Acquire(A, SIX), now=1.0) == [start(SIX)]
    assert scheduler.handle(Acquire(B, SIX), now=1.0) == []
    assert scheduler.handle(EngineExited(SIX_1, NO_MEMORY), now=2.0) == [Stop(THREE_1, "evicted")]
    assert scheduler.handle(Tick(), now=2.5) == []
    assert scheduler.handle(EngineExited(THREE_1), now=3.0) == [start(SIX, 2)]
    assert scheduler.handle(EngineReady(SIX_2), now=4.0) == [Grant(A, SIX_2), Grant(B, SIX_2)]


def test_all_idle_ones_leave_for_a_second_try_and_it_waits_for_all() -> None:
    scheduler = of_ten()
    idle(scheduler, THREE, since=0.0)
    idle(scheduler, ONE, since=0.0)
    scheduler.handle(Acquire(A, SIX), now=1.0)
    assert scheduler.handle(EngineExited(SIX_1, NO_MEMORY), now=2.0) == [
        Stop(THREE_1, "evicted"),
        Stop(nth(ONE, 1), "evicted"),
    ]
    assert scheduler.handle(EngineExited(THREE_1), now=3.0) == []
    assert scheduler.handle(EngineExited(nth(ONE, 1)), now=4.0) == [start(SIX, 2)]


def test_a_second_failure_is_told() -> None:
    scheduler = of_ten(backoff_first_s=1.0)
    idle(scheduler, THREE, since=0.0)
    scheduler.handle(Acquire(A, SIX), now=1.0)
    scheduler.handle(EngineExited(SIX_1, NO_MEMORY), now=2.0)
    scheduler.handle(EngineExited(THREE_1), now=3.0)
    idle(scheduler, FOUR, since=3.0)
    assert scheduler.handle(EngineExited(SIX_2, NO_MEMORY), now=4.0) == [
        Refused(A, InsufficientMemory)
    ]
    assert scheduler.handle(Acquire(B, SIX), now=4.25) == [
        Refused(B, InsufficientMemory, retry_after_s=0.75)
    ]
    assert states(scheduler) == ["ready"]


def test_where_nobody_is_idle_it_is_told_at_once() -> None:
    scheduler = of_ten()
    busy(scheduler, A, THREE)
    scheduler.handle(Acquire(B, SIX), now=1.0)
    assert scheduler.handle(EngineExited(SIX_1, NO_MEMORY), now=2.0) == [
        Refused(B, InsufficientMemory)
    ]


def test_pinned_ones_and_upstreams_stay_for_a_second_try() -> None:
    scheduler = of_ten()
    idle(scheduler, THREE, since=0.0)
    idle(scheduler, ONE, since=0.0)
    idle(scheduler, UPSTREAM, since=0.0)
    scheduler.handle(Pin(THREE.key.model), now=0.0)
    scheduler.handle(Acquire(A, FIVE), now=1.0)
    assert scheduler.handle(EngineExited(FIVE_1, NO_MEMORY), now=2.0) == [
        Stop(nth(ONE, 1), "evicted")
    ]


def test_who_holds_nothing_of_what_it_takes_stays_for_a_second_try() -> None:
    scheduler = of_ten()
    idle(scheduler, CARD_SIX, since=0.0)
    scheduler.handle(Acquire(A, FIVE), now=1.0)
    assert scheduler.handle(EngineExited(FIVE_1, NO_MEMORY), now=2.0) == [
        Refused(A, InsufficientMemory)
    ]


def test_another_failure_is_no_reason_for_a_second_try() -> None:
    scheduler = of_ten()
    idle(scheduler, THREE, since=0.0)
    scheduler.handle(Acquire(A, SIX), now=1.0)
    assert scheduler.handle(EngineExited(SIX_1, EngineStartFailed("bad")), now=2.0) == [
        Refused(A, EngineStartFailed)
    ]
    assert states(scheduler) == ["ready"]


def test_where_nobody_waits_any_more_nobody_leaves_for_a_second_try() -> None:
    scheduler = of_ten()
    idle(scheduler, THREE, since=0.0)
    scheduler.handle(Acquire(A, SIX), now=1.0)
    scheduler.handle(Release(A), now=1.5)
    assert scheduler.handle(EngineExited(SIX_1, NO_MEMORY), now=2.0) == []


def test_who_leaves_while_the_second_try_waits_takes_it_along() -> None:
    scheduler = of_ten()
    idle(scheduler, THREE, since=0.0)
    scheduler.handle(Acquire(A, SIX), now=1.0)
    scheduler.handle(EngineExited(SIX_1, NO_MEMORY), now=2.0)
    assert scheduler.handle(Acquire(B, ONE), now=2.0) == []  # it does not start past the first
    assert scheduler.handle(Release(A), now=2.5) == [start(ONE)]
    assert scheduler.handle(EngineExited(THREE_1), now=3.0) == []


# Residency: two models that share one place do not take turns with every request.


def sharing(**options: float) -> Scheduler:
    """Return a place for one: six is in use from 0 on, not for the first time, five waits."""
    scheduler = of_ten(fair_wait_s=100.0, **options)
    busy_again(scheduler, A, SIX)
    assert scheduler.handle(Acquire(B, FIVE), now=1.0) == []
    return scheduler


def test_who_came_while_it_was_in_use_lets_it_linger() -> None:
    scheduler = sharing(min_residency_s=30.0)
    assert scheduler.handle(Release(A), now=2.0) == []
    assert scheduler.next_wakeup(now=2.0) == 2.0 + LINGER_S
    assert scheduler.handle(Tick(), now=2.9) == []
    assert scheduler.handle(Tick(), now=3.0) == [Stop(SIX_1, "evicted")]


def test_a_model_that_is_used_for_the_first_time_does_not_linger() -> None:
    scheduler = of_ten(fair_wait_s=100.0, min_residency_s=30.0)
    busy(scheduler, A, SIX)
    assert scheduler.handle(Acquire(B, FIVE), now=1.0) == []
    assert scheduler.handle(Release(A), now=2.0) == [Stop(SIX_1, "evicted")]


def test_a_model_nobody_came_back_to_within_that_time_does_not_linger() -> None:
    scheduler = of_ten(fair_wait_s=100.0, min_residency_s=30.0)
    busy_again(scheduler, A, SIX)
    scheduler.handle(Release(A), now=0.0)
    scheduler.handle(Acquire(A, SIX), now=LINGER_S + 0.1)
    assert scheduler.handle(Acquire(B, FIVE), now=2.0) == []
    assert scheduler.handle(Release(A), now=3.0) == [Stop(SIX_1, "evicted")]


def test_who_came_back_too_late_for_one_life_has_the_next_one_linger() -> None:
    scheduler = of_ten(fair_wait_s=100.0, min_residency_s=30.0)
    busy(scheduler, A, SIX)
    scheduler.handle(Acquire(B, FIVE), now=1.0)
    assert scheduler.handle(Release(A), now=2.0) == [Stop(SIX_1, "evicted")]
    scheduler.handle(Acquire(A, SIX), now=2.5)
    scheduler.handle(EngineExited(SIX_1), now=3.0)
    scheduler.handle(EngineReady(FIVE_1), now=4.0)
    assert scheduler.handle(Release(B), now=5.0) == [Stop(FIVE_1, "evicted")]
    scheduler.handle(Acquire(B, FIVE), now=5.5)
    assert scheduler.handle(EngineExited(FIVE_1), now=6.0) == [start(SIX, 2)]
    scheduler.handle(EngineReady(EngineId(SIX.key, 2)), now=7.0)
    assert scheduler.handle(Release(A), now=8.0) == []
    assert scheduler.next_wakeup(now=8.0) == 8.0 + LINGER_S


def test_who_asks_it_again_keeps_it_for_its_residency() -> None:
    scheduler = sharing(min_residency_s=5.0)
    for now in (2.0, 3.0, 4.0):
        assert scheduler.handle(Release(A), now=now) == []
        assert scheduler.handle(Acquire(A, SIX), now=now + 0.9) == [Grant(A, SIX_1)]
    assert scheduler.handle(Release(A), now=4.95) == []
    assert scheduler.next_wakeup(now=4.95) == 5.0  # its residency ends before it has lingered
    assert scheduler.handle(Tick(), now=5.0) == [Stop(SIX_1, "evicted")]


def test_after_its_residency_it_leaves_with_its_last_lease() -> None:
    scheduler = sharing(min_residency_s=5.0)
    assert scheduler.handle(Release(A), now=5.0) == [Stop(SIX_1, "evicted")]


def test_without_a_residency_it_leaves_with_its_last_lease() -> None:
    scheduler = sharing(min_residency_s=0.0)
    assert scheduler.handle(Release(A), now=2.0) == [Stop(SIX_1, "evicted")]


def test_who_comes_when_it_is_idle_does_not_wait() -> None:
    scheduler = of_ten(min_residency_s=30.0)
    idle(scheduler, SIX, since=0.0)
    assert scheduler.handle(Acquire(A, FIVE), now=0.0) == [Stop(SIX_1, "evicted")]


def test_an_engine_nobody_has_used_leaves_at_once() -> None:
    scheduler = of_ten(min_residency_s=30.0)
    scheduler.handle(Acquire(A, SIX), now=0.0)
    scheduler.handle(Acquire(B, FIVE), now=1.0)
    scheduler.handle(Release(A), now=2.0)
    assert scheduler.handle(EngineReady(SIX_1), now=3.0) == [Stop(SIX_1, "evicted")]


def test_an_engine_that_may_leave_does_so_though_another_lingers() -> None:
    scheduler = of_ten(fair_wait_s=100.0, min_residency_s=30.0)
    busy_again(scheduler, A, THREE)
    busy_again(scheduler, B, FOUR)
    assert scheduler.handle(Acquire(C, FIVE), now=1.0) == []
    assert scheduler.handle(Release(B), now=2.0) == []
    assert scheduler.handle(Release(A), now=2.5) == []
    assert scheduler.next_wakeup(now=2.5) == 3.0
    assert scheduler.handle(Tick(), now=3.0) == [Stop(FOUR_1, "evicted")]


def test_nobody_busy_is_drained_where_one_that_lingers_suffices() -> None:
    scheduler = of_ten(fair_wait_s=1.0, min_residency_s=1.5)
    busy_again(scheduler, A, SIX)
    busy(scheduler, B, THREE, now=0.0)
    assert scheduler.handle(Acquire(C, FIVE), now=0.1) == []
    assert scheduler.handle(Release(A), now=1.2) == []
    assert scheduler.handle(Tick(), now=1.4) == []
    assert states(scheduler) == ["ready", "ready"]
    assert scheduler.handle(Tick(), now=1.5) == [Stop(SIX_1, "evicted")]


def test_a_busy_engine_is_drained_after_the_fair_wait_and_its_residency() -> None:
    scheduler = of_ten(fair_wait_s=5.0, min_residency_s=20.0)
    busy(scheduler, A, SIX, now=0.0)
    scheduler.handle(Acquire(B, FIVE), now=1.0)
    assert scheduler.next_wakeup(now=1.0) == 20.0
    scheduler.handle(Tick(), now=19.9)
    assert states(scheduler) == ["ready"]
    scheduler.handle(Tick(), now=20.0)
    assert states(scheduler) == ["draining"]
    assert scheduler.next_wakeup(now=20.0) is None


# Waiting has an end.


def test_a_wait_for_room_has_a_bound_of_its_own() -> None:
    scheduler = of_ten(fair_wait_s=100.0)
    busy(scheduler, A, SIX)
    scheduler.handle(Acquire(B, FIVE, deadline=50.0, queue_deadline=10.0), now=1.0)
    assert scheduler.next_wakeup(now=1.0) == 10.0
    assert scheduler.handle(Tick(), now=9.9) == []
    assert scheduler.handle(Tick(), now=10.0) == [Refused(B, QueueTimeout, retry_after_s=10.0)]


def test_who_waits_for_its_engine_to_load_waits_on() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, SIX, deadline=50.0, queue_deadline=10.0), now=1.0)
    assert scheduler.handle(Tick(), now=10.0) == []
    assert scheduler.next_wakeup(now=10.0) == 50.0
    assert scheduler.handle(Tick(), now=50.0) == [Refused(A, LoadingTimeout)]


def test_a_load_of_fewer_than_it_asks_for_is_not_its_own() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, asking(SLOTTED, n_parallel=1)), now=0.0)
    scheduler.handle(Acquire(B, asking(SLOTTED, n_ctx=4096), queue_deadline=10.0), now=1.0)
    assert scheduler.handle(Tick(), now=10.0) == [Refused(B, QueueTimeout)]


def test_who_gives_up_is_told_how_long_it_waited() -> None:
    scheduler = of_ten(fair_wait_s=100.0)
    scheduler.handle(Acquire(A, SIX, deadline=12.0), now=5.0)
    scheduler.handle(Acquire(B, FIVE, deadline=12.0), now=2.0)
    loading, waiting = scheduler.handle(Tick(), now=12.0)
    assert isinstance(loading, Refuse)
    assert isinstance(waiting, Refuse)
    assert "/models/six.gguf is still loading after 7 s." in loading.error.message
    assert "No place for /models/five.gguf became free in 10 s." in waiting.error.message


def test_two_deadlines_in_one_moment_refuse_once() -> None:
    scheduler = of_ten(fair_wait_s=100.0)
    busy(scheduler, A, SIX)
    scheduler.handle(Acquire(B, FIVE, deadline=10.0, queue_deadline=10.0), now=1.0)
    assert scheduler.handle(Tick(), now=10.0) == [Refused(B, QueueTimeout)]


def test_who_was_served_or_left_is_not_waited_for() -> None:
    scheduler = of_ten(fair_wait_s=100.0, default_ttl_s=0.0)
    scheduler.handle(Acquire(A, SIX, queue_deadline=10.0), now=0.0)
    scheduler.handle(EngineReady(SIX_1), now=1.0)
    scheduler.handle(Acquire(B, FIVE, deadline=20.0), now=1.0)
    assert scheduler.next_wakeup(now=1.0) == 20.0
    scheduler.handle(Release(B), now=2.0)
    assert scheduler.next_wakeup(now=2.0) is None


# Taking a load back.


def test_a_load_that_is_taken_back_ends() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, SIX), now=0.0)
    assert scheduler.handle(Release(A, cancel=True), now=1.0) == [Stop(SIX_1, "cancelled")]
    assert scheduler.handle(EngineExited(SIX_1), now=2.0) == []
    assert scheduler.handle(Acquire(B, SIX), now=2.0) == [start(SIX, 2)]  # it was no failure


def test_a_load_that_others_wait_for_goes_on() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, SIX), now=0.0)
    scheduler.handle(Acquire(B, SIX), now=0.0)
    assert scheduler.handle(Release(A, cancel=True), now=1.0) == []
    assert scheduler.handle(Release(B, cancel=True), now=1.0) == [Stop(SIX_1, "cancelled")]


def test_who_waits_behind_a_load_that_is_taken_back_moves_up() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, SIX), now=0.0)
    scheduler.handle(Acquire(B, FIVE), now=0.0)
    assert scheduler.handle(Release(A, cancel=True), now=1.0) == [Stop(SIX_1, "cancelled")]
    assert scheduler.handle(EngineExited(SIX_1), now=2.0) == [start(FIVE)]


def test_what_runs_already_is_not_taken_back() -> None:
    scheduler = of_ten()
    busy(scheduler, A, SIX)
    assert scheduler.handle(Release(A, cancel=True), now=1.0) == []
    assert states(scheduler) == ["ready"]


def test_who_waits_for_room_only_leaves() -> None:
    scheduler = of_ten(fair_wait_s=100.0)
    busy(scheduler, A, asking(SLOTTED, n_parallel=1))
    assert scheduler.handle(Acquire(B, asking(SLOTTED, n_ctx=2048)), now=1.0) == []
    assert scheduler.handle(Release(B, cancel=True), now=2.0) == []
    scheduler.handle(Acquire(C, EIGHT), now=3.0)
    assert scheduler.handle(Release(C, cancel=True), now=4.0) == []


# Pins.


def test_a_pinned_model_has_no_ttl_until_it_is_unpinned() -> None:
    scheduler = of_ten(default_ttl_s=60.0)
    idle(scheduler, SIX, since=0.0)
    assert scheduler.handle(Pin(SIX.key.model), now=1.0) == []
    assert scheduler.pinned == {SIX.key.model}
    view = scheduler.view(SIX.key)
    assert view is not None
    assert (view.pinned, view.idle_deadline()) == (True, None)
    assert scheduler.next_wakeup(now=1.0) is None
    assert scheduler.handle(Tick(), now=1000.0) == []
    assert scheduler.handle(Pin(SIX.key.model, pinned=False), now=1000.0) == []
    assert scheduler.next_wakeup(now=1000.0) == 60.0
    assert scheduler.handle(Tick(), now=1000.0) == [Stop(SIX_1, "idle")]


def test_a_pinned_model_is_no_victim_until_it_is_unpinned() -> None:
    scheduler = of_ten()
    idle(scheduler, SIX, since=0.0)
    idle(scheduler, THREE, since=100.0)
    scheduler.handle(Pin(SIX.key.model), now=100.0)
    assert scheduler.handle(Acquire(A, FOUR), now=100.0) == [Stop(THREE_1, "evicted")]
    assert scheduler.handle(EngineExited(THREE_1), now=101.0) == [start(FOUR)]
    scheduler.handle(EngineReady(FOUR_1), now=102.0)
    scheduler.handle(Pin(SIX.key.model, pinned=False), now=103.0)
    assert scheduler.handle(Acquire(B, FIVE), now=103.0) == [Stop(SIX_1, "evicted")]


def test_the_head_need_not_wait_for_a_busy_one_when_another_is_unpinned() -> None:
    scheduler = of_ten(fair_wait_s=100.0)
    busy(scheduler, A, FIVE)
    idle(scheduler, THREE, since=0.0)
    scheduler.handle(Pin(THREE.key.model), now=0.0)
    assert scheduler.handle(Acquire(B, FOUR), now=1.0) == []
    assert scheduler.handle(Pin(THREE.key.model, pinned=False), now=2.0) == [
        Stop(THREE_1, "evicted")
    ]


def test_a_pinned_model_is_not_drained_for_the_head() -> None:
    scheduler = of_ten(fair_wait_s=5.0)
    busy(scheduler, A, THREE)
    busy(scheduler, B, SIX)
    scheduler.handle(Pin(THREE.key.model), now=0.0)
    scheduler.handle(Acquire(C, FIVE), now=0.0)
    scheduler.handle(Tick(), now=5.0)
    assert states(scheduler) == ["ready", "draining"]


def test_an_engine_that_drains_already_leaves_though_it_is_pinned() -> None:
    scheduler = of_ten(fair_wait_s=5.0)
    busy(scheduler, A, SIX)
    scheduler.handle(Acquire(B, FIVE), now=0.0)
    scheduler.handle(Tick(), now=5.0)
    assert scheduler.handle(Pin(SIX.key.model), now=6.0) == []
    assert scheduler.handle(Tick(), now=7.0) == []
    assert scheduler.handle(Release(A), now=8.0) == [Stop(SIX_1, "evicted")]
    assert scheduler.handle(EngineExited(SIX_1), now=9.0) == [start(FIVE)]


def test_who_waits_for_what_is_pinned_meanwhile_is_told_so() -> None:
    scheduler = of_ten(fair_wait_s=100.0)
    scheduler.handle(host(10), now=0.0)
    busy(scheduler, A, SIX)
    scheduler.handle(Acquire(B, FIVE), now=0.0)
    assert scheduler.handle(Pin(SIX.key.model), now=1.0) == [
        Refused(B, InsufficientMemory, retry_after_s=ASK_AGAIN_S)
    ]


def test_a_model_may_be_pinned_before_it_is_loaded() -> None:
    scheduler = of_ten(default_ttl_s=60.0)
    scheduler.handle(Pin(SIX.key.model), now=0.0)
    idle(scheduler, SIX, since=0.0)
    assert scheduler.next_wakeup(now=0.0) is None
    assert scheduler.handle(Unload(SIX_1), now=1.0) == [Stop(SIX_1, "unload")]
    assert scheduler.handle(EngineExited(SIX_1), now=2.0) == []
    assert scheduler.pinned == {SIX.key.model}


def test_a_wish_to_unpin_what_is_not_pinned_does_nothing() -> None:
    assert of_ten().handle(Pin(SIX.key.model, pinned=False), now=0.0) == []


# Whether several fit at once, as for the pins of the settings.


def test_models_fit_together_if_the_budget_holds_them_all() -> None:
    scheduler = of_ten()
    assert scheduler.fit_together([]).fits
    together = scheduler.fit_together([SIX, FOUR])
    assert together.fits
    assert together.sizes == ((SIX.key.model, gib(6)), (FOUR.key.model, gib(4)))
    assert together.limits == "10.00 GiB on host"
    assert not scheduler.fit_together([SIX, FIVE]).fits
    assert not scheduler.fit_together([FIVE, SIX, ONE]).fits
    assert not scheduler.fit_together([ELEVEN]).fits


def test_models_fit_together_as_they_would_be_loaded_one_after_the_other() -> None:
    # Each is as large as the ones before it leave it room for.
    for specs, fits in [([FIVE, SLOTTED], True), ([SLOTTED, FIVE], False)]:
        assert of_ten().fit_together(specs).fits is fits
        scheduler = of_ten()
        for spec in specs:
            scheduler.handle(Pin(spec.key.model), now=0.0)
        first = scheduler.handle(Acquire(A, specs[0]), now=0.0)
        second = scheduler.handle(Acquire(B, specs[1]), now=0.0)
        assert [type(effect) for effect in (*first, *second)] == [Start, Start if fits else Refuse]


def test_models_fit_together_on_each_device() -> None:
    scheduler = make_scheduler(budgets={HOST: gib(10), CARD: gib(10), CARD_1: gib(6)})
    pair = [
        on_cards(name, size, host_gib=3, placements=TWO_CARDS)
        for name, size in [("first", 8), ("second", 5)]
    ]
    together = scheduler.fit_together([*pair, FOUR])
    assert together.fits
    assert [size for _, size in together.sizes] == [gib(11), gib(8), gib(4)]
    assert together.limits == "10.00 GiB on host and 10.00 GiB on cuda:0 and 6.00 GiB on cuda:1"
    assert not scheduler.fit_together([*pair, FIVE]).fits


# Options, where memory limits them.


def test_two_clients_in_turn_cause_one_reload() -> None:
    scheduler = of_ten(fair_wait_s=5.0)
    model = growing("alternating", GrowingCost(2, 0.5))  # 4 with 2048, 6 with 4096 and 2 slots
    small, large = asking(model, n_ctx=2048), asking(model, n_ctx=4096)
    reloads = 0
    now = 0.0
    for number, spec in enumerate([small, large] * 10, start=10):
        ticket = Ticket(number)
        effects = scheduler.handle(Acquire(ticket, spec), now=now)
        while effects and not isinstance(effects[-1], Grant):
            now += 1.0
            [effect] = effects
            if isinstance(effect, Stop):
                assert effect.reason == "options"
                reloads += 1
                effects = scheduler.handle(EngineExited(effect.engine), now=now)
            else:
                assert isinstance(effect, Start)
                effects = scheduler.handle(EngineReady(effect.engine), now=now)
        assert len(effects) == 1
        now += 1.0
        assert scheduler.handle(Release(ticket), now=now) == []
    assert reloads == 1


def test_wishes_that_are_too_large_together_are_served_one_after_the_other() -> None:
    scheduler = of_ten()
    busy(scheduler, A, EIGHT)
    long, wide = asking(SLOTTED, n_ctx=4096), asking(SLOTTED, n_parallel=4)
    scheduler.handle(Acquire(B, long), now=1.0)
    scheduler.handle(Acquire(C, wide), now=1.0)
    scheduler.handle(Release(A), now=2.0)
    assert scheduler.handle(EngineExited(EIGHT_1), now=3.0) == [start(long, n_parallel=1)]
    assert scheduler.handle(EngineReady(SLOTTED_1), now=4.0) == [Grant(B, SLOTTED_1)]
    assert scheduler.handle(Release(B), now=5.0) == [Stop(SLOTTED_1, "options")]
    assert scheduler.handle(EngineExited(SLOTTED_1), now=6.0) == [start(wide, 2)]
    assert scheduler.handle(EngineReady(SLOTTED_2), now=7.0) == [Grant(C, SLOTTED_2)]


def test_wishes_that_fit_together_are_served_together_with_fewer_slots() -> None:
    scheduler = of_ten()
    busy(scheduler, A, EIGHT)
    scheduler.handle(Acquire(B, SLOTTED), now=1.0)
    scheduler.handle(Acquire(C, asking(SLOTTED, n_ctx=2048)), now=1.0)
    scheduler.handle(Release(A), now=2.0)
    assert scheduler.handle(EngineExited(EIGHT_1), now=3.0) == [
        start(SLOTTED, n_ctx=2048, n_parallel=2)
    ]


# A plan: what would become of a request.


def verdict(
    scheduler: Scheduler, spec: EngineSpec, *, now: float
) -> tuple[Verdict, list[EngineId]]:
    decision = scheduler.plan(spec, now=now)
    return decision.verdict, [victim.engine for victim in decision.victims]


def test_a_plan_of_what_runs_is_a_hit() -> None:
    scheduler = of_ten()
    busy(scheduler, A, asking(SLOTTED, n_ctx=2048))
    decision = scheduler.plan(SLOTTED, now=1.0)
    assert (decision.verdict, decision.options) == (
        Verdict.HIT,
        replace(SLOTTED.defaults, n_ctx=2048, n_parallel=2),
    )
    assert decision.reasons == ("n_parallel 2 instead of 4: engines may take 10.00 GiB on host",)
    assert decision.victims == decision.alternatives == ()


def test_a_plan_of_what_fits_is_a_load() -> None:
    scheduler = of_ten()
    scheduler.handle(host(9), now=0.0)
    decision = scheduler.plan(SIX, now=0.0)
    assert (decision.verdict, decision.model) == (Verdict.LOAD, SIX.key.model)
    assert (decision.options, decision.placement) == (SIX.defaults, ())
    assert decision.footprint.host_bytes == gib(6)
    assert decision.expected_s == pytest.approx(0.5 + gib(6) / 1.5e9)
    assert not decision.learned
    assert decision.devices == scheduler.devices()
    assert decision.lacking == decision.victims == decision.alternatives == ()


def test_a_plan_names_who_would_leave() -> None:
    scheduler = of_ten()
    idle(scheduler, FOUR, since=0.0)
    idle(scheduler, THREE, since=0.0)
    assert verdict(scheduler, FIVE, now=1.0) == (Verdict.EVICT, [THREE_1])


def test_a_plan_of_what_loads_or_cannot_be_had_yet_is_to_wait() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, SIX), now=0.0)
    assert verdict(scheduler, SIX, now=1.0) == (Verdict.WAIT, [])
    assert verdict(scheduler, FIVE, now=1.0) == (Verdict.WAIT, [])
    scheduler.handle(EngineReady(SIX_1), now=2.0)
    assert verdict(scheduler, FIVE, now=2.0) == (Verdict.WAIT, [])


def test_a_plan_of_other_options_is_a_reload_with_the_union() -> None:
    scheduler = of_ten()
    busy(scheduler, A, asking(SLOTTED, n_ctx=2048, n_parallel=1))
    decision = scheduler.plan(asking(SLOTTED, n_ctx=1024, n_parallel=2), now=1.0)
    assert (decision.verdict, decision.options) == (
        Verdict.RELOAD,
        replace(SLOTTED.defaults, n_ctx=2048, n_parallel=2),
    )


def test_a_plan_of_other_options_than_those_that_load_is_a_reload() -> None:
    scheduler = of_ten()
    scheduler.handle(Acquire(A, SLOTTED), now=0.0)
    assert verdict(scheduler, asking(SLOTTED, n_ctx=2048), now=1.0) == (Verdict.RELOAD, [])


def test_a_plan_of_a_reload_names_who_would_leave_for_it() -> None:
    scheduler = of_ten()
    idle(scheduler, asking(SLOTTED, n_parallel=1), since=0.0)
    idle(scheduler, THREE, since=0.0)
    larger = asking(SLOTTED, n_ctx=4096, n_parallel=1)
    assert verdict(scheduler, larger, now=1.0) == (Verdict.RELOAD, [THREE_1])


def test_a_plan_of_what_can_never_fit_says_what_would() -> None:
    scheduler = of_ten()
    idle(scheduler, THREE, since=0.0)
    decision = scheduler.plan(asking(SLOTTED, n_ctx=8192, n_parallel=1), now=1.0)
    assert (decision.verdict, decision.victims) == (Verdict.NEVER, ())
    assert decision.lacking == ((HOST, gib(2)),)
    assert [offer.change for offer in decision.alternatives] == ["n_ctx", "cache_type"]


def test_a_plan_of_a_reload_too_large_with_what_is_held_is_what_the_reload_will_be() -> None:
    scheduler = of_ten()
    idle(scheduler, asking(SLOTTED, n_ctx=4096), since=0.0)
    wide = asking(SLOTTED, n_parallel=4)
    decision = scheduler.plan(wide, now=1.0)
    assert scheduler.handle(Acquire(A, wide), now=1.0) == [Stop(SLOTTED_1, "options")]
    assert scheduler.handle(EngineExited(SLOTTED_1), now=2.0) == [start(wide, 2)]
    assert (decision.verdict, decision.options.n_ctx) == (Verdict.RELOAD, 1024)


def test_a_plan_of_what_is_leaving_is_what_the_next_one_will_be() -> None:
    scheduler = of_ten()
    idle(scheduler, asking(SLOTTED, n_ctx=4096), since=0.0)
    scheduler.handle(Unload(SLOTTED_1), now=1.0)
    decision = scheduler.plan(SLOTTED, now=1.0)
    scheduler.handle(Acquire(A, SLOTTED), now=1.0)
    assert scheduler.handle(EngineExited(SLOTTED_1), now=2.0) == [start(SLOTTED, 2)]
    assert (decision.verdict, decision.options) == (Verdict.WAIT, SLOTTED.defaults)


def test_a_plan_of_options_that_can_never_fit_is_never_though_the_model_runs() -> None:
    scheduler = of_ten()
    idle(scheduler, SLOTTED, since=0.0)
    assert verdict(scheduler, asking(SLOTTED, n_ctx=8192), now=1.0) == (Verdict.NEVER, [])


def test_what_another_client_asked_for_was_not_given_up() -> None:
    layered = growing("layered", GrowingCost(4, 0.25, layers=8), ((CARD,),))
    scheduler = of_ten()
    scheduler.handle(Acquire(A, asking(layered, n_gpu_layers=3, n_parallel=8)), now=0.0)
    decision = scheduler.plan(layered, now=1.0)
    assert (decision.verdict, decision.reasons) == (Verdict.WAIT, ())
    scheduler.handle(EngineReady(nth(layered, 1)), now=2.0)
    decision = scheduler.plan(layered, now=3.0)
    assert (decision.verdict, decision.reasons) == (Verdict.HIT, ())


SCRIPT: list[tuple[Event, float]] = [
    (host(9.5), 0.0),
    (Acquire(A, SIX), 0.0),
    (EngineReady(SIX_1), 1.0),
    (Acquire(B, THREE), 1.0),
    (EngineReady(THREE_1), 2.0),
    (Release(B), 2.0),
    (Acquire(B, SLOTTED), 3.0),
    (uses(THREE_1, 2), 3.5),
    (Tick(), 8.0),
    (Release(A), 9.0),
    (EngineExited(SIX_1), 10.0),
    (EngineReady(SLOTTED_1), 11.0),
    (Acquire(C, asking(SLOTTED, n_ctx=2048)), 12.0),
    (Release(B), 13.0),
    (EngineExited(SLOTTED_1), 14.0),
    (EngineReady(SLOTTED_2), 15.0),
    (Pin(THREE.key.model), 16.0),
    (Release(C), 17.0),
    (Tick(), 1000.0),
]


def test_a_plan_changes_nothing() -> None:
    assert _played(planning=True) == _played(planning=False)


def _played(*, planning: bool) -> list[object]:
    """Return all that can be seen while the script is played."""
    scheduler = of_ten(min_residency_s=3.0)
    seen: list[object] = []
    verdicts = set()
    for event, now in SCRIPT:
        seen += scheduler.handle(event, now=now)
        if planning:
            for spec in (ONE, SIX, ELEVEN, THREE, SLOTTED, asking(SLOTTED, n_ctx=2048)):
                verdicts.add(scheduler.plan(spec, now=now).verdict)
        seen += [scheduler.next_wakeup(now=now), scheduler.devices(), scheduler.views()]
    assert not planning or verdicts == set(Verdict)
    return seen
