"""What is found and ended at the start after a gateway and a guard were killed."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from tests.fakes.processes import ENGINE, all_gone, fake_plan, freeze, tree_below
from tests.waiting import wait_for
from xandrouting.launch import sweep
from xandrouting.launch.local import LocalLauncher

GATEWAY = """
import asyncio, sys
from pathlib import Path
from tests.fakes.processes import ENGINE, fake_plan
from xandrouting.launch.local import LocalLauncher

async def main():
    launcher = LocalLauncher(run_dir=Path(sys.argv[1]))
    handle = await launcher.start(ENGINE, fake_plan("--ignore-sigterm", "--with-child"))
    await handle.ready_line()
    print("ready", flush=True)
    await handle.exited()

asyncio.run(main())
"""


@pytest.fixture
def mark() -> str:
    """One of its own: other tests may run on this machine at this moment."""
    return secrets.token_hex(16)


@contextmanager
def gateway(run_dir: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A gateway with one deaf engine; yields it and the tree of guard, engine and child."""
    command = [sys.executable, "-c", GATEWAY, str(run_dir)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process, tree_below(process.pid)
        finally:
            process.kill()


@contextmanager
def bystander(mark: str = "") -> Iterator[psutil.Process]:
    env = os.environ | {sweep.MARK: mark}
    with subprocess.Popen(["sleep", "60"], env=env) as process:
        try:
            # The exec is over for us a moment before the kernel shows its environment.
            environment = Path(f"/proc/{process.pid}/environ")
            wait_for(lambda: f"{sweep.MARK}={mark}\0".encode() in environment.read_bytes())
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def a_dead_life() -> sweep.Life:
    """A pid that had another user at another time."""
    return sweep.Life(os.getpid(), 1)


def write(run_dir: Path, record: sweep.Record) -> Path:
    path = run_dir / f"{record.mark}.json"
    path.write_text(json.dumps(asdict(record)))
    return path


def record_of(engine: psutil.Process, mark: str) -> sweep.Record:
    """A record of an engine whose guard and gateway are gone."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    life = sweep.Life.of(engine.pid)
    assert life
    return sweep.Record(mark, boot_id, gateway=a_dead_life(), guard=a_dead_life(), engine=life)


def test_a_tree_whose_gateway_and_guard_were_killed_is_ended(tmp_path: Path) -> None:
    with gateway(tmp_path) as (process, tree):
        guard, _, child = tree
        freeze(guard)  # so that it cannot end its tree when the gateway goes
        process.kill()
        process.wait()
        guard.kill()
        assert not all_gone([child])()
        assert sweep.sweep(tmp_path) == 1
        assert all_gone(tree)()
        assert list(tmp_path.iterdir()) == []


def test_a_guard_that_is_at_it_is_given_time(tmp_path: Path) -> None:
    with gateway(tmp_path) as (process, tree):
        process.kill()
        process.wait()
        assert sweep.sweep(tmp_path) == 0
        assert all_gone(tree)()
        assert list(tmp_path.iterdir()) == []


def test_a_guard_that_hangs_is_ended_with_its_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_GUARD_WAIT_S", 0.05)
    with gateway(tmp_path) as (process, tree):
        freeze(tree[0])
        process.kill()
        process.wait()
        assert sweep.sweep(tmp_path) == 1
        assert all_gone(tree)()


def test_the_engines_of_a_living_gateway_are_left_alone(tmp_path: Path) -> None:
    with gateway(tmp_path) as (_, tree):
        assert sweep.sweep(tmp_path) == 0
        assert not any(all_gone([process])() for process in tree)
        assert len(list(tmp_path.iterdir())) == 1


async def test_a_record_lives_as_long_as_its_engine(tmp_path: Path) -> None:
    run_dir = tmp_path / "not" / "there" / "yet"
    handle = await LocalLauncher(run_dir).start(ENGINE, fake_plan())
    (path,) = run_dir.iterdir()
    record = sweep.Record.parse(path.read_text())
    assert handle.pid is not None
    assert record.engine == sweep.Life.of(handle.pid)
    assert record.gateway == sweep.Life.of(os.getpid())
    assert record.guard.lasts()
    assert await asyncio.to_thread(sweep.sweep, run_dir) == 0
    await handle.stop(grace_s=1)
    assert list(run_dir.iterdir()) == []


def test_a_reused_pid_is_not_signalled(tmp_path: Path, mark: str) -> None:
    with bystander() as process:
        record = record_of(process, mark)
        earlier = sweep.Life(process.pid, record.engine.start - 1)
        path = write(tmp_path, replace(record, engine=earlier))
        assert sweep.sweep(tmp_path) == 0
        assert process.status() != psutil.STATUS_ZOMBIE
        assert not path.exists()


def test_the_remembered_engine_is_ended_even_without_its_mark(tmp_path: Path, mark: str) -> None:
    with bystander() as process:
        write(tmp_path, record_of(process, mark))
        assert sweep.sweep(tmp_path) == 1
        wait_for(all_gone([process]))


def test_a_mark_must_match_as_a_whole(tmp_path: Path, mark: str) -> None:
    with bystander(mark + "2") as other, bystander(mark) as marked:
        write(tmp_path, replace(record_of(marked, mark), engine=a_dead_life()))
        assert sweep.sweep(tmp_path) == 1
        wait_for(all_gone([marked]))
        assert not all_gone([other])()


def test_after_a_reboot_every_pid_is_anothers(tmp_path: Path, mark: str) -> None:
    with bystander(mark) as process:
        path = write(tmp_path, replace(record_of(process, mark), boot_id="before"))
        assert sweep.sweep(tmp_path) == 0
        assert not all_gone([process])()
        assert not path.exists()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def scratch(mark: str) -> Path:
    folder = sweep.scratch_of(mark)
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "file").write_text("left")
    (folder / "link").symlink_to("/")
    return folder


def test_after_a_reboot_its_scratch_folder_is_removed(
    tmp_path: Path, temporary: Path, mark: str
) -> None:
    (temporary / "theirs").mkdir()
    scratch(mark)
    with bystander() as process:
        write(tmp_path, replace(record_of(process, mark), boot_id="before"))
        assert sweep.sweep(tmp_path) == 0
        assert not all_gone([process])()
    assert [path.name for path in temporary.iterdir()] == ["theirs"]


@pytest.mark.parametrize("text", ["", '{"mark": "', "\0" * 300])
def test_of_a_record_that_a_power_cut_emptied_the_folder_is_removed(
    tmp_path: Path, temporary: Path, mark: str, text: str
) -> None:
    scratch(mark)
    (tmp_path / f"{mark}.json").write_text(text)
    assert sweep.sweep(tmp_path) == 0
    assert list(temporary.iterdir()) == []
    assert [path for path in tmp_path.iterdir() if path != temporary] == []


def test_the_folder_of_a_living_engine_stays_though_its_record_cannot_be_read(
    tmp_path: Path, temporary: Path, mark: str
) -> None:
    folder = scratch(mark)
    (tmp_path / f"{mark}.json").touch()
    with bystander(mark) as process:
        assert sweep.sweep(tmp_path) == 0
        assert not all_gone([process])()
        assert (folder / "below" / "file").exists()


def test_a_record_names_no_folder_but_its_engine_s(tmp_path: Path, temporary: Path) -> None:
    victim = temporary / "xr-" / "victim"
    victim.mkdir(parents=True)
    with bystander() as process:
        record = record_of(process, "/victim")
    (tmp_path / "any.json").write_text(json.dumps(asdict(replace(record, boot_id="before"))))
    assert sweep.sweep(tmp_path) == 0
    assert victim.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"gateway": {"pid": 1}}'])
def test_a_broken_record_is_dropped(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.json").write_text(text)
    assert sweep.sweep(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []
    assert "engine record unreadable" in caplog.text


def test_no_run_dir_is_nothing_to_sweep(tmp_path: Path) -> None:
    assert sweep.sweep(tmp_path / "none") == 0


def test_an_engine_that_is_gone_already_is_not_remembered(tmp_path: Path, mark: str) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    path = sweep.remember(tmp_path, mark, guard_pid=process.pid, engine_pid=os.getpid())
    assert path is None


def test_what_cannot_be_killed_is_told_and_given_up(
    mark: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a process that the kernel itself holds: here, the signals go astray."""
    monkeypatch.setattr(sweep, "_KILL_WAIT_S", 0.05)
    monkeypatch.setattr("xandrouting.launch.guard.send", lambda *_: None)
    with bystander(mark) as process:
        assert sweep.end_leftovers(mark, None)
        assert "cannot be killed" in caplog.text
        process.send_signal(signal.SIGKILL)
