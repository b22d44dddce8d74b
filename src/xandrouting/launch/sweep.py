"""What outlived a gateway and its guards, found again at the next start.

A guard ends its engine's tree however the gateway died. Only where the guard was killed too may
something be left, and a file per live engine says what to look for. Every process of an engine
carries a random mark in its environment, so one that left the group, the session and its
parents is still known. Nothing is signalled that is neither marked, nor the remembered engine
with its start time, nor a descendant of those: a reused pid is never harmed.

Linux only: without `/proc` nothing is remembered and nothing is swept.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from xandrouting.launch import guard

log = logging.getLogger(__name__)

MARK: Final = "XR_ENGINE_MARK"  # the environment variable that every process of an engine inherits
_A_MARK: Final = re.compile("[0-9a-f]{32}")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_POLL_S: Final = 0.01
_GUARD_WAIT_S: Final = 2.0  # a guard whose gateway is gone ends its tree in half a second
_KILL_WAIT_S: Final = 5.0  # longer only if the kernel itself is stuck


@dataclass(frozen=True, slots=True)
class Life:
    """One process of this boot: a pid alone may be another's tomorrow."""

    pid: int
    start: int  # ticks since boot

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Look at a process now; None when there is none, or no `/proc`."""
        process = guard.look(pid)
        return None if process is None else cls(pid, process.start)

    def lasts(self) -> bool:
        """Whether this very process still runs; a zombie does not."""
        process = guard.look(self.pid)
        return process is not None and process.running and process.start == self.start


@dataclass(frozen=True, slots=True)
class Record:
    """One live engine, as its file remembers it."""

    mark: str
    boot_id: str
    gateway: Life
    guard: Life
    engine: Life  # leads its session and its group: their ids are its pid

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a file's text. Raises ValueError, KeyError or TypeError for any other text."""
        values: dict[str, Any] = json.loads(text)
        lives = {role: Life(**values[role]) for role in ("gateway", "guard", "engine")}
        return cls(mark=values["mark"], boot_id=values["boot_id"], **lives)


def remember(run_dir: Path, mark: str, *, guard_pid: int, engine_pid: int) -> Path | None:
    """Write down an engine this process started; return its file, which goes when the engine does.

    None when one of them is gone already, or on a system without `/proc`.

    Raises:
        OSError: `run_dir` cannot be made or written.
    """
    lives = [Life.of(pid) for pid in (os.getpid(), guard_pid, engine_pid)]
    gateway, guarding, engine = lives
    if gateway is None or guarding is None or engine is None:
        return None
    record = Record(mark, _boot_id(), gateway, guarding, engine)
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / f"{mark}.json"
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(asdict(record)))
    unfinished.replace(path)
    return path


def sweep(run_dir: Path) -> int:
    """Kill what is left of engines whose guard and gateway are gone; return how many had any.

    Engines of a gateway that lives are left alone, its own included. A guard that outlived its
    gateway is given time to do its work. Blocks, for some seconds at worst: not for the loop.
    """
    return sum(_sweep_one(path) for path in sorted(run_dir.glob("*.json")))


def _sweep_one(path: Path) -> bool:
    try:
        record = Record.parse(path.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("engine record unreadable file=%s error=%s", path.name, error)
        _discard_scratch(path.stem)  # it is named by its mark, and a power cut may empty it
        path.unlink(missing_ok=True)
        return False
    if record.boot_id == _boot_id():
        if record.gateway.lasts():
            return False
        _wait(lambda: not record.guard.lasts(), _GUARD_WAIT_S)
        ended = end_leftovers(record.mark, record.engine)
    else:
        ended = False  # the machine was started anew since: every pid is another's
        _discard_scratch(record.mark)
    path.unlink(missing_ok=True)
    return ended


def end_leftovers(mark: str, engine: Life | None) -> bool:
    """Kill what is left of one engine whose guard is gone; return whether there was anything.

    Its scratch folder goes with it, and the shared memory as far as what was left still mapped
    it. Blocks until it is gone, for some seconds at worst.
    """
    found = False
    segments = guard.Segments()

    def gone() -> bool:
        nonlocal found
        left = list(_leftovers(mark, engine))
        found = found or bool(left)
        segments.look(life.pid for life in left)
        for life in left:
            guard.send(life.pid, life.start, signal.SIGKILL)
        return not left

    if not _wait(gone, _KILL_WAIT_S):
        log.warning("engine leftovers cannot be killed mark=%s", mark)
    segments.remove()
    guard.discard(str(scratch_of(mark)))
    return found


def scratch_of(mark: str) -> Path:
    """Return the folder for temporary files of the engine with this mark, if it wants one.

    Its name is short: sockets in it have room for about 100 characters.
    """
    return Path(tempfile.gettempdir(), f"xr-{mark[:16]}")


def _discard_scratch(mark: str) -> None:
    """Remove the scratch folder of an engine that is not running, as far as can be told."""
    if _A_MARK.fullmatch(mark) and next(_leftovers(mark, None), None) is None:
        guard.discard(str(scratch_of(mark)))


def _leftovers(mark: str, engine: Life | None) -> Iterator[Life]:
    table = guard.processes()
    roots = {pid for pid in table if _is_marked(pid, mark)}
    if engine is not None and engine.lasts():
        roots.add(engine.pid)
    below = {pid for root in roots for pid in guard.descendants(table, root)}
    for pid in (roots | below) & table.keys():
        if table[pid].running:
            yield Life(pid, table[pid].start)


def _is_marked(pid: int, mark: str) -> bool:
    try:
        environment = Path(f"{guard.PROC}/{pid}/environ").read_bytes()
    except OSError:
        return False  # it is gone, or another user's
    return f"{MARK}={mark}".encode() in environment.split(b"\0")


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _wait(fact: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not fact():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True
