"""Runs one mover: starts its process, gives it the order, hears its events, ends it.

The mover lives no longer than the gateway: its stdin ends with us, and Linux tells it besides.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from xandrouting.downloads.jobs import Failure

MOVER: Final = Path(__file__).with_name("mover.py")

_LONGEST_LINE_BYTES: Final = 8 << 20  # progress of some 50,000 files
_STDERR_BYTES: Final = 8 << 10  # its last words
_STOP_GRACE_S: Final = 1.0  # it takes some 10 ms; from then on it hangs
_PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_KEPT: Final = (
    *("PATH", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    *(name for upper in _PROXIES for name in (upper, upper.lower())),
)

log = logging.getLogger(__name__)

Event = Mapping[str, Any]


class Ending(StrEnum):
    """How a mover's run ended."""

    DONE = "done"  # published
    FAILED = "failed"  # it said why
    STOPPED = "stopped"  # because we wanted it to
    LOST = "lost"  # it was killed or broke, and every byte is still there: another run goes on


@dataclass(frozen=True, slots=True)
class Outcome:
    """The last word on a run. `failure` is there if it failed or was lost."""

    ending: Ending
    failure: Failure | None = None


class Courier:
    """One run of one mover. `order` is its line on stdin (see `mover_files.Order`)."""

    def __init__(self, order: Mapping[str, Any], token: str | None = None) -> None:
        self._order = order
        self._token = token
        self._process: Process | None = None
        self._starting = False
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._last: Event | None = None
        self._stderr = b""

    @property
    def pid(self) -> int | None:
        """The mover's process, once it was started."""
        return None if self._process is None else self._process.pid

    async def run(self, on_event: Callable[[Event], None]) -> Outcome:
        """Start the mover and return when it has ended; to be called once.

        `on_event` hears `progress`, `waiting` and `verifying`. Cancelling stops the mover as
        `stop` does before the cancellation goes on.

        Raises:
            OSError: no process could be made.
        """
        if self._stopping.is_set():
            return Outcome(Ending.STOPPED)
        self._starting = True
        try:
            return await self._run(on_event)
        finally:
            self._ended.set()

    async def _run(self, on_event: Callable[[Event], None]) -> Outcome:
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(MOVER)),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            limit=_LONGEST_LINE_BYTES,
            env=self._environment(),
            start_new_session=True,
        )
        stderr = asyncio.create_task(self._hear_stderr(process), name="a mover's stderr")
        try:
            if self._stopping.is_set():
                await self._end(process)  # `stop` came while it was being started
            await self._give_order(process)
            await self._hear(process, on_event)
            await process.wait()
        finally:
            await self._end(process)
            await stderr
        return self._outcome(process)

    async def stop(self) -> None:
        """Have the mover end and keep every byte; return when it is gone."""
        self._stopping.set()
        if self._process is not None:
            await self._end(self._process)
        elif self._starting:
            await self._ended.wait()

    async def _end(self, process: Process) -> None:
        if process.returncode is not None:
            return
        _signal(process, signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_GRACE_S):
                await process.wait()
        except TimeoutError:
            log.warning("mover killed pid=%d grace_s=%.1f", process.pid, _STOP_GRACE_S)
            _signal(process, signal.SIGKILL)
            await process.wait()
        except asyncio.CancelledError:
            _signal(process, signal.SIGKILL)
            raise

    async def _give_order(self, process: Process) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(self._order).encode() + b"\n")
            await process.stdin.drain()
        except (ConnectionError, RuntimeError):
            pass  # it is gone already (uvloop: "the handler is closed"); its exit tells more

    async def _hear(self, process: Process, on_event: Callable[[Event], None]) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:
                log.warning("mover line too long pid=%d", process.pid)
                continue
            if not line:
                return
            event = _event_in(line)
            if event is None:
                continue
            if event["event"] in ("done", "failed"):
                self._last = event
            else:
                on_event(event)

    async def _hear_stderr(self, process: Process) -> None:
        assert process.stderr is not None
        while data := await process.stderr.read(_STDERR_BYTES):
            self._stderr = (self._stderr + data)[-_STDERR_BYTES:]

    def _outcome(self, process: Process) -> Outcome:
        last, status = self._last, process.returncode
        if self._stderr:
            words = self._stderr.decode(errors="replace").strip()
            log.warning("mover complained pid=%d status=%s words=%s", process.pid, status, words)
        if last is not None and last["event"] == "done":
            return Outcome(Ending.DONE)
        if last is not None:
            return Outcome(Ending.FAILED, Failure(str(last["code"]), str(last["message"])))
        if self._stopping.is_set():
            return Outcome(Ending.STOPPED)
        message = "The download's own process ended early. Resume it: every byte so far is kept."
        log.warning("mover lost pid=%d status=%s", process.pid, status)
        return Outcome(Ending.LOST, Failure("mover_lost", message))

    def _environment(self) -> dict[str, str]:
        """Return all that the mover may know: the token, and its way to programs and the hub."""
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        token = {} if self._token is None else {"HF_TOKEN": self._token}
        return {"LANG": "C.UTF-8"} | kept | token


def _event_in(line: bytes) -> Event | None:
    """Read one line; None for one that was cut when the mover was stopped, and for a blank."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _signal(process: Process, number: int) -> None:
    try:
        process.send_signal(number)
    except ProcessLookupError:
        pass  # it has just ended
