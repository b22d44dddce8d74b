"""The pool around the scheduler: leases, loads and ends, on a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.fakes.launcher import FakeAdapter, FakeHandle, FakeHealth, FakeLauncher, name_of, running
from tests.fakes.loop import virtual_time
from tests.unit.scheduling import LLAMA, QWEN, asking
from xandrouting.core.engine_state import EngineState
from xandrouting.core.errors import (
    EngineStartFailed,
    EngineUnloaded,
    GatewayError,
    InsufficientMemory,
    InvalidModelFile,
    InvalidRequest,
    LoadingTimeout,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from xandrouting.core.model import (
    EngineId,
    EngineSpec,
    FixedCost,
    Footprint,
    LaunchPlan,
    LoadOptions,
    MemoryUse,
    StartFailure,
    Terms,
)
from xandrouting.pool.engine import Engine
from xandrouting.pool.pool import EnginePool


@asynccontextmanager
async def lease(pool: EnginePool, spec: EngineSpec, **asked: Any) -> AsyncIterator[Engine]:
    claim = pool.claim(spec, **asked)
    try:
        yield await claim.granted()
    finally:
        claim.release()


async def hold(pool: EnginePool, spec: EngineSpec, seconds: float, **asked: Any) -> str:
    async with lease(pool, spec, **asked) as engine:
        await asyncio.sleep(seconds)
        return name_of(engine.id)


def now() -> float:
    return asyncio.get_running_loop().time()


def state_of(pool: EnginePool, spec: EngineSpec) -> EngineState | None:
    found = pool.view(spec.key)
    return None if found is None else found[0].state


def active(pool: EnginePool, spec: EngineSpec) -> int:
    found = pool.view(spec.key)
    return 0 if found is None else found[0].active


def engine_of(pool: EnginePool, spec: EngineSpec) -> Engine:
    found = pool.view(spec.key)
    assert found is not None
    return found[1]


# Loading on demand.


@virtual_time
async def test_the_first_request_loads_the_model() -> None:
    launcher = FakeLauncher(load_s=5.0)
    async with running(launcher) as pool:
        claim = pool.claim(QWEN)
        assert (claim.hit, claim.engine, launcher.journal) == (False, None, [])
        engine = await claim.granted()
        assert now() == pytest.approx(5.0)
        assert engine.load_seconds == pytest.approx(5.0)
        assert engine.label == b"llamacpp/cpu#1"
        assert launcher.journal == ["started qwen#1"]
        claim.release()


@virtual_time
async def test_a_running_engine_is_granted_before_claim_returns() -> None:
    async with running(FakeLauncher(load_s=5.0)) as pool:
        await hold(pool, QWEN, 1.0)
        claim = pool.claim(QWEN)
        assert claim.hit
        assert claim.engine is await claim.granted()
        claim.release()


@virtual_time
async def test_fifty_requests_at_once_cause_one_load() -> None:
    launcher = FakeLauncher(load_s=5.0)
    async with running(launcher) as pool:
        names = await asyncio.gather(*(hold(pool, QWEN, 1.0) for _ in range(50)))
        assert names == ["qwen#1"] * 50
        assert now() == pytest.approx(6.0)
        assert launcher.journal == ["started qwen#1"]
        assert pool.loads == 1


@virtual_time
async def test_other_options_reload_the_engine_with_what_both_asked() -> None:
    launcher, adapter = FakeLauncher(load_s=5.0), FakeAdapter()
    async with running(launcher, adapter=adapter) as pool:
        await hold(pool, asking(QWEN, n_ctx=1000, n_parallel=4), 0.0)
        await hold(pool, asking(QWEN, n_ctx=9000), 0.0)
        assert await hold(pool, asking(QWEN, n_ctx=1000), 0.0) == "qwen#2"
    assert [options for _, options, _ in adapter.planned] == [
        LoadOptions(n_ctx=1000, n_parallel=4),
        LoadOptions(n_ctx=9000, n_parallel=4),
    ]


@virtual_time
async def test_an_engine_without_a_ready_line_is_asked_until_it_is_ready() -> None:
    health = FakeHealth(from_s=3.0)
    async with running(FakeLauncher(), adapter=FakeAdapter(ready_line=None), health=health) as pool:
        await hold(pool, QWEN, 0.0)
        assert 3.0 <= now() <= 3.25
        assert len(health.asked_at) > 5


# Idle time.


@virtual_time
async def test_the_ttl_runs_from_the_end_of_the_last_request() -> None:
    launcher = FakeLauncher(load_s=5.0)
    async with running(launcher, ttl_s=60.0) as pool:
        long, longer = hold(pool, QWEN, 40.0), hold(pool, QWEN, 100.0)
        await asyncio.gather(long, longer)
        assert now() == pytest.approx(105.0)
        await asyncio.sleep(59.9)
        assert launcher.journal == ["started qwen#1"]
        await asyncio.sleep(0.2)
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]


@virtual_time
async def test_a_request_in_time_begins_the_ttl_anew() -> None:
    launcher = FakeLauncher()
    async with running(launcher, ttl_s=60.0) as pool:
        for _ in range(3):
            assert await hold(pool, QWEN, 0.0) == "qwen#1"
            await asyncio.sleep(59.0)
        await asyncio.sleep(1.1)
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]


@virtual_time
async def test_ttl_0_is_never() -> None:
    launcher = FakeLauncher()
    async with running(launcher, ttl_s=10.0) as pool:
        await hold(pool, QWEN, 0.0, ttl_s=0)
        await asyncio.sleep(1000.0)
        assert launcher.journal == ["started qwen#1"]


@virtual_time
async def test_the_newest_request_s_ttl_counts() -> None:
    launcher = FakeLauncher()
    async with running(launcher, ttl_s=10.0) as pool:
        await hold(pool, QWEN, 0.0, ttl_s=0)
        await hold(pool, QWEN, 0.0, ttl_s=3)
        await hold(pool, QWEN, 0.0)  # says nothing
        await asyncio.sleep(3.1)
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]


@virtual_time
async def test_request_during_idle_stop_gets_the_next_incarnation() -> None:
    """At t=65 the idle TTL fires and the stop takes 2 s; a request lands in the middle."""
    launcher = FakeLauncher(load_s=5.0, stop_s=2.0)
    async with running(launcher, ttl_s=60.0) as pool:
        async with lease(pool, QWEN) as first:
            assert name_of(first.id) == "qwen#1"
        await asyncio.sleep(61.0)

        async with lease(pool, QWEN) as second:
            assert name_of(second.id) == "qwen#2"

        assert launcher.journal == ["started qwen#1", "exited qwen#1", "started qwen#2"]
        assert now() == pytest.approx(5 + 60 + 2 + 5)


# A client that leaves.


@virtual_time
async def test_a_load_goes_on_when_who_asked_for_it_leaves() -> None:
    launcher = FakeLauncher(load_s=5.0)
    async with running(launcher, ttl_s=60.0) as pool:
        waiting = asyncio.create_task(hold(pool, QWEN, 1.0))
        await asyncio.sleep(2.0)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert pool.queued == 0
        await asyncio.sleep(3.1)
        assert (pool.loads, active(pool, QWEN)) == (1, 0)
        await asyncio.sleep(60.0)
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]


@virtual_time
async def test_who_leaves_takes_nobody_along() -> None:
    async with running(FakeLauncher(load_s=5.0)) as pool:
        leaving = [asyncio.create_task(hold(pool, QWEN, 1.0)) for _ in range(3)]
        staying = asyncio.create_task(hold(pool, QWEN, 1.0))
        await asyncio.sleep(2.0)
        for task in leaving:
            task.cancel()
        assert await staying == "qwen#1"
        assert now() == pytest.approx(6.0)


@virtual_time
async def test_a_wait_may_be_broken_off_and_taken_up_again() -> None:
    async with running(FakeLauncher(load_s=25.0)) as pool:
        claim = pool.claim(QWEN)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(10.0):
                    await claim.granted()
        assert name_of((await claim.granted()).id) == "qwen#1"
        assert now() == pytest.approx(25.0)
        claim.release()


@virtual_time
async def test_a_grant_while_nobody_looks_is_kept() -> None:
    async with running(FakeLauncher(load_s=5.0), ttl_s=1.0) as pool:
        claim = pool.claim(QWEN)
        await asyncio.sleep(100.0)
        assert active(pool, QWEN) == 1
        assert claim.engine is await claim.granted()
        claim.release()


@virtual_time
async def test_a_cancel_that_meets_the_grant_leaks_no_lease() -> None:
    async with running(FakeLauncher(load_s=5.0)) as pool:
        waiting = asyncio.create_task(hold(pool, QWEN, 100.0))
        asyncio.get_running_loop().call_at(5.0, waiting.cancel)
        await asyncio.wait({waiting})
        await asyncio.sleep(1.0)
        assert waiting.cancelled()
        assert (state_of(pool, QWEN), active(pool, QWEN)) == (EngineState.READY, 0)


@virtual_time
async def test_a_second_release_does_nothing() -> None:
    async with running(FakeLauncher()) as pool:
        first, second = pool.claim(QWEN), pool.claim(QWEN)
        await first.granted()
        first.release()
        first.release()
        assert active(pool, QWEN) == 1
        second.release()
        second.release()
        assert active(pool, QWEN) == 0


# Unloading.


@virtual_time
async def test_unload_lets_running_requests_end() -> None:
    launcher = FakeLauncher(load_s=5.0, stop_s=2.0)
    async with running(launcher) as pool:
        running_request = asyncio.create_task(hold(pool, QWEN, 20.0))
        await asyncio.sleep(10.0)
        unloading = asyncio.create_task(pool.unload([engine_of(pool, QWEN).id], force=False))
        await asyncio.sleep(1.0)
        assert state_of(pool, QWEN) is EngineState.DRAINING
        after = asyncio.create_task(hold(pool, QWEN, 0.0))
        await unloading
        assert now() == pytest.approx(25.0 + 2.0)
        assert await running_request == "qwen#1"
        assert await after == "qwen#2"
        assert launcher.journal == ["started qwen#1", "exited qwen#1", "started qwen#2"]


@virtual_time
async def test_unload_by_force_cuts() -> None:
    launcher = FakeLauncher(stop_s=5.0)
    async with running(launcher) as pool:
        claim = pool.claim(QWEN)
        engine = await claim.granted()
        began = now()
        await pool.unload([engine.id], force=True)
        assert now() == began  # no grace either
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]
        assert await hold(pool, QWEN, 0.0) == "qwen#2"
        claim.release()  # late, and of an engine that is gone
        assert active(pool, QWEN) == 0


@virtual_time
async def test_unload_of_nothing_returns() -> None:
    async with running(FakeLauncher()) as pool:
        await hold(pool, QWEN, 0.0)
        await pool.unload([EngineId(QWEN.key, 7), EngineId(LLAMA.key, 1)], force=True)
        assert state_of(pool, QWEN) is EngineState.READY


@virtual_time
async def test_breaking_off_an_unload_does_not_take_it_back() -> None:
    launcher = FakeLauncher(stop_s=4.0)
    async with running(launcher) as pool:
        await hold(pool, QWEN, 0.0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await pool.unload([engine_of(pool, QWEN).id], force=False)
        await asyncio.sleep(3.1)
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]


@virtual_time
async def test_unload_of_a_load_nobody_waits_for_ends_it() -> None:
    launcher = FakeLauncher(load_s=50.0, stop_s=1.0)
    async with running(launcher) as pool:
        pool.claim(QWEN).release()
        await asyncio.sleep(10.0)
        await pool.unload([engine_of(pool, QWEN).id], force=False)
        assert now() == pytest.approx(11.0)
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]
        assert (pool.loads, pool.load_failures) == (0, 0)


@virtual_time
async def test_unload_of_a_load_serves_who_waits_first() -> None:
    launcher = FakeLauncher(load_s=25.0)
    async with running(launcher) as pool:
        waiting = asyncio.create_task(hold(pool, QWEN, 10.0))
        await asyncio.sleep(20.0)
        await pool.unload([engine_of(pool, QWEN).id], force=False)
        assert now() == pytest.approx(35.0)
        assert await waiting == "qwen#1"


@virtual_time
async def test_unload_of_a_load_by_force_tells_who_waits() -> None:
    launcher = FakeLauncher(load_s=50.0, stop_s=5.0)
    async with running(launcher) as pool:
        waiting = asyncio.create_task(hold(pool, QWEN, 10.0))
        await asyncio.sleep(20.0)
        await pool.unload([engine_of(pool, QWEN).id], force=True)
        with pytest.raises(EngineUnloaded):
            await waiting
        assert now() == pytest.approx(20.0)
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]


@pytest.mark.parametrize("force", [False, True])
@virtual_time
async def test_unload_before_there_is_a_process(force: bool) -> None:
    launcher = FakeLauncher(start_s=10.0)
    async with running(launcher) as pool:
        pool.claim(QWEN).release()
        await asyncio.sleep(1.0)
        await pool.unload([engine_of(pool, QWEN).id], force=force)
        assert now() == pytest.approx(1.0)
        assert launcher.journal == ["cancelled qwen#1"]
        assert pool.views() == []


@virtual_time
async def test_unload_in_the_same_moment_as_the_start() -> None:
    launcher = FakeLauncher(load_s=1.0)
    async with running(launcher) as pool:
        pool.claim(QWEN).release()
        await pool.unload([engine_of(pool, QWEN).id], force=True)
        assert pool.views() == []


@pytest.mark.parametrize("hurried_after_s", [0.0, 1.0])
@virtual_time
async def test_force_hurries_a_stop_that_is_under_way(hurried_after_s: float) -> None:
    launcher = FakeLauncher(stop_s=8.0)
    async with running(launcher) as pool:
        await hold(pool, QWEN, 0.0)
        engine = engine_of(pool, QWEN).id
        began = now()
        unloading = asyncio.create_task(pool.unload([engine], force=False))
        await asyncio.sleep(hurried_after_s)
        assert state_of(pool, QWEN) is EngineState.STOPPING
        await pool.unload([engine], force=True)
        await unloading
        assert now() - began == pytest.approx(hurried_after_s)
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]


# Starts that fail.

FACES = {
    StartFailure.OUT_OF_MEMORY: (InsufficientMemory, 5.0),
    StartFailure.BAD_FILE: (InvalidModelFile, None),
    StartFailure.UNKNOWN_ARCHITECTURE: (InvalidModelFile, None),
    StartFailure.BAD_OPTION: (InvalidRequest, None),
    StartFailure.MISSING_LIBRARY: (EngineStartFailed, 5.0),
    StartFailure.PORT_IN_USE: (EngineStartFailed, 5.0),
    StartFailure.KILLED: (EngineStartFailed, 5.0),
    StartFailure.STALLED: (LoadingTimeout, 5.0),
    StartFailure.EXITED: (EngineStartFailed, 5.0),
}


@pytest.mark.parametrize("failure", StartFailure)
@virtual_time
async def test_who_waits_learns_why_the_start_failed(failure: StartFailure) -> None:
    kind, retry_after_s = FACES[failure]
    launcher = FakeLauncher(load_s=2.0, fail=1, says=[f"line {n}" for n in range(30)])
    adapter = FakeAdapter(failure=failure)
    async with running(launcher, adapter=adapter) as pool:
        outcomes = await asyncio.gather(
            *(hold(pool, QWEN, 0.0) for _ in range(3)), return_exceptions=True
        )
        assert now() == pytest.approx(2.0)
        assert [type(outcome) for outcome in outcomes] == [kind] * 3
        assert len(set(map(id, outcomes))) == 3  # each has a traceback of its own
        first = outcomes[0]
        assert isinstance(first, GatewayError)
        assert QWEN.key.model in first.message
        assert "{" not in first.message
        assert first.message.endswith(".")
        assert first.retry_after_s == retry_after_s
        assert first.details == {"reason": failure.value, "exit_code": 1}
        assert first.detail.splitlines() == [f"line {n}" for n in range(10, 30)]
        assert (pool.loads, pool.load_failures) == (0, 1)
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]
    assert adapter.classified == [([f"line {n}" for n in range(30)], 1)]


@virtual_time
async def test_after_a_failure_nobody_tries_again_at_once() -> None:
    launcher = FakeLauncher(load_s=2.0, fail=1)
    async with running(launcher, backoff_first_s=1.0) as pool:
        with pytest.raises(EngineStartFailed):
            await hold(pool, QWEN, 0.0)
        assert isinstance(pool.failure(QWEN.key.model, QWEN.revision), EngineStartFailed)
        await asyncio.sleep(0.25)
        refused = pool.claim(QWEN)
        assert isinstance(refused.error, EngineStartFailed)
        assert refused.error.retry_after_s == pytest.approx(0.75)
        with pytest.raises(EngineStartFailed):
            await refused.granted()
        refused.release()

        launcher.fail = None
        await asyncio.sleep(0.76)
        assert await hold(pool, QWEN, 0.0) == "qwen#2"
        assert pool.failure(QWEN.key.model, QWEN.revision) is None
        assert launcher.journal == ["started qwen#1", "exited qwen#1", "started qwen#2"]


@virtual_time
async def test_a_mended_file_need_not_wait() -> None:
    launcher = FakeLauncher(fail=1)
    async with running(launcher, backoff_first_s=100.0) as pool:
        with pytest.raises(EngineStartFailed):
            await hold(pool, QWEN, 0.0)
        launcher.fail = None
        assert await hold(pool, replace(QWEN, revision="new"), 0.0) == "qwen#2"
        assert now() == pytest.approx(0.0)


@virtual_time
async def test_a_failure_concerns_its_model_only() -> None:
    launcher = FakeLauncher(load_s=1.0, fail=1)
    async with running(launcher, max_loaded=1) as pool:
        failing = asyncio.create_task(hold(pool, QWEN, 0.0))
        other = asyncio.create_task(hold(pool, LLAMA, 0.0))
        await asyncio.sleep(0.5)
        launcher.fail = None
        with pytest.raises(EngineStartFailed):
            await failing
        assert await other == "llama#1"


@virtual_time
async def test_the_launcher_s_own_error_is_handed_on(caplog: pytest.LogCaptureFixture) -> None:
    error = EngineStartFailed("No such program.", detail="/opt/secret/llama-server")
    async with running(FakeLauncher(fail=error)) as pool:
        with pytest.raises(EngineStartFailed, match="No such program") as caught:
            await hold(pool, QWEN, 0.0)
        assert "/opt" not in caught.value.message
        assert pool.load_failures == 1
    assert "/opt/secret/llama-server" in caplog.text


@virtual_time
async def test_a_bug_in_the_launcher_is_logged_and_ends_the_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    launcher = FakeLauncher(fail=KeyError("a bug"))
    async with running(launcher) as pool:
        with pytest.raises(EngineStartFailed, match="failed inside the server") as caught:
            await hold(pool, QWEN, 0.0)
        assert "a bug" not in caught.value.message
        assert (pool.loads, pool.load_failures) == (0, 1)
        assert pool.views() == []
        launcher.fail = None
        await asyncio.sleep(1.1)
        assert await hold(pool, QWEN, 0.0) == "qwen#2"
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info is not None
    assert record.exc_info[0] is KeyError


@virtual_time
async def test_an_address_nobody_can_reach_leaves_no_process() -> None:
    class OddHandle(FakeHandle):
        base_url = "ftp://127.0.0.1"

    class OddLauncher(FakeLauncher):
        async def start(self, engine: EngineId, plan: LaunchPlan) -> FakeHandle:
            handle = OddHandle(name_of(engine), plan, self.journal)
            self.handles.append(handle)
            return handle

    launcher = OddLauncher()
    async with running(launcher) as pool:
        with pytest.raises(EngineStartFailed):
            await hold(pool, QWEN, 0.0)
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]


@virtual_time
async def test_a_load_that_stalls_is_ended() -> None:
    launcher = FakeLauncher(load_s=float("inf"), stop_s=2.0)
    async with running(launcher, load_stall_s=30.0) as pool:
        with pytest.raises(LoadingTimeout, match="nothing moved for 30 s"):
            await hold(pool, QWEN, 0.0)
        assert now() == pytest.approx(32.0, abs=1.01)  # told when its memory is free again
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]
        assert pool.load_failures == 1


@virtual_time
async def test_a_slow_load_that_moves_is_not_ended() -> None:
    launcher = FakeLauncher(load_s=300.0, memory=lambda age_s: int(age_s) << 20)
    async with running(launcher, load_stall_s=30.0) as pool:
        assert await hold(pool, QWEN, 0.0) == "qwen#1"
        assert now() == pytest.approx(300.0)


# Engines that end by themselves.


@virtual_time
async def test_after_a_crash_the_next_request_loads_anew() -> None:
    launcher = FakeLauncher(load_s=5.0)
    async with running(launcher) as pool:
        async with lease(pool, QWEN) as engine:
            launcher.handles[0].die(-11)
            await asyncio.sleep(1.0)
            assert pool.views() == []
            assert engine.gone.is_set()
            assert await hold(pool, QWEN, 0.0) == "qwen#2"
        assert (pool.loads, pool.load_failures) == (2, 0)  # a crash is no failed load
        assert active(pool, QWEN) == 0
        assert launcher.journal == ["started qwen#1", "exited qwen#1", "started qwen#2"]


@virtual_time
async def test_a_crash_while_idle_frees_its_place() -> None:
    launcher = FakeLauncher()
    async with running(launcher, max_loaded=1) as pool:
        await hold(pool, QWEN, 0.0)
        launcher.handles[0].die(9)
        await asyncio.sleep(1.0)
        assert await hold(pool, LLAMA, 0.0) == "llama#1"
        assert pool.evictions == 0


@virtual_time
async def test_a_crash_while_it_drains_ends_the_unload() -> None:
    launcher = FakeLauncher()
    async with running(launcher) as pool, lease(pool, QWEN) as engine:
        unloading = asyncio.create_task(pool.unload([engine.id], force=False))
        await asyncio.sleep(1.0)
        launcher.handles[0].die(9)
        await unloading


@virtual_time
async def test_a_survey_that_fails_is_logged_and_made_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(age_s: float) -> int:
        if age_s < 5.0:
            raise ZeroDivisionError
        return 7 << 20

    launcher = FakeLauncher()
    async with running(launcher) as pool, lease(pool, QWEN) as engine:
        launcher.handles[0].take(broken)
        await asyncio.sleep(4.0)
        assert engine.memory.host_bytes is None
        await asyncio.sleep(4.0)
        assert engine.memory.host_bytes == 7 << 20
    assert "ZeroDivisionError" in caplog.text


# When there is not room for all.


@virtual_time
async def test_an_idle_engine_leaves_for_another() -> None:
    launcher = FakeLauncher(load_s=5.0, stop_s=2.0)
    async with running(launcher, max_loaded=1) as pool:
        await hold(pool, QWEN, 0.0)
        assert await hold(pool, LLAMA, 0.0) == "llama#1"
        assert now() == pytest.approx(5 + 2 + 5)
        assert launcher.journal == ["started qwen#1", "exited qwen#1", "started llama#1"]
        assert (pool.loads, pool.evictions) == (2, 1)


@virtual_time
async def test_the_first_in_the_queue_waits_a_fair_time_for_busy_engines() -> None:
    launcher = FakeLauncher()
    async with running(launcher, max_loaded=1, fair_wait_s=5.0) as pool:
        first = asyncio.create_task(hold(pool, QWEN, 20.0))
        await asyncio.sleep(1.0)
        other = asyncio.create_task(hold(pool, LLAMA, 1.0))
        await asyncio.sleep(4.0)
        assert await hold(pool, QWEN, 0.0) == "qwen#1"  # the fair time is not over
        await asyncio.sleep(1.1)
        assert state_of(pool, QWEN) is EngineState.DRAINING
        again = asyncio.create_task(hold(pool, QWEN, 0.0))
        assert await other == "llama#1"
        assert now() == pytest.approx(21.0)
        assert (await first, await again) == ("qwen#1", "qwen#2")
        assert pool.evictions == 2


@virtual_time
async def test_who_waits_too_long_is_told_what_for() -> None:
    async with running(FakeLauncher(load_s=10.0), max_loaded=1) as pool:
        loading = asyncio.create_task(hold(pool, QWEN, 100.0, wait_s=3.0))
        with pytest.raises(LoadingTimeout, match="the load goes on"):
            await loading
        assert now() == pytest.approx(3.0)
        await asyncio.sleep(8.0)
        assert pool.loads == 1

        busy = asyncio.create_task(hold(pool, QWEN, 100.0))
        await asyncio.sleep(0)
        with pytest.raises(QueueTimeout, match="No place"):
            await hold(pool, LLAMA, 0.0, wait_s=3.0)
        assert now() == pytest.approx(14.0)
        assert await busy == "qwen#1"


@virtual_time
async def test_a_full_queue_refuses() -> None:
    async with running(FakeLauncher(load_s=5.0), max_queue=1) as pool:
        waiting = asyncio.create_task(hold(pool, QWEN, 0.0))
        await asyncio.sleep(1.0)
        assert pool.queued == 1
        with pytest.raises(QueueFull):
            await hold(pool, QWEN, 0.0)
        assert await waiting == "qwen#1"


# What the outside sees.


@virtual_time
async def test_until_gone_waits_for_the_engine_of_now() -> None:
    launcher = FakeLauncher(stop_s=4.0)
    async with running(launcher) as pool:
        await pool.until_gone(QWEN.key, timeout_s=9.0)  # there is none
        assert now() == 0.0
        await hold(pool, QWEN, 0.0)
        unloading = asyncio.create_task(pool.unload([engine_of(pool, QWEN).id], force=False))
        next_one = asyncio.create_task(hold(pool, QWEN, 0.0))
        await asyncio.sleep(1.0)
        await pool.until_gone(QWEN.key, timeout_s=9.0)
        assert now() == pytest.approx(4.0)
        await unloading
        assert await next_one == "qwen#2"
        await pool.until_gone(QWEN.key, timeout_s=9.0)  # it lives
        assert now() == pytest.approx(13.0)


@virtual_time
async def test_an_engine_is_held_from_its_start_to_its_end() -> None:
    async with running(FakeLauncher(load_s=5.0, stop_s=2.0)) as pool:
        assert not pool.holds(QWEN.key)
        pool.claim(QWEN).release()
        assert pool.holds(QWEN.key)
        await asyncio.sleep(6.0)
        unloading = asyncio.create_task(pool.unload([engine_of(pool, QWEN).id], force=False))
        await asyncio.sleep(1.0)
        assert pool.holds(QWEN.key)
        await unloading
        assert not pool.holds(QWEN.key)


@virtual_time
async def test_progress_says_what_a_claim_waits_for() -> None:
    sized = replace(QWEN, cost=FixedCost(Footprint(host=Terms(weights=100 << 20))))
    launcher = FakeLauncher(load_s=20.0, memory=lambda age_s: int(age_s * 10) << 20)
    async with running(launcher, max_loaded=1) as pool:
        claims = [pool.claim(spec) for spec in (sized, LLAMA, LLAMA)]
        texts = lambda: [pool.progress(claim) for claim in claims]  # noqa: E731
        assert texts() == ["loading", "queued behind 1", "queued behind 2"]
        await asyncio.sleep(4.5)
        assert texts() == ["loading 40%", "queued behind 1", "queued behind 2"]
        await asyncio.sleep(10.0)
        assert texts()[0] == "loading 99%"  # the process needs more than the file has
        await claims[0].granted()
        assert texts()[1:] == ["queued behind 0", "queued behind 1"]
        for claim in claims:
            claim.release()


@virtual_time
async def test_progress_without_a_size_gives_no_figure() -> None:
    launcher = FakeLauncher(load_s=20.0, memory=lambda age_s: 5 << 20)
    async with running(launcher) as pool:
        claim = pool.claim(QWEN)
        await asyncio.sleep(10.0)
        assert pool.progress(claim) == "loading"
        claim.release()


@virtual_time
async def test_a_running_engine_s_memory_is_measured() -> None:
    launcher = FakeLauncher(load_s=5.0, memory=lambda age_s: int(age_s) << 20)
    async with running(launcher) as pool, lease(pool, QWEN) as engine:
        await asyncio.sleep(0.5)
        assert engine.memory == MemoryUse(5 << 20, 5 << 20, ())
        await asyncio.sleep(4.0)
        assert engine.memory == MemoryUse(9 << 20, 9 << 20, ())
        assert launcher.surveys < 15


@virtual_time
async def test_views_join_what_is_decided_and_what_is_measured() -> None:
    async with running(FakeLauncher(load_s=5.0)) as pool:
        assert (pool.views(), pool.view(QWEN.key)) == ([], None)
        claim = pool.claim(QWEN)
        [(view, engine)] = pool.views()
        assert (view.engine, view.state, view.waiting) == (engine.id, EngineState.STARTING, 1)
        assert (engine.load_seconds, engine.loaded_at, engine.used_at) == (None, None, None)
        await claim.granted()
        found = pool.view(QWEN.key)
        assert found is not None
        assert (found[0].state, found[0].active) == (EngineState.READY, 1)
        assert found[1] is engine
        assert engine.start.options == LoadOptions(n_ctx=2048)
        assert engine.loaded_at is not None
        claim.release()
        assert engine.used_at is not None
        assert engine.used_at >= engine.loaded_at


@virtual_time
async def test_an_engine_goes_by_the_name_its_last_client_used() -> None:
    async with running(FakeLauncher()) as pool:
        async with lease(pool, QWEN) as engine:
            assert engine.spelling == QWEN.key.model
        async with lease(pool, QWEN, spelling="qwen") as engine:
            assert engine.spelling == "qwen"
        async with lease(pool, QWEN, spelling="models/qwen.gguf") as engine:
            assert engine.spelling == "models/qwen.gguf"


# The end.


@virtual_time
async def test_drain_lets_running_requests_end() -> None:
    launcher = FakeLauncher(stop_s=2.0)
    async with running(launcher) as pool:
        request = asyncio.create_task(hold(pool, QWEN, 10.0))
        await asyncio.sleep(1.0)
        await pool.drain(30.0)
        assert now() == pytest.approx(12.0)
        assert await request == "qwen#1"
        assert launcher.journal == ["started qwen#1", "exited qwen#1"]


@pytest.mark.parametrize("grace_s", [0.0, 5.0])
@virtual_time
async def test_drain_cuts_what_outlives_the_grace(grace_s: float) -> None:
    launcher = FakeLauncher(stop_s=2.0)
    async with running(launcher) as pool:
        claim = pool.claim(QWEN)
        await claim.granted()
        await hold(pool, LLAMA, 0.0)  # idle: ends within the grace if there is one
        await pool.drain(grace_s)
        assert now() == pytest.approx(grace_s)
        assert pool.views() == []
        assert set(launcher.journal[2:]) == {"exited qwen#1", "exited llama#1"}
        claim.release()


@virtual_time
async def test_drain_hurries_a_stop_that_outlives_the_grace() -> None:
    launcher = FakeLauncher(stop_s=8.0)
    async with running(launcher) as pool:
        await hold(pool, QWEN, 0.0)
        await pool.drain(3.0)
        assert now() == pytest.approx(3.0)


@virtual_time
async def test_drain_refuses_who_waits_and_who_comes() -> None:
    async with running(FakeLauncher(load_s=5.0, stop_s=1.0)) as pool:
        waiting = asyncio.create_task(hold(pool, QWEN, 0.0))
        await asyncio.sleep(1.0)
        draining = asyncio.create_task(pool.drain(30.0))
        await asyncio.sleep(0.5)
        with pytest.raises(ShuttingDown):
            await waiting
        with pytest.raises(ShuttingDown):
            await hold(pool, LLAMA, 0.0)
        await draining
        assert now() == pytest.approx(2.0)


@virtual_time
async def test_drain_of_an_empty_pool_returns() -> None:
    async with running(FakeLauncher()) as pool:
        await pool.drain(30.0)
        assert now() == 0.0


@pytest.mark.parametrize("after_s", [0.0, 0.5, 3.0, 8.0, 70.0])
@virtual_time
async def test_aclose_leaves_nothing_whatever_was_under_way(after_s: float) -> None:
    """In turn: a start, a start, a load, a running request, an idle stop. `running` looks."""
    launcher = FakeLauncher(start_s=1.0, load_s=5.0, stop_s=4.0)
    async with running(launcher, max_loaded=1, ttl_s=60.0) as pool:
        served, queued = pool.claim(QWEN), pool.claim(LLAMA)
        asyncio.get_running_loop().call_later(7.0, served.release)
        asyncio.get_running_loop().call_later(7.0, queued.release)
        await asyncio.sleep(after_s)
        began = now()
        await pool.aclose()
        assert now() == pytest.approx(began)
        served.release()
        queued.release()
        refused = pool.claim(QWEN)
        assert isinstance(refused.error, ShuttingDown)
        refused.release()
        await asyncio.sleep(10.0)


@virtual_time
async def test_aclose_twice_is_once() -> None:
    launcher = FakeLauncher()
    async with running(launcher) as pool:
        await hold(pool, QWEN, 0.0)
        await pool.aclose()
        await pool.aclose()
    assert launcher.journal == ["started qwen#1", "exited qwen#1"]
