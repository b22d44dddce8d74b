"""Real engines on this machine, on both event loops where the loop may matter."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import uvloop

from tests.fakes.nvml import GIB, FakeCard, FakeNvml
from tests.fakes.processes import (
    ENGINE,
    READY_LINE,
    WAITING_LINE,
    all_gone,
    fake_plan,
    freeze,
    ordered_plan,
    tree_below,
)
from tests.waiting import async_wait_for, wait_for
from xandrouting.core.errors import EngineStartFailed
from xandrouting.core.model import EngineId, LaunchPlan, MemoryUse
from xandrouting.launch import guard, host_memory, sweep
from xandrouting.launch.base import Handle
from xandrouting.launch.local import LocalHandle, LocalLauncher
from xandrouting.launch.nvml import open_gpus
from xandrouting.launch.ports import reserve_port

T = TypeVar("T")

MIB = 1 << 20
STUBBORN = ("--ignore-sigterm", "--with-child")


@pytest.fixture
async def launcher() -> AsyncIterator[LocalLauncher]:
    launcher = LocalLauncher()
    yield launcher
    await launcher.aclose()


def shell(script: str) -> LaunchPlan:
    return LaunchPlan(argv=("sh", "-c", script))


async def ready(launcher: LocalLauncher, *options: str) -> tuple[Handle, list[psutil.Process]]:
    """Start a fake engine, wait until it is ready; return it and its guard's whole tree."""
    handle = await launcher.start(ENGINE, fake_plan(*options))
    async with asyncio.timeout(10):
        await handle.ready_line()
    assert handle.pid is not None
    guard = psutil.Process(handle.pid).parent()
    assert guard
    return handle, [guard, *tree_below(guard.pid)]


def our_children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


async def test_the_engine_answers_at_its_base_url(launcher: LocalLauncher) -> None:
    handle, _ = await ready(launcher)

    def health() -> int:
        with urllib.request.urlopen(f"{handle.base_url}/health") as response:
            return int(response.status)

    assert await asyncio.to_thread(health) == 200


async def test_port_and_environment_reach_the_engine(launcher: LocalLauncher) -> None:
    plan = replace(
        shell('echo "$0 $WHERE {not a format}"; env | grep -c ^PATH='),
        env=(("WHERE", "on {port}"),),
    )
    plan = replace(plan, argv=(*plan.argv, "at {port}"))
    handle = await launcher.start(ENGINE, plan)
    assert await handle.exited() == 0
    port = handle.base_url.removeprefix("http://127.0.0.1:")
    assert list(handle.tail()) == [f"at {port} on {port} {{not a format}}", "1"]


async def test_an_engine_that_exits_at_once_leaves_its_words(launcher: LocalLauncher) -> None:
    plan = fake_plan("--exit", "4", "--say", "error: bad magic")
    handle = await launcher.start(ENGINE, plan)
    assert await handle.exited() == 4
    assert handle.exit_status == 4
    assert list(handle.tail()) == ["error: bad magic"]


async def test_no_such_program_is_told_without_its_path(launcher: LocalLauncher) -> None:
    before = our_children()
    with pytest.raises(EngineStartFailed) as caught:
        await launcher.start(ENGINE, LaunchPlan(argv=("/opt/secret/llama-server", "--key", "k")))
    assert "No such file or directory" in caught.value.message
    assert "secret" not in caught.value.message
    assert "/opt/secret/llama-server" in caught.value.detail
    assert our_children() == before


async def test_stop_ends_a_deaf_tree(launcher: LocalLauncher) -> None:
    handle, tree = await ready(launcher, *STUBBORN)
    assert len(tree) == 3
    async with asyncio.timeout(2):
        await handle.stop(grace_s=0.2)
    assert all_gone(tree)()
    assert handle.exit_status == -signal.SIGKILL


async def test_a_shorter_grace_hurries_a_stop(launcher: LocalLauncher) -> None:
    handle, tree = await ready(launcher, *STUBBORN)
    patient = asyncio.create_task(handle.stop(grace_s=60))
    await asyncio.sleep(0)  # it has begun
    async with asyncio.timeout(2):
        await handle.stop(grace_s=0)
        await patient
    assert all_gone(tree)()


async def test_two_stops_begun_in_one_go_are_both_heard(launcher: LocalLauncher) -> None:
    handle, _ = await ready(launcher)
    await asyncio.gather(handle.stop(grace_s=9), handle.stop(grace_s=9))
    await handle.stop(grace_s=9)
    assert handle.exit_status == 0


async def test_cancelling_a_start_leaves_nothing(launcher: LocalLauncher) -> None:
    before = our_children()
    starting = asyncio.create_task(launcher.start(ENGINE, fake_plan(*STUBBORN)))
    await asyncio.sleep(0)  # it has begun, and has not heard anything yet
    assert our_children() != before
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert our_children() == before


async def test_a_start_cancelled_before_it_began_starts_nothing(launcher: LocalLauncher) -> None:
    before = our_children()
    starting = asyncio.create_task(launcher.start(ENGINE, fake_plan()))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert our_children() == before


async def test_a_killed_guard_leaves_nothing(launcher: LocalLauncher) -> None:
    """The kernel ends the engine; the launcher finds its child in another session."""
    handle, tree = await ready(launcher, *STUBBORN)
    tree[0].kill()
    async with asyncio.timeout(2):
        assert await handle.exited() == -signal.SIGKILL
    assert all_gone(tree)()


async def test_a_guard_killed_before_its_first_word_fails_the_start(
    launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "guard.py"
    killed.write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr("xandrouting.launch.guard.__file__", str(killed))
    before = our_children()
    with pytest.raises(EngineStartFailed, match="its guard ended early"):
        await launcher.start(ENGINE, fake_plan())
    assert our_children() == before


async def test_a_pipe_kept_open_elsewhere_delays_the_exit_only_a_little(
    launcher: LocalLauncher,
) -> None:
    """A process outside the tree may have been handed the log: its end is not waited for."""
    handle = await launcher.start(ENGINE, shell("echo $$; exec sleep 60"))
    await async_wait_for(handle.tail)
    opener = ["sh", "-c", f"exec 3>/proc/{handle.pid}/fd/2; echo; exec sleep 60"]
    with subprocess.Popen(opener, stdout=subprocess.PIPE) as outsider:
        assert outsider.stdout
        await asyncio.to_thread(outsider.stdout.readline)
        async with asyncio.timeout(3):
            await handle.stop(grace_s=1)
        outsider.kill()


async def test_a_megabyte_without_a_newline_neither_blocks_nor_stays(
    launcher: LocalLauncher,
) -> None:
    handle, _ = await ready(launcher, "--big-stderr")
    tail = handle.tail()
    assert handle.activity() == 1024 * 1024 + 1 + len(READY_LINE) + 1
    assert len(tail) == 200
    assert list(tail[-3:]) == ["x" * 63, "y" * 2000, READY_LINE]


async def test_lines_are_shown_as_a_terminal_would(launcher: LocalLauncher) -> None:
    script = r"printf 'crlf\r\n10%%\r20%%\r30%%\n\377\n\nno newline'"
    handle = await launcher.start(ENGINE, shell(script))
    await handle.exited()
    assert list(handle.tail()) == ["crlf", "30%", "�", "", "no newline"]


async def test_the_ready_line_is_the_beginning_of_a_line(launcher: LocalLauncher) -> None:
    script = "echo not listening; read go < $0; echo listening on 1; exec sleep 60"
    plan = replace(shell(script), ready_line="listening")
    go = Path(f"/proc/{os.getpid()}/fd")
    readable, writable = os.pipe()
    handle = await launcher.start(ENGINE, replace(plan, argv=(*plan.argv, f"{go}/{readable}")))
    waiting = asyncio.create_task(handle.ready_line())
    await async_wait_for(handle.tail)
    assert not waiting.done()
    os.write(writable, b"go\n")
    async with asyncio.timeout(5):
        await waiting
    os.close(readable)
    os.close(writable)


async def test_each_line_is_told_with_the_engine_that_printed_it() -> None:
    heard: list[tuple[EngineId, str]] = []
    launcher = LocalLauncher(hear=lambda engine, line: heard.append((engine, line)))
    other = replace(ENGINE, incarnation=2)
    plans = {ENGINE: shell("echo hello; echo there"), other: shell("printf again >&2")}
    for engine, plan in plans.items():
        await (await launcher.start(engine, plan)).exited()
    assert heard == [(ENGINE, "hello"), (ENGINE, "there"), (other, "again")]


async def test_each_engine_gets_a_key_of_its_own(launcher: LocalLauncher) -> None:
    plan = replace(fake_plan("--api-key-env", "KEY"), env=(("KEY", "{key}"),))
    handles = [await launcher.start(ENGINE, plan) for _ in range(2)]
    assert len({handle.api_key for handle in handles}) == 2
    for handle in handles:
        assert len(handle.api_key) >= 32
        process = psutil.Process(handle.pid)
        assert process.environ()["KEY"] == handle.api_key
        assert handle.api_key not in " ".join(process.cmdline())


async def test_measure_is_the_share_of_the_tree_without_the_guard(
    launcher: LocalLauncher,
) -> None:
    handle, (_, *tree) = await ready(launcher, "--with-child")
    use = await handle.measure()
    assert use.devices == ()
    assert use.host_bytes == pytest.approx(
        sum(process.memory_full_info().pss for process in tree), rel=0.1
    )


async def test_measure_after_the_end_tells_nothing(launcher: LocalLauncher) -> None:
    handle = await launcher.start(ENGINE, shell("exit 0"))
    await handle.exited()
    assert (await handle.measure()).host_bytes is None


async def test_a_survey_shows_what_an_engine_and_its_children_take() -> None:
    launcher = LocalLauncher()
    handle, _ = await ready(launcher, "--allocate-mib", "40")  # and a child as much again
    survey = await launcher.survey()
    use = survey.engines[ENGINE]
    assert use.host_bytes is not None
    assert use.private_bytes is not None
    assert 80 * MIB < use.private_bytes < use.host_bytes < 140 * MIB
    assert use.devices == ()
    (host,) = survey.devices
    assert (host.device, host.stale) == ("host", False)
    assert 0 < host.available_bytes < host.capacity_bytes
    await handle.stop(grace_s=1)
    assert (await launcher.survey()).engines == {}
    await launcher.aclose()


async def test_a_mapped_file_is_not_private(launcher: LocalLauncher, tmp_path: Path) -> None:
    """Its pages are the kernel's to drop: the engine's end gives nothing back."""
    file = tmp_path / "model"
    file.write_bytes(b"x" * 40 * MIB)
    script = (
        "import mmap, sys, time; file = open(sys.argv[1], 'rb'); "
        "m = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); "
        "sum(m[::4096]); print('mapped', flush=True); time.sleep(60)"
    )
    plan = LaunchPlan(argv=(sys.executable, "-c", script, str(file)), ready_line="mapped")
    handle = await launcher.start(ENGINE, plan)
    async with asyncio.timeout(10):
        await handle.ready_line()
    use = await handle.measure()
    assert use.host_bytes is not None
    assert use.private_bytes is not None
    assert use.host_bytes > 40 * MIB > 2 * use.private_bytes


async def test_each_engine_has_its_own_share(launcher: LocalLauncher) -> None:
    large, small = (replace(ENGINE, incarnation=number) for number in (1, 2))
    plans = {large: fake_plan("--allocate-mib", "40"), small: fake_plan()}
    handles = [await launcher.start(engine, plan) for engine, plan in plans.items()]
    async with asyncio.timeout(10):
        await asyncio.gather(*(handle.ready_line() for handle in handles))
    engines = (await launcher.survey()).engines
    assert engines.keys() == {large, small}
    assert (engines[large].private_bytes or 0) > 80 * MIB
    assert 0 < (engines[small].private_bytes or 0) < 40 * MIB


async def test_a_cards_processes_are_found_in_the_trees() -> None:
    card = FakeCard()
    launcher = LocalLauncher(gpus=open_gpus(FakeNvml(card)))
    handle, (_, *tree) = await ready(launcher, "--with-child")
    on_card = replace(ENGINE, key=replace(ENGINE.key, device="cuda:0"))
    starting = await launcher.start(on_card, fake_plan())
    card.computing = [(process.pid, 3 * GIB) for process in tree] + [(os.getpid(), GIB)]
    survey = await launcher.survey()
    assert [device.device for device in survey.devices] == ["host", "cuda:0"]
    assert survey.engines[ENGINE].devices == (("cuda:0", 6 * GIB),)
    assert survey.engines[on_card].devices is None  # NVML does not tell
    assert (await handle.measure()).device_bytes == 6 * GIB
    assert (await starting.measure()).device_bytes is None
    await launcher.aclose()


async def test_the_cards_have_nvmls_numbers(launcher: LocalLauncher) -> None:
    handle = await launcher.start(ENGINE, shell("echo $CUDA_DEVICE_ORDER"))
    await handle.exited()
    assert list(handle.tail()) == ["PCI_BUS_ID"]


async def test_a_survey_that_fails_tells_the_last_figures(
    launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handle, _ = await ready(launcher)
    before = await launcher.survey()

    def too_many_files() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(host_memory, "read", too_many_files)
        stale = [await launcher.survey() for _ in range(3)][-1]
        assert await handle.measure() == MemoryUse()
    assert stale.devices == tuple(replace(device, stale=True) for device in before.devices)
    assert stale.engines == before.engines
    assert caplog.text.count("memory cannot be read") == 1
    assert not (await launcher.survey()).devices[0].stale


@pytest.mark.parametrize(
    ("end", "kills", "said"),
    [
        ("kill -9 $$", [3, 4], True),
        ("kill -9 $$", [3, 3], False),  # somebody else's doing
        ("kill -9 $$", [None, None], False),  # a kernel that does not count
        ("kill -15 $$", [3, 4], False),
        ("exit 137", [3, 4], False),
    ],
)
async def test_an_end_for_want_of_memory(
    launcher: LocalLauncher,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
    kills: list[int | None],
    said: bool,
) -> None:
    counts = iter(kills)
    monkeypatch.setattr(host_memory, "oom_kills", lambda: next(counts))
    handle = await launcher.start(ENGINE, shell(end))
    await handle.exited()
    assert handle.killed_for_memory is said


async def test_an_end_by_our_own_sigkill_is_no_want_of_memory(
    launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = itertools.count()
    monkeypatch.setattr(host_memory, "oom_kills", lambda: next(counts))
    handle, _ = await ready(launcher, *STUBBORN)
    await handle.stop(grace_s=0.0)
    assert handle.exit_status == -signal.SIGKILL
    assert not handle.killed_for_memory


async def test_the_remedy_for_a_full_run_dir_is_not_a_dead_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "run"
    in_the_way.write_text("a file where the folder should be")
    launcher = LocalLauncher(run_dir=in_the_way)
    await ready(launcher)
    await launcher.aclose()
    assert "engine not remembered" in caplog.text


async def test_aclose_ends_all_engines_at_once() -> None:
    launcher = LocalLauncher()
    trees = [(await ready(launcher, *STUBBORN))[1] for _ in range(3)]
    async with asyncio.timeout(2.5):  # each takes its second of grace
        await launcher.aclose()
    assert all(all_gone(tree)() for tree in trees)


# Engines that wait for an order.


async def ordered(launcher: LocalLauncher, *options: str) -> LocalHandle:
    """Start an engine that takes orders, and wait until it followed the first."""
    handle = await launcher.start(ENGINE, ordered_plan(*options))
    await soon(handle.ready_line())
    return handle


async def soon(waiting: Coroutine[None, None, T]) -> T:
    async with asyncio.timeout(10):
        return await waiting


async def spare(launcher: LocalLauncher, plan: LaunchPlan | None = None) -> psutil.Process:
    """Prepare a spare; return its process."""
    before = our_children()
    await launcher.prepare(plan or ordered_plan())
    [process] = [child for child in our_children() - before if not is_guard(child)]
    return process


def is_guard(process: psutil.Process) -> bool:
    return guard.__file__ in process.cmdline()


def health(base_url: str) -> int:
    with urllib.request.urlopen(f"{base_url}/health") as response:
        return int(response.status)


async def test_an_order_is_followed(launcher: LocalLauncher) -> None:
    handle = await ordered(launcher)
    assert await asyncio.to_thread(health, handle.base_url) == 200
    port = handle.base_url.removeprefix("http://127.0.0.1:")
    assert port not in psutil.Process(handle.pid).cmdline()


async def test_a_spare_becomes_the_engine(launcher: LocalLauncher) -> None:
    process = await spare(launcher)
    children = our_children()
    handle = await ordered(launcher)
    assert handle.pid == process.pid
    assert our_children() == children
    assert await asyncio.to_thread(health, handle.base_url) == 200
    assert await soon(handle.stop(grace_s=1)) is None
    assert handle.exit_status is not None


async def test_a_spare_is_taken_once(launcher: LocalLauncher) -> None:
    process = await spare(launcher)
    first, second = await ordered(launcher), await ordered(launcher)
    assert first.pid == process.pid != second.pid
    assert first.base_url != second.base_url
    assert first.api_key != second.api_key


async def test_a_spare_that_has_not_begun_yet_is_taken(launcher: LocalLauncher) -> None:
    preparing = asyncio.create_task(launcher.prepare(ordered_plan()))
    await asyncio.sleep(0)
    handle = await ordered(launcher)
    await preparing
    assert len(our_children()) == 2
    assert await asyncio.to_thread(health, handle.base_url) == 200


async def test_a_spare_is_for_its_own_program_and_environment(launcher: LocalLauncher) -> None:
    process = await spare(launcher)
    other = await launcher.start(ENGINE, ordered_plan(env=(("A", "1"),)))
    without_order = (await ready(launcher))[0]
    told_nothing = await launcher.start(ENGINE, ordered_plan(order=""))
    assert process.pid not in (other.pid, without_order.pid, told_nothing.pid)
    assert (await ordered(launcher)).pid == process.pid


async def test_it_is_known_of_a_spare_that_it_never_followed_its_order(
    launcher: LocalLauncher,
) -> None:
    process = await spare(launcher)
    [waiting] = launcher._spares.values()
    await async_wait_for(lambda: WAITING_LINE in waiting.tail())
    freeze(process)
    handle = await launcher.start(ENGINE, ordered_plan())
    process.kill()
    assert await soon(handle.exited()) == -signal.SIGKILL
    assert handle.pid == process.pid
    assert handle.never_began


@pytest.mark.parametrize("was_spare", [True, False])
async def test_one_that_has_said_a_word_has_begun(launcher: LocalLauncher, was_spare: bool) -> None:
    if was_spare:
        await spare(launcher)
    handle = await ordered(launcher)
    assert handle.pid is not None
    os.kill(handle.pid, signal.SIGKILL)
    await soon(handle.exited())
    assert not handle.never_began


async def test_a_spare_s_words_are_nobody_s_until_it_is_an_engine() -> None:
    heard: list[tuple[EngineId, str]] = []
    launcher = LocalLauncher(hear=lambda engine, line: heard.append((engine, line)))
    script = "echo early; read order; echo $order; exec sleep 60"
    plan = ordered_plan(argv=("sh", "-c", script), order="late", ready_line="late")
    await launcher.prepare(plan)
    [spare] = launcher._spares.values()
    await async_wait_for(lambda: "early" in spare.tail())
    handle = await launcher.start(ENGINE, plan)
    await soon(handle.ready_line())
    assert heard == [(ENGINE, "late")]
    assert list(handle.tail()) == ["early", "late"]
    await launcher.aclose()


async def test_preparing_twice_is_preparing_once(launcher: LocalLauncher) -> None:
    await asyncio.gather(*(launcher.prepare(ordered_plan()) for _ in range(3)))
    await launcher.prepare(ordered_plan("--big-mib", "1"))  # another order, the same program
    assert len(our_children()) == 2


async def test_after_it_is_taken_another_may_be_prepared(launcher: LocalLauncher) -> None:
    await spare(launcher)
    await ordered(launcher)
    process = await spare(launcher)
    assert (await ordered(launcher)).pid == process.pid


async def test_what_cannot_be_prepared_is_told_each_time(launcher: LocalLauncher) -> None:
    for _ in range(2):
        with pytest.raises(EngineStartFailed, match="No such file"):
            await launcher.prepare(ordered_plan(argv=("/no/such/program",)))
    assert our_children() == set()


@pytest.mark.parametrize("noticed", [False, True])
async def test_a_spare_that_was_killed_is_not_taken(launcher: LocalLauncher, noticed: bool) -> None:
    process = await spare(launcher)
    process.kill()
    if noticed:
        await async_wait_for(lambda: not our_children())
    else:
        wait_for(all_gone([process]))  # in this thread: the launcher hears nothing of it
    handle = await ordered(launcher)
    assert handle.pid != process.pid
    assert await asyncio.to_thread(health, handle.base_url) == 200


async def test_a_spare_that_ended_by_itself_is_replaced(launcher: LocalLauncher) -> None:
    plan = ordered_plan(argv=("sh", "-c", "exit 1"))
    await launcher.prepare(plan)
    await async_wait_for(lambda: not our_children())
    await launcher.prepare(plan)
    handle = await launcher.start(ENGINE, plan)
    assert await soon(handle.exited()) == 1


async def test_spares_are_given_up(launcher: LocalLauncher) -> None:
    await spare(launcher)
    await soon(launcher.give_up_spares())
    assert our_children() == set()
    await launcher.give_up_spares()
    await ordered(launcher)


async def test_giving_up_spares_spares_the_engines(launcher: LocalLauncher) -> None:
    await spare(launcher)
    handle = await ordered(launcher)
    await launcher.give_up_spares()
    assert handle.exit_status is None
    assert await asyncio.to_thread(health, handle.base_url) == 200


async def test_a_survey_tells_of_spares(launcher: LocalLauncher) -> None:
    await spare(launcher)
    survey = await launcher.survey()
    assert survey.engines == {}
    [use] = survey.spares
    assert use.devices in (None, ())
    assert 0 < survey.spare_bytes == (use.private_bytes or 0) < 40 * MIB
    await ordered(launcher)
    survey = await launcher.survey()
    assert (set(survey.engines), survey.spares, survey.spare_bytes) == ({ENGINE}, (), 0)


async def test_a_spare_that_is_starting_can_be_surveyed(launcher: LocalLauncher) -> None:
    preparing = asyncio.create_task(launcher.prepare(ordered_plan()))
    await asyncio.sleep(0)
    assert len((await launcher.survey()).spares) == 1
    await preparing


async def test_aclose_ends_spares() -> None:
    launcher = LocalLauncher()
    await spare(launcher)
    await soon(launcher.aclose())
    assert our_children() == set()


async def test_a_start_with_a_spare_that_is_cancelled_leaves_nothing(
    launcher: LocalLauncher,
) -> None:
    preparing = asyncio.create_task(launcher.prepare(ordered_plan()))
    await asyncio.sleep(0)
    starting = asyncio.create_task(launcher.start(ENGINE, ordered_plan()))
    await asyncio.sleep(0)
    assert not starting.done()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await preparing
    assert our_children() == set()
    assert (await launcher.survey()).spares == ()


async def test_an_end_for_want_of_memory_before_it_was_the_engine_s_does_not_count(
    launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "oom_kills", lambda: 3)
    process = await spare(launcher)
    monkeypatch.setattr(host_memory, "oom_kills", lambda: 4)
    handle = await ordered(launcher)
    process.kill()
    assert await soon(handle.exited()) == -signal.SIGKILL
    assert not handle.killed_for_memory


# Rest.


async def test_an_engine_that_rests_has_given_back_memory_and_port(
    launcher: LocalLauncher,
) -> None:
    handle = await ordered(launcher, "--big-mib", "60")
    pid = handle.pid
    taken = (await handle.measure()).host_bytes
    assert taken is not None
    assert taken > 60 * MIB
    await soon(handle.rest())
    assert (handle.pid, handle.exit_status) == (pid, None)
    left = (await handle.measure()).host_bytes
    assert left is not None
    assert left < 30 * MIB
    with pytest.raises(urllib.error.URLError, match="refused"):
        await asyncio.to_thread(health, handle.base_url)
    assert set((await launcher.survey()).engines) == {ENGINE}


async def test_it_wakes_with_another_order_at_another_port(launcher: LocalLauncher) -> None:
    handle = await ordered(launcher)
    pid, before, key = handle.pid, handle.base_url, handle.api_key
    for _ in range(2):
        await soon(handle.rest())
        handle.wake(ordered_plan("--ready-line", "up again", ready_line="up"))
        await soon(handle.ready_line())
        assert handle.tail()[-1] == "up again"
        assert await asyncio.to_thread(health, handle.base_url) == 200
    assert (handle.pid, handle.api_key) == (pid, key)
    assert handle.base_url != before


async def test_the_ready_line_of_before_says_nothing_after_a_wake(launcher: LocalLauncher) -> None:
    handle = await ordered(launcher)
    await soon(handle.rest())
    handle.wake(ordered_plan("--stall"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await handle.ready_line()


async def test_an_engine_may_be_stopped_while_it_goes_to_rest(launcher: LocalLauncher) -> None:
    handle = await ordered(launcher, "--deaf-to-orders")
    resting = asyncio.create_task(handle.rest())
    await asyncio.sleep(0)
    await soon(handle.stop(grace_s=1))
    assert not resting.done()  # as it says
    resting.cancel()
    assert our_children() == set()


async def test_an_engine_that_rests_may_be_stopped(launcher: LocalLauncher) -> None:
    handle = await ordered(launcher)
    await soon(handle.rest())
    await soon(handle.stop(grace_s=1))
    assert our_children() == set()


async def test_an_engine_that_died_in_its_rest_takes_no_orders(launcher: LocalLauncher) -> None:
    handle = await ordered(launcher)
    await soon(handle.rest())
    psutil.Process(handle.pid).kill()
    assert await soon(handle.exited()) == -signal.SIGKILL
    handle.wake(ordered_plan())
    assert await handle.exited() == -signal.SIGKILL


async def test_a_wake_that_fails_leaves_its_words(launcher: LocalLauncher) -> None:
    handle = await ordered(launcher)
    await soon(handle.rest())
    handle.wake(ordered_plan("--exit", "4", "--say", "error: bad magic"))
    assert await soon(handle.exited()) == 4
    assert handle.tail()[-1] == "error: bad magic"


# Read-ahead.


async def test_files_are_read_in_a_thread_and_a_missing_one_is_no_fault(
    launcher: LocalLauncher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "xandrouting")
    file = tmp_path / "model"
    file.write_bytes(b"x" * MIB)
    await launcher.read_ahead((str(tmp_path / "none"), str(file)), limit_bytes=MIB // 2)
    assert f"read ahead bytes={MIB // 2} " in caplog.text


async def test_reading_ahead_ends_when_it_is_cancelled(
    launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[threading.Event] = []

    def read(files: object, *, limit_bytes: int, ended: threading.Event) -> int:
        events.append(ended)
        ended.wait(10)
        return limit_bytes

    monkeypatch.setattr("xandrouting.launch.local.read_ahead", read)
    reading = asyncio.create_task(launcher.read_ahead(("/models/m",), limit_bytes=1))
    await async_wait_for(lambda: events)
    reading.cancel()
    await asyncio.wait({reading})
    assert events[0].is_set()


def test_a_reserved_port_is_only_for_a_server() -> None:
    port = reserve_port()
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", port))
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, option, 1)
            server.bind(("127.0.0.1", port))
            server.listen()


def test_no_two_engines_get_one_port() -> None:
    ports = [reserve_port() for _ in range(300)]
    assert len(set(ports)) == len(ports)


async def a_spare_s_life() -> None:
    launcher = LocalLauncher()
    await launcher.prepare(ordered_plan())
    handle = await ordered(launcher)
    await soon(handle.rest())
    handle.wake(ordered_plan())
    await soon(handle.ready_line())
    await launcher.prepare(ordered_plan())
    await soon(launcher.aclose())
    assert not our_children()


async def a_whole_life() -> None:
    launcher = LocalLauncher()
    handle, tree = await ready(launcher, *STUBBORN)
    assert (await handle.measure()).host_bytes
    await handle.stop(grace_s=0.1)
    assert all_gone(tree)()
    assert handle.tail()[-1] == READY_LINE


async def a_cancelled_start() -> None:
    launcher = LocalLauncher()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await launcher.start(ENGINE, fake_plan(*STUBBORN))
    assert not our_children()


async def a_failing_start() -> None:
    with pytest.raises(EngineStartFailed):
        await LocalLauncher().start(ENGINE, LaunchPlan(argv=("/no/such/program",)))


async def a_killed_guard() -> None:
    handle, tree = await ready(LocalLauncher(), *STUBBORN)
    tree[0].kill()
    await handle.exited()
    assert all_gone(tree)()


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize(
    "scenario",
    [a_whole_life, a_spare_s_life, a_cancelled_start, a_failing_start, a_killed_guard],
)
def test_on_either_loop(
    scenario: Callable[[], Coroutine[None, None, None]],
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(scenario())


GATEWAY = """
import asyncio, sys
from pathlib import Path
from tests.fakes.processes import ENGINE, fake_plan, ordered_plan
from xandrouting.launch.local import LocalLauncher

async def spare():
    launcher = LocalLauncher(Path(sys.argv[2]))
    await launcher.prepare(ordered_plan())
    print("ready", flush=True)
    await asyncio.sleep(60)

async def main():
    if sys.argv[1] == "spare":
        await spare()
    launcher = LocalLauncher()
    handle = await launcher.start(ENGINE, fake_plan("--ignore-sigterm", "--with-child"))
    await handle.ready_line()
    print("ready", flush=True)
    if sys.argv[1] == "waits":
        await handle.exited()

asyncio.run(main())
"""


def gateway(*what: str) -> subprocess.Popen[bytes]:
    """Start a process that starts a deaf engine, and then waits or returns without a goodbye.

    Or one that prepares a spare.
    """
    command = [sys.executable, "-c", GATEWAY, *what]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)


def test_a_gateway_killed_outright_leaves_nothing() -> None:
    with gateway("waits") as parent:
        assert parent.stdout
        assert parent.stdout.readline() == b"ready\n"
        tree = tree_below(parent.pid)
        assert len(tree) == 3
        parent.kill()
        wait_for(all_gone(tree), 2.0)


def test_a_gateway_that_forgets_to_close_leaves_nothing() -> None:
    with gateway("returns") as parent:
        assert parent.stdout
        assert parent.stdout.readline() == b"ready\n"
        tree = tree_below(parent.pid)
        assert parent.wait(10) == 0
        wait_for(all_gone(tree), 2.0)


@pytest.mark.parametrize("guard_too", [False, True])
def test_a_gateway_killed_outright_leaves_no_spare(tmp_path: Path, guard_too: bool) -> None:
    with gateway("spare", str(tmp_path)) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == b"ready\n"
        tree = tree_below(parent.pid)
        assert len(tree) == 2
        assert len(list(tmp_path.iterdir())) == 1  # what a sweep would look for
        parent.kill()
        if guard_too:
            tree[0].kill()
        wait_for(all_gone(tree), 2.0)
    assert sweep.sweep(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []
