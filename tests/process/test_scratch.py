"""A folder for an engine's temporary files: its own, and gone when it is."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.fakes.processes import ENGINE, fake_plan, ordered_plan
from xandrouting.core.errors import EngineStartFailed
from xandrouting.launch.local import LocalHandle, LocalLauncher

SCRATCH = (("TMPDIR", "{scratch}"),)


@pytest.fixture
async def launcher() -> AsyncIterator[LocalLauncher]:
    launcher = LocalLauncher()
    yield launcher
    await launcher.aclose()


async def started(launcher: LocalLauncher) -> tuple[LocalHandle, Path]:
    """Start an engine that leaves things in its folder."""
    handle = await launcher.start(ENGINE, replace(fake_plan(), env=SCRATCH))
    async with asyncio.timeout(10):
        await handle.ready_line()
    folder = Path(psutil.Process(handle.pid).environ()["TMPDIR"])
    (folder / "below").mkdir()
    (folder / "below" / "file").write_text("left")
    (folder / "link").symlink_to("/")
    return handle, folder


async def test_it_is_private_and_goes_with_the_engine(launcher: LocalLauncher) -> None:
    handle, folder = await started(launcher)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(f"{folder}/") + 36 < 100  # vLLM's sockets are named by a UUID
    await handle.stop(grace_s=1)
    assert not folder.exists()


async def test_it_goes_with_an_engine_that_was_killed(launcher: LocalLauncher) -> None:
    handle, folder = await started(launcher)
    assert handle.pid is not None
    os.kill(handle.pid, signal.SIGKILL)
    await handle.exited()
    assert not folder.exists()


async def test_it_goes_when_the_guard_was_killed_too(launcher: LocalLauncher) -> None:
    handle, folder = await started(launcher)
    assert handle.guard_pid is not None
    os.kill(handle.guard_pid, signal.SIGKILL)
    await handle.exited()
    assert not folder.exists()


async def test_none_is_left_by_a_program_that_does_not_exist(
    launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plan = replace(fake_plan(), argv=("/nowhere/at/all",), env=SCRATCH)
    with pytest.raises(EngineStartFailed):
        await launcher.start(ENGINE, plan)
    assert not list(tmp_path.iterdir())


async def test_one_that_asks_for_none_has_none(
    launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    await launcher.start(ENGINE, fake_plan())
    assert not list(tmp_path.iterdir())


async def test_an_order_may_ask_for_cores(
    launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xandrouting.launch.local.usable_cores", lambda: {0, 1, 2, 3})
    first = await launcher.start(ENGINE, replace(ordered_plan(), order="on {cores}"))
    second = await launcher.start(ENGINE, replace(ordered_plan(), order="on {cores}"))
    assert (first.cores, second.cores) == ((0, 1, 2, 3), (0, 1))


async def test_it_goes_when_no_process_could_be_made(
    launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(EngineStartFailed):
        await launcher.start(ENGINE, replace(fake_plan(), env=SCRATCH))
    assert list(tmp_path.iterdir()) == []
