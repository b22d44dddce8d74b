"""This machine's main memory: how much there is, and how much a process tree takes of it.

Linux tells by `/proc` and the control groups; elsewhere psutil knows the machine as a whole.
`root` is where those files lie: a test lays out its own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

import psutil

from xandrouting.core.model import HOST, DeviceReading, MemoryUse

ROOT: Final = Path("/")
KEPT_FOR_COSTS: Final = 200  # how often a figure's own CPU time passes before it is read again

_KIB_FIELD: Final = re.compile(rb"^(\w+):\s+(\d+) kB$", re.MULTILINE)
_OOM_KILLS: Final = re.compile(rb"^oom_kill (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """Where a control group's memory controller says what."""

    folder: str
    limit: str
    usage: str
    file_cache: tuple[str, ...]  # lines of memory.stat, the groups below included


_V1: Final = _GroupFiles(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_V2: Final = _GroupFiles(
    "sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")
)


def read(root: Path = ROOT) -> DeviceReading:
    """Read main memory, as far as this process's control groups let it be used.

    Raises:
        OSError: `/proc` cannot be read just now, as when no file can be opened.
    """
    try:
        meminfo = _kib_fields((root / "proc/meminfo").read_bytes())
    except FileNotFoundError:
        memory = psutil.virtual_memory()
        return DeviceReading(HOST, HOST, memory.total, memory.available)
    capacity, available = meminfo[b"MemTotal"], meminfo[b"MemAvailable"]
    for group, files in _groups(root):
        limit = _number(group / files.limit)
        if limit is not None and limit < meminfo[b"MemTotal"]:
            capacity = min(capacity, limit)
            available = min(available, max(0, limit - _taken(group, files)))
    return DeviceReading(HOST, HOST, capacity, available)


def _groups(root: Path) -> Iterator[tuple[Path, _GroupFiles]]:
    """Yield this process's groups that may limit memory, from its own up to the root.

    In a container the path is often that of the machine outside, while the container's own
    group is mounted as the root. What is not there has no files, and so no limit.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _V1 if controllers else _V2
        own = PurePosixPath(path)
        for group in (own, *own.parents):
            yield root / files.folder / group.relative_to("/"), files


def _taken(group: Path, files: _GroupFiles) -> int:
    """What a group takes less the files' pages, as MemAvailable counts for the machine."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cache = sum(int(stat.get(name, 0)) for name in files.file_cache)
    return (_number(group / files.usage) or 0) - cache


def _number(path: Path) -> int | None:
    """Read a file's one number; None where there is no such file, or it says `max`."""
    try:
        text = path.read_text().strip()
    except (FileNotFoundError, PermissionError):
        return None
    return None if text == "max" else int(text)


def _kib_fields(data: bytes) -> dict[bytes, int]:
    """Parse lines such as `Pss:  312 kB`; the values are bytes."""
    return {name: 1024 * int(kib) for name, kib in _KIB_FIELD.findall(data)}


def oom_kills(root: Path = ROOT) -> int | None:
    """Return how many processes the kernel has ended for want of memory; None: it does not say."""
    try:
        found = _OOM_KILLS.search((root / "proc/vmstat").read_bytes())
    except OSError:
        return None
    return None if found is None else int(found[1])


@dataclass(frozen=True, slots=True)
class _Share:
    """What one process takes; bytes. `anonymous` and `shared_memory` are part of `pss`."""

    pss: int
    anonymous: int
    shared_memory: int = 0  # its share of it


class Meter:
    """Measures process trees, at no more than a twentieth of a core for each process.

    To tell a process's share the kernel looks at every page it maps, 12 ms for each GiB of a
    model's file, and a large model would keep a core busy with being measured. So a figure
    that took long to read is kept for long: a small process's for milliseconds, 40 GiB for
    ten seconds. Its anonymous memory, which the kernel counts as it goes, is always fresh.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._kept: dict[int, tuple[float, _Share]] = {}  # by pid; until when

    def measure(self, pids: Iterable[int]) -> MemoryUse:
        """Add up what living processes take; one that ends meanwhile does not count.

        Nothing is told if one of them must not be looked at, or none is left.

        Raises:
            OSError: `/proc` cannot be read just now, as when no file can be opened.
        """
        now = time.monotonic()
        self._kept = {pid: kept for pid, kept in self._kept.items() if now < kept[0]}
        try:
            shares = [share for pid in pids if (share := self._share(pid)) is not None]
        except (PermissionError, psutil.AccessDenied):
            return MemoryUse()
        if not shares:
            return MemoryUse()
        return MemoryUse(
            host_bytes=sum(share.pss for share in shares),
            private_bytes=sum(share.anonymous + share.shared_memory for share in shares),
        )

    def _share(self, pid: int) -> _Share | None:
        kept = self._kept.get(pid)
        if kept is not None:
            return _freshened(self._root, pid, kept[1])
        began_s = time.thread_time()
        share = _read_share(self._root, pid)
        cost_s = time.thread_time() - began_s
        if share is not None:
            self._kept[pid] = (time.monotonic() + KEPT_FOR_COSTS * cost_s, share)
        return share


def _read_share(root: Path, pid: int) -> _Share | None:
    """Read what one process takes; None if it has ended."""
    try:
        fields = _kib_fields((root / f"proc/{pid}/smaps_rollup").read_bytes())
    except ProcessLookupError:
        return None
    except FileNotFoundError:
        return _ask_psutil(pid)  # it has ended, or the kernel is older than 4.14 or none
    anonymous = fields.get(b"Pss_Anon", fields[b"Anonymous"])  # before 5.4 not told by share
    return _Share(fields[b"Pss"], anonymous, fields.get(b"Pss_Shmem", 0))


def _freshened(root: Path, pid: int, share: _Share) -> _Share | None:
    """Return a figure of before with the anonymous memory of now; None if it has ended."""
    try:
        fields = _kib_fields((root / f"proc/{pid}/status").read_bytes())
    except (ProcessLookupError, FileNotFoundError):
        return None
    anonymous = fields.get(b"RssAnon", share.anonymous)
    return replace(share, pss=share.pss - share.anonymous + anonymous, anonymous=anonymous)


def _ask_psutil(pid: int) -> _Share | None:
    try:
        memory = psutil.Process(pid).memory_full_info()
    except psutil.NoSuchProcess:
        return None
    anonymous = memory.rss - memory.shared if hasattr(memory, "shared") else memory.uss
    return _Share(getattr(memory, "pss", memory.uss), anonymous)
