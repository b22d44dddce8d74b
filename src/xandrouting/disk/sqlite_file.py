"""A SQLite file that begins anew when it is damaged, and is done without when it cannot be."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_BUSY_S: Final = 0.05  # another gateway's write takes far less
_DAMAGED: Final = frozenset((sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR))


class NotOurs(Exception):
    """The file is damaged, or something else wrote it."""


class WarnsOnce:
    """Lets an error of SQLite pass and logs the first one; what comes next is tried all the same.

    It is a context, as often as one likes: a full disk may be emptied.
    """

    def __init__(self, warning: str) -> None:
        """`warning` says what goes on without the file."""
        self._warning = warning
        self._warned = False

    def __enter__(self) -> None:
        """Begin what may fail."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        """Swallow an error of SQLite, and no other."""
        if not isinstance(error, sqlite3.Error):
            return False
        if not self._warned:
            log.warning("%s reason=%s", self._warning, error)
        self._warned = True
        return True


def open_file(
    path: Path, prepare: Callable[[sqlite3.Connection], None], *, holds: str
) -> sqlite3.Connection | None:
    """Open the file at `path`, or begin it, readable for this user only; None: there can be none.

    `prepare` makes the tables of an empty file and checks those of another; what it finds to be
    `NotOurs` is moved aside to `….damaged`. `holds` is the log's word for what is in it. It
    blocks for some milliseconds, and its connection may be used from any thread, one at a time.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        try:
            return _connect(path, prepare)
        except NotOurs as error:
            log.warning("%s file moved aside path=%s reason=%s", holds, path, error)
            _move_aside(path)
            path.touch(mode=0o600)
            return _connect(path, prepare)
    except (OSError, sqlite3.Error, NotOurs) as error:
        log.warning("%s kept in memory only path=%s reason=%s", holds, path, error)
        return None


def _connect(path: Path, prepare: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
    )
    try:
        prepare(connection)
        [problem] = connection.execute("PRAGMA quick_check(1)").fetchone()
        if problem != "ok":
            raise NotOurs(problem)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    except sqlite3.Error as error:
        connection.close()
        # Text that is no UTF-8 is an error of the module's own, without a code.
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in _DAMAGED:
            raise NotOurs(error) from error
        raise
    except NotOurs:
        connection.close()
        raise
    return connection


def _move_aside(path: Path) -> None:
    # Its write-ahead log and index are there when it was not closed well, or another gateway
    # has it open; they are part of it.
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            old = path.with_name(path.name + suffix)
            old.replace(path.with_name(f"{path.name}.damaged{suffix}"))
