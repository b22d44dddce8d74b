"""With which options, where, and who leaves for it. Sizes are in GiB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from tests.unit.scheduling import (
    CARD,
    CARD_1,
    LLAMA_1,
    MISTRAL_1,
    ONE_CARD,
    QWEN_1,
    TWO_CARDS,
    UPSTREAM,
    GrowingCost,
    asking,
    gib,
    growing,
    model,
    on_cards,
)
from xandrouting.core import planner
from xandrouting.core.cover import fill
from xandrouting.core.eviction import Candidate
from xandrouting.core.ledger import Ledger
from xandrouting.core.model import (
    ENGINES,
    HOST,
    EngineId,
    EngineSpec,
    Figure,
    FixedCost,
    Footprint,
    LoadOptions,
    Placement,
    Terms,
)
from xandrouting.core.planner import Plan, Surroundings, Verdict

SIX = model("six", host_gib=6)
SLOTTED = growing("slotted", GrowingCost(4, 1))  # 5 with one slot, 8 with four
LAYERED = growing("layered", GrowingCost(8, 0.5, layers=8), ONE_CARD)  # 10; a layer is 1.25


class World:
    """A ledger with engines in it, and what a plan may count on."""

    def __init__(self, *, max_engines: int | None = None, **budgets_gib: float) -> None:
        budgets = {_device(name): gib(size) for name, size in budgets_gib.items()}
        self.ledger = Ledger(max_engines=max_engines, budgets=budgets)
        self.leaving: Mapping[str, int] = {}
        self.staying: Mapping[str, int] = {}
        self.own: Mapping[str, int] = {}
        self.candidates: list[Candidate] = []

    def idle(self, engine: EngineId, *, loss: float = 1.0, **taken_gib: float) -> None:
        amounts = self.busy(engine, **taken_gib)
        self.candidates.append(Candidate(engine, amounts, 0.0, uses=1.0, reload_s=loss))

    def stopping(self, engine: EngineId, **taken_gib: float) -> None:
        self.leaving = self.busy(engine, **taken_gib)

    def pinned(self, engine: EngineId, **taken_gib: float) -> None:
        self.staying = self.busy(engine, **taken_gib)

    def sleeping(self, engine: EngineId, **taken_gib: float) -> None:
        """Let the engine that is planned be one that sleeps."""
        self.own = {_device(name): gib(size) for name, size in taken_gib.items()}
        self.ledger.charge(engine, self.own)
        self.leaving = self.own

    def busy(self, engine: EngineId, **taken_gib: float) -> Mapping[str, int]:
        amounts = {ENGINES: 1} | {_device(name): gib(size) for name, size in taken_gib.items()}
        self.ledger.charge(engine, amounts)
        return amounts

    def among(self, spec: EngineSpec) -> Surroundings:
        return Surroundings(
            self.ledger,
            lambda options, _: spec.cost.footprint(options),
            self.leaving,
            self.staying,
            self.candidates,
            self.own,
        )

    def plan(self, spec: EngineSpec, wants: LoadOptions | None = None) -> Plan:
        return planner.plan(spec, spec.wants if wants is None else wants, self.among(spec))

    def reasons(self, spec: EngineSpec) -> list[str]:
        return list(planner.reasons(spec, spec.wants, self.plan(spec), self.ledger))

    def lacking(self, spec: EngineSpec) -> Mapping[str, int]:
        among = self.among(spec)
        return planner.lacking(planner.never(spec, spec.wants, among), among)

    def alternatives(self, spec: EngineSpec) -> list[tuple[str, object]]:
        """Return each change and what the option would be."""
        found = planner.alternatives(spec, spec.wants, self.among(spec))
        option = {"cache_type": "cache_type_k"}
        return [(a.change, getattr(a.options, option.get(a.change, a.change))) for a in found]


def _device(name: str) -> str:
    return {"card": CARD, "card_1": CARD_1}.get(name, name)


def planned(
    verdict: Verdict,
    spec: EngineSpec,
    *,
    placement: Placement = (),
    victims: Sequence[EngineId] = (),
    **options: int,
) -> tuple[Verdict, LoadOptions, Placement, list[EngineId]]:
    """Return a plan with the spec's own options, save those given here."""
    settled = replace(fill(spec.wants, spec.defaults), **options)
    return verdict, settled, placement, list(victims)


def said(plan: Plan) -> tuple[Verdict, LoadOptions, Placement, list[EngineId]]:
    return plan.verdict, plan.options, plan.placement, [c.engine for c in plan.victims]


# Verdicts.


def test_what_fits_is_loaded_beside_the_others() -> None:
    world = World(host=10)
    world.idle(QWEN_1, host=4)
    assert said(world.plan(SIX)) == planned(Verdict.LOAD, SIX)


def test_who_sleeps_has_what_it_has_already() -> None:
    world = World(host=10)
    world.busy(QWEN_1, host=4)
    world.sleeping(LLAMA_1, host=0.5)
    assert said(world.plan(SIX)) == planned(Verdict.LOAD, SIX)
    world.own = {}
    assert said(world.plan(SIX)) == planned(Verdict.WAIT, SIX)


def test_who_sleeps_and_does_not_fit_asks_others_to_leave_and_never_itself() -> None:
    world = World(host=10)
    world.idle(QWEN_1, host=4.5)
    world.sleeping(LLAMA_1, host=1)
    assert said(world.plan(SIX)) == planned(Verdict.EVICT, SIX, victims=[QWEN_1])
    world.candidates.clear()
    assert said(world.plan(SIX)) == planned(Verdict.WAIT, SIX)


def test_with_who_leaves_already_a_sleeper_s_own_is_counted_once() -> None:
    world = World(host=10)
    world.busy(QWEN_1, host=4)
    world.idle(MISTRAL_1, host=1)
    world.sleeping(LLAMA_1, host=1)
    assert said(world.plan(SIX)) == planned(Verdict.EVICT, SIX, victims=[MISTRAL_1])


def test_what_does_not_fit_asks_idle_ones_to_leave() -> None:
    world = World(host=10)
    world.idle(QWEN_1, host=4, loss=2.0)
    world.idle(LLAMA_1, host=4, loss=1.0)
    assert said(world.plan(SIX)) == planned(Verdict.EVICT, SIX, victims=[LLAMA_1])


def test_who_leaves_anyway_is_waited_for_and_nobody_else_leaves() -> None:
    world = World(host=10)
    world.stopping(QWEN_1, host=4)
    world.idle(LLAMA_1, host=4)
    assert said(world.plan(SIX)) == planned(Verdict.WAIT, SIX)


def test_what_who_leaves_gives_back_need_not_be_freed_again() -> None:
    world = World(host=10)
    world.stopping(QWEN_1, host=2)
    world.idle(LLAMA_1, host=2, loss=1.0)
    world.idle(MISTRAL_1, host=5, loss=1.1)
    assert said(world.plan(SIX)) == planned(Verdict.EVICT, SIX, victims=[MISTRAL_1])
    world.idle(MISTRAL_1, host=5, loss=9.0)
    world.candidates.pop(1)
    assert said(world.plan(SIX)) == planned(Verdict.EVICT, SIX, victims=[MISTRAL_1])


def test_busy_ones_are_waited_for() -> None:
    world = World(host=10)
    world.busy(QWEN_1, host=4)
    world.busy(LLAMA_1, host=4)
    assert said(world.plan(SIX)) == planned(Verdict.WAIT, SIX)


def test_what_those_that_stay_leave_no_room_for_never_fits() -> None:
    world = World(host=10)
    world.pinned(QWEN_1, host=5)
    world.idle(LLAMA_1, host=4)
    assert said(world.plan(SIX)) == planned(Verdict.NEVER, SIX)


def test_what_is_larger_than_the_budget_never_fits() -> None:
    world = World(host=5)
    assert said(world.plan(SIX)) == planned(Verdict.NEVER, SIX)


def test_a_limit_of_engines_is_one_more_resource() -> None:
    world = World(max_engines=1, host=100)
    world.idle(QWEN_1, host=1)
    assert said(world.plan(SIX)) == planned(Verdict.EVICT, SIX, victims=[QWEN_1])
    world.staying = {ENGINES: 1}
    world.candidates.clear()
    assert said(world.plan(SIX)) == planned(Verdict.NEVER, SIX)


def test_what_takes_nothing_always_fits() -> None:
    world = World(max_engines=1, host=1)
    world.busy(QWEN_1, host=9)
    assert said(world.plan(UPSTREAM)) == planned(Verdict.LOAD, UPSTREAM)


@pytest.mark.parametrize(("budget", "fits"), [(4.99, False), (5, True)])
def test_whether_it_fits_at_all_is_asked_of_its_smallest_form(budget: float, fits: bool) -> None:
    world = World(host=budget)
    world.busy(QWEN_1, host=4)
    among = world.among(SLOTTED)
    assert planner.fits_at_all(SLOTTED, SLOTTED.wants, among) is fits
    assert (world.plan(SLOTTED).verdict is not Verdict.NEVER) is fits


def test_where_it_would_fit_once_all_are_gone() -> None:
    world = World(host=6.5)
    world.busy(QWEN_1, host=6)
    two_slots = replace(SLOTTED.defaults, n_parallel=2)
    found = planner.smallest_fit(SLOTTED, SLOTTED.wants, world.among(SLOTTED))
    assert found == (two_slots, ())
    assert planner.smallest_fit(SIX, SIX.wants, World(host=5).among(SIX)) is None


# What is given up: slots, and only if the request left them open.


@pytest.mark.parametrize(("budget", "slots"), [(8, 4), (7.9, 2), (6, 2), (5.9, 1), (5, 1)])
def test_slots_are_given_up_as_far_as_needed(budget: float, slots: int) -> None:
    world = World(host=budget)
    assert said(world.plan(SLOTTED)) == planned(Verdict.LOAD, SLOTTED, n_parallel=slots)


def test_idle_ones_leave_before_slots_are_given_up() -> None:
    world = World(host=10)
    world.idle(QWEN_1, host=4)
    assert said(world.plan(SLOTTED)) == planned(Verdict.EVICT, SLOTTED, victims=[QWEN_1])


def test_slots_are_given_up_rather_than_wait_for_busy_ones() -> None:
    world = World(host=10)
    world.busy(QWEN_1, host=4)
    assert said(world.plan(SLOTTED)) == planned(Verdict.LOAD, SLOTTED, n_parallel=2)


def test_idle_ones_may_leave_for_fewer_slots() -> None:
    world = World(host=10)
    world.busy(QWEN_1, host=4)
    world.idle(LLAMA_1, host=2)
    assert said(world.plan(SLOTTED)) == planned(
        Verdict.EVICT, SLOTTED, n_parallel=2, victims=[LLAMA_1]
    )


def test_who_waits_for_busy_ones_waits_for_all_its_slots() -> None:
    world = World(host=10)
    world.busy(QWEN_1, host=8)
    assert said(world.plan(SLOTTED)) == planned(Verdict.WAIT, SLOTTED)


def test_slots_that_were_asked_for_are_not_given_up() -> None:
    four = asking(SLOTTED, n_parallel=4)
    assert said(World(host=7.9).plan(four)) == planned(Verdict.NEVER, four)
    assert said(World(host=8).plan(four)) == planned(Verdict.LOAD, four)


def test_an_odd_number_of_slots_is_halved_too() -> None:
    odd = replace(SLOTTED, defaults=replace(SLOTTED.defaults, n_parallel=3))
    assert said(World(host=6.9).plan(odd)) == planned(Verdict.LOAD, odd, n_parallel=1)


def test_a_context_is_never_given_up() -> None:
    assert said(World(host=4.9).plan(SLOTTED)) == planned(Verdict.NEVER, SLOTTED, n_parallel=1)


def test_the_wishes_of_all_count_and_not_only_the_spec_s_own() -> None:
    wants = LoadOptions(n_ctx=4096)
    found = World(host=8).plan(SLOTTED, wants)
    assert said(found) == planned(Verdict.LOAD, SLOTTED, n_ctx=4096, n_parallel=1)


# Layers: as many as the budget of the card holds.


@pytest.mark.parametrize(
    ("card", "layers", "slots"),
    [
        (10, -1, 4),
        (9.9, -1, 2),  # slots before layers
        (8.5, -1, 1),
        (8.4, 7, 1),  # with one slot a layer takes 1.0625
        (7.4, 6, 1),
        (1.07, 1, 1),
        (1.06, 0, 1),
        (0, 0, 1),
    ],
)
def test_as_many_layers_as_fit_the_card(card: float, layers: int, slots: int) -> None:
    world = World(host=100, card=card)
    assert said(world.plan(LAYERED)) == planned(
        Verdict.LOAD, LAYERED, placement=(CARD,), n_gpu_layers=layers, n_parallel=slots
    )


def test_main_memory_must_hold_the_other_layers() -> None:
    # 3 on the card is two layers; the other six take 6.375.
    assert World(host=6.375, card=3).plan(LAYERED).options.n_gpu_layers == 2
    assert said(World(host=6.37, card=3).plan(LAYERED)) == planned(
        Verdict.NEVER, LAYERED, placement=(CARD,), n_parallel=1, n_gpu_layers=0
    )


def test_layers_follow_the_budget_and_not_what_is_free_now() -> None:
    world = World(host=100, card=6)
    world.idle(QWEN_1, host=0, card=4)
    five = planned(
        Verdict.EVICT,
        LAYERED,
        placement=(CARD,),
        n_gpu_layers=5,
        n_parallel=1,
        victims=[QWEN_1],
    )
    assert said(world.plan(LAYERED)) == five
    world.candidates.clear()  # it is busy now
    assert said(world.plan(LAYERED)) == (Verdict.WAIT, *five[1:3], [])


def test_layers_leave_room_for_those_that_stay() -> None:
    world = World(host=100, card=6)
    world.pinned(QWEN_1, card=4)
    assert world.plan(LAYERED).options.n_gpu_layers == 1


@pytest.mark.parametrize("layers", [-1, 8, 3])
def test_layers_that_were_asked_for_are_not_given_up(layers: int) -> None:
    asked = asking(LAYERED, n_gpu_layers=layers)
    needed = 8.5 * (8 if layers < 0 else layers) / 8
    loaded = planned(Verdict.LOAD, asked, placement=(CARD,), n_parallel=1)
    assert said(World(host=100, card=needed).plan(asked)) == loaded
    refused = planned(Verdict.NEVER, asked, placement=(CARD,), n_parallel=1)
    assert said(World(host=100, card=needed - 0.01).plan(asked)) == refused


def test_no_layers_asked_for_is_no_layers() -> None:
    none = asking(LAYERED, n_gpu_layers=0)
    assert said(World(host=100, card=100).plan(none)) == planned(
        Verdict.LOAD, none, placement=(CARD,)
    )


def test_without_a_place_for_one_more_engine_fewer_layers_help_nothing() -> None:
    world = World(max_engines=1, host=100, card=6)
    world.pinned(QWEN_1)
    assert world.plan(LAYERED).verdict is Verdict.NEVER


def test_where_layers_cannot_be_chosen_it_fits_whole_or_never() -> None:
    vllm = on_cards("vllm", 8)
    assert World(card=8).plan(vllm).verdict is Verdict.LOAD
    assert World(card=7.9).plan(vllm).verdict is Verdict.NEVER


# Two cards.


def test_of_the_cards_that_do_the_roomiest_is_taken() -> None:
    spec = on_cards("spec", 3, placements=TWO_CARDS)
    assert World(card=8, card_1=9).plan(spec).placement == (CARD_1,)
    assert World(card=9, card_1=8).plan(spec).placement == (CARD,)
    assert World(card=8, card_1=8).plan(spec).placement == (CARD,)


def test_what_counts_is_what_is_free_on_a_card() -> None:
    spec = on_cards("spec", 3, placements=TWO_CARDS)
    world = World(card=20, card_1=9)
    world.busy(QWEN_1, card=12)
    assert said(world.plan(spec)) == planned(Verdict.LOAD, spec, placement=(CARD_1,))


def test_what_is_too_large_for_one_card_is_spread_over_both() -> None:
    spec = on_cards("spec", 12, placements=TWO_CARDS)
    assert said(World(card=8, card_1=6).plan(spec)) == planned(
        Verdict.LOAD, spec, placement=(CARD, CARD_1)
    )
    # Alike on both: the smaller card decides.
    assert World(card=20, card_1=5).plan(spec).placement == (CARD,)
    assert World(card=11, card_1=5).plan(spec).verdict is Verdict.NEVER


def test_who_leaves_is_on_the_card_whose_loss_is_less() -> None:
    spec = on_cards("spec", 6, placements=TWO_CARDS)
    world = World(card=8, card_1=8)
    world.idle(QWEN_1, card=8, loss=2.0)
    world.idle(LLAMA_1, card_1=8, loss=1.0)
    assert said(world.plan(spec)) == planned(
        Verdict.EVICT, spec, placement=(CARD_1,), victims=[LLAMA_1]
    )


def test_an_engine_that_leaves_one_card_is_waited_for_though_the_other_could_be_freed() -> None:
    spec = on_cards("spec", 6, placements=TWO_CARDS)
    world = World(card=8, card_1=8)
    world.idle(QWEN_1, card=8)
    world.stopping(LLAMA_1, card_1=8)
    assert said(world.plan(spec)) == planned(Verdict.WAIT, spec, placement=(CARD_1,))


def test_the_most_layers_of_any_card_are_taken() -> None:
    spec = replace(LAYERED, placements=((CARD,), (CARD_1,)))
    found = World(host=100, card=3, card_1=5).plan(spec)
    assert said(found) == planned(
        Verdict.LOAD, spec, placement=(CARD_1,), n_gpu_layers=4, n_parallel=1
    )
    both = World(host=100, card=3, card_1=3).plan(replace(spec, placements=TWO_CARDS))
    assert (both.placement, both.options.n_gpu_layers) == ((CARD, CARD_1), 5)


# How long a load takes.


def test_a_load_takes_what_it_took_before() -> None:
    seen = Footprint(host=Terms(weights=gib(6)), seen=Figure(1, 0, load_s=12.0))
    assert planner.expected_load_s(seen, learned_s=30.0) == 12.0
    assert planner.expected_load_s(replace(seen, seen=None), learned_s=30.0) == 30.0


def test_a_first_load_takes_what_its_weights_take_to_read() -> None:
    footprint = Footprint(
        host=Terms(weights=1_500_000_000, kv_cache=10**12), device=Terms(weights=3_000_000_000)
    )
    assert planner.expected_load_s(footprint, None) == 0.5 + 3.0


def test_what_takes_nothing_here_takes_no_time() -> None:
    assert planner.expected_load_s(Footprint(engines=0), None) == 0.0


# Why.


def test_nothing_is_said_where_nothing_was_given_up() -> None:
    assert World(host=8).reasons(SLOTTED) == []


def test_slots_that_were_given_up_are_told() -> None:
    assert World(host=7.5).reasons(SLOTTED) == [
        "n_parallel 2 instead of 4: engines may take 7.50 GiB on host"
    ]


def test_layers_that_were_given_up_are_told() -> None:
    assert World(host=64, card=4.5).reasons(LAYERED) == [
        "n_parallel 1 instead of 4: engines may take 4.50 GiB on cuda:0 and 64.00 GiB on host",
        (
            "n_gpu_layers 4 of 8: more do not fit, engines may take 4.50 GiB on cuda:0 and "
            "64.00 GiB on host"
        ),
    ]


def test_that_all_layers_fit_is_told_where_it_was_not_asked_for() -> None:
    world = World(card=10, card_1=10)
    assert world.reasons(LAYERED) == ["all layers fit on cuda:0"]
    assert world.reasons(asking(LAYERED, n_gpu_layers=-1)) == []
    both = replace(LAYERED, placements=((CARD, CARD_1),))
    assert world.reasons(both) == ["it is shared by cuda:0, cuda:1: it does not fit on one of them"]


# By how much it is too large.


def test_what_lacks_is_told_of_the_smallest_form() -> None:
    assert World(host=4).lacking(SLOTTED) == {HOST: gib(1)}
    assert World(host=4).lacking(asking(SLOTTED, n_parallel=4)) == {HOST: gib(4)}


def test_what_lacks_is_told_of_the_place_where_it_lacks_least() -> None:
    spec = on_cards("spec", 12, host_gib=5, placements=TWO_CARDS)
    assert World(host=4, card=6, card_1=8).lacking(spec) == {HOST: gib(1)}
    assert World(host=5, card=4, card_1=11).lacking(spec) == {CARD_1: gib(1)}
    assert World(host=5, card=4, card_1=5).lacking(spec) == {CARD: gib(2), CARD_1: gib(1)}


def test_what_lacks_is_told_of_the_layers_with_which_it_lacks_least() -> None:
    # With one slot it takes 8.5, all on the card or all in main memory.
    one_slot = asking(LAYERED, n_parallel=1)
    assert World(host=8, card=1).lacking(one_slot) == {HOST: gib(0.5)}
    assert said(World(host=8, card=0).plan(one_slot)) == planned(
        Verdict.NEVER, one_slot, placement=(CARD,), n_gpu_layers=0
    )
    # Who asked for all of them is told of no others.
    all_layers = asking(LAYERED, n_gpu_layers=-1)
    assert World(host=8, card=1).lacking(all_layers) == {CARD: gib(7.5)}


def test_those_that_stay_are_in_the_way() -> None:
    world = World(host=10)
    world.pinned(QWEN_1, host=6)
    world.idle(LLAMA_1, host=4)
    assert world.lacking(SLOTTED) == {HOST: gib(1)}


# What would fit instead.


def test_what_would_fit_instead_one_thing_at_a_time() -> None:
    # The weights take 4, and each slot 1 for each 1,024 tokens: 20 as asked.
    large = asking(SLOTTED, n_ctx=4096, n_parallel=4)
    assert World(host=12).alternatives(large) == [
        ("n_ctx", 2048),
        ("n_parallel", 2),
        ("cache_type", "q8_0"),
    ]
    assert World(host=8).alternatives(large) == [("n_ctx", 1024), ("n_parallel", 1)]
    assert World(host=6).alternatives(large) == [("n_ctx", 512)]
    assert World(host=5.9).alternatives(large) == []


def test_slots_left_open_are_given_up_before_anything_is_offered() -> None:
    large = asking(SLOTTED, n_ctx=4096)
    assert World(host=6).alternatives(large) == [
        ("n_ctx", 2048),
        ("cache_type", "q8_0"),
    ]


def test_another_cache_type_is_offered_for_f16_only() -> None:
    large = asking(SLOTTED, n_ctx=2048)
    half = replace(large.defaults, n_parallel=1, n_ctx=2048)
    [_, offer] = planner.alternatives(large, large.wants, World(host=5).among(large))
    assert offer.options == replace(half, cache_type_k="q8_0", cache_type_v="q8_0")
    assert (offer.host_bytes, offer.device_bytes) == (gib(5), 0)
    asked = asking(large, n_ctx=2048, cache_type_k="bf16")
    assert World(host=5).alternatives(asked) == [("n_ctx", 1024)]


def test_a_shorter_model_length_is_offered() -> None:
    class ByLength:
        layers = 0

        def footprint(self, options: LoadOptions, cards: int = 1) -> Footprint:
            assert options.max_model_len is not None
            return Footprint(device=Terms(kv_cache=gib(options.max_model_len / 1024)))

    spec = replace(on_cards("vllm", 0), cost=ByLength())
    assert World(card=2).alternatives(asking(spec, max_model_len=8192)) == [("max_model_len", 2048)]
    assert World(card=0.5).alternatives(asking(spec, max_model_len=1024)) == [
        ("max_model_len", 512)
    ]
    assert World(card=0.4).alternatives(asking(spec, max_model_len=8192)) == []


def test_fewer_layers_are_offered_where_they_were_asked_for() -> None:
    asked = asking(LAYERED, n_gpu_layers=-1, n_parallel=4)
    found = planner.alternatives(asked, asked.wants, World(host=100, card=5).among(asked))
    offers = {offer.change: offer for offer in found}
    assert list(offers) == ["n_gpu_layers"]
    assert offers["n_gpu_layers"].options.n_gpu_layers == 4
    assert offers["n_gpu_layers"].host_bytes == offers["n_gpu_layers"].device_bytes == gib(5)


def test_who_asked_for_no_layers_is_not_offered_fewer() -> None:
    none = asking(LAYERED, n_gpu_layers=0, n_parallel=1)
    assert World(host=8.4, card=10).alternatives(none) == [
        ("n_ctx", 512),
        ("cache_type", "q8_0"),
    ]


def test_other_quantizations_on_disk_are_offered() -> None:
    siblings = (
        ("/models/q8.gguf", FixedCost(Footprint(host=Terms(weights=gib(9))))),
        ("/models/q4.gguf", FixedCost(Footprint(host=Terms(weights=gib(5))))),
        ("/models/q2.gguf", FixedCost(Footprint(host=Terms(weights=gib(3))))),
    )
    spec = replace(model("f16", host_gib=18), siblings=siblings)
    found = planner.alternatives(spec, spec.wants, World(host=6).among(spec))
    assert [(a.change, a.model, a.host_bytes) for a in found] == [
        ("model", "/models/q4.gguf", gib(5)),
        ("model", "/models/q2.gguf", gib(3)),
    ]


def test_an_offer_fits_beside_those_that_stay() -> None:
    large = asking(SLOTTED, n_ctx=2048)
    world = World(host=10)
    world.idle(LLAMA_1, host=5)
    world.pinned(QWEN_1, host=5)
    assert world.alternatives(large) == [("n_ctx", 1024), ("cache_type", "q8_0")]
    world.pinned(QWEN_1, host=5.1)
    assert world.alternatives(large) == [("n_ctx", 512)]


def test_an_offer_on_cards_tells_all_it_takes_of_them() -> None:
    cost = FixedCost(Footprint(host=Terms(weights=gib(1)), device=Terms(weights=gib(8))))
    spec = replace(on_cards("f16", 40, placements=TWO_CARDS), siblings=(("q4", cost),))
    found = planner.alternatives(spec, spec.wants, World(host=8, card=5, card_1=5).among(spec))
    assert [(a.model, a.host_bytes, a.device_bytes) for a in found] == [("q4", gib(1), gib(8))]
