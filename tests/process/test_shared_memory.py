"""What a killed engine leaves in /dev/shm, and who removes it."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import pytest

from tests.fakes.processes import ENGINE, all_gone, freeze, tree_below
from tests.waiting import async_wait_for
from xandrouting.core.model import LaunchPlan
from xandrouting.launch import guard, sweep
from xandrouting.launch.local import LocalHandle, LocalLauncher

SHM = os.fsencode(guard.SHARED_MEMORY)
HOLDER = """
import mmap, os, signal, subprocess, sys

def hold(path):
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(descriptor, 4096)
    held = mmap.mmap(descriptor, 4096)
    os.close(descriptor)
    return held

signal.signal(signal.SIGTERM, signal.SIG_IGN)
own, _, below = os.fsencode(chr(0).join(sys.argv[1:])).partition(b"\\0--\\0")
held = [hold(b"/dev/shm/" + name) for name in own.split(b"\\0") if name]
if below:
    command = [sys.executable, "-c", HOLDER, "", *below.split(b"\\0")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
print("holding", flush=True)
signal.pause()
"""
HOLDER = f"HOLDER = {HOLDER!r}\nexec(HOLDER)"
UNTRACKED = """
import multiprocessing, signal
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory

resource_tracker.register = resource_tracker._resource_tracker.register = lambda *_: None
segment = SharedMemory(create=True, size=4096)
semaphore = multiprocessing.get_context("spawn").Semaphore()
print("made", segment.name, semaphore._semlock.name.removeprefix("/"), flush=True)
signal.pause()
"""
GATEWAY = """
import asyncio, os, sys
from pathlib import Path
from tests.fakes.processes import ENGINE
from tests.process.test_shared_memory import holder
from xandrouting.launch.local import LocalLauncher

async def main():
    launcher = LocalLauncher(run_dir=Path(sys.argv[1]))
    name = os.fsencode(sys.argv[2])
    handle = await launcher.start(ENGINE, holder([name], [name]))
    await handle.ready_line()
    print("ready", flush=True)
    await handle.exited()

asyncio.run(main())
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and /dev/shm")


def argv(own: Sequence[bytes], below: Sequence[bytes] = ()) -> tuple[str, ...]:
    """A program deaf to SIGTERM that maps files; a child in another session maps those `below`."""
    names = [*own, *([b"--", *below] if below else [])]
    return (sys.executable, "-c", HOLDER, "", *map(os.fsdecode, names))


def holder(own: Sequence[bytes], below: Sequence[bytes] = ()) -> LaunchPlan:
    return LaunchPlan(argv=argv(own, below), ready_line="holding")


def a_name(suffix: bytes = b"") -> bytes:
    return b"xr-test-" + secrets.token_hex(8).encode() + suffix


def path_of(name: bytes) -> Path:
    return Path(os.fsdecode(SHM + b"/" + name))


@pytest.fixture
def name() -> Iterator[bytes]:
    """A file of this test's own, which is gone after it in any case."""
    name = a_name()
    yield name
    path_of(name).unlink(missing_ok=True)


@pytest.fixture
async def launcher() -> AsyncIterator[LocalLauncher]:
    launcher = LocalLauncher()
    yield launcher
    await launcher.aclose()


async def started(launcher: LocalLauncher, plan: LaunchPlan) -> LocalHandle:
    handle = await launcher.start(ENGINE, plan)
    async with asyncio.timeout(10):
        await handle.ready_line()
    return handle


async def noticed(handle: LocalHandle) -> None:
    """Wait until the guard has looked at the whole tree: it reads nothing else meanwhile."""
    watching = psutil.Process(handle.guard_pid)
    before = watching.io_counters().read_chars
    maps = len(Path(f"/proc/{handle.pid}/maps").read_bytes())
    await async_wait_for(lambda: watching.io_counters().read_chars > before + 2 * maps)


@contextmanager
def outsider(name: bytes) -> Iterator[None]:
    """A process that is no engine's and maps the file too."""
    with subprocess.Popen(argv([name]), stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == b"holding\n"
            yield
        finally:
            process.kill()


async def kill_leader(handle: LocalHandle) -> None:
    assert handle.pid is not None
    os.kill(handle.pid, signal.SIGKILL)
    await handle.exited()


async def kill_guard(handle: LocalHandle) -> None:
    assert handle.guard_pid is not None
    os.kill(handle.guard_pid, signal.SIGKILL)
    await handle.exited()


async def stop(handle: LocalHandle) -> None:
    await handle.stop(grace_s=0.1)


async def stop_at_once(handle: LocalHandle) -> None:
    await handle.stop(grace_s=0.0)


@pytest.mark.parametrize("end", [kill_leader, kill_guard, stop, stop_at_once])
async def test_what_the_tree_mapped_is_gone_when_its_end_is_told(
    launcher: LocalLauncher, end: Callable[[LocalHandle], Awaitable[None]]
) -> None:
    shared, below = a_name(), a_name()
    handle = await started(launcher, holder([shared], [shared, below]))
    assert handle.guard_pid is not None
    tree = tree_below(handle.guard_pid)
    assert len(tree) == 2
    assert path_of(shared).exists()
    assert path_of(below).exists()
    async with asyncio.timeout(5):
        await end(handle)
    assert all_gone(tree)()
    assert not path_of(shared).exists()
    assert not path_of(below).exists()


async def test_what_only_the_killed_process_mapped_is_gone_too(
    launcher: LocalLauncher, name: bytes
) -> None:
    handle = await started(launcher, holder([name]))
    await noticed(handle)
    await kill_leader(handle)
    assert not path_of(name).exists()


async def test_what_an_outsider_maps_stays(launcher: LocalLauncher, name: bytes) -> None:
    handle = await started(launcher, holder([name]))
    with outsider(name):
        await stop_at_once(handle)
        assert path_of(name).exists()


async def test_one_engine_s_end_leaves_the_others_theirs(
    launcher: LocalLauncher, name: bytes
) -> None:
    theirs = a_name()
    other = await started(launcher, holder([theirs]))
    await stop_at_once(await started(launcher, holder([name])))
    assert not path_of(name).exists()
    assert path_of(theirs).exists()
    await stop_at_once(other)
    assert not path_of(theirs).exists()


async def test_what_nobody_of_the_tree_mapped_stays(launcher: LocalLauncher, name: bytes) -> None:
    path_of(name).write_bytes(b"an application's, between two uses")
    await stop_at_once(await started(launcher, holder([a_name()])))
    assert path_of(name).exists()


async def test_a_new_file_of_the_same_name_stays(launcher: LocalLauncher, name: bytes) -> None:
    handle = await started(launcher, holder([name]))
    path_of(name).unlink()
    path_of(name).touch()
    await stop_at_once(handle)
    assert path_of(name).exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
async def test_another_user_s_file_stays(launcher: LocalLauncher, name: bytes) -> None:
    handle = await started(launcher, holder([name]))
    os.chown(path_of(name), 12345, -1)
    await stop_at_once(handle)
    assert path_of(name).exists()


ODD = (b" (deleted)", b"\n", b"\r00:1b x", b"\\012", b"  ", b"\xff\xfe", b"%s\t*?[a-z]", b"x" * 200)


async def test_names_may_hold_anything(launcher: LocalLauncher) -> None:
    names = [a_name(odd) for odd in ODD]
    handle = await started(launcher, holder(names))
    assert all(path_of(name).exists() for name in names)
    await stop_at_once(handle)
    assert not any(path_of(name).exists() for name in names)


async def test_python_s_own_segments_and_semaphores_go(launcher: LocalLauncher) -> None:
    """A semaphore's mapping bears the name it was made under, which is gone.

    SIGTERM ends this program at once: it must have been looked at before.
    """
    plan = LaunchPlan(argv=(sys.executable, "-c", UNTRACKED), ready_line="made")
    handle = await started(launcher, plan)
    _, segment, semaphore = handle.tail()[-1].split()
    paths = [path_of(segment.encode()), path_of(f"sem.{semaphore}".encode())]
    assert all(path.exists() for path in paths)
    await stop(handle)
    assert not any(path.exists() for path in paths)


@pytest.mark.parametrize("shared", [False, True])
def test_a_sweep_removes_what_is_left_and_nobody_else_maps(
    tmp_path: Path, name: bytes, shared: bool
) -> None:
    command = [sys.executable, "-c", GATEWAY, str(tmp_path), os.fsdecode(name)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        tree = tree_below(process.pid)
        freeze(tree[0])  # so that the guard cannot end its tree when the gateway goes
        process.kill()
    tree[0].kill()
    with outsider(name) if shared else nullcontext():
        assert sweep.sweep(tmp_path) == 1
    assert all_gone(tree)()
    assert path_of(name).exists() == shared


def test_beside_an_empty_folder_no_process_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "SHARED_MEMORY", str(tmp_path))
    monkeypatch.setattr(guard, "mapped", lambda _: pytest.fail("it looked"))
    segments = guard.Segments()
    assert not segments.news()
    segments.look([os.getpid()])
    segments.remove()


def test_a_file_is_news_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first look and the second, who made it has come to map it."""
    monkeypatch.setattr(guard, "SHARED_MEMORY", str(tmp_path))
    segments = guard.Segments()
    (tmp_path / "a").touch()
    assert [segments.news() for _ in range(3)] == [True, True, False]
    (tmp_path / "b").touch()
    (tmp_path / "a").unlink()
    assert [segments.news() for _ in range(3)] == [True, True, False]


def test_without_the_folder_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SHARED_MEMORY", "/nonexistent")
    segments = guard.Segments()
    assert not segments.news()
    segments.look([os.getpid()])
    segments.remove()
