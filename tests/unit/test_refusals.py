"""What is told to who gets no engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.scheduling import (
    CARD,
    CARD_1,
    ONE_CARD,
    TWO_CARDS,
    A,
    B,
    GrowingCost,
    asking,
    gib,
    growing,
    make_scheduler,
    model,
    nth,
    on_cards,
    reading,
)
from xandrouting.core import refusals
from xandrouting.core.errors import GatewayError, InsufficientMemory
from xandrouting.core.events import Acquire, EngineReady, Measured, Pin, Refuse
from xandrouting.core.model import (
    HOST,
    DeviceReading,
    EngineSpec,
    FixedCost,
    Footprint,
    LoadOptions,
    MemoryUse,
    Terms,
)
from xandrouting.core.planner import Alternative

SLOTTED = growing("slotted", GrowingCost(4, 1))  # 5 GiB with one slot, 8 with four


def refused(
    spec: EngineSpec, *readings: DeviceReading, budgets: dict[str, int] | None = None
) -> GatewayError:
    """Return what a request for `spec` is refused with on such a machine."""
    scheduler = make_scheduler(budgets=budgets)
    scheduler.handle(Measured(readings), now=0.0)
    [effect] = scheduler.handle(Acquire(A, spec), now=0.0)
    assert isinstance(effect, Refuse)
    return effect.error


def test_what_is_too_large_is_told_with_its_numbers() -> None:
    error = refused(model("large", host_gib=9), reading(HOST, 16, 12), budgets={HOST: gib(8)})
    assert isinstance(error, InsufficientMemory)
    assert error.message == (
        "/models/large.gguf does not fit: it needs 9.00 GiB of main memory (it may have 8.00 GiB). "
        "Use a smaller model."
    )
    assert error.param == "model"
    assert error.retry_after_s is None
    assert error.details == {
        "needed_bytes": gib(9),
        "lacking_bytes": {HOST: gib(1)},
        "devices": [
            {
                "device": HOST,
                "needed_bytes": gib(9),
                "budget_bytes": gib(8),
                "free_bytes": gib(8),
                "others_bytes": gib(4),
            }
        ],
        "alternatives": [],
    }


def test_several_resources_may_be_too_small() -> None:
    spec = on_cards("large", 20, host_gib=10)
    error = refused(spec, reading(HOST, 8, 8), reading(CARD, 16, 16))
    assert (
        "it needs 10.00 GiB of main memory (it may have 8.00 GiB) and 20.00 GiB of cuda:0 (it "
        in (error.message)
    )
    assert error.details is not None
    assert error.details["needed_bytes"] == gib(30)
    assert error.details["lacking_bytes"] == {HOST: gib(2), CARD: gib(4)}
    assert [d["needed_bytes"] for d in error.details["devices"]] == [gib(10), gib(20)]


def test_a_device_it_does_not_need_is_shown_with_none_needed() -> None:
    error = refused(model("large", host_gib=9), reading(HOST, 8, 8), reading(CARD, 16, 16))
    assert error.details is not None
    assert [d["needed_bytes"] for d in error.details["devices"]] == [gib(9), 0]


def test_where_others_are_in_the_way_waiting_helps() -> None:
    error = refused(model("large", host_gib=9), reading(HOST, 16, 6))
    assert "9.00 GiB of main memory (it may have 6.00 GiB)" in error.message
    assert error.retry_after_s == refusals.ASK_AGAIN_S
    just = refused(model("just", host_gib=8), reading(HOST, 16, 6), budgets={HOST: gib(8)})
    assert just.retry_after_s == refusals.ASK_AGAIN_S


def test_where_pinned_ones_hold_more_than_others_left_there_is_nothing() -> None:
    pinned, large = model("pinned", host_gib=6), model("large", host_gib=2)
    scheduler = make_scheduler()
    scheduler.handle(Measured([reading(HOST, 8, 8)]), now=0.0)
    scheduler.handle(Acquire(A, pinned), now=0.0)
    scheduler.handle(EngineReady(nth(pinned, 1)), now=1.0)
    scheduler.handle(Pin(pinned.key.model), now=1.0)
    uses = {nth(pinned, 1): MemoryUse(host_bytes=gib(3))}
    scheduler.handle(Measured([reading(HOST, 8, 0)], uses), now=2.0)
    [effect] = scheduler.handle(Acquire(B, large), now=2.0)
    assert isinstance(effect, Refuse)
    assert "it needs 2.00 GiB of main memory (it may have 0 bytes)" in effect.error.message


def test_where_one_device_is_too_small_by_itself_waiting_helps_nothing() -> None:
    spec = on_cards("large", 20, host_gib=10)
    error = refused(spec, reading(HOST, 64, 6), reading(CARD, 16, 16))
    assert error.retry_after_s is None


def test_a_budget_helps_nothing_to_wait_for_though_its_device_was_never_read() -> None:
    error = refused(model("large", host_gib=9), budgets={HOST: gib(8)})
    assert "(it may have 8.00 GiB)" in error.message
    assert error.retry_after_s is None


def test_what_it_may_have_is_told_right_though_slots_could_be_given_up() -> None:
    error = refused(SLOTTED, reading(HOST, 4, 4))
    assert "(it may have 4.00 GiB)" in error.message
    assert error.details is not None
    needed, lacking = error.details["needed_bytes"], error.details["lacking_bytes"][HOST]
    assert needed - lacking == gib(4)
    assert error.details["devices"][0]["needed_bytes"] == needed


def test_waiting_helps_where_only_its_smallest_form_is_within_the_budget() -> None:
    error = refused(SLOTTED, reading(HOST, 7, 4))
    assert error.retry_after_s == refusals.ASK_AGAIN_S


def test_waiting_helps_where_others_hold_a_card_that_all_layers_fit_on() -> None:
    layered = growing("layered", GrowingCost(8, 0.5, layers=8), ONE_CARD)  # 8.5 with one slot
    error = refused(layered, reading(HOST, 8, 8), reading(CARD, 10, 1))
    assert error.retry_after_s == refusals.ASK_AGAIN_S


def test_what_lacks_on_another_than_the_first_card_can_be_told() -> None:
    spec = on_cards("large", 20, placements=((CARD,), (CARD_1,)))
    error = refused(spec, reading(HOST, 64, 64), reading(CARD, 8, 8), reading(CARD_1, 16, 16))
    assert "20.00 GiB of cuda:1 (it may have 16.00 GiB)" in error.message


def test_what_lacks_on_both_cards_can_be_told() -> None:
    spec = on_cards("large", 40, placements=TWO_CARDS)
    error = refused(spec, reading(HOST, 64, 64), reading(CARD, 18, 18), reading(CARD_1, 16, 16))
    assert "20.00 GiB of cuda:0 (it may have 18.00 GiB)" in error.message
    assert "20.00 GiB of cuda:1 (it may have 16.00 GiB)" in error.message


def test_what_would_fit_is_told_in_words_and_numbers() -> None:
    sibling = FixedCost(Footprint(host=Terms(weights=gib(3))))
    large = replace(
        asking(SLOTTED, n_ctx=4096, n_parallel=4), siblings=(("/models/small.gguf", sibling),)
    )
    error = refused(large, reading(HOST, 12, 12))
    assert error.message.endswith(
        "What would fit: n_ctx 2048; n_parallel 2; cache_type_k q8_0, cache_type_v q8_0; "
        "model /models/small.gguf."
    )
    assert error.details is not None
    assert error.details["alternatives"] == [
        {"change": "n_ctx", "n_ctx": 2048, "host_bytes": gib(12), "device_bytes": 0},
        {"change": "n_parallel", "n_parallel": 2, "host_bytes": gib(12), "device_bytes": 0},
        {
            "change": "cache_type",
            "cache_type_k": "q8_0",
            "cache_type_v": "q8_0",
            "host_bytes": gib(12),
            "device_bytes": 0,
        },
        {
            "change": "model",
            "model": "/models/small.gguf",
            "host_bytes": gib(3),
            "device_bytes": 0,
        },
    ]


def test_fewer_layers_are_told_as_the_client_would_ask_for_them() -> None:
    layered = growing("layered", GrowingCost(8, 0, layers=8), ONE_CARD)
    error = refused(asking(layered, n_gpu_layers=-1), reading(HOST, 64, 64), reading(CARD, 3, 3))
    assert error.message.endswith("What would fit: n_gpu_layers 3.")


def test_without_a_place_there_are_no_bytes_to_tell_of() -> None:
    scheduler = make_scheduler(1)
    [effect] = scheduler.handle(Acquire(A, model("giant", engines=2)), now=0.0)
    assert isinstance(effect, Refuse)
    assert "/models/giant.gguf does not fit: it needs a place" in effect.error.message


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        ("n_ctx", {"n_ctx": 2048}),
        ("n_parallel", {"n_parallel": 1}),
        ("cache_type", {"cache_type_k": "q8_0", "cache_type_v": "q4_0"}),
        ("model", {"model": "/models/other.gguf"}),
    ],
)
def test_an_alternative_names_only_what_changes(change: str, asked: dict[str, object]) -> None:
    options = LoadOptions(n_ctx=2048, n_parallel=1, cache_type_k="q8_0", cache_type_v="q4_0")
    alternative = Alternative(change, "/models/other.gguf", options, 7, 8)
    assert refusals.described(alternative) == (
        {"change": change} | asked | {"host_bytes": 7, "device_bytes": 8}
    )
