"""How deep an idle engine sleeps, as values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.scheduling import GIB, QWEN, gib
from xandrouting.core.ladder import WORTH, Ladder, Rung
from xandrouting.core.model import EngineSpec, Level

REST, OFFLOADED, DROPPED = Level.REST, Level.OFFLOADED, Level.DROPPED
MODEL = replace(QWEN, sleep_levels=(OFFLOADED, DROPPED))
RESTING = replace(QWEN, sleeper_bytes=1)


def next_level(
    ladder: Ladder, spec: EngineSpec = MODEL, current: Level | None = None, **facts: Any
) -> Level | None:
    """Return how a model of 6 GiB sleeps that loads in 60 s, where 100 GiB are free."""
    known = {"weights_bytes": gib(6), "host_free_bytes": gib(100), "cold_s": 60.0, **facts}
    rung = ladder.next(spec, current, **known)
    return None if rung is None else rung.level


def test_weights_go_to_main_memory_where_there_is_room() -> None:
    ladder = Ladder()
    assert next_level(ladder) is OFFLOADED
    assert next_level(ladder, host_free_bytes=None) is OFFLOADED
    assert next_level(ladder, host_free_bytes=gib(6)) is OFFLOADED
    assert next_level(ladder, host_free_bytes=gib(6) - 1) is DROPPED


def test_who_sleeps_sleeps_deeper_or_as_it_does() -> None:
    ladder = Ladder()
    assert next_level(ladder, current=OFFLOADED) is DROPPED
    assert next_level(ladder, current=DROPPED) is None


def test_what_cannot_sleep_does_not() -> None:
    assert next_level(Ladder(), QWEN) is None


def test_one_that_only_rests_is_not_weighed() -> None:
    ladder = Ladder()
    assert next_level(ladder, RESTING, host_free_bytes=0, cold_s=0.0) is REST
    assert ladder.rung(RESTING, REST, gib(6)).takes_bytes == 0


def test_a_cold_start_that_is_nearly_as_fast_is_no_reason_to_sleep() -> None:
    ladder = Ladder()
    ladder.note_woken(MODEL, OFFLOADED, wake_s=1.0)
    ladder.note_woken(MODEL, DROPPED, wake_s=4.0)
    assert next_level(ladder, cold_s=1.0 / WORTH) is OFFLOADED
    assert next_level(ladder, cold_s=1.0 / WORTH - 0.1) is None
    assert next_level(ladder, cold_s=4.0 / WORTH, host_free_bytes=0) is DROPPED
    assert next_level(ladder, cold_s=4.0 / WORTH - 0.1, host_free_bytes=0) is None


def test_one_that_takes_long_to_fall_asleep_is_stopped_sooner() -> None:
    ladder = Ladder()
    ladder.note_slept(MODEL, OFFLOADED, sleep_s=10.6, grown_bytes=0)
    ladder.note_woken(MODEL, OFFLOADED, wake_s=1.0)
    ladder.note_failed(MODEL, DROPPED)
    assert next_level(ladder, cold_s=12.0) is OFFLOADED
    assert next_level(ladder, cold_s=11.0) is None


@pytest.mark.parametrize(
    ("level", "wake_s"), [(OFFLOADED, 0.1 + 6 * GIB / 5e9), (DROPPED, 0.1 + 6 * GIB / 1.5e9)]
)
def test_what_waking_takes_is_an_estimate_until_it_was_seen(level: Level, wake_s: float) -> None:
    ladder = Ladder()
    rung = ladder.rung(MODEL, level, gib(6))
    assert (rung.wake_s, rung.measured) == (pytest.approx(wake_s), False)
    ladder.note_woken(MODEL, level, wake_s=0.7)
    rung = ladder.rung(MODEL, level, gib(6))
    assert (rung.wake_s, rung.measured) == (0.7, True)


def test_main_memory_is_asked_for_what_it_was_seen_to_grow_by() -> None:
    ladder = Ladder()
    ladder.note_slept(MODEL, OFFLOADED, sleep_s=1.0, grown_bytes=gib(8))
    assert ladder.rung(MODEL, OFFLOADED, gib(6)) == Rung(
        OFFLOADED, gib(8), pytest.approx(0.1 + 6 * GIB / 5e9), False, 1.0
    )
    assert next_level(ladder, host_free_bytes=gib(7)) is DROPPED


def test_and_for_the_weights_where_the_system_does_not_count_them_as_the_engine_s() -> None:
    ladder = Ladder()
    ladder.note_slept(MODEL, OFFLOADED, sleep_s=1.0, grown_bytes=-gib(1))
    assert ladder.rung(MODEL, OFFLOADED, gib(6)).takes_bytes == gib(6)


def test_a_level_that_failed_is_not_tried_again_with_the_same_file() -> None:
    ladder = Ladder()
    ladder.note_failed(MODEL, OFFLOADED)
    assert next_level(ladder) is DROPPED
    ladder.note_failed(MODEL, DROPPED)
    assert next_level(ladder) is None
    assert next_level(ladder, replace(MODEL, revision="another")) is OFFLOADED
