"""How much of a device engines may take."""

from __future__ import annotations

import pytest

from tests.unit.scheduling import CARD, gib, reading
from xandrouting.core.budget import MIN_RESERVE_BYTES, Budget, BudgetTooLarge, budget_bytes
from xandrouting.core.model import HOST


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("24GiB", 24 << 30),
        ("24 gib", 24 << 30),
        ("8000MB", 8_000_000_000),
        ("1.5k", 1500),
        ("2Ti", 2 << 40),
        ("1073741824", 1 << 30),
        ("512B", 512),
        (" 1G ", 1_000_000_000),
    ],
)
def test_a_size(text: str, size_bytes: int) -> None:
    assert Budget.parse(text) == Budget(size_bytes=size_bytes)


@pytest.mark.parametrize(("text", "share"), [("80%", 0.8), ("12.5 %", 0.125), ("100%", 1.0)])
def test_a_share(text: str, share: float) -> None:
    assert Budget.parse(text) == Budget(share=share)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "as 24GiB, or a share as 80%"),
        ("all", "as 24GiB, or a share as 80%"),
        ("-4GiB", "as 24GiB, or a share as 80%"),
        ("4 PiB", "as 24GiB, or a share as 80%"),
        ("1e9", "as 24GiB, or a share as 80%"),
        ("0", "a budget is over 0"),
        ("0.5", "a budget is over 0"),
        ("0%", "a share is over 0% and at most 100%"),
        ("100.1%", "a share is over 0% and at most 100%"),
    ],
)
def test_what_is_no_budget(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Budget.parse(text)


def test_without_a_budget_it_is_what_is_free_at_the_start_less_a_reserve() -> None:
    assert budget_bytes(None, reading(HOST, 100, 60)) == gib(55)
    assert budget_bytes(None, reading(CARD, 1, 1)) == gib(1) - MIN_RESERVE_BYTES
    assert budget_bytes(None, reading(HOST, 100, 4)) == 0


def test_a_size_counts_whatever_is_free() -> None:
    assert budget_bytes(Budget(size_bytes=gib(8)), reading(HOST, 8, 1)) == gib(8)


def test_a_share_is_of_the_whole_device() -> None:
    assert budget_bytes(Budget(share=0.5), reading(CARD, 24, 1)) == gib(12)


def test_a_budget_larger_than_the_device_is_a_mistake() -> None:
    with pytest.raises(BudgetTooLarge) as caught:
        budget_bytes(Budget(size_bytes=gib(24)), reading(CARD, 16, 16))
    assert str(caught.value) == "the budget of 24.00 GiB is more than cuda:0 has: 16.00 GiB"
