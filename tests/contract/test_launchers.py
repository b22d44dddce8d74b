"""What every launcher promises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.processes import ENGINE, fake_plan, ordered_plan
from xandrouting.core.model import LaunchPlan, MemoryUse
from xandrouting.launch.base import Handle, Launcher, Survey
from xandrouting.launch.external import ExternalLauncher
from xandrouting.launch.local import LocalLauncher

LOCAL = fake_plan("--with-child", stop_grace_s=0.2)
EXTERNAL = LaunchPlan(base_url="http://127.0.0.1:9/", api_key="k3y")


@pytest.fixture(params=["local", "external"])
async def setup(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Launcher, LaunchPlan]]:
    local = request.param == "local"
    launcher: Launcher = LocalLauncher() if local else ExternalLauncher()
    yield launcher, LOCAL if local else EXTERNAL
    await launcher.aclose()


@pytest.fixture
async def handle(setup: tuple[Launcher, LaunchPlan]) -> Handle:
    launcher, plan = setup
    handle = await launcher.start(ENGINE, plan)
    async with asyncio.timeout(10):
        await handle.ready_line()
    return handle


async def test_a_started_engine_runs(handle: Handle) -> None:
    assert handle.exit_status is None
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await handle.exited()
    assert handle.exit_status is None


async def test_the_base_url_has_no_slash_at_its_end(handle: Handle) -> None:
    assert handle.base_url.startswith("http://127.0.0.1:")
    assert not handle.base_url.endswith("/")


async def test_a_stop_lets_everybody_know(handle: Handle) -> None:
    waiting = [asyncio.create_task(handle.exited()) for _ in range(2)]
    await handle.stop(grace_s=0.2)
    statuses = await asyncio.gather(*waiting)
    assert statuses == [handle.exit_status] * 2
    assert handle.exit_status is not None
    assert await handle.exited() == handle.exit_status


async def test_stopping_twice_is_stopping_once(handle: Handle) -> None:
    await asyncio.gather(handle.stop(grace_s=0.2), handle.stop(grace_s=0.1))
    status = handle.exit_status
    await handle.stop(grace_s=0.2)
    assert status is not None
    assert handle.exit_status == status


async def test_cancelling_the_wait_does_not_cancel_the_stop(handle: Handle) -> None:
    stopping = asyncio.create_task(handle.stop(grace_s=0.2))
    await asyncio.sleep(0)  # it has begun
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    async with asyncio.timeout(3):
        await handle.exited()


async def test_cancelling_a_wait_for_the_exit_leaves_the_others(handle: Handle) -> None:
    gone, waiting = (asyncio.create_task(handle.exited()) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    await handle.stop(grace_s=0.2)
    assert await waiting == handle.exit_status
    assert gone.cancelled()


async def test_measuring_never_fails(handle: Handle) -> None:
    assert isinstance(await handle.measure(), MemoryUse)
    await handle.stop(grace_s=0.2)
    assert await handle.measure() == MemoryUse(None, None)


async def test_a_survey_tells_of_living_engines_only(setup: tuple[Launcher, LaunchPlan]) -> None:
    launcher, plan = setup
    handle = await launcher.start(ENGINE, plan)
    survey = await launcher.survey()
    assert isinstance(survey, Survey)
    assert set(survey.engines) <= {ENGINE}
    assert [device.device for device in survey.devices] in ([], ["host"])
    await handle.stop(grace_s=0.2)
    assert (await launcher.survey()).engines == {}


async def test_an_engine_that_was_told_to_stop_was_not_killed_for_memory(handle: Handle) -> None:
    assert not handle.killed_for_memory
    await handle.stop(grace_s=0.0)
    assert not handle.killed_for_memory


async def test_output_is_told_and_bounded(handle: Handle) -> None:
    assert all(isinstance(line, str) for line in handle.tail())
    assert len(handle.tail()) <= 200
    assert handle.activity() >= 0


async def test_a_plan_without_a_ready_line_is_not_waited_for(
    setup: tuple[Launcher, LaunchPlan],
) -> None:
    launcher, plan = setup
    without = LaunchPlan(argv=plan.argv, base_url=plan.base_url, stop_grace_s=0.2)
    handle = await launcher.start(ENGINE, without)
    async with asyncio.timeout(1):
        await handle.ready_line()


async def test_closing_ends_every_engine(setup: tuple[Launcher, LaunchPlan]) -> None:
    launcher, plan = setup
    handles = [await launcher.start(ENGINE, plan) for _ in range(2)]
    await launcher.aclose()
    assert all(handle.exit_status is not None for handle in handles)
    await launcher.aclose()


async def test_what_an_engine_asks_of_its_clients_is_told(handle: Handle) -> None:
    assert handle.api_key
    assert isinstance(handle.api_key, str)


async def test_preparing_is_no_engine(setup: tuple[Launcher, LaunchPlan]) -> None:
    launcher, _ = setup
    for _ in range(2):
        await launcher.prepare(ordered_plan())
    assert (await launcher.survey()).engines == {}
    await launcher.give_up_spares()
    await launcher.give_up_spares()
    survey = await launcher.survey()
    assert (survey.spares, survey.spare_bytes) == ((), 0)


async def test_an_engine_starts_whether_or_not_something_was_prepared(
    setup: tuple[Launcher, LaunchPlan],
) -> None:
    launcher, plan = setup
    await launcher.prepare(ordered_plan())
    handle = await launcher.start(ENGINE, plan)
    async with asyncio.timeout(10):
        await handle.ready_line()
    assert handle.exit_status is None


async def test_closing_ends_what_was_prepared(setup: tuple[Launcher, LaunchPlan]) -> None:
    launcher, _ = setup
    await launcher.prepare(ordered_plan())
    await launcher.aclose()
    assert (await launcher.survey()).spares == ()


async def test_reading_ahead_never_fails(
    setup: tuple[Launcher, LaunchPlan], tmp_path: Path
) -> None:
    launcher, _ = setup
    there = tmp_path / "model"
    there.write_bytes(b"weights")
    await launcher.read_ahead((str(tmp_path / "none"), str(there)), limit_bytes=3)
    await launcher.read_ahead((), limit_bytes=3)


async def test_a_local_engine_rests_and_wakes() -> None:
    launcher: Launcher = LocalLauncher()
    handle = await launcher.start(ENGINE, ordered_plan())
    async with asyncio.timeout(10):
        await handle.ready_line()
        await handle.rest()
        handle.wake(ordered_plan())
        await handle.ready_line()
    assert handle.exit_status is None
    await launcher.aclose()


async def test_an_external_engine_is_not_ours_to_put_to_sleep() -> None:
    handle: Handle = await ExternalLauncher().start(ENGINE, EXTERNAL)
    with pytest.raises(RuntimeError, match="takes no orders"):
        await handle.rest()
    with pytest.raises(RuntimeError, match="takes no orders"):
        handle.wake(EXTERNAL)


async def test_an_external_engine_needs_an_address() -> None:
    with pytest.raises(ValueError, match="base_url"):
        await ExternalLauncher().start(ENGINE, LOCAL)
