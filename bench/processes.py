"""Processes of a bench: started where they belong, measured, and always ended."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")

CORES = sorted(os.sched_getaffinity(0))
LOAD_CORE = CORES[0]  # the mock engine and the load generator
SERVER_CORE = CORES[-1]  # who is measured


class BenchError(Exception):
    """A measurement could not be taken; the message tells why."""


class Process:
    """A child with its stdin, its stdout line by line, and its stderr in a file."""

    def __init__(self, popen: subprocess.Popen[bytes], stderr: Path) -> None:
        self._popen = popen
        self._stderr = stderr
        self._read = b""
        self.pid = popen.pid

    def line(self, timeout_s: float = 60.0) -> str:
        """Return the next line of its stdout.

        Raises:
            BenchError: it ended, or said nothing in time; with its last words on stderr.
        """
        deadline = time.monotonic() + timeout_s
        assert self._popen.stdout is not None
        while b"\n" not in self._read:
            readable, _, _ = select.select(
                [self._popen.stdout], [], [], max(0.0, deadline - time.monotonic())
            )
            data = os.read(self._popen.stdout.fileno(), 1 << 16) if readable else b""
            if not data:
                why = "ended" if readable else f"said nothing for {timeout_s:.0f} s"
                tail = self._stderr.read_text(errors="replace").splitlines()[-5:]
                raise BenchError(f"{self._popen.args} {why}: {' | '.join(tail)}")
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()

    def wait_for(self, start: str, timeout_s: float = 60.0) -> str:
        """Return what follows `start` in the first line that begins with it."""
        while True:
            line = self.line(timeout_s)
            if line.startswith(start):
                return line.removeprefix(start).strip()

    def tell(self, line: str) -> None:
        """Write a line to its stdin."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(line.encode() + b"\n")
        self._popen.stdin.flush()

    def close_stdin(self) -> None:
        """Tell a child that waits for it to go on."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def end(self) -> None:
        """End it and wait until it is gone."""
        self._popen.terminate()
        try:
            self._popen.wait(timeout=20.0)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


@contextlib.contextmanager
def running(
    argv: Sequence[str], *, core: int | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """Run a program for the length of the block, pinned to `core`; None: on any."""

    def pin() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})

    with tempfile.NamedTemporaryFile(prefix="bench-stderr-") as stderr:
        popen = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=env,
            preexec_fn=pin,
        )
        process = Process(popen, Path(stderr.name))
        with popen:
            try:
                yield process
            finally:
                process.end()


def cpu_s(pid: int) -> float:
    """Return the CPU seconds a process has used, in user and kernel; steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def memory_bytes(pid: int, kind: str = "Pss") -> int:
    """Return a process's memory; `Pss` counts shared pages in proportion, `Rss` in full."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise BenchError(f"no {kind} of process {pid}")


def raise_file_limit() -> int:
    """Open as many files as the system allows; return how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
