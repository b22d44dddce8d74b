"""The cores a launcher chooses for engines that ask for some."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import psutil
import pytest

from tests.fakes.processes import ENGINE, fake_plan, ordered_plan
from xandrouting.core.model import LaunchPlan
from xandrouting.launch.local import LocalHandle, LocalLauncher

BOUND = (("BOUND", "{cores}"),)


@pytest.fixture
async def launcher(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LocalLauncher]:
    """One that believes to have five cores."""
    monkeypatch.setattr("xandrouting.launch.local.usable_cores", lambda: {0, 1, 2, 3, 6})
    launcher = LocalLauncher()
    yield launcher
    await launcher.aclose()


async def bound(launcher: LocalLauncher, plan: LaunchPlan | None = None) -> tuple[LocalHandle, str]:
    """Start an engine; return it and what it was told to be bound to."""
    handle = await launcher.start(ENGINE, plan or replace(fake_plan(), env=BOUND))
    async with asyncio.timeout(10):
        await handle.ready_line()
    return handle, psutil.Process(handle.pid).environ()["BOUND"]


async def test_engines_side_by_side_have_cores_of_their_own(launcher: LocalLauncher) -> None:
    told = [(await bound(launcher))[1] for _ in range(4)]
    assert told == ["0-3,6", "0-2", "0,3,6", "1-3"]


async def test_an_engine_that_ended_gives_its_cores_back(launcher: LocalLauncher) -> None:
    first, _ = await bound(launcher)
    _, second = await bound(launcher)
    await first.stop(grace_s=1)
    third = (await bound(launcher))[1]
    assert (second, third) == ("0-2", "3,6")


async def test_an_engine_that_asks_for_none_takes_none(launcher: LocalLauncher) -> None:
    plan = replace(fake_plan(), env=(("BOUND", "as it likes"),))
    assert (await bound(launcher, plan))[1] == "as it likes"
    assert (await bound(launcher))[1] == "0-3,6"


async def test_a_spare_keeps_what_it_got(launcher: LocalLauncher) -> None:
    plan = ordered_plan(env=BOUND)
    await launcher.prepare(plan)
    assert (await bound(launcher))[1] == "0-2"
    assert (await bound(launcher, plan))[1] == "0-3,6"
