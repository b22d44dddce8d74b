"""What is given up of a vLLM engine: slots, then its context's length; and cards it may share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest

from tests.unit.scheduling import CARD, CARD_1, QWEN_1, TWO_CARDS, asking, gib, on_cards
from xandrouting.core import planner
from xandrouting.core.cover import fill
from xandrouting.core.eviction import Candidate
from xandrouting.core.ledger import Ledger
from xandrouting.core.model import (
    ENGINES,
    HOST,
    EngineSpec,
    Footprint,
    LoadOptions,
    Placement,
    Terms,
)
from xandrouting.core.planner import Plan, Surroundings, Verdict


@dataclass(frozen=True, slots=True)
class LongCost:
    """Weights, and a cache that grows with length and slots; a further card takes its own part."""

    weights_gib: float
    cache_gib: float = 0.0  # of each slot, for each 1,024 tokens
    card_gib: float = 0.0  # on each card
    layers: int = 0

    def footprint(self, options: LoadOptions, cards: int = 1) -> Footprint:
        tokens = (options.max_model_len or 0) * (options.n_parallel or 1)
        kv_cache = gib(self.cache_gib * tokens / 1024)
        if options.gpu_memory_utilization is not None:
            kv_cache = gib(options.gpu_memory_utilization * 8 - self.weights_gib)
        overhead = gib(self.card_gib) * cards
        terms = Terms(weights=gib(self.weights_gib), kv_cache=kv_cache, overhead=overhead)
        return Footprint(device=terms)


def spec(cost: LongCost, *placements: Placement, n_parallel: int = 2) -> EngineSpec:
    """Return a model that gets 8,192 tokens in two slots where nobody asks."""
    defaults = LoadOptions(n_parallel=n_parallel, max_model_len=8192)
    found = on_cards("vllm", 0, placements=placements or ((CARD,),))
    return replace(found, defaults=defaults, cost=cost)


class World:
    """A ledger of cards, with engines in it that may leave or not."""

    def __init__(self, **budgets_gib: float) -> None:
        cards = {"card": CARD, "card_1": CARD_1, "host": HOST}
        self.ledger = Ledger(budgets={cards[name]: gib(n) for name, n in budgets_gib.items()})
        self.candidates: list[Candidate] = []

    def idle(self, size_gib: float) -> None:
        self.busy(size_gib)
        charge = self.ledger.charge_of(QWEN_1)
        self.candidates.append(Candidate(QWEN_1, charge, 0.0, uses=1.0, reload_s=1.0))

    def busy(self, size_gib: float) -> None:
        self.ledger.charge(QWEN_1, {ENGINES: 1, CARD: gib(size_gib)})

    def among(self, wanted: EngineSpec) -> Surroundings:
        def footprint(options: LoadOptions, placement: Placement) -> Footprint:
            return wanted.cost.footprint(options, max(1, len(placement)))

        return Surroundings(self.ledger, footprint, {}, {}, self.candidates, {})

    def plan(self, wanted: EngineSpec, wants: LoadOptions | None = None) -> Plan:
        asked = wanted.wants if wants is None else wants
        return planner.plan(wanted, asked, self.among(wanted))

    def outcome(self, wanted: EngineSpec) -> tuple[Verdict, int | None, int | None]:
        """Return the verdict, the slots and the length."""
        found = self.plan(wanted)
        return found.verdict, found.options.n_parallel, found.options.max_model_len

    def reasons(self, wanted: EngineSpec) -> list[str]:
        found = self.plan(wanted)
        return list(planner.reasons(wanted, wanted.wants, found, self.ledger))

    def lacking(self, wanted: EngineSpec) -> Mapping[str, int]:
        return planner.lacking(self.plan(wanted), self.among(wanted))

    def alternatives(self, wanted: EngineSpec) -> list[tuple[str, object]]:
        found = planner.alternatives(wanted, wanted.wants, self.among(wanted))
        return [(a.change, getattr(a.options, a.change)) for a in found]


# Length. 4 of weights, and 4 for each slot of 8,192 tokens: 12 as asked.
LONG = spec(LongCost(4, 0.5))


@pytest.mark.parametrize(
    ("card", "slots", "length"),
    [
        (12, 2, 8192),
        (11.9, 1, 8192),  # slots before length
        (8, 1, 8192),
        (7.9, 1, 4096),
        (6, 1, 4096),
        (5.9, 1, 2048),
        (5, 1, 2048),
    ],
)
def test_a_shorter_context_is_the_last_thing_given_up(card: float, slots: int, length: int) -> None:
    assert World(card=card).outcome(LONG) == (Verdict.LOAD, slots, length)


def test_a_context_too_short_to_be_of_use_is_not_chosen() -> None:
    assert World(card=4.9).outcome(LONG)[0] is Verdict.NEVER


def test_what_lacks_is_told_of_the_shortest() -> None:
    world = World(card=4.5)
    assert world.outcome(LONG) == (Verdict.NEVER, 1, 2048)
    assert world.lacking(LONG) == {CARD: gib(0.5)}
    assert world.alternatives(LONG) == [("max_model_len", 1024)]


def test_a_length_that_was_asked_for_is_not_given_up() -> None:
    asked = asking(LONG, max_model_len=8192)
    assert World(card=8).outcome(asked) == (Verdict.LOAD, 1, 8192)
    world = World(card=7.9)
    assert world.outcome(asked) == (Verdict.NEVER, 1, 8192)
    assert world.lacking(asked) == {CARD: gib(8) - gib(7.9)}
    assert world.alternatives(asked) == [("max_model_len", 4096)]


def test_a_default_that_cannot_be_halved_stays() -> None:
    short = replace(LONG, defaults=replace(LONG.defaults, max_model_len=3000))
    assert World(card=4.9).outcome(short) == (Verdict.NEVER, 1, 3000)


def test_a_length_nobody_knows_is_not_given_up() -> None:
    unknown = replace(LONG, defaults=LoadOptions(n_parallel=2))
    assert World(card=3.9).outcome(unknown) == (Verdict.NEVER, 1, None)


def test_others_leave_before_the_context_is_shortened() -> None:
    world = World(card=8)
    world.idle(4)
    assert world.outcome(LONG) == (Verdict.EVICT, 1, 8192)
    world.candidates.clear()  # it is busy now
    assert world.outcome(LONG) == (Verdict.WAIT, 1, 8192)


def test_others_leave_for_a_shortened_one_too() -> None:
    world = World(card=5)
    world.idle(1)
    assert world.outcome(LONG) == (Verdict.EVICT, 1, 2048)
    world.candidates.clear()
    assert world.outcome(LONG) == (Verdict.WAIT, 1, 2048)


def test_a_shortened_context_is_told() -> None:
    assert World(card=6).reasons(LONG) == [
        "n_parallel 1 instead of 2: engines may take 6.00 GiB on cuda:0",
        "max_model_len 4096 instead of 8192: engines may take 6.00 GiB on cuda:0",
        "all layers fit on cuda:0",
    ]


def test_an_engine_of_several_wishes_keeps_the_length_somebody_asked_for() -> None:
    wants = LoadOptions(max_model_len=8192)
    assert World(card=7.9).plan(LONG, wants).verdict is Verdict.NEVER


# A share of the card, of 8.


@pytest.mark.parametrize(
    ("room", "offers"),
    [
        (7.0, [("gpu_memory_utilization", 0.85)]),
        (4.4, [("gpu_memory_utilization", 0.55)]),
        (1.2, [("gpu_memory_utilization", 0.15)]),
        (0.8, [("gpu_memory_utilization", 0.1)]),
        (0.7, []),
    ],
)
def test_a_smaller_share_of_the_card_is_offered(
    room: float, offers: list[tuple[str, object]]
) -> None:
    asked = asking(spec(LongCost(0), n_parallel=1), gpu_memory_utilization=0.9, max_model_len=512)
    assert World(card=room).alternatives(asked) == offers


def test_where_no_share_was_asked_for_none_is_offered() -> None:
    assert World(card=4.5).alternatives(LONG) == [("max_model_len", 1024)]


# Cards that share a model.


def shared(weights_gib: float, *, asked: int | None = None, **budgets_gib: float) -> Placement:
    """Return where a model goes that may have one of two cards, or both."""
    wanted = spec(LongCost(weights_gib, card_gib=1), *TWO_CARDS)
    if asked is not None:
        wanted = asking(wanted, tensor_parallel_size=asked)
    found = World(**budgets_gib).plan(wanted)
    return found.placement if found.verdict is Verdict.LOAD else ()


def test_one_card_is_preferred() -> None:
    assert shared(7, card=8, card_1=8) == (CARD,)
    assert shared(7, card=7.9, card_1=8) == (CARD_1,)


def test_two_are_taken_where_one_is_too_small() -> None:
    assert shared(7.1, card=8, card_1=8) == (CARD, CARD_1)
    # Each takes half of the weights and its own part.
    assert shared(14, card=8, card_1=8) == (CARD, CARD_1)
    assert shared(14.1, card=8, card_1=8) == ()


def test_who_asks_for_one_gets_one_or_none() -> None:
    assert shared(7, asked=1, card=8, card_1=8) == (CARD,)
    assert shared(7.1, asked=1, card=8, card_1=8) == ()


def test_who_asks_for_two_gets_two_or_none() -> None:
    assert shared(1, asked=2, card=8, card_1=8) == (CARD, CARD_1)
    assert shared(1, asked=2, card=8, card_1=1) == ()


def test_why_two_are_taken_is_told_unless_they_were_asked_for() -> None:
    large = spec(LongCost(8, card_gib=1), *TWO_CARDS)
    world = World(card=8, card_1=8)
    assert world.reasons(large) == [
        "it is shared by cuda:0, cuda:1: it does not fit on one of them"
    ]
    assert world.reasons(asking(large, tensor_parallel_size=2)) == []


def test_what_lacks_is_told_of_as_many_cards_as_were_asked_for() -> None:
    large = spec(LongCost(20, card_gib=1), *TWO_CARDS)
    world = World(card=8, card_1=8)
    assert world.lacking(large) == {CARD: gib(3), CARD_1: gib(3)}
    assert world.lacking(asking(large, tensor_parallel_size=1)) == {CARD: gib(13)}


def test_where_layers_cannot_be_chosen_none_are_left_out() -> None:
    found = World(card=1, host=64).plan(LONG)
    assert (found.verdict, found.options.n_gpu_layers) == (Verdict.NEVER, None)


def test_an_offer_of_another_file_is_weighed_on_as_many_cards() -> None:
    sibling = ("/models/q4.gguf", LongCost(2, card_gib=1))
    large = replace(spec(LongCost(40), (CARD, CARD_1)), siblings=(sibling,))
    world = World(card=2, card_1=2)
    [offer] = planner.alternatives(large, large.wants, world.among(large))
    assert (offer.model, offer.device_bytes) == ("/models/q4.gguf", gib(4))
    assert fill(large.wants, large.defaults).max_model_len == offer.options.max_model_len
