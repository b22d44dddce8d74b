"""Switching fast: sleep and wake, conversations, spares and read-ahead, on a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from tests.fakes.launcher import FakeAdapter, FakeHandle, FakeLauncher, name_of, running
from tests.fakes.loop import virtual_time
from tests.unit.scheduling import LLAMA, MISTRAL, QWEN, asking
from xandrouting.core.engine_state import EngineState
from xandrouting.core.errors import EngineStartFailed, GatewayError
from xandrouting.core.events import Start
from xandrouting.core.figures import Figures
from xandrouting.core.model import (
    HOST,
    EngineSpec,
    FixedCost,
    Footprint,
    LaunchPlan,
    MemoryUse,
    StartFailure,
    Terms,
)
from xandrouting.engines.base import Slots
from xandrouting.engines.llamacpp_slots import LlamaSlots
from xandrouting.launch.base import Survey
from xandrouting.net.client import Client
from xandrouting.pool.engine import Engine, EngineNews, News
from xandrouting.pool.learning import Learning
from xandrouting.pool.life import REST_S
from xandrouting.pool.parking import Parking, SavedSlot
from xandrouting.pool.pool import EnginePool
from xandrouting.pool.preparing import SPARE_WAIT_S

GIB = 1 << 30
SLEEPER_BYTES = 30 << 20
SLEEPY = replace(QWEN, sleeper_bytes=SLEEPER_BYTES)
SLOTS = LlamaSlots()
SAVED = (SavedSlot("qwen.slot", 500, 5000, 1),)
FILES = ("/models/qwen-1.gguf", "/models/qwen-2.gguf")


@dataclass
class FakeParking:
    """A parking that writes its calls into the launcher's journal, and takes its time.

    `fails` is raised by the calls it names.
    """

    journal: list[str]
    takes_s: dict[str, float] = field(default_factory=dict)
    fails: dict[str, Exception] = field(default_factory=dict)
    whole: tuple[SavedSlot, ...] = ()
    folder: str = "/data/parked/"

    async def _call(self, call: str, start: Start) -> None:
        name = name_of(start.engine)
        try:
            await asyncio.sleep(self.takes_s.get(call, 0.0))
        except asyncio.CancelledError:
            self.journal.append(f"{call} of {name} broken off")
            raise
        self.journal.append(f"{call} {name}")
        if call in self.fails:
            raise self.fails[call]

    async def park(self, start: Start, client: Client, slots: Slots) -> None:
        assert slots is SLOTS
        await self._call("park", start)

    async def fetch(self, start: Start) -> tuple[SavedSlot, ...]:
        await self._call("fetch", start)
        return self.whole

    async def restore(
        self, start: Start, whole: tuple[SavedSlot, ...], client: Client, slots: Slots
    ) -> None:
        assert whole == self.whole
        await self._call("restore", start)

    async def drop_old(self) -> None:
        pass

    @property
    def as_parking(self) -> Parking:
        return cast("Parking", self)


def keeping(launcher: FakeLauncher, **changes: Any) -> tuple[FakeParking, FakeAdapter]:
    """Return a parking, and an adapter whose engines have slots to park."""
    return FakeParking(launcher.journal, **changes), FakeAdapter(slots=SLOTS)


def sized(spec: EngineSpec, host_gib: float) -> EngineSpec:
    whole = Footprint(host=Terms(weights=int(host_gib * GIB)))
    return replace(spec, cost=FixedCost(whole))


async def use(pool: EnginePool, spec: EngineSpec, seconds: float = 0.0) -> Engine:
    claim = pool.claim(spec)
    try:
        engine = await claim.granted()
        await asyncio.sleep(seconds)
        return engine
    finally:
        claim.release()


def now() -> float:
    return asyncio.get_running_loop().time()


def state_of(pool: EnginePool, spec: EngineSpec) -> EngineState | None:
    found = pool.view(spec.key)
    return None if found is None else found[0].state


def engine_of(pool: EnginePool, spec: EngineSpec) -> Engine:
    found = pool.view(spec.key)
    assert found is not None
    return found[1]


async def unload(pool: EnginePool, spec: EngineSpec, *, force: bool = False) -> None:
    await pool.unload([engine_of(pool, spec).id], force=force)


# Sleep and wake.


@virtual_time
async def test_an_idle_engine_sleeps_and_a_request_wakes_it() -> None:
    launcher = FakeLauncher(load_s=5.0)
    async with running(launcher, ttl_s=0, soft_idle_s=60.0) as pool:
        await use(pool, SLEEPY)
        await asyncio.sleep(59.9)
        assert state_of(pool, SLEEPY) is EngineState.READY
        await asyncio.sleep(0.2)
        assert state_of(pool, SLEEPY) is EngineState.SLEEPING
        await asyncio.sleep(100.0)
        began = now()
        engine = await use(pool, SLEEPY)
        assert name_of(engine.id) == "qwen#1"  # the same life
        assert now() - began == pytest.approx(5.0)
        assert launcher.journal == ["started qwen#1", "slept qwen#1", "woken qwen#1"]


@virtual_time
async def test_waking_is_a_load_that_counts_as_such() -> None:
    launcher = FakeLauncher(load_s=5.0)
    async with running(launcher, ttl_s=0, soft_idle_s=60.0) as pool:
        await use(pool, SLEEPY)
        launcher.handles[0]._load_s = 2.0
        await asyncio.sleep(61.0)
        first, second = pool.claim(SLEEPY), pool.claim(SLEEPY)
        assert not first.hit
        await asyncio.sleep(1.0)
        engine = engine_of(pool, SLEEPY)
        assert pool.loading(SLEEPY.key) is not None
        assert (engine.load_seconds, engine.loaded_at) == (None, None)
        await asyncio.gather(first.granted(), second.granted())
        assert engine.load_seconds == pytest.approx(2.0)
        assert engine.loaded_at is not None
        assert [claim.first for claim in (first, second)] == [True, False]
        assert (pool.loads, pool.load_failures) == (2, 0)
        first.release()
        second.release()


@virtual_time
async def test_an_engine_sleeps_and_wakes_again_and_again() -> None:
    launcher = FakeLauncher(load_s=1.0)
    async with running(launcher, ttl_s=0, soft_idle_s=10.0) as pool:
        for _ in range(4):
            assert name_of((await use(pool, SLEEPY)).id) == "qwen#1"
            await asyncio.sleep(11.0)
            assert state_of(pool, SLEEPY) is EngineState.SLEEPING
        again = ["woken qwen#1", "slept qwen#1"] * 3
        assert launcher.journal == ["started qwen#1", "slept qwen#1", *again]
        assert pool.loads == 4


@virtual_time
async def test_who_asks_while_an_engine_goes_to_sleep_waits_for_its_wake() -> None:
    launcher, news = FakeLauncher(load_s=5.0), []
    on_news = lambda item: news.append(item.news)  # noqa: E731
    async with running(launcher, ttl_s=0, soft_idle_s=60.0, on_news=on_news) as pool:
        await use(pool, SLEEPY)
        launcher.handles[0].rest_s = 3.0
        await asyncio.sleep(61.0)
        assert state_of(pool, SLEEPY) is EngineState.SUSPENDING
        news.clear()
        claim = pool.claim(SLEEPY)
        assert (claim.hit, claim.engine, pool.queued) == (False, None, 1)
        assert name_of((await claim.granted()).id) == "qwen#1"
        assert now() == pytest.approx(5 + 60 + 3 + 5)
        assert claim.first
        claim.release()
        assert [kind for kind in news if kind is not News.PROGRESS] == [News.STARTING, News.READY]
        assert launcher.journal == ["started qwen#1", "slept qwen#1", "woken qwen#1"]


@virtual_time
async def test_a_sleep_and_a_wake_are_news() -> None:
    told: list[EngineNews] = []
    launcher = FakeLauncher()
    async with running(launcher, ttl_s=0, soft_idle_s=60.0, on_news=told.append) as pool:
        await use(pool, SLEEPY)
        await asyncio.sleep(61.0)
        await use(pool, SLEEPY)
    assert [item.news for item in told if item.news is not News.PROGRESS] == [
        *(News.STARTING, News.READY, News.SLEEPING, News.STARTING, News.READY),
        *(News.STOPPING, News.GONE),
    ]
    assert all(item.decision for item in told if item.news is News.STARTING)


@virtual_time
async def test_an_engine_that_cannot_sleep_does_not() -> None:
    launcher = FakeLauncher()
    async with running(launcher, ttl_s=0, soft_idle_s=60.0) as pool:
        await use(pool, QWEN)
        await asyncio.sleep(1000.0)
        assert launcher.journal == ["started qwen#1"]


@virtual_time
async def test_the_ttl_ends_a_sleeper_too() -> None:
    launcher = FakeLauncher(stop_s=2.0)
    async with running(launcher, ttl_s=100.0, soft_idle_s=60.0) as pool:
        await use(pool, SLEEPY)
        await asyncio.sleep(99.0)
        assert state_of(pool, SLEEPY) is EngineState.SLEEPING
        await asyncio.sleep(4.0)
        assert launcher.journal == ["started qwen#1", "slept qwen#1", "exited qwen#1"]
        assert pool.views() == []


@virtual_time
async def test_a_sleeper_has_given_its_memory_back() -> None:
    launcher = FakeLauncher(memory=lambda age_s: 4 * GIB, capacity_bytes=8 * GIB)
    spec, other = sized(SLEEPY, 4), sized(LLAMA, 6)
    async with running(launcher, ttl_s=0, soft_idle_s=60.0) as pool:
        await use(pool, spec)
        await asyncio.sleep(59.0)
        launcher.handles[0].take(lambda age_s: SLEEPER_BYTES)
        await asyncio.sleep(2.0)
        assert pool.view(spec.key)[0].charged[HOST] == SLEEPER_BYTES  # type: ignore[index]
        launcher.memory = lambda age_s: 6 * GIB
        await use(pool, other)
        assert state_of(pool, spec) is EngineState.SLEEPING  # nobody had to leave
        assert pool.evictions == 0


@virtual_time
async def test_what_a_sleeper_takes_is_not_learned_as_what_it_needs() -> None:
    figures = Figures()
    launcher = FakeLauncher(load_s=1.0, memory=lambda age_s: 4 * GIB)
    spec = replace(sized(SLEEPY, 1), learned_as="qwen")
    async with running(
        launcher, learning=Learning(figures), figures=figures, ttl_s=0, soft_idle_s=60.0
    ) as pool:
        await use(pool, spec, 5.0)
        launcher.handles[0].take(lambda age_s: SLEEPER_BYTES)
        await asyncio.sleep(300.0)
        assert state_of(pool, spec) is EngineState.SLEEPING
        assert pool.plan(spec).footprint.host_bytes == 4 * GIB


@virtual_time
async def test_a_wake_with_other_wishes_is_planned_anew() -> None:
    launcher, adapter = FakeLauncher(), FakeAdapter()
    async with running(launcher, adapter=adapter, ttl_s=0, soft_idle_s=60.0) as pool:
        await use(pool, SLEEPY)
        await asyncio.sleep(61.0)
        engine = await use(pool, asking(SLEEPY, n_ctx=9000))
        assert engine.start.options.n_ctx == 9000
    assert [options.n_ctx for _, options, _ in adapter.planned] == [2048, 9000]
    assert launcher.journal[:3] == ["started qwen#1", "slept qwen#1", "woken qwen#1"]


# A sleep that does not go as it should.


@virtual_time
async def test_an_engine_that_crashes_in_its_sleep_is_gone() -> None:
    launcher = FakeLauncher(load_s=5.0)
    async with running(launcher, ttl_s=0, soft_idle_s=60.0) as pool:
        await use(pool, SLEEPY)
        await asyncio.sleep(61.0)
        launcher.handles[0].die(-9)
        await asyncio.sleep(0.1)
        assert pool.views() == []
        assert name_of((await use(pool, SLEEPY)).id) == "qwen#2"  # at once: no load has failed
        assert (pool.loads, pool.load_failures) == (2, 0)


@virtual_time
async def test_an_engine_that_crashes_on_its_way_to_sleep_is_replaced() -> None:
    launcher = FakeLauncher(load_s=5.0)
    async with running(launcher, ttl_s=0, soft_idle_s=60.0) as pool:
        await use(pool, SLEEPY)
        launcher.handles[0].rest_s = 5.0
        await asyncio.sleep(61.0)
        claim = pool.claim(SLEEPY)
        launcher.handles[0].die(-11)
        assert name_of((await claim.granted()).id) == "qwen#2"
        assert now() == pytest.approx(5 + 61 + 5)
        claim.release()
        assert launcher.journal == ["started qwen#1", "exited qwen#1", "started qwen#2"]


@virtual_time
async def test_an_engine_that_never_rests_is_ended_and_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    launcher = FakeLauncher(load_s=5.0, stop_s=1.0)
    async with running(launcher, ttl_s=0, soft_idle_s=60.0) as pool:
        await use(pool, SLEEPY)
        launcher.handles[0].rest_s = 1e6
        await asyncio.sleep(61.0)
        assert name_of((await use(pool, SLEEPY)).id) == "qwen#2"
        assert now() == pytest.approx(5 + 60 + REST_S + 1 + 5)
        assert "engine does not rest" in caplog.text


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("rest_s", [0.0, 5.0])
@virtual_time
async def test_an_unload_ends_a_sleeper_and_one_that_goes_to_sleep(
    rest_s: float, force: bool
) -> None:
    launcher = FakeLauncher(stop_s=2.0)
    async with running(launcher, ttl_s=0, soft_idle_s=60.0) as pool:
        await use(pool, SLEEPY)
        launcher.handles[0].rest_s = rest_s
        await asyncio.sleep(61.0)
        began = now()
        await unload(pool, SLEEPY, force=force)
        assert now() - began == pytest.approx(0.0 if force else 2.0)
        assert launcher.journal[-1] == "exited qwen#1"
        assert pool.views() == []
        await use(pool, SLEEPY)
        assert launcher.journal[-1] == "started qwen#2"


@virtual_time
async def test_who_waited_for_a_sleeper_to_be_is_served_after_its_unload() -> None:
    launcher = FakeLauncher(load_s=5.0, stop_s=2.0)
    async with running(launcher, ttl_s=0, soft_idle_s=60.0) as pool:
        await use(pool, SLEEPY)
        launcher.handles[0].rest_s = 5.0
        await asyncio.sleep(61.0)
        claim = pool.claim(SLEEPY)
        await unload(pool, SLEEPY)
        assert name_of((await claim.granted()).id) == "qwen#2"
        claim.release()


@pytest.mark.parametrize("after_s", [60.5, 66.0, 70.5, 73.0])
@virtual_time
async def test_aclose_leaves_nothing_of_a_sleeper(after_s: float) -> None:
    """In turn: it goes to sleep, sleeps, wakes, has woken. `running` looks."""
    launcher = FakeLauncher(load_s=2.0, stop_s=4.0)
    async with running(launcher, ttl_s=0, soft_idle_s=58.0) as pool:
        await use(pool, SLEEPY)
        launcher.handles[0].rest_s = 2.0
        asyncio.get_running_loop().call_at(70.0, lambda: pool.claim(SLEEPY).release())
        await asyncio.sleep(after_s - now())
        await pool.aclose()
        assert now() == pytest.approx(after_s)
        await asyncio.sleep(100.0)


@virtual_time
async def test_a_wake_that_fails_is_a_failed_load() -> None:
    launcher, adapter = FakeLauncher(load_s=5.0), FakeAdapter(failure=StartFailure.BAD_FILE)
    async with running(launcher, adapter=adapter, ttl_s=0, soft_idle_s=60.0) as pool:
        await use(pool, SLEEPY)
        await asyncio.sleep(61.0)
        claim = pool.claim(SLEEPY)
        await asyncio.sleep(1.0)
        launcher.handles[0].die(1)
        with pytest.raises(GatewayError):
            await claim.granted()
        claim.release()
        assert (pool.loads, pool.load_failures) == (1, 1)
        assert pool.failure(SLEEPY.key.model, SLEEPY.revision) is not None
        assert pool.views() == []
        refused = pool.claim(SLEEPY)
        assert refused.error is not None
        refused.release()
        await asyncio.sleep(2.0)
        assert name_of((await use(pool, SLEEPY)).id) == "qwen#2"


@virtual_time
async def test_an_unload_breaks_a_wake_off() -> None:
    launcher = FakeLauncher(load_s=5.0, stop_s=2.0)
    async with running(launcher, ttl_s=0, soft_idle_s=60.0) as pool:
        await use(pool, SLEEPY)
        await asyncio.sleep(61.0)
        claim = pool.claim(SLEEPY)
        await asyncio.sleep(1.0)
        await unload(pool, SLEEPY, force=True)
        with pytest.raises(GatewayError):
            await claim.granted()
        claim.release()
        assert launcher.journal[-1] == "exited qwen#1"
        assert (pool.loads, pool.load_failures) == (1, 0)


# Conversations.


@virtual_time
async def test_a_conversation_is_parked_before_its_engine_ends_and_restored_before_the_next() -> (
    None
):
    launcher = FakeLauncher(load_s=5.0, stop_s=2.0)
    parking, adapter = keeping(launcher, whole=SAVED)
    async with running(launcher, adapter=adapter, parking=parking.as_parking) as pool:
        parking.takes_s = {"restore": 1.0}
        await use(pool, QWEN)
        await unload(pool, QWEN)
        began = now()
        await use(pool, QWEN)
        assert now() - began == pytest.approx(6.0)  # it has its conversations when it is ready
        assert engine_of(pool, QWEN).load_seconds == pytest.approx(6.0)
    life = ["started qwen#{n}", "fetch qwen#{n}", "restore qwen#{n}"]
    end = ["park qwen#{n}", "exited qwen#{n}"]
    first, second = ([line.format(n=n) for line in life + end] for n in (1, 2))
    assert launcher.journal == [*first, *second[:3], second[4]]  # the last end was by force
    assert [folder for _, _, folder in adapter.planned] == ["/data/parked/"] * 2


@virtual_time
async def test_files_are_checked_while_the_engine_loads() -> None:
    launcher = FakeLauncher(load_s=5.0)
    parking, adapter = keeping(launcher, takes_s={"fetch": 4.0})
    async with running(launcher, adapter=adapter, parking=parking.as_parking) as pool:
        await use(pool, QWEN)
        assert now() == pytest.approx(5.0)
        assert "restore qwen#1" not in launcher.journal  # there is nothing to


@pytest.mark.parametrize("reason", ["idle", "evicted", "unload", "shutdown"])
@virtual_time
async def test_it_is_parked_when_its_engine_leaves_in_peace(reason: str) -> None:
    launcher = FakeLauncher()
    parking, adapter = keeping(launcher)
    async with running(
        launcher, adapter=adapter, parking=parking.as_parking, ttl_s=60.0, max_loaded=1
    ) as pool:
        await use(pool, QWEN)
        engine = engine_of(pool, QWEN)
        if reason == "idle":
            await asyncio.sleep(61.0)
        elif reason == "evicted":
            await use(pool, LLAMA)
        elif reason == "unload":
            await unload(pool, QWEN)
        else:
            await pool.drain(30.0)
        assert engine.stop_reason == reason
        assert launcher.journal[1:4] == ["fetch qwen#1", "park qwen#1", "exited qwen#1"]


@virtual_time
async def test_it_is_not_parked_for_other_options_which_it_would_not_fit() -> None:
    launcher = FakeLauncher()
    parking, adapter = keeping(launcher)
    async with running(launcher, adapter=adapter, parking=parking.as_parking) as pool:
        await use(pool, QWEN)
        await use(pool, asking(QWEN, n_ctx=9000))
        assert "park qwen#1" not in launcher.journal
        assert "exited qwen#1" in launcher.journal


@virtual_time
async def test_it_is_not_parked_when_its_engine_crashed_or_was_ended_by_force() -> None:
    launcher = FakeLauncher()
    parking, adapter = keeping(launcher)
    async with running(launcher, adapter=adapter, parking=parking.as_parking) as pool:
        await use(pool, QWEN)
        launcher.handles[0].die(-11)
        await asyncio.sleep(1.0)
        await use(pool, QWEN)
        await unload(pool, QWEN, force=True)
        assert not any(line.startswith("park") for line in launcher.journal)
        assert launcher.journal[-1] == "exited qwen#2"


@virtual_time
async def test_an_engine_that_dies_as_it_is_told_to_leave_is_not_asked_any_more() -> None:
    launcher = FakeLauncher()
    parking, adapter = keeping(launcher)
    async with running(launcher, adapter=adapter, parking=parking.as_parking) as pool:
        await use(pool, QWEN)
        launcher.handles[0].die(-11)
        await unload(pool, QWEN)
        assert launcher.journal == ["started qwen#1", "fetch qwen#1", "exited qwen#1"]


@virtual_time
async def test_an_engine_that_was_never_ready_has_nothing_to_park() -> None:
    launcher = FakeLauncher(load_s=5.0)
    parking, adapter = keeping(launcher)
    async with running(launcher, adapter=adapter, parking=parking.as_parking) as pool:
        pool.claim(QWEN).release()
        await asyncio.sleep(1.0)
        await unload(pool, QWEN)
        assert launcher.journal == ["started qwen#1", "fetch qwen#1", "exited qwen#1"]


@virtual_time
async def test_an_adapter_without_slots_has_nothing_to_park() -> None:
    launcher, adapter = FakeLauncher(), FakeAdapter()
    parking = FakeParking(launcher.journal)
    async with running(launcher, adapter=adapter, parking=parking.as_parking) as pool:
        await use(pool, QWEN)
        await unload(pool, QWEN)
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]
    assert [folder for _, _, folder in adapter.planned] == [""]


@virtual_time
async def test_a_sleeper_s_conversations_are_there_when_it_wakes() -> None:
    launcher = FakeLauncher()
    parking, adapter = keeping(launcher)
    async with running(
        launcher, adapter=adapter, parking=parking.as_parking, ttl_s=0, soft_idle_s=60.0
    ) as pool:
        await use(pool, SLEEPY)
        parking.whole = SAVED
        await asyncio.sleep(61.0)
        await use(pool, SLEEPY)
        assert launcher.journal == [
            *("started qwen#1", "fetch qwen#1", "park qwen#1", "slept qwen#1"),
            *("woken qwen#1", "fetch qwen#1", "restore qwen#1"),
        ]


@virtual_time
async def test_a_sleeper_that_leaves_is_not_parked_again() -> None:
    launcher = FakeLauncher()
    parking, adapter = keeping(launcher)
    async with running(
        launcher, adapter=adapter, parking=parking.as_parking, ttl_s=0, soft_idle_s=60.0
    ) as pool:
        await use(pool, SLEEPY)
        await asyncio.sleep(61.0)
        await unload(pool, SLEEPY)
        assert launcher.journal.count("park qwen#1") == 1


@virtual_time
async def test_a_stop_while_it_parks_to_sleep_parks_it_after_all() -> None:
    launcher = FakeLauncher()
    parking, adapter = keeping(launcher, takes_s={"park": 4.0})
    async with running(
        launcher, adapter=adapter, parking=parking.as_parking, ttl_s=0, soft_idle_s=60.0
    ) as pool:
        await use(pool, SLEEPY)
        await asyncio.sleep(61.0)
        began = now()
        await unload(pool, SLEEPY)
        assert now() - began == pytest.approx(4.0)
        assert launcher.journal[2:] == [
            *("park of qwen#1 broken off", "park qwen#1", "exited qwen#1"),
        ]


@virtual_time
async def test_a_stop_by_force_does_not_wait_for_a_parking_of_a_sleeper_to_be() -> None:
    launcher = FakeLauncher()
    parking, adapter = keeping(launcher, takes_s={"park": 4.0})
    async with running(
        launcher, adapter=adapter, parking=parking.as_parking, ttl_s=0, soft_idle_s=60.0
    ) as pool:
        await use(pool, SLEEPY)
        await asyncio.sleep(61.0)
        began = now()
        await unload(pool, SLEEPY, force=True)
        assert now() == began
        assert launcher.journal[2:] == ["park of qwen#1 broken off", "exited qwen#1"]


@virtual_time
async def test_a_stop_by_force_ends_the_engine_that_parks() -> None:
    """The parking's call ends with the engine's connection."""
    launcher = FakeLauncher(stop_s=2.0)
    parking, adapter = keeping(launcher, takes_s={"park": 4.0})
    async with running(launcher, adapter=adapter, parking=parking.as_parking) as pool:
        await use(pool, QWEN)
        unloading = asyncio.create_task(unload(pool, QWEN))
        await asyncio.sleep(1.0)
        assert launcher.journal[-1] == "fetch qwen#1"
        forced = asyncio.create_task(unload(pool, QWEN, force=True))
        await asyncio.sleep(0.1)
        assert launcher.journal[-1] == "exited qwen#1"
        await asyncio.gather(unloading, forced)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyError("a bug")])
@virtual_time
async def test_a_parking_that_fails_keeps_no_engine(error: Exception) -> None:
    launcher = FakeLauncher()
    parking, adapter = keeping(launcher, fails={"park": error})
    async with running(launcher, adapter=adapter, parking=parking.as_parking) as pool:
        await use(pool, QWEN)
        await unload(pool, QWEN)
        assert launcher.journal[-2:] == ["park qwen#1", "exited qwen#1"]
        assert pool.views() == []
        await asyncio.sleep(2.0)
        assert name_of((await use(pool, QWEN)).id) == "qwen#2"


@virtual_time
async def test_an_engine_that_dies_of_its_conversation_is_a_crash() -> None:
    launcher = FakeLauncher(load_s=5.0)
    parking, adapter = keeping(launcher, takes_s={"restore": 1.0}, whole=SAVED)
    async with running(launcher, adapter=adapter, parking=parking.as_parking) as pool:
        asyncio.get_running_loop().call_at(5.5, lambda: launcher.handles[0].die(-6))
        await use(pool, QWEN)
        await asyncio.sleep(1.0)
        assert pool.views() == []
        parking.whole = ()
        assert name_of((await use(pool, QWEN)).id) == "qwen#2"


# Spares.


@virtual_time
async def test_a_spare_waits_from_the_start_and_is_replaced_after_the_first_answer() -> None:
    launcher, adapter = FakeLauncher(load_s=5.0), FakeAdapter(order="serve")
    async with running(launcher, adapter=adapter) as pool:
        await asyncio.sleep(0.1)
        assert [plan.argv for plan in launcher.prepared] == [("fake",)]
        using = asyncio.create_task(use(pool, QWEN, 2.0))
        await asyncio.sleep(6.9)
        assert launcher.prepared == []  # it became the engine, which answers
        await using
        await asyncio.sleep(0.1)
        assert len(launcher.prepared) == 1


@virtual_time
async def test_a_long_answer_is_not_waited_for() -> None:
    launcher, adapter = FakeLauncher(load_s=5.0), FakeAdapter(order="serve")
    async with running(launcher, adapter=adapter) as pool:
        using = asyncio.create_task(use(pool, QWEN, 100.0))
        await asyncio.sleep(5.0 + SPARE_WAIT_S - 0.1)
        assert launcher.prepared == []
        await asyncio.sleep(0.2)
        assert len(launcher.prepared) == 1
        await using


@virtual_time
async def test_a_load_nobody_waits_for_is_followed_by_a_spare_at_once() -> None:
    launcher, adapter = FakeLauncher(load_s=5.0), FakeAdapter(order="serve")
    async with running(launcher, adapter=adapter) as pool:
        pool.claim(QWEN).release()
        await asyncio.sleep(5.1)
        assert len(launcher.prepared) == 1


@virtual_time
async def test_a_load_that_fails_is_followed_by_a_spare() -> None:
    launcher, adapter = FakeLauncher(load_s=5.0, fail=1), FakeAdapter(order="serve")
    async with running(launcher, adapter=adapter) as pool:
        with pytest.raises(EngineStartFailed):
            await use(pool, QWEN)
        await asyncio.sleep(0.1)
        assert len(launcher.prepared) == 1


def dying(*times: float) -> FakeLauncher:
    """A launcher whose first engines die so long after their start."""
    launcher = FakeLauncher(load_s=5.0)
    left = list(times)

    def begun(handle: FakeHandle) -> None:
        if left:
            asyncio.get_running_loop().call_later(left.pop(0), handle.die, -9)

    launcher.on_start = begun
    return launcher


@virtual_time
async def test_a_spare_that_dies_as_it_is_taken_is_replaced_by_a_fresh_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    launcher, adapter = dying(0.001), FakeAdapter(order="serve")
    news: list[News] = []
    async with running(
        launcher, adapter=adapter, on_news=lambda told: news.append(told.news)
    ) as pool:
        await asyncio.sleep(0.1)
        assert len(launcher.prepared) == 1
        engine = await use(pool, QWEN)
        assert name_of(engine.id) == "qwen#1"
        assert now() == pytest.approx(0.1 + 0.001 + 5.0)
        assert [handle.was_spare for handle in launcher.handles] == [True, False]
        assert engine.handle is launcher.handles[1]
        assert (pool.loads, pool.load_failures) == (1, 0)
        assert News.FAILED not in news
        await asyncio.sleep(0.1)
        assert len(launcher.prepared) == 1
    assert launcher.journal[:3] == ["started qwen#1", "exited qwen#1", "started qwen#1"]
    told = "spare ended as it was taken engine=/models/qwen.gguf@llamacpp/cpu#1 status=-9"
    assert told in caplog.text


@virtual_time
async def test_the_fresh_process_is_the_last_one() -> None:
    launcher, adapter = dying(0.001, 0.002), FakeAdapter(order="serve")
    async with running(launcher, adapter=adapter) as pool:
        await asyncio.sleep(0.1)
        with pytest.raises(EngineStartFailed):
            await use(pool, QWEN)
        assert (len(launcher.handles), pool.load_failures) == (2, 1)
        await asyncio.sleep(0.1)
        assert len(launcher.prepared) == 1


@virtual_time
async def test_one_that_has_begun_its_load_is_not_started_again() -> None:
    """What it was asked for may be the reason: it would die of that once more."""
    launcher, adapter = dying(0.001), FakeAdapter(order="serve")
    launcher.says = ("llama_model_loader: loaded meta data",)
    async with running(launcher, adapter=adapter) as pool:
        await asyncio.sleep(0.1)
        with pytest.raises(EngineStartFailed):
            await use(pool, QWEN)
        assert [handle.was_spare for handle in launcher.handles] == [True]


@virtual_time
async def test_a_stop_while_the_fresh_process_loads_ends_it() -> None:
    launcher, adapter = dying(0.001), FakeAdapter(order="serve")
    async with running(launcher, adapter=adapter) as pool:
        await asyncio.sleep(0.1)
        claim = pool.claim(QWEN)
        await asyncio.sleep(1.0)
        [(view, _)] = pool.views()
        await pool.unload([view.engine], force=True)
        claim.release()
        assert [handle.exit_status for handle in launcher.handles] == [-9, 0]


@virtual_time
async def test_a_crash_before_the_first_answer_s_end_does_not_hold_up_the_end() -> None:
    launcher, adapter = FakeLauncher(load_s=5.0), FakeAdapter(order="serve")
    async with running(launcher, adapter=adapter) as pool:
        claim = pool.claim(QWEN)
        await claim.granted()
        launcher.handles[0].die(-11)
        await asyncio.sleep(0.1)
        await pool.aclose()
        assert now() == pytest.approx(5.1)
        claim.release()


@pytest.mark.parametrize("drains", [False, True])
@virtual_time
async def test_no_spare_is_made_while_the_pool_ends(drains: bool) -> None:
    class Counting(FakeLauncher):
        made = 0

        async def prepare(self, plan: LaunchPlan) -> None:
            self.made += 1

    launcher = Counting()
    async with running(launcher, adapter=FakeAdapter(order="serve")) as pool:
        await use(pool, QWEN)
        await asyncio.sleep(1.0)
        before = launcher.made
        if drains:
            await pool.drain(5.0)
    assert launcher.made == before == 2


@virtual_time
async def test_a_spare_that_cannot_be_started_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(FakeLauncher):
        async def prepare(self, plan: LaunchPlan) -> None:
            raise EngineStartFailed("No such program.", detail="program=/opt/runner")

    async with running(Failing(), adapter=FakeAdapter(order="serve")) as pool:
        await use(pool, QWEN)
    assert "spare not started" in caplog.text
    assert "/opt/runner" in caplog.text


@virtual_time
async def test_where_memory_is_short_no_spare_is_made() -> None:
    launcher = FakeLauncher(capacity_bytes=GIB)
    launcher.others_bytes = GIB - 20 * (1 << 20)
    adapter = FakeAdapter(order="serve", sleeper_bytes=SLEEPER_BYTES)
    async with running(launcher, adapter=adapter) as pool:
        await asyncio.sleep(0.1)
        assert launcher.prepared == []
        await use(pool, QWEN)
        await asyncio.sleep(0.1)
        assert launcher.prepared == []
        launcher.others_bytes = 0
        await asyncio.sleep(3.0)
        await use(pool, LLAMA)
        await asyncio.sleep(0.1)
        assert len(launcher.prepared) == 1


@virtual_time
async def test_a_spare_is_given_up_when_memory_becomes_short() -> None:
    launcher = FakeLauncher(capacity_bytes=GIB)
    launcher.spare_bytes = 40 << 20
    async with running(launcher, adapter=FakeAdapter(order="serve")) as pool:
        await asyncio.sleep(3.0)
        assert pool.spares == (MemoryUse(40 << 20, 40 << 20),)
        [host] = pool.devices()
        assert host.free_bytes == GIB  # a spare counts as free
        launcher.others_bytes = GIB - (20 << 20)
        await asyncio.sleep(3.0)
        assert launcher.prepared == []
        await asyncio.sleep(3.0)
        assert pool.spares == ()


@virtual_time
async def test_a_spare_keeps_nobody_out() -> None:
    """A model that needs the spare's memory too is loaded."""
    launcher = FakeLauncher(capacity_bytes=GIB, memory=lambda age_s: GIB - (20 << 20))
    launcher.spare_bytes = 40 << 20
    spec = sized(QWEN, 1 - 20 / 1024)
    async with running(launcher, adapter=FakeAdapter(order="serve")) as pool:
        await asyncio.sleep(3.0)
        assert len(launcher.prepared) == 1
        await use(pool, spec)
        await asyncio.sleep(10.0)
        assert launcher.prepared == []


# Read-ahead.


class Reading(FakeLauncher):
    """Reads for `read_s`, and writes down when it ends."""

    def __init__(self, *, read_s: float, **options: Any) -> None:
        super().__init__(**options)
        self.read_s = read_s

    async def read_ahead(self, files: Sequence[str], *, limit_bytes: int) -> None:
        await super().read_ahead(files, limit_bytes=limit_bytes)
        try:
            await asyncio.sleep(self.read_s)
        except asyncio.CancelledError:
            self.journal.append("reading broken off")
            raise
        self.journal.append(f"read at {now():.0f}")


@virtual_time
async def test_files_are_read_while_the_engine_before_leaves() -> None:
    launcher = Reading(read_s=3.0, load_s=5.0, stop_s=4.0, capacity_bytes=8 * GIB)
    launcher.memory = lambda age_s: 2 * GIB
    async with running(launcher, max_loaded=1) as pool:
        await use(pool, sized(MISTRAL, 2))
        assert launcher.read == []  # nobody knows its files
        await asyncio.sleep(3.0)
        await use(pool, replace(sized(QWEN, 2), files=FILES))
        assert launcher.read[0] == (FILES, 6 * GIB)  # what is free beside the one that leaves
        assert launcher.journal == [
            *("started mistral#1", "read at 11", "exited mistral#1", "started qwen#1"),
            "read at 15",
        ]


@virtual_time
async def test_files_are_read_while_an_engine_starts_and_while_it_wakes() -> None:
    launcher = FakeLauncher(load_s=5.0, capacity_bytes=8 * GIB)
    spec = replace(SLEEPY, files=FILES)
    async with running(launcher, ttl_s=0, soft_idle_s=60.0) as pool:
        await use(pool, spec)
        assert launcher.read == [(FILES, 8 * GIB)]
        await asyncio.sleep(61.0)
        await use(pool, spec)
        assert launcher.read == [(FILES, 8 * GIB)] * 2


@virtual_time
async def test_files_that_are_being_read_are_not_read_again() -> None:
    launcher = Reading(read_s=100.0, load_s=5.0, stop_s=4.0, capacity_bytes=8 * GIB)
    async with running(launcher, max_loaded=1) as pool:
        await use(pool, MISTRAL)
        await use(pool, replace(QWEN, files=FILES))
        assert len(launcher.read) == 1


@virtual_time
async def test_what_engines_have_mapped_is_not_free_to_read_into() -> None:
    class Mapping(FakeLauncher):
        async def survey(self) -> Survey:
            survey = await super().survey()
            uses = {engine: MemoryUse(3 * GIB, GIB, ()) for engine in survey.engines}
            return replace(survey, engines=uses)

    launcher = Mapping(capacity_bytes=8 * GIB)
    async with running(launcher) as pool:
        await use(pool, MISTRAL)
        await asyncio.sleep(3.0)
        await use(pool, replace(QWEN, files=FILES))
        assert launcher.read == [(FILES, 6 * GIB)]


@pytest.mark.parametrize("capacity_bytes", [None, GIB])
@virtual_time
async def test_where_nothing_is_free_or_known_nothing_is_read(capacity_bytes: int | None) -> None:
    launcher = FakeLauncher(capacity_bytes=capacity_bytes)
    launcher.others_bytes = GIB
    async with running(launcher) as pool:
        await use(pool, replace(QWEN, files=FILES))
        assert launcher.read == []


@virtual_time
async def test_reading_ends_with_the_pool() -> None:
    launcher = Reading(read_s=1000.0, capacity_bytes=8 * GIB)
    async with running(launcher) as pool:
        await use(pool, replace(QWEN, files=FILES))
        began = now()
        await pool.aclose()
        assert now() == began
        assert "reading broken off" in launcher.journal
