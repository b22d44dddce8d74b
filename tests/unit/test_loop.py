"""The clock that jumps, and what a test on it must not leave behind."""

from __future__ import annotations

import asyncio
import gc
import inspect
import time

import pytest

from tests.fakes.loop import VirtualTimeLoop, virtual_time


def _now() -> float:
    return asyncio.get_running_loop().time()


@virtual_time
async def test_an_hour_takes_no_time() -> None:
    began = time.monotonic()
    assert _now() == 0.0
    await asyncio.sleep(3600.0)
    assert _now() == pytest.approx(3600.0)
    assert time.monotonic() - began < 1.0


@virtual_time
async def test_timers_fire_in_the_order_of_their_time() -> None:
    journal: list[tuple[str, float]] = []

    async def note(name: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        journal.append((name, _now()))

    async with asyncio.TaskGroup() as group:
        group.create_task(note("late", 72.1))
        group.create_task(note("soon", 0.1))
        group.create_task(note("at once", 0.0))

    assert journal == [("at once", 0.0), ("soon", 0.1), ("late", pytest.approx(72.1))]


@virtual_time
async def test_no_time_passes_while_somebody_can_run() -> None:
    timer = asyncio.create_task(asyncio.sleep(1.0))
    for _ in range(1000):
        await asyncio.sleep(0)
    assert _now() == 0.0
    await timer


@virtual_time
async def test_timeouts_are_on_the_same_clock() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(10.0):
            await asyncio.Event().wait()
    assert _now() == pytest.approx(10.0)


@virtual_time
async def test_far_from_zero_the_clock_still_moves() -> None:
    await asyncio.sleep(1e6)
    for _ in range(10):
        await asyncio.sleep(0.001)
    assert _now() == pytest.approx(1e6 + 0.01)


@pytest.fixture
def seven() -> int:
    return 7


@pytest.mark.parametrize("factor", [2, 3])
@virtual_time
async def test_fixtures_and_parameters_arrive(seven: int, factor: int) -> None:
    assert seven * factor in (14, 21)
    assert isinstance(asyncio.get_running_loop(), VirtualTimeLoop)


def test_pytest_sees_a_plain_function() -> None:
    assert not inspect.iscoroutinefunction(test_an_hour_takes_no_time)
    assert test_an_hour_takes_no_time() is None
    assert test_an_hour_takes_no_time.__name__ == "test_an_hour_takes_no_time"


def test_a_deadlock_fails_at_once() -> None:
    @virtual_time
    async def deadlock() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="every task is blocked and no timer is set"):
        deadlock()


def test_a_task_left_behind_is_an_error() -> None:
    cancelled: list[str] = []

    async def forgotten() -> None:
        try:
            await asyncio.sleep(1.0)
        except asyncio.CancelledError:
            cancelled.append("forgotten")
            raise

    @virtual_time
    async def careless() -> None:
        tasks.append(asyncio.create_task(forgotten(), name="forgotten"))
        await asyncio.sleep(0)

    tasks: list[asyncio.Task[None]] = []
    with pytest.raises(RuntimeError, match="the test left tasks behind: forgotten"):
        careless()
    assert cancelled == ["forgotten"]  # the loop was closed cleanly all the same


def test_the_test_s_own_failure_comes_first() -> None:
    @virtual_time
    async def failing() -> None:
        tasks.append(asyncio.create_task(asyncio.sleep(1.0)))
        raise KeyError("mine")

    tasks: list[asyncio.Task[None]] = []
    with pytest.raises(KeyError, match="mine"):
        failing()
    assert tasks[0].cancelled()


def test_an_exception_in_a_callback_is_an_error() -> None:
    @virtual_time
    async def failing() -> None:
        asyncio.get_running_loop().call_later(1.0, int, "not a number")
        await asyncio.sleep(2.0)

    with pytest.raises(RuntimeError, match="Exception in callback") as caught:
        failing()
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_exception_nobody_retrieved_is_an_error() -> None:
    async def fail() -> None:
        raise KeyError("lost")

    @virtual_time
    async def careless() -> None:
        task = asyncio.create_task(fail())
        await asyncio.sleep(0)
        del task
        gc.collect()

    with pytest.raises(RuntimeError, match="never retrieved") as caught:
        careless()
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_loop_is_closed_at_the_end() -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    @virtual_time
    async def look() -> None:
        loops.append(asyncio.get_running_loop())

    look()
    assert loops[0].is_closed()
