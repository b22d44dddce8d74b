"""The guard alone, as the program it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.fakes.processes import (
    FAKE_ENGINE,
    READY_LINE,
    WAITING_LINE,
    all_gone,
    fake_argv,
    tree_below,
)
from tests.waiting import wait_for
from xandrouting.launch import guard

STUBBORN = ("--ignore-sigterm", "--with-child")
WITHOUT_PROC = (
    "import runpy, sys; m = runpy.run_path(sys.argv[1]);"
    "m['main'].__globals__['PROC'] = '/nonexistent'; sys.exit(m['main'](sys.argv[2:]))"
)


class Guard:
    """A guard's process with its three channels."""

    def __init__(
        self, argv: tuple[str, ...], *, program: tuple[str, ...], grace_s: float, orders: bool
    ) -> None:
        options = ["--grace-s", str(grace_s), *(["--orders"] if orders else [])]
        command = [*program, *options, "--", *argv]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def tell(self, command: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().decode().strip()

    def log_line(self) -> str:
        assert self.process.stderr
        return self.process.stderr.readline().decode().strip()

    def until(self, said: str) -> None:
        """Wait for this line of the engine's."""
        while self.log_line() != said:
            pass

    def ready(self) -> list[psutil.Process]:
        """Wait for the engine's ready line; return its whole tree."""
        self.until(READY_LINE)
        return tree_below(self.process.pid)


@contextmanager
def guarding(
    *argv: str,
    grace_s: float = 0.5,
    program: tuple[str, ...] = ("-I", "-S", guard.__file__),
    orders: bool = False,
) -> Iterator[Guard]:
    started = Guard(argv, program=(sys.executable, *program), grace_s=grace_s, orders=orders)
    with started.process:
        try:
            yield started
        finally:
            assert started.process.stdin
            started.process.stdin.close()  # the gateway's end: the guard ends all there is


def fake(*options: str) -> tuple[str, ...]:
    return fake_argv(*options, port="0")


def test_it_tells_the_pid_and_the_exit_status() -> None:
    with guarding("sh", "-c", "exit 3") as guarded:
        assert guarded.hear().startswith("pid ")
        assert guarded.hear() == "exited 3"
        assert guarded.process.wait() == 0


def test_a_signal_is_a_negative_status() -> None:
    with guarding("sh", "-c", "kill -9 $$") as guarded:
        guarded.hear()
        assert guarded.hear() == "exited -9"


@pytest.mark.parametrize(
    ("program", "reason"),
    [("/no/such/program", "No such file or directory"), ("/etc/passwd", "Permission denied")],
)
def test_a_program_that_cannot_be_run_is_told_as_such(program: str, reason: str) -> None:
    with guarding(program) as guarded:
        assert guarded.hear() == f"failed {reason}"
        assert guarded.process.wait() == 127


def test_the_engine_sees_none_of_the_guards_channels() -> None:
    with guarding("sh", "-c", "cat; echo out; echo err >&2; ls /proc/self/fd") as guarded:
        guarded.hear()
        assert guarded.hear() == "exited 0"
        assert guarded.process.stderr
        assert guarded.process.stderr.read().split() == [b"out", b"err", b"0", b"1", b"2", b"3"]


def test_the_engine_hears_the_signals_that_its_guard_ignores() -> None:
    with guarding("sh", "-c", "kill -INT $$; sleep 60") as guarded:
        guarded.hear()
        assert guarded.hear() == "exited -2"


def test_a_stop_ends_what_listens_to_sigterm_long_before_its_grace() -> None:
    with guarding(*fake()) as guarded:
        guarded.hear()
        guarded.ready()
        guarded.tell("stop 60")
        assert guarded.hear() == "exited 0"


def test_a_stop_ends_a_deaf_tree_after_its_grace() -> None:
    with guarding(*fake(*STUBBORN)) as guarded:
        guarded.hear()
        tree = guarded.ready()
        assert len(tree) == 2
        told_at = time.monotonic()
        guarded.tell("stop 0.3")
        assert guarded.hear() == "exited -9"
        assert 0.3 <= time.monotonic() - told_at < 2.0
        assert all_gone(tree)()


def test_a_second_stop_hurries_the_first_and_never_delays_it() -> None:
    with guarding(*fake(*STUBBORN)) as guarded:
        guarded.hear()
        tree = guarded.ready()
        guarded.tell("stop 60")
        guarded.tell("stop 0.1\nstop 30")
        wait_for(all_gone(tree), 2.0)
        assert guarded.hear() == "exited -9"


def test_what_the_engine_leaves_behind_ends_before_its_exit_is_told() -> None:
    """An engine killed from outside leaves a child in another session, deaf to SIGTERM."""
    with guarding(*fake(*STUBBORN), grace_s=0.1) as guarded:
        engine = int(guarded.hear().removeprefix("pid "))
        tree = guarded.ready()
        os.kill(engine, signal.SIGKILL)
        assert guarded.hear() == "exited -9"
        assert all_gone(tree)()


def test_sigterm_comes_once_even_if_the_engine_takes_its_time() -> None:
    """Many programs take a second SIGTERM for impatience and drop what they do."""
    script = "trap 'echo term' TERM; echo ready; while :; do sleep 0.05 & wait; done"
    with guarding("bash", "-c", script) as guarded:
        guarded.hear()
        assert guarded.log_line() == "ready"
        guarded.tell("stop 0.5")
        assert guarded.hear() == "exited -9"
        assert guarded.process.stderr
        assert guarded.process.stderr.read().split() == [b"term"]


def test_the_gateways_end_is_the_engines_end() -> None:
    with guarding(*fake(*STUBBORN), grace_s=60) as guarded:
        tree = guarded.ready()
        assert guarded.process.stdin
        guarded.process.stdin.close()
        wait_for(all_gone(tree), 2.0)
        assert guarded.process.wait() == 0


def test_the_guard_is_deaf_to_a_terminals_signals() -> None:
    with guarding(*fake()) as guarded:
        guarded.ready()
        for number in guard.IGNORED_HERE:
            guarded.process.send_signal(number)
        guarded.tell("stop 60")
        guarded.hear()
        assert guarded.hear() == "exited 0"


def test_a_killed_guard_takes_the_engine_with_it() -> None:
    with guarding(*fake("--ignore-sigterm")) as guarded:
        tree = guarded.ready()
        guarded.process.kill()
        wait_for(all_gone(tree), 2.0)


def test_without_proc_the_process_group_ends() -> None:
    """As on macOS: the engine and the children that stayed in its group."""
    program = ("-c", WITHOUT_PROC, guard.__file__)
    script = "trap '' TERM; sleep 60 & echo ready; wait; sleep 60"
    with guarding("bash", "-c", script, program=program) as guarded:
        guarded.hear()
        assert guarded.log_line() == "ready"
        tree = tree_below(guarded.process.pid)
        assert len(tree) == 2
        guarded.tell("stop 0.1")
        assert guarded.hear() == "exited -9"
        wait_for(all_gone(tree), 2.0)


# Orders.

WAITS = (sys.executable, FAKE_ENGINE, "--orders")


def test_an_order_reaches_the_engine_as_it_is() -> None:
    with guarding("sh", "-c", "cat", orders=True) as guarded:
        guarded.hear()
        long = "x" * 10_000  # longer than the guard reads at once
        guarded.tell('tell {"a": "b  c", "\\u00fc": 1} ')
        guarded.tell(f"tell {long}\ntell")
        assert guarded.process.stderr
        read = guarded.process.stderr.readline
        assert read() == b'{"a": "b  c", "\\u00fc": 1} \n'
        assert read() == long.encode() + b"\n"
        assert read() == b"\n"


def test_an_order_may_come_in_pieces() -> None:
    with guarding("sh", "-c", "cat", orders=True) as guarded:
        guarded.hear()
        assert guarded.process.stdin
        for piece in (b"te", b"ll one", b" two\nst"):
            guarded.process.stdin.write(piece)
            guarded.process.stdin.flush()
        assert guarded.log_line() == "one two"
        guarded.tell("op 0.1")
        assert guarded.hear().startswith("exited")


def test_an_engine_rests_as_the_same_process() -> None:
    with guarding(*WAITS, orders=True) as guarded:
        engine = int(guarded.hear().removeprefix("pid "))
        for _ in range(2):
            guarded.until(WAITING_LINE)
            guarded.tell("tell --port 0")
            assert [process.pid for process in guarded.ready()] == [engine]
            guarded.tell("tell rest")
        guarded.until(WAITING_LINE)
        guarded.tell("stop 60")
        assert guarded.hear() == "exited -15"


def test_an_engine_that_rests_still_ends_with_its_guard() -> None:
    """What the kernel promised to do at its parent's death is kept over an exec."""
    with guarding(*WAITS, orders=True) as guarded:
        guarded.until(WAITING_LINE)
        guarded.tell("tell --port 0")
        tree = guarded.ready()
        guarded.tell("tell rest")
        guarded.until(WAITING_LINE)
        guarded.process.kill()
        wait_for(all_gone(tree), 2.0)


@pytest.mark.parametrize("orders", [True, False])
def test_an_order_for_nobody_is_no_fault(orders: bool) -> None:
    with guarding("sh", "-c", "exec <&-; echo closed; sleep 60", orders=orders) as guarded:
        guarded.hear()
        assert guarded.log_line() == "closed"
        guarded.tell("tell anybody?\ntell nobody")
        guarded.tell("stop 60")
        assert guarded.hear() == "exited -15"


def test_orders_that_are_not_read_keep_no_stop() -> None:
    with guarding("sleep", "60", orders=True) as guarded:
        guarded.hear()
        for _ in range(20):
            guarded.tell("tell " + "x" * 10_000)
        guarded.tell("stop 60")
        assert guarded.hear() == "exited -15"


def test_only_the_engine_holds_its_end_of_the_orders() -> None:
    """Else it would not see the guard's end as the end of its orders."""
    with guarding("sleep", "60", orders=True) as guarded:
        engine = int(guarded.hear().removeprefix("pid "))
        mine = Path(f"/proc/{engine}/fd/0").stat().st_ino
        held = Path(f"/proc/{guarded.process.pid}/fd").iterdir()
        assert [file.stat().st_ino for file in held].count(mine) == 1  # the other one


def test_a_signal_for_an_earlier_user_of_a_pid_reaches_nobody() -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        process = guard.look(bystander.pid)
        assert process
        guard.send(bystander.pid, process.start - 1, signal.SIGKILL)
        guard.send(bystander.pid, process.start, signal.SIGTERM)
        assert bystander.wait() == -signal.SIGTERM


def test_a_process_whose_name_looks_like_a_stat_line_is_read_right() -> None:
    script = "open('/proc/self/comm', 'w').write('x) Z 1 (y'); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as odd:
        wait_for(lambda: psutil.Process(odd.pid).name().startswith("x)"))
        process = guard.look(odd.pid)
        assert process
        assert (process.parent, process.running) == (os.getpid(), True)
