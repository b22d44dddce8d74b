"""What downloads that are over have left: the next one of the same content goes on from it.

Parts are named by their content, so it does not matter whose they were, of which commit they came
and whether anybody remembers. The mover hashes every byte it did not fetch itself.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from xandrouting.downloads.jobs import Order, RemoteFile

log = logging.getLogger(__name__)

PARTS: Final = ".parts"  # in a job's folder; a file for each content, named by its hash
TREE: Final = "tree"  # finished files, about to be published
_LOCKED: Final = (errno.EWOULDBLOCK, errno.EACCES)


@dataclass(frozen=True, slots=True)
class Leftover:
    """Some or all bytes of one content, and whose they were."""

    path: Path
    size: int
    job_id: str


Leftovers = Mapping[str, Leftover]
"""The leftovers by their content's hash."""

NO_LEFTOVERS: Final[Leftovers] = MappingProxyType({})


def content_of(file: RemoteFile) -> str:
    """Return what a file's part is called."""
    return file.sha256 or file.blob_id or ""


@contextmanager
def leftovers(
    folders: Sequence[Path], order: Order, files: Sequence[RemoteFile], spared: Collection[str]
) -> Iterator[Leftovers]:
    """Yield the most there is of each of these files, but for the jobs that are `spared`.

    No mover writes to any of it as long as the context lasts: folders that one has are left out.
    """
    found: dict[str, Leftover] = {}
    with ExitStack() as held:
        for folder in folders:
            if folder.name in spared:
                continue
            with ExitStack() as mine:
                if not mine.enter_context(_idle(folder / PARTS)):
                    continue
                before = dict(found)
                for content, one in _usable(folder, order, files):
                    if content not in found or found[content].size < one.size:
                        found[content] = one
                if found != before:
                    held.push(mine.pop_all())
        yield found


def take(found: Leftovers, parts: Path) -> set[str]:
    """Move leftovers to a job's parts; return whose they were."""
    givers = set()
    for content, one in found.items():
        try:
            one.path.rename(parts / content)
        except OSError as error:
            log.warning("download parts not taken over from=%s reason=%s", one.job_id, error)
            continue
        givers.add(one.job_id)
    for giver in givers:
        with suppress(OSError):  # something else is in it
            (parts.parent.parent / giver / PARTS).rmdir()
            (parts.parent.parent / giver).rmdir()
    return givers


@contextmanager
def _idle(parts: Path) -> Iterator[bool]:
    """Whether no mover has these parts; none gets them as long as the context lasts."""
    try:
        fd = os.open(parts, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield not os.path.lexists(parts)
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            idle = error.errno not in _LOCKED  # else a filesystem without locks
        else:
            idle = True
        yield idle
    finally:
        os.close(fd)


def _usable(
    folder: Path, order: Order, files: Sequence[RemoteFile]
) -> Iterator[tuple[str, Leftover]]:
    wanted = [(content_of(file), file.size) for file in files]
    if order.package is not None:
        wanted.append((order.package.sha256, order.package.size))
    for content, size in wanted:
        part = folder / PARTS / content
        if 0 < _size(part) <= size:  # of a longer one the mover would keep nothing
            yield content, Leftover(part, _size(part), folder.name)
    for file in files:
        finished = folder / TREE / file.path
        if 0 < _size(finished) == file.size:
            yield content_of(file), Leftover(finished, file.size, folder.name)


def _size(path: Path) -> int:
    """Return a regular file's size; 0: there is none."""
    try:
        status = path.lstat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
