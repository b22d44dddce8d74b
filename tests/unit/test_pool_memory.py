"""The pool and the memory: what it measures, learns and waits for, on a clock that jumps."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.launcher import FakeLauncher, running
from tests.fakes.loop import virtual_time
from tests.unit.scheduling import LLAMA, QWEN
from xandrouting.core.engine_state import EngineState
from xandrouting.core.errors import InsufficientMemory, LoadingTimeout
from xandrouting.core.figures import Figures
from xandrouting.core.model import (
    HOST,
    DeviceReading,
    EngineSpec,
    Figure,
    FixedCost,
    Footprint,
    MemoryUse,
    Terms,
)
from xandrouting.core.planner import Verdict
from xandrouting.engines.base import Phase
from xandrouting.launch.base import Survey
from xandrouting.pool.engine import EngineNews, News
from xandrouting.pool.figure_store import FigureStore
from xandrouting.pool.learning import Learning
from xandrouting.pool.pool import EnginePool
from xandrouting.pool.watching import FREED_WAIT_S

GIB = 1 << 30
CARD = "cuda:0"


def sized(spec: EngineSpec, host_gib: float = 0, device_gib: float = 0) -> EngineSpec:
    footprint = Footprint(
        host=Terms(weights=int(host_gib * GIB)), device=Terms(weights=int(device_gib * GIB))
    )
    placements = ((CARD,),) if device_gib else ((),)
    return replace(spec, cost=FixedCost(footprint), placements=placements, learned_as=spec.source)


async def use(pool: EnginePool, spec: EngineSpec, seconds: float = 1.0) -> None:
    claim = pool.claim(spec)
    try:
        await claim.granted()
        await asyncio.sleep(seconds)
    finally:
        claim.release()


def now() -> float:
    return asyncio.get_running_loop().time()


# Measuring and learning.


@virtual_time
async def test_what_a_load_took_is_known_the_next_time() -> None:
    figures = Figures()
    launcher = FakeLauncher(load_s=5.0, memory=lambda age_s: 3 * GIB if age_s < 8 else 4 * GIB)
    spec = sized(QWEN, host_gib=2)
    learning = Learning(figures)
    async with running(launcher, learning=learning, figures=figures) as pool:
        plan = pool.plan(spec)
        assert (plan.verdict, plan.learned, plan.footprint.host_bytes) == (
            *(Verdict.LOAD, False),
            2 * GIB,
        )
        await use(pool, spec, 10.0)
        [(view, engine)] = pool.views()
        assert engine.memory.host_bytes == 4 * GIB
        assert view.charged[HOST] == 4 * GIB
        await pool.unload([engine.id], force=False)
        again = pool.plan(spec)
        assert again.learned
        assert again.footprint.seen == Figure(4 * GIB, 0, pytest.approx(5.0))
        assert again.expected_s == pytest.approx(5.0)


@virtual_time
async def test_what_was_learned_outlives_the_server(tmp_path: Path) -> None:
    path = tmp_path / "figures.db"
    launcher = FakeLauncher(load_s=5.0, memory=lambda age_s: 3 * GIB)
    spec = sized(QWEN, host_gib=2)
    for learned in (False, True):
        store = FigureStore.open(path)
        figures = store.load()
        learning = Learning(figures, store)
        async with running(launcher, learning=learning, figures=figures) as pool:
            assert pool.plan(spec).learned is learned
            await use(pool, spec)
        store.close()


@virtual_time
async def test_a_file_without_a_name_to_learn_by_is_not_learned() -> None:
    figures = Figures()
    launcher = FakeLauncher(memory=lambda age_s: GIB)
    learning = Learning(figures)
    async with running(launcher, learning=learning, figures=figures) as pool:
        await use(pool, replace(sized(QWEN, host_gib=1), learned_as=""))
    assert figures.items() == []


@virtual_time
async def test_memory_that_others_take_is_not_promised() -> None:
    launcher = FakeLauncher(memory=lambda age_s: 2 * GIB, capacity_bytes=8 * GIB)
    launcher.others_bytes = 5 * GIB
    async with running(launcher) as pool:
        await use(pool, sized(QWEN, host_gib=2))
        with pytest.raises(InsufficientMemory, match=r"needs 4\.00 GiB of main memory") as caught:
            await use(pool, sized(LLAMA, host_gib=4))
        assert caught.value.retry_after_s is not None  # others may be gone then
        assert launcher.journal == ["started qwen#1"]
        launcher.others_bytes = GIB
        await asyncio.sleep(5.0)
        await use(pool, sized(LLAMA, host_gib=4))
        [host] = pool.devices()
        assert (host.capacity_bytes, host.others_bytes) == (8 * GIB, GIB)


@virtual_time
async def test_who_waits_for_memory_is_served_when_it_comes_back() -> None:
    launcher = FakeLauncher(memory=lambda age_s: 2 * GIB, capacity_bytes=8 * GIB)
    async with running(launcher, fair_wait_s=1000.0) as pool:
        busy = asyncio.create_task(use(pool, sized(QWEN, host_gib=2), 30.0))
        await asyncio.sleep(1.0)
        claim = pool.claim(sized(LLAMA, host_gib=7))
        await asyncio.sleep(5.0)
        assert launcher.journal == ["started qwen#1"]
        await claim.granted()
        assert now() == pytest.approx(30.0)
        claim.release()
        await busy


@virtual_time
async def test_a_device_that_cannot_be_read_is_stale() -> None:
    class Blind(FakeLauncher):
        async def survey(self) -> Survey:
            survey = await super().survey()
            return Survey(tuple(replace(d, stale=True) for d in survey.devices), survey.engines)

    async with running(Blind(capacity_bytes=8 * GIB)) as pool:
        [host] = pool.devices()
        assert host.stale
        await use(pool, sized(QWEN, host_gib=2))


# Memory that is late in coming back.


class WithCard(FakeLauncher):
    """A machine with one card, whose driver gives memory back `late_s` after an exit."""

    def __init__(self, late_s: float, **options: float) -> None:
        super().__init__(**options)
        self.late_s = late_s
        self.gone_at: float | None = None

    async def survey(self) -> Survey:
        await asyncio.sleep(0.001)
        uses = {
            engine: MemoryUse(GIB, GIB, ((CARD, 6 * GIB),))
            for engine, handle in self.living.items()
            if handle.exit_status is None
        }
        ended = len(self.living) - len(uses)
        if ended and self.gone_at is None:
            self.gone_at = now()
        late = bool(ended) and self.gone_at is not None and now() < self.gone_at + self.late_s
        taken = 6 * GIB * (len(uses) + late)
        card = DeviceReading(CARD, "a card", 10 * GIB, 10 * GIB - taken)
        return Survey((card,), uses)


@virtual_time
async def test_the_next_engine_waits_for_the_card_s_memory() -> None:
    launcher = WithCard(late_s=1.5)
    async with running(launcher) as pool:
        await use(pool, sized(QWEN, device_gib=6), 5.0)
        began = now()
        await use(pool, sized(LLAMA, device_gib=6), 0.0)
        assert now() - began == pytest.approx(1.5, abs=0.2)
        assert launcher.journal == ["started qwen#1", "exited qwen#1", "started llama#1"]


@virtual_time
async def test_memory_that_never_comes_back_is_somebody_else_s(
    caplog: pytest.LogCaptureFixture,
) -> None:
    launcher = WithCard(late_s=10_000.0)
    async with running(launcher) as pool:
        await use(pool, sized(QWEN, device_gib=6), 5.0)
        began = now()
        with pytest.raises(InsufficientMemory):
            await use(pool, sized(LLAMA, device_gib=6))
        assert now() - began == pytest.approx(FREED_WAIT_S, abs=0.2)
        [card] = pool.devices()
        assert (card.used_bytes, card.others_bytes) == (0, 6 * GIB)
    assert "its memory not free" in caplog.text


# Seeing a load.


@virtual_time
async def test_a_load_seen_before_tells_how_long_it_will_take() -> None:
    figures = Figures()
    learning = Learning(figures)
    launcher = FakeLauncher(load_s=20.0, memory=lambda age_s: GIB)
    async with running(launcher, learning=learning, figures=figures, ttl_s=1.0) as pool:
        await use(pool, sized(QWEN, host_gib=2))
        await asyncio.sleep(5.0)
        claim = pool.claim(sized(QWEN, host_gib=2))
        await asyncio.sleep(5.0)
        loading = pool.loading(claim.key)
        assert loading is not None
        assert loading.phase is Phase.READING
        assert loading.seconds_left == pytest.approx(15.0)
        await asyncio.sleep(9.0)
        assert pool.progress(claim) == "loading 99%"  # its memory is all there already
        await claim.granted()
        assert pool.loading(claim.key) is None
        claim.release()


@virtual_time
async def test_who_waits_too_long_is_told_how_far_the_load_is() -> None:
    launcher = FakeLauncher(load_s=20.0, memory=lambda age_s: int(age_s * GIB / 10))
    async with running(launcher) as pool:
        claim = pool.claim(sized(QWEN, host_gib=2), wait_s=10.0)
        with pytest.raises(LoadingTimeout) as caught:
            await claim.granted()
        claim.release()
        assert caught.value.details is not None
        loading = caught.value.details["loading"]
        assert (loading["phase"], loading["percent"]) == (
            "loading_weights",
            pytest.approx(50, abs=6),
        )
        assert caught.value.retry_after_s == pytest.approx(loading["seconds_left"], abs=0.1)


@virtual_time
async def test_a_load_taken_back_ends() -> None:
    launcher = FakeLauncher(load_s=20.0)
    async with running(launcher) as pool:
        claim, other = pool.claim(QWEN), pool.claim(QWEN)
        await asyncio.sleep(1.0)
        claim.release(cancel=True)
        await asyncio.sleep(1.0)
        assert launcher.journal == ["started qwen#1"]  # somebody else waits for it
        other.release(cancel=True)
        await asyncio.sleep(1.0)
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]


@virtual_time
async def test_the_queue_s_own_deadline_does_not_end_a_load() -> None:
    launcher = FakeLauncher(load_s=20.0)
    async with running(launcher, max_loaded=1) as pool:
        claim = pool.claim(QWEN, queue_wait_s=5.0)
        await claim.granted()
        assert now() == pytest.approx(20.0)
        claim.release()


@virtual_time
async def test_news_tell_of_a_life_and_of_why_it_ended() -> None:
    heard: list[EngineNews] = []
    launcher = FakeLauncher(load_s=0.5)
    async with running(launcher, max_loaded=1, on_news=heard.append) as pool:
        await use(pool, QWEN)
        await use(pool, LLAMA)
    told = [(item.news, item.engine.spec.key.model, item.reason) for item in heard]
    qwen, llama = QWEN.key.model, LLAMA.key.model
    assert [entry for entry in told if entry[0] is not News.PROGRESS] == [
        (News.STARTING, qwen, None),
        (News.READY, qwen, None),
        (News.STOPPING, qwen, "evicted"),
        (News.GONE, qwen, None),
        (News.STARTING, llama, None),
        (News.READY, llama, None),
        (News.STOPPING, llama, "shutdown"),
        (News.GONE, llama, None),
    ]
    [evicted] = [item for item in heard if item.reason == "evicted"]
    assert evicted.decision is not None
    assert evicted.decision.model == llama
    assert [victim.engine.key.model for victim in evicted.decision.victims] == [qwen]


@virtual_time
async def test_pinned_engines_stay() -> None:
    async with running(FakeLauncher(), max_loaded=1, ttl_s=10.0) as pool:
        pool.pin(QWEN.key.model, pinned=True)
        await use(pool, QWEN)
        await asyncio.sleep(100.0)
        with suppress(InsufficientMemory):
            await use(pool, LLAMA)
        found = pool.view(QWEN.key)
        assert found is not None
        assert (found[0].state, found[0].pinned) == (EngineState.READY, True)
        pool.pin(QWEN.key.model, pinned=False)
        await asyncio.sleep(11.0)
        assert pool.view(QWEN.key) is None
