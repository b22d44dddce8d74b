"""What there is, what is promised, what is left."""

from __future__ import annotations

import pytest

from tests.unit.scheduling import CARD, LLAMA_1, QWEN_1, reading
from xandrouting.core.ledger import DeviceState, Ledger
from xandrouting.core.model import ENGINES, HOST, DeviceReading

# Limits.


def test_where_nothing_is_known_nothing_is_limited() -> None:
    ledger = Ledger()
    ledger.charge(QWEN_1, {ENGINES: 100, HOST: 100})
    assert ledger.lacks({ENGINES: 1, HOST: 10**15}) == {}
    assert ledger.lacks_alone({ENGINES: 1, HOST: 10**15}, beside={HOST: 10**15}) == {}
    assert (ledger.limit(HOST), ledger.free(HOST)) == (None, None)
    assert ledger.states() == ()


def test_a_budget_counts_before_anything_was_read() -> None:
    ledger = Ledger(budgets={HOST: 10})
    assert (ledger.limit(HOST), ledger.free(HOST)) == (10, 10)
    assert ledger.lacks({HOST: 11}) == {HOST: 1}
    assert ledger.states() == ()


def test_engines_are_limited_by_the_piece() -> None:
    ledger = Ledger(max_engines=2)
    ledger.charge(QWEN_1, {ENGINES: 1})
    assert ledger.lacks({ENGINES: 1}) == {}
    assert ledger.lacks({ENGINES: 2}) == {ENGINES: 1}
    assert ledger.free(ENGINES) == 1


@pytest.mark.parametrize(
    ("budget", "available", "ours", "others", "limit"),
    [
        (None, 10, 0, 0, 10),  # no budget: all of it
        (6, 10, 0, 0, 6),
        (6, 7, 0, 3, 6),  # others leave more than the budget
        (6, 4, 0, 6, 4),  # others leave less
        (6, 4, 6, 0, 6),  # what is taken is ours
        (6, 4, 2, 4, 6),
        (None, 4, 2, 4, 6),
        (None, 4, 9, 0, 10),  # ours was measured a moment later
    ],
)
def test_a_limit_is_the_budget_or_what_others_leave(
    budget: int | None, available: int, ours: int, others: int, limit: int
) -> None:
    ledger = Ledger(budgets={} if budget is None else {HOST: budget})
    ledger.read([DeviceReading(HOST, "host", 10, available)], {HOST: ours})
    [state] = ledger.states()
    assert (state.others_bytes, ledger.limit(HOST)) == (others, limit)


def test_what_others_give_back_is_there_again() -> None:
    ledger = Ledger()
    ledger.read([DeviceReading(HOST, "host", 10, 1)], {})
    assert ledger.limit(HOST) == 1
    ledger.read([DeviceReading(HOST, "host", 10, 8)], {})
    assert ledger.limit(HOST) == 8


def test_a_device_that_is_not_told_of_any_more_keeps_its_last_figure() -> None:
    ledger = Ledger()
    ledger.read([reading(HOST, 10, 10), reading(CARD, 8, 6)], {})
    ledger.read([reading(HOST, 10, 9)], {})
    assert [state.device for state in ledger.states()] == [HOST, CARD]
    assert ledger.limit(CARD) == 6 * 2**30


def test_what_a_stale_reading_says_is_said_to_be_stale() -> None:
    ledger = Ledger()
    ledger.read([reading(CARD, 8, 6)], {})
    assert [state.stale for state in ledger.states()] == [False]
    ledger.read([reading(CARD, 8, 6, stale=True)], {})
    assert [state.stale for state in ledger.states()] == [True]
    assert ledger.limit(CARD) == 6 * 2**30


def test_a_stale_reading_does_not_make_others_of_our_own_engine_that_ended_since() -> None:
    ledger = Ledger()
    ledger.read([DeviceReading(CARD, "a card", 10, 2)], {CARD: 8})
    ledger.read([DeviceReading(CARD, "a card", 10, 2, stale=True)], {})
    assert ledger.limit(CARD) == 10


# Charges.


def test_who_is_charged_leaves_less() -> None:
    ledger = Ledger(budgets={HOST: 10, CARD: 8})
    ledger.charge(QWEN_1, {ENGINES: 1, HOST: 3})
    ledger.charge(LLAMA_1, {ENGINES: 1, HOST: 1, CARD: 5})
    assert (ledger.free(HOST), ledger.free(CARD)) == (6, 3)
    assert ledger.charge_of(LLAMA_1) == {ENGINES: 1, HOST: 1, CARD: 5}


def test_a_new_charge_replaces_the_one_before() -> None:
    ledger = Ledger(budgets={HOST: 10, CARD: 8})
    ledger.charge(QWEN_1, {HOST: 3, CARD: 5})
    ledger.charge(QWEN_1, {HOST: 7})
    assert (ledger.free(HOST), ledger.free(CARD)) == (3, 8)
    assert ledger.charge_of(QWEN_1) == {HOST: 7}


def test_who_falls_asleep_gives_its_place_and_its_card_back() -> None:
    ledger = Ledger(max_engines=1, budgets={HOST: 10, CARD: 8})
    ledger.charge(QWEN_1, {ENGINES: 1, HOST: 3, CARD: 5})
    ledger.charge(QWEN_1, {HOST: 1})
    assert (ledger.free(ENGINES), ledger.free(HOST), ledger.free(CARD)) == (1, 9, 8)
    assert ledger.lacks({ENGINES: 1, HOST: 10}) == {HOST: 1}
    assert ledger.lacks({ENGINES: 1, HOST: 10}, freed=ledger.charge_of(QWEN_1)) == {}


def test_who_is_gone_is_charged_no_more() -> None:
    ledger = Ledger(budgets={HOST: 10})
    ledger.charge(QWEN_1, {HOST: 3})
    ledger.charge(LLAMA_1, {HOST: 4})
    ledger.release(QWEN_1)
    assert ledger.free(HOST) == 6
    ledger.release(QWEN_1)
    assert ledger.free(HOST) == 6


# What lacks.


def test_what_fits_to_the_last_byte_fits() -> None:
    ledger = Ledger(budgets={HOST: 10})
    ledger.charge(QWEN_1, {HOST: 4})
    assert ledger.lacks({HOST: 6}) == {}
    assert ledger.lacks({HOST: 7}) == {HOST: 1}


def test_each_device_lacks_for_itself() -> None:
    ledger = Ledger(max_engines=1, budgets={HOST: 10, CARD: 8})
    ledger.charge(QWEN_1, {ENGINES: 1, HOST: 4, CARD: 8})
    assert ledger.lacks({ENGINES: 1, HOST: 6, CARD: 3}) == {ENGINES: 1, CARD: 3}


def test_what_is_given_back_counts_before_it_is_there() -> None:
    ledger = Ledger(max_engines=1, budgets={HOST: 10})
    ledger.charge(QWEN_1, {ENGINES: 1, HOST: 8})
    wanted = {ENGINES: 1, HOST: 9}
    assert ledger.lacks(wanted, freed={HOST: 6}) == {ENGINES: 1, HOST: 1}
    assert ledger.lacks(wanted, freed={ENGINES: 1, HOST: 8}) == {}


def test_who_wants_none_of_a_device_lacks_none_however_much_is_taken() -> None:
    ledger = Ledger(max_engines=1, budgets={CARD: 8})
    ledger.charge(QWEN_1, {ENGINES: 1, CARD: 9})
    assert ledger.free(CARD) == -1
    assert ledger.lacks({ENGINES: 0, CARD: 0}) == {}
    assert ledger.lacks_alone({ENGINES: 0, CARD: 0}, beside={ENGINES: 2, CARD: 9}) == {}


def test_alone_only_those_count_that_stay() -> None:
    ledger = Ledger(max_engines=2, budgets={HOST: 10})
    ledger.charge(QWEN_1, {ENGINES: 1, HOST: 8})
    ledger.charge(LLAMA_1, {ENGINES: 1, HOST: 2})
    wanted = {ENGINES: 1, HOST: 9, CARD: 100}
    assert ledger.lacks(wanted) == {ENGINES: 1, HOST: 9}
    assert ledger.lacks_alone(wanted, beside={}) == {}
    assert ledger.lacks_alone(wanted, beside={ENGINES: 1, HOST: 2}) == {HOST: 1}
    assert ledger.lacks_alone(wanted, beside={ENGINES: 2, HOST: 10}) == {ENGINES: 1, HOST: 9}


def test_without_burdens_the_budgets_alone_count() -> None:
    ledger = Ledger(max_engines=1, budgets={HOST: 10})
    ledger.charge(QWEN_1, {ENGINES: 1, HOST: 10})
    ledger.read([DeviceReading(HOST, "host", 16, 2), DeviceReading(CARD, "L4", 8, 1)], {})
    free = ledger.unburdened()
    assert (free.free(ENGINES), free.free(HOST), free.free(CARD)) == (1, 10, 8)
    assert ledger.lacks({HOST: 1})


# How it is shown.


def test_a_line_for_each_device() -> None:
    ledger = Ledger(max_engines=4, budgets={CARD: 20})
    ledger.read(
        [DeviceReading(HOST, "host", 100, 70), DeviceReading(CARD, "L4", 24, 6)],
        {HOST: 10, CARD: 15},
    )
    ledger.charge(QWEN_1, {ENGINES: 1, HOST: 8, CARD: 15})
    ledger.charge(LLAMA_1, {ENGINES: 1, HOST: 30})
    assert ledger.states(starting=[LLAMA_1]) == (
        DeviceState(
            HOST,
            "host",
            capacity_bytes=100,
            budget_bytes=100,
            others_bytes=20,
            reserved_bytes=30,
            used_bytes=8,
            free_bytes=42,
            stale=False,
        ),
        DeviceState(
            CARD,
            "L4",
            capacity_bytes=24,
            budget_bytes=20,
            others_bytes=3,
            reserved_bytes=0,
            used_bytes=15,
            free_bytes=5,
            stale=False,
        ),
    )


def test_what_is_reserved_is_used_once_it_runs() -> None:
    ledger = Ledger()
    ledger.read([DeviceReading(HOST, "host", 100, 100)], {})
    ledger.charge(LLAMA_1, {ENGINES: 1, HOST: 30})
    [starting], [running] = ledger.states([LLAMA_1]), ledger.states()
    assert (starting.reserved_bytes, starting.used_bytes, starting.free_bytes) == (30, 0, 70)
    assert (running.reserved_bytes, running.used_bytes, running.free_bytes) == (0, 30, 70)


def test_more_may_be_taken_than_may_be() -> None:
    ledger = Ledger()
    ledger.charge(QWEN_1, {HOST: 8})
    ledger.read([DeviceReading(HOST, "host", 10, 1)], {HOST: 4})  # others: 5
    [state] = ledger.states()
    assert (state.others_bytes, state.free_bytes) == (5, -3)
    assert ledger.lacks({HOST: 1}) == {HOST: 4}
