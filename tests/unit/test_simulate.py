from __future__ import annotations

from dataclasses import replace

import pytest
from bench.simulate import (
    GIB,
    POLICIES,
    START_S,
    STOP_S,
    TRACES,
    Ask,
    Outcome,
    Policy,
    Trace,
    load_s,
    lru,
    model,
    replay,
    zipf,
)

from xandrouting.core.eviction import Candidate
from xandrouting.core.model import HOST, EngineId, Ticket

A, B = model("a", 3 * GIB), model("b", 2 * GIB)
OURS, LRU, COUNT_LRU = POLICIES

by_trace = pytest.mark.parametrize("name", TRACES)
by_policy = pytest.mark.parametrize("policy", POLICIES, ids=[policy.name for policy in POLICIES])


def short(trace: Trace) -> Trace:
    """Return some of its requests: enough to switch, few enough for a test."""
    every = max(1, len(trace.clients) // 150)
    return replace(trace, clients=tuple(asks[:40] for asks in trace.clients[::every]))


def candidate(name: str, gib: int, idle_s: float) -> Candidate:
    key = model(name, gib * GIB).key
    return Candidate(EngineId(key, 1), {HOST: gib * GIB}, idle_s, uses=1.0, reload_s=1.0)


@by_trace
@by_policy
def test_every_request_is_granted_once_and_the_budget_holds(name: str, policy: Policy) -> None:
    trace = short(TRACES[name](1))
    outcome = replay(trace, policy)
    assert len(outcome.waits_s) == sum(len(asks) for asks in trace.clients)
    assert outcome.refused == 0
    assert outcome.most_bytes <= trace.budget_bytes < outcome.loaded_bytes  # somebody had to go
    if policy is COUNT_LRU:
        assert outcome.most_engines <= trace.always_fit


def test_a_seed_gives_the_same_replay_and_another_does_not() -> None:
    first, again, other = (replay(short(zipf(seed)), OURS) for seed in (1, 1, 2))
    assert first == again
    assert first.waits_s != other.waits_s


def test_a_count_is_what_fits_whichever_the_models_are() -> None:
    assert replace(zipf(1), budget_bytes=29 * GIB).always_fit == 1
    assert replace(zipf(1), budget_bytes=30 * GIB).always_fit == 2


def test_a_switch_waits_for_the_stop_and_the_load() -> None:
    """B comes while A serves: LRU lets A go when it is idle, and not before."""
    trace = Trace(((Ask(0.0, A, 4.0),), (Ask(4.0, B, 1.0),)), (A, B), 4 * GIB)
    outcome = replay(trace, LRU)
    a_idle_at = load_s(A) + 4.0
    assert load_s(A) == START_S + 3 * GIB / 1.5e9
    assert outcome == Outcome(
        waits_s={
            Ticket(0): pytest.approx(load_s(A)),
            Ticket(1): pytest.approx(a_idle_at - 4.0 + STOP_S + load_s(B)),
        },
        loaded_bytes=5 * GIB,
        most_engines=1,
        most_bytes=3 * GIB,
        ended_at=pytest.approx(a_idle_at + STOP_S + load_s(B) + 1.0),
    )


def test_lru_takes_those_unused_for_longest_and_no_more_than_it_needs() -> None:
    new, old, oldest = candidate("n", 8, 1.0), candidate("o", 2, 20.0), candidate("p", 1, 30.0)
    assert lru({HOST: 2 * GIB}, [new, old, oldest]) == [oldest, old]
    assert lru({HOST: 12 * GIB}, [new, old, oldest]) is None
