"""The mover: one small process that brings one job's files and publishes them as a folder.

Run as `python -I -S mover.py`; standard library only. stdin is one line of JSON, the order (see
`mover_files.Order`); EOF after it means that the gateway is gone. On EOF and on SIGTERM it ends at
once and every byte stays where it is. stdout is lines of JSON:

    {"event": "progress", "done": {path: bytes on disk}, "fetched": bytes of this run}
    {"event": "waiting", "seconds": s, "why": text}    a try failed, the next one follows
    {"event": "verifying"}                             every byte is here
    {"event": "done"} | {"event": "failed", "code": …, "message": …}

It exits with 0 when done or told to stop, 3 after a failure, 4 when the disk is full.

Bytes go to one part file for each content, named by its hash. The part's size is what is known of
it after a crash: it grows at its end only. Its hash is computed while bytes come; what an earlier
run wrote is read again meanwhile. When all hashes are right the files move into a tree beside the
parts, which becomes the target by one rename. Into a folder that has other files already they move
one by one, the manifest last: a file without its line in there is not ours yet.

The token comes by the environment and is told to the order's `token_hosts` alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import queue
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

if __name__ == "__main__":  # with `-I -S` our own modules are not found by themselves
    sys.path.append(str(Path(__file__).parents[2]))

from xandrouting.downloads.mover_board import Board, guarded
from xandrouting.downloads.mover_client import Client
from xandrouting.downloads.mover_fetch import Fetcher
from xandrouting.downloads.mover_files import (
    Failed,
    Order,
    Stopped,
    clean_up,
    is_published,
    publish,
    take_over,
)

DONE, BROKEN, FAILED, DISK_FULL = 0, 1, 3, 4
ORDER, EVENTS = 0, 1  # this process's stdin, stdout
_STOP_S: Final = 0.05  # for the threads to write down what has come
_NICENESS: Final = 10
_SESSION_NICENESS: Final = Path("/proc/self/autogroup")
_SESSION_EVERY_S, _SESSION_TRIES = 0.1, 5  # Linux lets one unprivileged process do it in 100 ms
_PR_SET_PDEATHSIG: Final = 1
_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS, _IOPRIO_IDLE = 1, 3 << 13


class Run:
    """One order, from what earlier runs left to the published folder."""

    def __init__(self, order: Order, token: str | None) -> None:
        self.board = Board(order.files)
        self._order = order
        self._fetcher = Fetcher(order, self.board, Client(order, self.board, token))
        self._ended = threading.Event()
        self._counted = False  # whether what earlier runs left is known
        self._said_at = 0.0

    def watch(self) -> int:
        """Report until it has ended, and return the exit status.

        Raises:
            Stopped: the gateway is gone.
        """
        threading.Thread(target=self._work, daemon=True).start()
        sources = [ORDER, self.board.woken]
        while not self._ended.is_set():
            readable = select.select(sources, [], [], self._order.report_s)[0]
            if ORDER in readable and not os.read(ORDER, 4096):
                raise Stopped
            if self.board.woken in readable:
                os.read(self.board.woken, 4096)
            if time.monotonic() - self._said_at >= self._order.report_s:
                self._said_at = time.monotonic()
                self._say_progress()
            self._say_news()
        self._say_news()
        self._say_progress()
        return self._end()

    def _end(self) -> int:
        failure = self.board.failure
        if failure is not None:
            say({"event": "failed", "code": failure.code, "message": failure.message})
            return DISK_FULL if failure.code == "disk_full" else FAILED
        if self.board.bug:
            return BROKEN
        say({"event": "done"})
        return DONE

    def _say_news(self) -> None:
        while True:
            try:
                news = self.board.news.get_nowait()
            except queue.Empty:
                return
            if news["event"] == "verifying":
                self._say_progress()  # bytes told of later would be new ones
            say(news)

    def _work(self) -> None:
        with guarded(self.board):
            # Kept open until this process ends: no other mover may touch the same parts.
            take_over(self._order, self._tell_of_another)
            self._counted = True
            self.board.wake()
            if not is_published(self._order):
                self._fetcher.run()
                if self.board.stopping.is_set():
                    raise Stopped
                publish(self._order)
            clean_up(self._order)
        self._ended.set()
        self.board.wake()

    def _tell_of_another(self) -> None:
        why = "an earlier process of this download has not ended yet"
        self.board.tell("waiting", seconds=0.0, why=why)

    def leave(self) -> None:
        """Keep what has come, and say how much that is."""
        self.board.stop()
        deadline = time.monotonic() + _STOP_S
        for thread in self._fetcher.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._say_progress(fresh=True)

    def _say_progress(self, *, fresh: bool = False) -> None:
        if self._counted:  # else it would be that nothing is there
            say(self.board.progress(), fresh=fresh)


def say(event: dict[str, Any], *, fresh: bool = False) -> None:
    """Tell the gateway; `fresh`: what was said last may have been cut in the middle of its line."""
    data = b"\n" * fresh + json.dumps(event).encode() + b"\n"
    try:
        while data:
            data = data[os.write(EVENTS, data) :]
    except BrokenPipeError:
        raise Stopped from None


def read_order() -> Order:
    """Read the one line.

    Raises:
        Stopped: the gateway was gone before it had said it.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        data = os.read(ORDER, 1 << 16)
        if not data:
            raise Stopped
        line += data
    return Order(json.loads(line))


def step_back() -> None:
    """Let everybody else go first, and end when the gateway does; the latter is Linux's alone."""
    os.nice(_NICENESS)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        number = _IOPRIO_SET.get(platform.machine())
        if number is not None:
            libc.syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)
        if os.getsid(0) == os.getpid():  # else it would be others' too
            _step_back_as_session()


def _step_back_as_session() -> None:
    """Lower this session's share: where Linux groups by sessions, niceness counts within one."""
    for _ in range(_SESSION_TRIES):
        try:
            _SESSION_NICENESS.write_text(str(_NICENESS))
        except BlockingIOError:
            time.sleep(_SESSION_EVERY_S)
        except OSError:
            return  # a kernel without it, or a container that may not
        else:
            return


def _stop(_number: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped


def main() -> int:
    """Do what stdin says."""
    signal.signal(signal.SIGTERM, _stop)
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's are for the gateway
        signal.signal(number, signal.SIG_IGN)
    run = None
    try:
        step_back()
        run = Run(read_order(), os.environ.pop("HF_TOKEN", None))
        return run.watch()
    except Failed as failure:
        say({"event": "failed", "code": failure.code, "message": failure.message})
        return FAILED
    except Stopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if run is not None:
            try:
                run.leave()
            except Stopped:
                pass  # nobody listens
        return DONE


if __name__ == "__main__":
    status = main()
    os._exit(status)  # no thread is waited for: what it holds is on the disk
