"""The sleep ladder over real HTTP, with real processes; only the card is a number.

A load takes a second. An engine has 96 MiB of the card for its weights, 32 for its cache.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import fake_engine
from tests.fakes.launcher import FakeAdapter, make_scheduler
from tests.fakes.nvml import GIB, FakeCard, FakeNvml
from tests.unit.scheduling import CARD, QWEN
from tests.waiting import async_wait_for
from xandrouting.core.engine_state import EngineState
from xandrouting.core.figures import Figures
from xandrouting.core.model import (
    Backend,
    EngineSpec,
    FixedCost,
    Footprint,
    LaunchPlan,
    Level,
    LoadOptions,
    Placement,
    Terms,
)
from xandrouting.engines.vllm_sleep import VllmSleep
from xandrouting.launch.base import Survey
from xandrouting.launch.local import LocalLauncher
from xandrouting.launch.nvml import open_gpus
from xandrouting.pool.engine import Engine, EngineNews, News
from xandrouting.pool.learning import Learning
from xandrouting.pool.pool import EnginePool, Kind

MIB = 1 << 20
MODEL = replace(
    QWEN,
    cost=FixedCost(Footprint(device=Terms(weights=96 * MIB, kv_cache=32 * MIB))),
    placements=((CARD,),),
    learned_as="qwen on a card",
    sleep_levels=VllmSleep().levels_on("cuda:0"),
)
KEY = "XANDROUTING_ENGINE_KEY"
ASKED = json.dumps({"messages": [], "max_tokens": 2}).encode()
READ_AGAIN = ["wake_up tags=weights", "collective_rpc", "wake_up tags=kv_cache"]
OFFLOAD, DROP = "sleep level=1&mode=abort", "sleep level=2&mode=abort"
RESET = "reset_prefix_cache"


class Sleepy(FakeAdapter):
    """Runs the fake engine, with sleep mode and what else is wrong with it."""

    def __init__(self, card_file: Path) -> None:
        super().__init__(ready_line=None, sleep=VllmSleep())
        self.card_file = card_file
        self.wrong: tuple[str, ...] = ()

    def plan(
        self,
        spec: EngineSpec,
        options: LoadOptions,
        *,
        placement: Placement,
        slot_folder: str = "",
    ) -> LaunchPlan:
        sizes = ("--weights-mib", "96", "--cache-mib", "32", "--load-s", "1")
        argv = (sys.executable, fake_engine.__file__, "--port", "{port}", "--sleep-mode", *sizes)
        files = ("--card-file", str(self.card_file), "--api-key-env", KEY)
        return LaunchPlan(argv=(*argv, *files, *self.wrong), env=((KEY, "{key}"),))


class OnCard(LocalLauncher):
    """Its card holds what the engine says in a file."""

    def __init__(self, card_file: Path) -> None:
        self.card = FakeCard(total=10 * GIB, free=9 * GIB)
        self._card_file = card_file
        super().__init__(gpus=open_gpus(FakeNvml(self.card)))

    async def survey(self) -> Survey:
        if self._card_file.exists():
            pid, taken = json.loads(self._card_file.read_text())
            alive = Path(f"/proc/{pid}").exists()
            self.card.computing = [(pid, taken)] if alive else []
            self.card.free = 9 * GIB - (taken if alive else 0)
        return await super().survey()


@dataclass
class World:
    pool: EnginePool
    adapter: Sleepy
    launcher: OnCard
    news: list[EngineNews]

    @property
    def state(self) -> EngineState | None:
        found = self.pool.view(MODEL.key)
        return None if found is None else found[0].state

    async def ask(self) -> Engine:
        """Have an answer of the model."""
        claim = self.pool.claim(MODEL)
        try:
            engine = await claim.granted()
            assert engine.client is not None
            response = await engine.client.request(b"POST", b"/v1/chat/completions", ASKED)
            answer = await response.read(1 << 20)
            response.close()
            assert response.status == 200, answer
            return engine
        finally:
            claim.release()

    async def calls(self) -> list[str]:
        engine = await self.ask()
        assert engine.client is not None
        _, answer = await engine.client.get(b"/seen")
        return [seen["event"] for seen in json.loads(answer) if seen["request"] == 0]

    async def sleeps(self) -> None:
        await async_wait_for(lambda: self.state is EngineState.SLEEPING, timeout_s=20)


@asynccontextmanager
async def world(tmp_path: Path, *wrong: str, **scheduling: Any) -> AsyncIterator[World]:
    card_file = tmp_path / "card"
    launcher, adapter = OnCard(card_file), Sleepy(card_file)
    adapter.wrong = wrong
    news: list[EngineNews] = []
    figures = Figures()
    settings: dict[str, Any] = {"ttl_s": 300.0, "soft_idle_s": 0.3, **scheduling}
    pool = EnginePool(
        make_scheduler(figures=figures, **settings),
        {Backend.LLAMACPP: Kind(adapter, launcher)},
        node=launcher,
        learning=Learning(figures),
        load_stall_s=30.0,
        on_news=news.append,
    )
    async with asyncio.timeout(60), pool:
        yield World(pool, adapter, launcher, news)


async def test_it_sleeps_and_wakes_and_answers(tmp_path: Path) -> None:
    async with world(tmp_path, "--sleep-s", "0.2", "--wake-s", "0.1") as w:
        first = await w.ask()
        cold_s = first.load_seconds
        await w.sleeps()
        view, engine = w.pool.view(MODEL.key)
        assert (view.level, engine.memory.device_bytes) == (Level.OFFLOADED, 0)
        assert view.charged[CARD] == 0
        second = await w.ask()
        assert second is first
        assert 0.1 <= second.load_seconds < cold_s
        assert (await w.calls())[:3] == [OFFLOAD, "wake_up", RESET]
        assert w.pool.loads >= 2


async def test_what_leaks_is_dropped_and_read_again(tmp_path: Path) -> None:
    async with world(tmp_path, "--sleep-leaks", "1") as w:
        await w.ask()
        await w.sleeps()
        view, _ = w.pool.view(MODEL.key)
        assert view.level is Level.DROPPED
        calls = await w.calls()
        assert calls[:4] == [OFFLOAD, "wake_up", RESET, DROP]
        assert calls[4:8] == [*READ_AGAIN, RESET]


async def test_who_stays_idle_sleeps_deeper(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.ask()
        await async_wait_for(
            lambda: (
                w.state is EngineState.SLEEPING and w.pool.view(MODEL.key)[0].level is Level.DROPPED
            ),
            timeout_s=20,
        )
        assert (await w.calls())[:8] == [OFFLOAD, "wake_up", RESET, DROP, *READ_AGAIN, RESET]


@pytest.mark.parametrize("wrong", [("--fails", "sleep"), ("--sleep-leaks", "1", "2")])
async def test_who_cannot_sleep_is_ended_and_the_next_one_stays_awake(
    tmp_path: Path, wrong: tuple[str, ...]
) -> None:
    async with world(tmp_path, *wrong) as w:
        first = await w.ask()
        async with asyncio.timeout(20):
            await first.gone.wait()
        [stopping] = [news for news in w.news if news.news is News.STOPPING]
        assert stopping.reason == "sleep_failed"
        assert (await w.ask()).id.incarnation == 2


@pytest.mark.parametrize("call", ["wake_up", "reset_prefix_cache"])
async def test_who_asks_for_one_that_does_not_wake_has_an_answer_of_a_fresh_one(
    tmp_path: Path, call: str
) -> None:
    async with world(tmp_path, "--fails", call) as w:
        await w.ask()
        await w.sleeps()
        w.adapter.wrong = ()
        engine = await w.ask()
        assert engine.id.incarnation == 2
        assert w.pool.load_failures == 0


async def test_one_that_was_killed_while_it_slept_is_replaced(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        first = await w.ask()
        await w.sleeps()
        assert first.handle is not None
        await first.handle.stop(grace_s=0.0)
        assert (await w.ask()).id.incarnation == 2
