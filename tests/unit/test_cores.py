from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xandrouting.launch.cores import as_list, cores_for, usable_cores

FOUR = range(4)
MACHINES = st.sets(st.integers(0, 63), min_size=1, max_size=16)
LIVES = st.lists(st.one_of(st.just(None), st.integers(0, 3)), max_size=30)
"""Starts (None) and ends (of which of those that live)."""


def test_who_starts_alone_has_all() -> None:
    assert cores_for(FOUR, []) == (0, 1, 2, 3)


def test_the_second_has_half_and_the_third_the_other_half() -> None:
    assert cores_for(FOUR, [FOUR]) == (0, 1)
    assert cores_for(FOUR, [FOUR, (0, 1)]) == (2, 3)


def test_the_fourth_has_a_half_that_is_nobody_s() -> None:
    assert cores_for(FOUR, [FOUR, (0, 1), (2, 3)]) == (1, 2)


def test_half_of_an_odd_number_is_rounded_up() -> None:
    assert cores_for(range(5), [range(5)]) == (0, 1, 2)


def test_what_nobody_has_comes_first() -> None:
    assert cores_for(FOUR, [(0, 1)]) == (2, 3)
    assert cores_for(FOUR, [(0, 1), (3,)]) == (2,)


def test_cores_that_may_not_be_used_any_more_count_for_nothing() -> None:
    assert cores_for({4, 5}, [(0, 1, 2, 3)]) == (4, 5)


def test_two_cores_have_three_sets_and_one_has_one() -> None:
    sets: list[tuple[int, ...]] = []
    for _ in range(4):
        sets.append(cores_for((0, 1), sets))
    assert sets == [(0, 1), (0,), (1,), (0,)]
    assert cores_for((7,), [(7,), (7,)]) == (7,)


@given(MACHINES, LIVES)
def test_as_long_as_there_are_sets_no_two_engines_have_the_same(
    cores: set[int], lives: list[int | None]
) -> None:
    engines: list[tuple[int, ...]] = []
    most = {1: 1, 2: 3}.get(len(cores), 4)
    for end in lives:
        if end is not None:
            del engines[end : end + 1]
        elif len(engines) < most:
            got = cores_for(cores, engines)
            assert got
            assert list(got) == sorted(got)
            assert set(got) <= cores
            engines.append(got)
        assert len(set(engines)) == len(engines)


@given(MACHINES, st.lists(MACHINES, max_size=6))
def test_nobody_shares_while_a_core_is_free(cores: set[int], taken: list[set[int]]) -> None:
    got = set(cores_for(cores, taken))
    free = cores - set().union(*taken)
    if free:
        assert got == free
    else:
        assert len(got) in {(len(cores) + 1) // 2, len(cores)}


def test_lists_are_written_in_ranges() -> None:
    assert as_list([6, 0, 1, 2, 3]) == "0-3,6"
    assert as_list([1]) == "1"
    assert as_list([0, 2, 4, 5]) == "0,2,4-5"
    assert as_list([]) == ""


@given(MACHINES)
def test_a_list_names_each_core_once(cores: set[int]) -> None:
    pieces = [piece.split("-") for piece in as_list(cores).split(",")]
    named = [core for piece in pieces for core in range(int(piece[0]), int(piece[-1]) + 1)]
    assert named == sorted(cores)


def test_this_machine_has_some() -> None:
    assert usable_cores()
