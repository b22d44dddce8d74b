"""With which options a model is loaded, where, and who leaves for it: decided and explained.

The same plan is made for a dry run and for a load. In this order: as asked, where it fits
beside the others; as asked, once those that leave anyway are gone; as asked, with the idle
engines gone whose loss is cheapest; then the same with fewer slots; and where the budget
itself is too small, with a shorter `max_model_len` or fewer layers on the GPU. Only what the
request left open is given up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, Self

from xandrouting.core.cover import fill
from xandrouting.core.eviction import Candidate, Choose, choose
from xandrouting.core.ledger import Amounts, DeviceState, Ledger
from xandrouting.core.model import (
    ENGINES,
    HOST,
    Cost,
    EngineId,
    EngineSpec,
    Footprint,
    LoadOptions,
    Placement,
)
from xandrouting.core.sizes import in_words

MIN_CTX: Final = 512  # a smaller context is no alternative worth naming
MIN_MODEL_LEN: Final = 2048  # a shorter one is not chosen unasked
MIN_SHARE, SHARE_STEP = 0.1, 0.05  # of a card, as alternatives
SMALL_CACHE: Final = "q8_0"  # half of f16
GUESSED_BYTES_PER_S: Final = 1.5e9

FootprintOf = Callable[[LoadOptions, Placement], Footprint]


class Verdict(StrEnum):
    """What would become of a request."""

    HIT = "hit"  # a running engine serves it
    LOAD = "load"  # it fits beside the others
    EVICT = "evict"  # it fits once the victims are gone
    WAIT = "wait"  # it fits once engines that are busy or leaving are gone
    RELOAD = "reload"  # its engine runs with other options and is loaded anew
    NEVER = "never"  # it does not fit though all leave that may


@dataclass(frozen=True, slots=True)
class Victim:
    """An engine that leaves, and what its loss was weighed by."""

    engine: EngineId
    frees: Mapping[str, int]
    idle_s: float
    uses: float
    reload_s: float
    score: float

    @classmethod
    def of(cls, candidate: Candidate) -> Self:
        """Return a candidate that was chosen."""
        return cls(
            candidate.engine,
            candidate.frees,
            candidate.idle_s,
            candidate.uses,
            candidate.reload_s,
            candidate.loss,
        )


@dataclass(frozen=True, slots=True)
class Alternative:
    """What would fit instead: other options, or another quantization of the same model."""

    change: str  # the option that differs, or `model`
    model: str
    options: LoadOptions
    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What is loaded where, what it takes, who leaves for it, and why: kept with each load.

    `expected_s` is the load itself, without any wait; `learned` tells whether it and the
    bytes come from an earlier load or are estimates. `lacking` is empty unless the verdict
    is `never`: by how much it is too large, by resource; `over_budget` then tells whether it
    would be though nobody else took anything.
    """

    verdict: Verdict
    model: str
    options: LoadOptions
    placement: Placement
    footprint: Footprint
    expected_s: float
    learned: bool
    devices: tuple[DeviceState, ...]
    victims: tuple[Victim, ...] = ()
    reasons: tuple[str, ...] = ()
    lacking: tuple[tuple[str, int], ...] = ()
    over_budget: bool = False
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a plan is made among.

    `leaving` is what engines give back that leave already, `staying` what those hold that
    leave for nobody, `candidates` those that could be asked to, `choose` picks among them.
    `own` is what the engine holds already: one that sleeps and is woken in its own place.
    """

    ledger: Ledger
    footprint_of: FootprintOf
    leaving: Amounts
    staying: Amounts
    candidates: Sequence[Candidate]
    own: Amounts
    choose: Choose = choose


@dataclass(frozen=True, slots=True)
class Plan:
    """The outcome of planning one load; `victims` only with the verdict `evict`."""

    verdict: Verdict
    options: LoadOptions
    placement: Placement
    victims: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class _Try:
    """Options and where; `amounts` is what that takes."""

    options: LoadOptions
    placement: Placement
    amounts: Amounts


def plan(spec: EngineSpec, wants: LoadOptions, among: Surroundings) -> Plan:
    """Return how an engine with at least `wants` can be had.

    `wants` are those of everybody it shall serve, not only the spec's own.
    """
    for options in _fewer_slots(spec, wants):
        found = _with(spec, options, among)
        if found is not None:
            return found
    # Nothing can go now that would help. With everybody gone who may, it may fit yet.
    best = _best_case(spec, wants, among)
    if best is None:
        return never(spec, wants, among)
    found = _with(spec, best.options, among)
    return Plan(Verdict.WAIT, best.options, best.placement) if found is None else found


def fits_at_all(spec: EngineSpec, wants: LoadOptions, among: Surroundings) -> bool:
    """Whether an engine with at least `wants` fits when all are gone who may leave."""
    return _best_case(spec, wants, among) is not None


def smallest_fit(
    spec: EngineSpec, wants: LoadOptions, among: Surroundings
) -> tuple[LoadOptions, Placement] | None:
    """Return how an engine with at least `wants` would fit when all are gone who may leave."""
    best = _best_case(spec, wants, among)
    return None if best is None else (best.options, best.placement)


def expected_load_s(footprint: Footprint, learned_s: float | None) -> float:
    """Return the seconds a load will take: as the last one did, else guessed by its size."""
    if footprint.seen is not None:
        return footprint.seen.load_s
    if learned_s is not None:
        return learned_s
    if footprint.engines == 0:
        return 0.0
    weights = footprint.host.weights + footprint.device.weights
    return footprint.start_s + weights / GUESSED_BYTES_PER_S


def never(spec: EngineSpec, wants: LoadOptions, among: Surroundings) -> Plan:
    """Return the smallest form of what does not fit, where it lacks least."""
    fewest = list(_fewer_slots(spec, wants))[-1]
    *_, smallest = fewest, *_shorter(wants, fewest)
    forms = [smallest]
    if wants.n_gpu_layers is None and spec.cost.layers:
        forms.append(replace(smallest, n_gpu_layers=0))
    tries = [attempt for options in forms for attempt in _tries(spec, options, among)]
    closest = min(tries, key=lambda attempt: sum(_lacks_alone(attempt, among).values()))
    return Plan(Verdict.NEVER, closest.options, closest.placement)


def lacking(found: Plan, among: Surroundings) -> dict[str, int]:
    """Return by how much a plan's engine is too large though all are gone who may leave."""
    amounts = dict(among.footprint_of(found.options, found.placement).demands(found.placement))
    return among.ledger.lacks_alone(amounts, beside=among.staying)


def reasons(spec: EngineSpec, wants: LoadOptions, found: Plan, ledger: Ledger) -> Iterator[str]:
    """Yield what was given up of the defaults and why."""
    chosen, placement = found.options, found.placement
    full = fill(wants, spec.defaults)
    limits = [(device, ledger.limit(device)) for device in (*placement, HOST)]
    room = " and ".join(
        f"{in_words(limit)} on {device}" for device, limit in limits if limit is not None
    )
    if chosen.n_parallel != full.n_parallel:
        slots = f"{chosen.n_parallel} instead of {full.n_parallel}"
        yield f"n_parallel {slots}: engines may take {room}"
    if chosen.max_model_len != full.max_model_len:
        length = f"{chosen.max_model_len} instead of {full.max_model_len}"
        yield f"max_model_len {length}: engines may take {room}"
    if chosen.n_gpu_layers != full.n_gpu_layers:
        yield (
            f"n_gpu_layers {chosen.n_gpu_layers} of {spec.cost.layers}: more do not fit, engines "
            f"may take {room}"
        )
    elif len(placement) == 1 and wants.n_gpu_layers is None:
        yield f"all layers fit on {placement[0]}"
    if len(placement) > 1 and wants.tensor_parallel_size is None:
        yield f"it is shared by {', '.join(placement)}: it does not fit on one of them"


def alternatives(
    spec: EngineSpec, wants: LoadOptions, among: Surroundings
) -> Iterator[Alternative]:
    """Yield what would fit when all are gone who may leave, one for each thing to give up."""
    smallest = list(_fewer_slots(spec, wants))[-1]
    found: set[str] = set()
    for change, options in _concessions(spec, smallest):
        fitting = None if change in found else _alone(spec, options, among)
        if fitting is not None:
            found.add(change)
            yield _alternative(change, spec.key.model, fitting)
    for model, cost in spec.siblings:
        other = replace(spec, cost=cost, siblings=())
        best = _best_case(other, wants, replace(among, footprint_of=_estimate_by(cost)))
        if best is not None:
            yield _alternative("model", model, best)


def _estimate_by(cost: Cost) -> FootprintOf:
    return lambda options, placement: cost.footprint(options, max(1, len(placement)))


def _alternative(change: str, model: str, attempt: _Try) -> Alternative:
    host_bytes = attempt.amounts[HOST]
    device_bytes = sum(attempt.amounts.values()) - host_bytes - attempt.amounts[ENGINES]
    return Alternative(change, model, attempt.options, host_bytes, device_bytes)


def _concessions(spec: EngineSpec, options: LoadOptions) -> Iterator[tuple[str, LoadOptions]]:
    """Yield the options with one thing less than asked, the largest first of each kind.

    The caller takes the first of a kind that fits; a kind may be offered in several sizes.
    """
    n_ctx = options.n_ctx
    while n_ctx is not None and n_ctx // 2 >= MIN_CTX:
        n_ctx //= 2
        yield "n_ctx", replace(options, n_ctx=n_ctx)
    max_model_len = options.max_model_len
    while max_model_len is not None and max_model_len // 2 >= MIN_CTX:
        max_model_len //= 2
        yield "max_model_len", replace(options, max_model_len=max_model_len)
    slots = options.n_parallel
    while slots is not None and slots > 1:
        slots //= 2
        yield "n_parallel", replace(options, n_parallel=slots)
    share = options.gpu_memory_utilization
    while share is not None and (share := round(share - SHARE_STEP, 2)) >= MIN_SHARE:
        yield "gpu_memory_utilization", replace(options, gpu_memory_utilization=share)
    if options.cache_type_k == options.cache_type_v == "f16":
        small = replace(options, cache_type_k=SMALL_CACHE, cache_type_v=SMALL_CACHE)
        yield "cache_type", small
    if spec.cost.layers and options.n_gpu_layers != 0:
        for layers in range(spec.cost.layers - 1, -1, -1):
            yield "n_gpu_layers", replace(options, n_gpu_layers=layers)


def _with(spec: EngineSpec, options: LoadOptions, among: Surroundings) -> Plan | None:
    """Return how an engine with just these options can be had; None: not now."""
    ledger, tries = among.ledger, _tries(spec, options, among)
    fitting = [attempt for attempt in tries if not ledger.lacks(attempt.amounts, freed=among.own)]
    if fitting:
        roomiest = max(fitting, key=lambda attempt: _room(attempt.placement, ledger))
        return Plan(Verdict.LOAD, options, roomiest.placement)
    for attempt in tries:
        if not ledger.lacks(attempt.amounts, freed=among.leaving):
            return Plan(Verdict.WAIT, options, attempt.placement)
    evicting = []
    for attempt in tries:
        lacking = ledger.lacks(attempt.amounts, freed=among.leaving)
        victims = among.choose(lacking, among.candidates)
        if victims is not None:
            loss = sum(victim.loss for victim in victims)
            evicting.append((loss, Plan(Verdict.EVICT, options, attempt.placement, (*victims,))))
    return min(evicting, key=lambda found: found[0])[1] if evicting else None


def _room(placement: Placement, ledger: Ledger) -> int:
    return min((ledger.free(device) or 0 for device in placement), default=0)


def _tries(spec: EngineSpec, options: LoadOptions, among: Surroundings) -> list[_Try]:
    shared_by = options.tensor_parallel_size
    return [
        _Try(options, placement, dict(among.footprint_of(options, placement).demands(placement)))
        for placement in spec.placements
        if shared_by in (None, len(placement))
    ]


def _fewer_slots(spec: EngineSpec, wants: LoadOptions) -> Iterator[LoadOptions]:
    """Yield the options as asked, then with ever fewer slots if the request left them open."""
    options = fill(wants, spec.defaults)
    yield options
    slots = options.n_parallel
    while wants.n_parallel is None and slots is not None and slots > 1:
        slots //= 2
        yield replace(options, n_parallel=slots)


def _shorter(wants: LoadOptions, options: LoadOptions) -> Iterator[LoadOptions]:
    """Yield the options with ever shorter contexts if the request left that open."""
    length = options.max_model_len
    while wants.max_model_len is None and length is not None and length // 2 >= MIN_MODEL_LEN:
        length //= 2
        yield replace(options, max_model_len=length)


def _best_case(spec: EngineSpec, wants: LoadOptions, among: Surroundings) -> _Try | None:
    """Return the best that fits when all are gone who may leave."""
    options = LoadOptions()
    for options in _fewer_slots(spec, wants):
        found = _alone(spec, options, among)
        if found is not None:
            return found
    for shorter in _shorter(wants, options):
        found = _alone(spec, shorter, among)
        if found is not None:
            return found
    if wants.n_gpu_layers is not None or not spec.cost.layers:
        return None
    partly = [
        found
        for placement in spec.placements
        if placement and (found := _most_layers(spec, options, placement, among)) is not None
    ]
    return max(partly, key=lambda attempt: attempt.options.n_gpu_layers or 0, default=None)


def _lacks_alone(attempt: _Try, among: Surroundings) -> Amounts:
    return among.ledger.lacks_alone(attempt.amounts, beside=among.staying)


def _alone(spec: EngineSpec, options: LoadOptions, among: Surroundings) -> _Try | None:
    """Return where just these options fit when all are gone who may leave."""
    for attempt in _tries(spec, options, among):
        if not _lacks_alone(attempt, among):
            return attempt
    return None


def _most_layers(
    spec: EngineSpec, options: LoadOptions, placement: Placement, among: Surroundings
) -> _Try | None:
    """Return as many layers as the accelerators hold, if main memory holds the rest."""

    def attempt(layers: int) -> _Try:
        fewer = replace(options, n_gpu_layers=layers)
        amounts = dict(among.footprint_of(fewer, placement).demands(placement))
        return _Try(fewer, placement, amounts)

    def lacks(layers: int) -> Amounts:
        return _lacks_alone(attempt(layers), among)

    layers = (
        bisect_left(range(spec.cost.layers), True, key=lambda k: bool(lacks(k).keys() - {HOST})) - 1
    )
    return attempt(layers) if layers >= 0 and not lacks(layers) else None
