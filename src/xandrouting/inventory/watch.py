"""Hears of changes on disk.

Of the two libraries that are kept up, watchfiles asks the system in Rust and wakes Python ten
times a second; watchdog takes a thread and an inotify instance for each folder, and makes
Python objects of every write there is. Each folder is watched by itself and not with what lies
below: the library would follow symlinks out of the root, and hear every byte of a download.
What it watches is the folder of that time, whatever comes in its place later.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from watchfiles import Change
from watchfiles._rust_notify import RustNotify, WatchfilesRustInternalError

log = logging.getLogger(__name__)

STEP_MS: Final = 100  # between looks at what the system said; a change is told after two
DEBOUNCE_MS: Final = 400  # a change is told after so long, though more keep coming
LOOK_EVERY_MS: Final = 1000  # at the roots themselves, which may come, go or be replaced
TRY_AGAIN_S: Final = 60.0  # after the system refused
_MOUNTS: Final = Path("/proc/self/mountinfo")
# Others may change these without this machine's kernel knowing.
_SHARED: Final = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "ceph", "glusterfs", "lustre"),
        *("gpfs", "beegfs", "ocfs2", "gfs2", "9p", "virtiofs", "vboxsf", "prl_fs", "fuse"),
    )
)


class FolderWatch:
    """Calls `on_change` on the loop after something changed in one of the folders it watches.

    `roots` may be symlinks, and need not exist: their coming and going is heard of too.
    """

    def __init__(self, roots: Sequence[Path], on_change: Callable[[], None]) -> None:
        self._roots = tuple(roots)
        self._on_change = on_change
        self._watched: list[_Identity] = []
        self._replaced = False  # one of them went; another may have its name, and its inode too
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._works = False
        self._again_at = 0.0  # no watch of the same folders is tried before
        self._warned = False

    @property
    def works(self) -> bool:
        """Whether every change in the folders of the last `watch` is heard of."""
        return self._works

    async def watch(self, folders: frozenset[str]) -> bool:
        """Watch these folders from now on instead; return whether anything had to be done.

        What changes meanwhile may go unheard: look once more afterwards.
        """
        found = await asyncio.to_thread(_identities, sorted(folders))
        same = found == self._watched and not self._replaced
        if same and (self._works or time.monotonic() < self._again_at):
            return False
        await self.aclose()
        self._watched, self._replaced = found, False
        notify = await asyncio.to_thread(self._begin, folders)
        self._works = notify is not None
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run,
            args=(notify, folders, self._stop, asyncio.get_running_loop()),
            name="models-watch",
            daemon=True,
        )
        self._thread.start()
        return self._works

    async def aclose(self) -> None:
        """Hear of nothing more."""
        self._works = False
        self._stop.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def _begin(self, folders: frozenset[str]) -> RustNotify | None:
        shared = shared_among(folders)
        if shared is not None:
            self._warn(f"it lies on a file system that other machines may change, {shared}")
            return None
        try:
            return RustNotify(sorted(folders), False, False, 0, False, True)
        except FileNotFoundError as error:  # gone meanwhile, or the system's limit is reached
            if all(map(os.path.isdir, folders)):
                self._warn(f"raise fs.inotify.max_user_watches: {error}")
        except (OSError, UnicodeError, WatchfilesRustInternalError) as error:
            self._warn(str(error))
        return None

    def _warn(self, reason: str) -> None:
        self._again_at = time.monotonic() + TRY_AGAIN_S
        if not self._warned:
            log.warning("models folders not watched, they are looked at instead reason=%s", reason)
        self._warned = True

    def _run(
        self,
        notify: RustNotify | None,
        folders: frozenset[str],
        stop: threading.Event,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        before = _identities(self._roots)
        with _mounting() as has_mounted:
            while not stop.is_set():
                heard = _wait(notify, stop)
                now = _identities(self._roots)
                if stop.is_set():
                    break
                if heard is None:
                    self._works = False
                    notify = None
                elif any(path in folders and change != Change.modified for change, path in heard):
                    self._replaced = True
                if heard or heard is None or now != before or has_mounted():
                    before = now
                    loop.call_soon_threadsafe(self._on_change)
        if notify is not None:
            notify.close()


def _wait(notify: RustNotify | None, stop: threading.Event) -> set[tuple[int, str]] | None:
    """Wait for a second at most; return what changed and how, None: this cannot go on."""
    if notify is None:
        stop.wait(LOOK_EVERY_MS / 1000)
        return set()
    try:
        heard = notify.watch(DEBOUNCE_MS, STEP_MS, LOOK_EVERY_MS, stop)
    except WatchfilesRustInternalError as error:  # a name that is no text, or a limit
        log.info("models watch begins anew reason=%s", error)
        notify.close()
        return None
    return set() if isinstance(heard, str) else heard


_Identity = tuple[str, int, int] | None


def _identities(folders: Iterable[str | Path]) -> list[_Identity]:
    """Return which folder each is now; None: it is none."""
    found: list[_Identity] = []
    for folder in folders:
        try:
            status = Path(folder).stat()
        except OSError:
            found.append(None)
        else:
            found.append((str(folder), status.st_dev, status.st_ino))
    return found


@contextmanager
def _mounting() -> Iterator[Callable[[], bool]]:
    """Yield what tells whether a file system came or went since it was asked: no folder hears."""
    try:
        file = _MOUNTS.open("rb")
    except OSError:
        yield lambda: False  # not Linux
        return
    with file:
        poll = select.poll()
        poll.register(file, select.POLLPRI)
        yield lambda: bool(poll.poll(0))


def shared_among(folders: Iterable[str], mounts: Path = _MOUNTS) -> str | None:
    """Return the kind of file system that other machines may change, if a folder is on one."""
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None  # not Linux
    kinds: dict[str, str] = {}
    for line in lines:
        fields, _, rest = line.partition(" - ")
        kinds[_unescaped(fields.split(" ")[4])] = rest.split(" ")[0]
    shared = {at: kind for at, kind in kinds.items() if kind.partition(".")[0] in _SHARED}
    if not shared:
        return None
    for folder in folders:
        at = folder
        while at not in kinds and at not in ("", "/"):
            at = at.rpartition("/")[0]
        kind = shared.get(at or "/")
        if kind is not None:
            return kind
    return None


def _unescaped(path: str) -> str:
    for escaped, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(escaped, plain)
    return path
