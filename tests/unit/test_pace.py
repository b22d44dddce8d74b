"""How fast a download is said to be."""

from __future__ import annotations

import pytest

from xandrouting.downloads.pace import WINDOW_S, Pace


def test_nothing_is_said_before_bytes_came() -> None:
    pace = Pace(100.0)
    pace.moved(0, 100.5)
    assert (pace.bytes_per_s, pace.eta_s(1000)) == (None, None)


def test_the_way_to_the_hub_does_not_make_it_slow() -> None:
    pace = Pace(100.0)
    for step in range(10):  # the process starts, and the hub is asked
        pace.moved(0, 100.0 + 0.3 * step)
    pace.moved(300, 103.0)
    pace.moved(600, 103.3)
    assert pace.bytes_per_s == pytest.approx(1000)
    assert pace.eta_s(500) == pytest.approx(0.5)


def test_a_stall_after_that_is_no_pace_at_all() -> None:
    pace = Pace(0.0)
    pace.moved(1000, 1.0)
    assert pace.bytes_per_s == 1000
    pace.moved(1000, 2.0)
    assert pace.bytes_per_s == 500
    pace.moved(1000, 1.0 + WINDOW_S)
    assert (pace.bytes_per_s, pace.eta_s(1000)) == (0, None)


def test_what_was_longer_ago_does_not_count() -> None:
    pace, total = Pace(0.0), 0
    for second in range(1, 21):
        total += 100 if second <= 5 else 10_000
        pace.moved(total, float(second))
    assert pace.bytes_per_s == 10_000


def test_what_is_told_in_the_same_moment_says_nothing_of_the_pace() -> None:
    pace = Pace(0.0)
    pace.moved(1000, 1.0)
    pace.moved(1_000_000, 1.001)
    assert pace.bytes_per_s == 1000
    pace.moved(1_000_000, 2.0)
    assert pace.bytes_per_s == 500_000
