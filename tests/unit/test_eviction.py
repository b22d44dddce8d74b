"""Which idle engines leave."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.unit.scheduling import CARD, LLAMA, LLAMA_1, MISTRAL_1, QWEN, QWEN_1, nth
from xandrouting.core.eviction import USES_HALVE_S, Candidate, choose, decayed
from xandrouting.core.model import ENGINES, HOST, EngineId


def candidate(
    engine: EngineId,
    frees: Mapping[str, int],
    *,
    loss: float = 1.0,
    idle_s: float = 0.0,
) -> Candidate:
    """Return one whose loss is this."""
    return Candidate(engine, frees, idle_s, uses=1.0, reload_s=loss * (idle_s + 1.0))


def leave(lacking: Mapping[str, int], *candidates: Candidate) -> list[EngineId] | None:
    chosen = choose(lacking, candidates)
    return None if chosen is None else [c.engine for c in chosen]


# What a loss costs.


def test_a_loss_grows_with_the_reload() -> None:
    quick = Candidate(QWEN_1, {}, idle_s=9.0, uses=2.0, reload_s=1.0)
    slow = Candidate(LLAMA_1, {}, idle_s=9.0, uses=2.0, reload_s=5.0)
    assert (quick.loss, slow.loss) == (0.2, 1.0)


def test_a_loss_grows_with_the_uses() -> None:
    seldom = Candidate(QWEN_1, {}, idle_s=9.0, uses=1.0, reload_s=5.0)
    often = Candidate(LLAMA_1, {}, idle_s=9.0, uses=4.0, reload_s=5.0)
    assert (seldom.loss, often.loss) == (0.5, 2.0)


def test_a_loss_shrinks_with_the_time_it_was_idle() -> None:
    fresh = Candidate(QWEN_1, {}, idle_s=0.0, uses=1.0, reload_s=5.0)
    stale = Candidate(LLAMA_1, {}, idle_s=99.0, uses=1.0, reload_s=5.0)
    assert (fresh.loss, stale.loss) == (5.0, 0.05)


def test_who_was_never_used_is_no_loss() -> None:
    assert Candidate(QWEN_1, {}, idle_s=0.0, uses=0.0, reload_s=500.0).loss == 0.0


def test_uses_halve_with_time() -> None:
    assert decayed(8.0, 0.0) == 8.0
    assert decayed(8.0, USES_HALVE_S) == 4.0
    assert decayed(8.0, 3 * USES_HALVE_S) == 1.0


@pytest.mark.parametrize(
    ("stays", "leaves"),
    [
        ({"reload_s": 5.0}, {"reload_s": 4.0}),
        ({"uses": 3.0}, {"uses": 2.0}),
        ({"idle_s": 10.0}, {"idle_s": 11.0}),
    ],
)
def test_each_of_the_three_decides_where_the_others_are_equal(
    stays: dict[str, float], leaves: dict[str, float]
) -> None:
    alike = {"idle_s": 10.0, "uses": 3.0, "reload_s": 5.0}
    first = Candidate(QWEN_1, {HOST: 4}, **(alike | stays))
    second = Candidate(LLAMA_1, {HOST: 4}, **(alike | leaves))
    assert leave({HOST: 4}, first, second) == [LLAMA_1]
    assert leave({HOST: 4}, second, first) == [LLAMA_1]


# Who leaves.


def test_nobody_leaves_where_nothing_lacks() -> None:
    assert leave({}, candidate(QWEN_1, {HOST: 4})) == []


def test_the_cheapest_that_suffices_leaves() -> None:
    assert leave(
        {HOST: 4},
        candidate(QWEN_1, {HOST: 4}, loss=3.0),
        candidate(LLAMA_1, {HOST: 4}, loss=1.0),
        candidate(MISTRAL_1, {HOST: 4}, loss=2.0),
    ) == [LLAMA_1]


def test_of_two_that_are_no_loss_the_one_idle_for_longer_leaves() -> None:
    unused = [
        Candidate(engine, {HOST: 4}, idle_s=idle_s, uses=0.0, reload_s=1.0)
        for engine, idle_s in [(QWEN_1, 3.0), (LLAMA_1, 8.0)]
    ]
    assert leave({HOST: 4}, *unused) == [LLAMA_1]


def test_only_as_many_leave_as_are_needed() -> None:
    assert leave(
        {HOST: 5},
        candidate(QWEN_1, {HOST: 3}, loss=1.0),
        candidate(LLAMA_1, {HOST: 3}, loss=2.0),
        candidate(MISTRAL_1, {HOST: 3}, loss=3.0),
    ) == [QWEN_1, LLAMA_1]


def test_all_together_are_too_few() -> None:
    both = candidate(QWEN_1, {HOST: 3}), candidate(LLAMA_1, {HOST: 3, CARD: 9})
    assert leave({HOST: 7}, *both) is None
    assert leave({HOST: 6}, *both) == [QWEN_1, LLAMA_1]
    assert leave({HOST: 1}) is None


def test_one_resource_too_few_is_too_few() -> None:
    assert leave({HOST: 3, CARD: 3}, candidate(QWEN_1, {HOST: 9, CARD: 2})) is None


def test_only_who_holds_something_of_what_lacks_leaves() -> None:
    assert leave(
        {CARD: 4},
        candidate(QWEN_1, {HOST: 50}, loss=0.0),
        candidate(LLAMA_1, {HOST: 1, CARD: 0}, loss=0.0),
        candidate(MISTRAL_1, {HOST: 1, CARD: 4}, loss=9.0),
    ) == [MISTRAL_1]


def test_several_resources_may_lack_at_once() -> None:
    assert sorted(
        leave(
            {ENGINES: 1, HOST: 4, CARD: 4},
            candidate(QWEN_1, {ENGINES: 1, HOST: 4}),
            candidate(LLAMA_1, {ENGINES: 1, CARD: 4}),
            candidate(MISTRAL_1, {ENGINES: 1, HOST: 1, CARD: 1}, loss=9.0),
        )
        or [],
        key=str,
    ) == [LLAMA_1, QWEN_1]


def test_the_loss_is_weighed_with_what_it_frees() -> None:
    # The large one costs more than each small one, and less than the two that would be needed.
    assert leave(
        {HOST: 8},
        candidate(QWEN_1, {HOST: 4}, loss=1.0),
        candidate(LLAMA_1, {HOST: 4}, loss=1.0),
        candidate(MISTRAL_1, {HOST: 8}, loss=1.5),
    ) == [MISTRAL_1]


def test_who_turns_out_not_to_be_needed_stays() -> None:
    # The small one is the better bargain by the byte, and then the large one does alone.
    assert leave(
        {HOST: 8},
        candidate(QWEN_1, {HOST: 2}, loss=0.1),
        candidate(LLAMA_1, {HOST: 8}, loss=1.0),
    ) == [LLAMA_1]


def test_several_that_are_needed_stay_chosen_when_another_is_not() -> None:
    assert leave(
        {HOST: 10},
        candidate(QWEN_1, {HOST: 1}, loss=0.01),
        candidate(LLAMA_1, {HOST: 5}, loss=1.0),
        candidate(MISTRAL_1, {HOST: 5}, loss=1.0),
    ) == [LLAMA_1, MISTRAL_1]


def test_what_it_frees_beyond_the_lack_counts_for_nothing() -> None:
    assert leave(
        {HOST: 4, CARD: 4},
        candidate(QWEN_1, {HOST: 100}, loss=2.0),
        candidate(LLAMA_1, {HOST: 4}, loss=1.5),
        candidate(MISTRAL_1, {CARD: 4}, loss=1.0),
    ) == [MISTRAL_1, LLAMA_1]


def test_who_frees_nothing_of_what_is_left_is_not_taken() -> None:
    assert leave(
        {HOST: 4, CARD: 4},
        candidate(QWEN_1, {HOST: 4}, loss=1.0),
        candidate(LLAMA_1, {HOST: 4}, loss=1.1),
        candidate(MISTRAL_1, {CARD: 4}, loss=2.0),
    ) == [QWEN_1, MISTRAL_1]


def test_one_that_suffices_and_is_cheaper_leaves_instead_of_several() -> None:
    # By share, the two small ones look better until both are needed.
    assert leave(
        {HOST: 10},
        candidate(QWEN_1, {HOST: 9}, loss=1.0),
        candidate(LLAMA_1, {HOST: 9}, loss=1.1),
        candidate(MISTRAL_1, {HOST: 10}, loss=2.0),
        candidate(nth(QWEN, 2), {HOST: 10}, loss=2.05),
    ) == [MISTRAL_1]


def test_one_that_suffices_and_is_not_cheaper_stays() -> None:
    small = [candidate(nth(LLAMA, n), {HOST: 5}, loss=0.5) for n in (1, 2)]
    large = candidate(MISTRAL_1, {HOST: 10}, loss=1.0)
    assert leave({HOST: 10}, *small, large) == [c.engine for c in small]
