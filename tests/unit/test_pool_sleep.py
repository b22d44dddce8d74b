"""Engines that sleep by calls: what is believed, what is tried next, and what waking costs.

A model has 4 GiB of weights and 2 of cache on a card of ten. Its load takes 40 s, so a sleep is
worth something. It is idle after 60 s.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest

from tests.fakes.launcher import FakeAdapter, FakeLauncher, running
from tests.fakes.loop import virtual_time
from tests.fakes.sleepers import CARD, FakeSleep
from tests.unit.scheduling import QWEN, asking
from xandrouting.core.engine_state import EngineState
from xandrouting.core.figures import Figures
from xandrouting.core.model import (
    ENGINES,
    HOST,
    EngineSpec,
    FixedCost,
    Footprint,
    Level,
    Terms,
)
from xandrouting.engines.vllm_sleep import VllmSleep
from xandrouting.pool.engine import Engine, EngineNews, News
from xandrouting.pool.learning import Learning
from xandrouting.pool.pool import EnginePool
from xandrouting.pool.sleeping import CALL_S, MOVES_BYTES_PER_S
from xandrouting.pool.watching import FREED_WAIT_S

GIB: Final = 1 << 30
LOAD_S, SOFT_IDLE_S, TTL_S, STALL_S = 40.0, 60.0, 1000.0, 50.0
MODEL = replace(
    QWEN,
    cost=FixedCost(Footprint(host=Terms(overhead=GIB), device=Terms(4 * GIB, 2 * GIB, 0, GIB))),
    placements=((CARD,),),
    learned_as="qwen on a card",
    sleep_levels=(Level.OFFLOADED, Level.DROPPED),
)
OFFLOAD = "sleep level=1 qwen#1"
DROP = "sleep level=2 qwen#1"
WAKE = ["wake_up qwen#1", "reset_prefix_cache qwen#1"]
READ_AGAIN = [
    "wake_up tags=weights qwen#1",
    "collective_rpc qwen#1",
    "wake_up tags=kv_cache qwen#1",
    "reset_prefix_cache qwen#1",
]


@dataclass
class World:
    pool: EnginePool
    launcher: FakeLauncher
    sleep: FakeSleep
    news: list[EngineNews]
    figures: Figures

    @property
    def journal(self) -> list[str]:
        return self.launcher.journal

    @property
    def state(self) -> EngineState | None:
        found = self.pool.view(MODEL.key)
        return None if found is None else found[0].state

    @property
    def charged(self) -> dict[str, float]:
        found = self.pool.view(MODEL.key)
        assert found is not None
        return {d: n / GIB for d, n in found[0].charged.items() if d != ENGINES}

    async def use(self, spec: EngineSpec = MODEL, seconds: float = 0.0) -> Engine:
        claim = self.pool.claim(spec)
        try:
            engine = await claim.granted()
            await asyncio.sleep(seconds)
            assert self.sleep.is_sound(int(engine.handle.base_url[-5:]))
            return engine
        finally:
            claim.release()


@asynccontextmanager
async def world(
    *, main_gib: float = 100, load_s: float = LOAD_S, tells: bool = True, **scheduling: Any
) -> AsyncIterator[World]:
    launcher = FakeLauncher(
        load_s=load_s, memory=lambda age_s: GIB, capacity_bytes=int(main_gib * GIB)
    )
    sleep = FakeSleep(
        launcher, weights=4 * GIB, cache=2 * GIB, context=GIB, capacity=10 * GIB, tells=tells
    )
    news: list[EngineNews] = []
    figures = Figures()
    settings: dict[str, Any] = {"ttl_s": TTL_S, "soft_idle_s": SOFT_IDLE_S, **scheduling}
    async with running(
        launcher,
        adapter=FakeAdapter(sleep=VllmSleep()),
        post=sleep,
        load_stall_s=STALL_S,
        learning=Learning(figures),
        on_news=news.append,
        figures=figures,
        **settings,
    ) as pool:
        yield World(pool, launcher, sleep, news, figures)


def told(world: World) -> list[News]:
    return [news.news for news in world.news if news.news is not News.PROGRESS]


def now() -> float:
    return asyncio.get_running_loop().time()


@virtual_time
async def test_who_is_idle_sleeps_and_wakes_as_a_load() -> None:
    async with world() as w:
        w.sleep.takes_s = {"sleep": 3.0, "wake_up": 0.5}
        first = await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 1.0)
        assert w.state is EngineState.SUSPENDING
        assert w.charged == {HOST: 5, CARD: 7}  # it takes the room for its weights beforehand
        await asyncio.sleep(3.0)
        assert w.state is EngineState.SLEEPING
        assert w.charged == {HOST: 5, CARD: 1}
        began = now()
        second = await w.use()
        assert second is first
        assert now() - began == pytest.approx(0.5, abs=0.1)
        assert second.load_seconds == pytest.approx(0.5, abs=0.1)
        assert second.decision.expected_s == pytest.approx(0.1 + 4 * GIB / 5e9)
        assert not second.decision.learned  # it is an estimate, and says so
        assert w.journal == ["started qwen#1", OFFLOAD, *WAKE]
        assert (w.pool.loads, w.pool.load_failures) == (2, 0)
        assert told(w) == [
            News.STARTING,
            News.READY,
            News.SLEEPING,
            News.STARTING,
            News.READY,
        ]


@virtual_time
async def test_what_waking_took_is_expected_the_next_time_and_no_load_is_learned_from_it() -> None:
    async with world() as w:
        w.sleep.takes_s = {"wake_up": 0.5}
        await w.use()
        for _ in range(2):
            await asyncio.sleep(SOFT_IDLE_S + 5.0)
            engine = await w.use()
            await asyncio.sleep(5.0)  # it is measured
        assert engine.decision.learned
        assert engine.decision.expected_s == pytest.approx(0.5, abs=0.1)
        assert w.figures.load_s(MODEL.learned_as, MODEL.key.device) == pytest.approx(LOAD_S)


@virtual_time
async def test_memory_that_a_driver_is_slow_to_give_back_is_waited_for() -> None:
    async with world() as w:
        w.sleep.frees_after_s = 2.0
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 1.0)
        assert w.state is EngineState.SUSPENDING
        await asyncio.sleep(1.5)
        assert w.state is EngineState.SLEEPING
        assert w.charged[CARD] == 1


@virtual_time
async def test_what_leaks_at_one_level_is_dropped_to_the_next() -> None:
    async with world() as w:
        w.sleep.leaks = {1}
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + FREED_WAIT_S + 1.0)
        assert w.state is EngineState.SLEEPING
        assert w.charged == {HOST: 1, CARD: 1}
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 1.0)
        assert w.journal == [
            "started qwen#1",
            OFFLOAD,
            *WAKE,  # vLLM does not change the level of what sleeps
            DROP,
            *READ_AGAIN,
            DROP,  # it has learned
        ]


@virtual_time
async def test_what_leaks_at_every_level_is_stopped_and_sleeps_no_more() -> None:
    async with world() as w:
        w.sleep.leaks = {1, 2}
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 2 * FREED_WAIT_S + 3.0)
        assert w.state is None
        assert w.journal[-1] == "exited qwen#1"
        [stopping] = [news for news in w.news if news.news is News.STOPPING]
        assert stopping.reason == "sleep_failed"
        assert w.pool.load_failures == 0
        second = await w.use()
        assert second.id.incarnation == 2
        await asyncio.sleep(TTL_S - 1.0)
        assert w.state is EngineState.READY
        await asyncio.sleep(2.0)
        assert w.journal[-1] == "exited qwen#2"


@virtual_time
async def test_one_that_does_not_answer_is_stopped() -> None:
    async with world() as w:
        w.sleep.hangs = {"sleep"}
        await w.use()
        limit_s = CALL_S + 4 * GIB / MOVES_BYTES_PER_S
        await asyncio.sleep(SOFT_IDLE_S + limit_s - 0.5)
        assert w.state is EngineState.SUSPENDING
        await asyncio.sleep(1.0)
        assert w.journal == ["started qwen#1", OFFLOAD, "exited qwen#1"]


@virtual_time
async def test_one_that_refuses_is_stopped_and_who_waits_for_it_gets_the_next() -> None:
    async with world() as w:
        w.sleep.refuses, w.sleep.takes_s = {"sleep"}, {"sleep": 2.0}
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 1.0)
        engine = await w.use()
        assert w.journal == ["started qwen#1", OFFLOAD, "exited qwen#1", "started qwen#2"]
        assert engine.id.incarnation == 2


@pytest.mark.parametrize("path", ["wake_up", "reset_prefix_cache"])
@virtual_time
async def test_who_asks_for_one_that_does_not_wake_gets_a_fresh_one(path: str) -> None:
    async with world() as w:
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 5.0)
        w.sleep.refuses = {path}
        began = now()
        engine = await w.use()
        assert engine.id.incarnation == 2
        assert now() - began == pytest.approx(LOAD_S, abs=0.5)
        assert (w.pool.loads, w.pool.load_failures) == (2, 0)
        assert News.FAILED not in told(w)
        await asyncio.sleep(SOFT_IDLE_S + 5.0)
        assert w.journal[-1] == "sleep level=2 qwen#2"  # it did not wake from the other


@virtual_time
async def test_one_that_hangs_while_it_wakes_is_replaced_when_nothing_moves() -> None:
    async with world() as w:
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 5.0)
        w.sleep.hangs = {"wake_up"}
        began = now()
        engine = await w.use()
        assert engine.id.incarnation == 2
        assert now() - began == pytest.approx(STALL_S + LOAD_S, abs=2.0)


@virtual_time
async def test_one_that_dies_while_it_wakes_is_replaced() -> None:
    async with world() as w:
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 5.0)
        w.sleep.hangs = {"wake_up"}
        claim = w.pool.claim(MODEL)
        await asyncio.sleep(1.0)
        w.launcher.handles[0].die(-9)
        engine = await claim.granted()
        claim.release()
        assert engine.id.incarnation == 2


@pytest.mark.parametrize("hangs", [True, False])
@virtual_time
async def test_one_that_dies_asleep_or_on_its_way_is_gone(hangs: bool) -> None:
    async with world() as w:
        w.sleep.hangs = {"sleep"} if hangs else set()
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 1.0)
        w.launcher.handles[0].die(-9)
        await asyncio.sleep(FREED_WAIT_S + 1.0)
        assert w.state is None
        assert (await w.use()).id.incarnation == 2


@pytest.mark.parametrize("path", ["sleep", "wake_up", None])
@virtual_time
async def test_it_is_stopped_whatever_it_is_at(path: str | None) -> None:
    async with world() as w:
        w.sleep.hangs = set() if path is None else {path}
        engine = await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 1.0)
        claim = w.pool.claim(MODEL) if path == "wake_up" else None
        await asyncio.sleep(1.0)
        if claim is not None:
            claim.release()
        await w.pool.unload([engine.id], force=False)
        assert w.journal[-1] == "exited qwen#1"


@virtual_time
async def test_who_asks_while_it_falls_asleep_wakes_it_then() -> None:
    async with world() as w:
        w.sleep.takes_s = {"sleep": 3.0}
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 1.0)
        assert await w.use() is not None
        assert w.journal == ["started qwen#1", OFFLOAD, *WAKE]
        assert News.SLEEPING not in told(w)


@virtual_time
async def test_where_main_memory_is_short_its_weights_are_dropped() -> None:
    async with world(main_gib=4) as w:
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 1.0)
        assert w.charged == {HOST: 1, CARD: 1}
        await w.use()
        assert w.journal == ["started qwen#1", DROP, *READ_AGAIN]


@virtual_time
async def test_who_sleeps_for_long_sleeps_deeper_and_ends_with_its_ttl() -> None:
    async with world() as w:
        await w.use()
        await asyncio.sleep(2 * SOFT_IDLE_S + 2.0)
        assert w.state is EngineState.SLEEPING
        assert w.charged == {HOST: 1, CARD: 1}
        await asyncio.sleep(TTL_S)
        assert w.journal == ["started qwen#1", OFFLOAD, *WAKE, DROP, "exited qwen#1"]


@virtual_time
async def test_where_the_card_is_taken_meanwhile_it_sleeps_on_as_it_does() -> None:
    async with world() as w:
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 1.0)
        w.sleep.others = 4 * GIB  # there is no room to wake in
        await asyncio.sleep(5 * SOFT_IDLE_S)
        assert w.journal == ["started qwen#1", OFFLOAD]
        assert w.state is EngineState.SLEEPING


@virtual_time
async def test_what_loads_as_fast_as_it_wakes_stays_awake() -> None:
    async with world(load_s=1.0) as w:
        await w.use()
        await asyncio.sleep(TTL_S - 1.0)
        assert w.state is EngineState.READY
        assert w.journal == ["started qwen#1"]


@pytest.mark.parametrize("leaks", [True, False])
@virtual_time
async def test_where_nobody_tells_whose_the_memory_is_the_card_tells(leaks: bool) -> None:
    async with world(tells=False) as w:
        w.sleep.leaks = {1} if leaks else set()
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + FREED_WAIT_S + 1.0)
        assert w.charged == ({HOST: 1, CARD: 1} if leaks else {HOST: 5, CARD: 1})
        await asyncio.sleep(5.0)  # it is measured again
        assert w.charged[CARD] == 1


@virtual_time
async def test_and_tells_so_though_others_have_taken_some_of_it_since() -> None:
    async with world(tells=False) as w:
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 5.0)
        w.sleep.others = 3 * GIB
        await asyncio.sleep(SOFT_IDLE_S)
        assert w.journal == ["started qwen#1", OFFLOAD, *WAKE, DROP]
        assert w.state is EngineState.SLEEPING
        assert w.charged == {HOST: 1, CARD: 1}


@virtual_time
async def test_other_options_are_had_by_a_fresh_one() -> None:
    async with world() as w:
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 1.0)
        engine = await w.use(asking(MODEL, n_ctx=8192))
        assert engine.id.incarnation == 2
        assert w.journal == ["started qwen#1", OFFLOAD, "exited qwen#1", "started qwen#2"]


@virtual_time
async def test_nothing_is_left_of_a_pool_that_ends_with_a_sleeper() -> None:
    async with world() as w:
        await w.use()
        await asyncio.sleep(SOFT_IDLE_S + 1.0)
        assert w.state is EngineState.SLEEPING
        await w.pool.drain(5.0)
    assert w.journal[-1] == "exited qwen#1"
