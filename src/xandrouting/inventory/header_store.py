"""What headers told, kept on disk across restarts: by file, for as long as it stays the same."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Final, Self

from xandrouting.disk.sqlite_file import NotOurs, WarnsOnce, open_file

MAX_ROWS: Final = 20_000
MAX_ROW_BYTES: Final = 256 << 10  # a larger one is read again after a restart
_FLUSH_ROWS: Final = 64  # that a kill may cost
_SCHEMA_VERSION: Final = 1
_CREATE: Final = f"""
BEGIN;
CREATE TABLE headers (
    path BLOB NOT NULL PRIMARY KEY,
    identity BLOB NOT NULL,
    told BLOB NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE TABLE readers (version TEXT NOT NULL);
PRAGMA user_version = {_SCHEMA_VERSION};
COMMIT;
"""
_TABLES: Final = {"headers", "readers"}
# REPLACE gives a row a new rowid, higher than all: the lowest are the oldest.
_TRIM: Final = """
DELETE FROM headers WHERE rowid <= (SELECT rowid FROM headers ORDER BY rowid DESC LIMIT 1 OFFSET ?)
"""


def version_of(modules: Sequence[ModuleType]) -> str:
    """Return what changes with the source of these modules: what others read is not ours."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


class HeaderStore:
    """One SQLite file. It never fails: without a file that works, nothing outlives the process.

    It may be used from several threads at once; every call blocks, for less than a millisecond
    as a rule.
    """

    def __init__(self, connection: sqlite3.Connection | None) -> None:
        """Use `open` instead; a connection of None keeps nothing."""
        self._connection = connection
        self._lock = threading.Lock()
        self._rows: list[tuple[bytes, bytes, bytes, int]] = []  # not written yet
        self._refusals = WarnsOnce("headers file fails, they are read again")

    @classmethod
    def open(cls, path: Path, version: str) -> Self:
        """Open the file at `path`, or begin it, readable for this user only.

        What another `version` of the readers wrote is forgotten. A file that is damaged or none
        of ours is moved aside to `….damaged`.
        """
        return cls(open_file(path, lambda file: _prepare(file, version), holds="headers"))

    def find(self, path: str, identity: bytes) -> bytes | None:
        """Return what was kept of the file at `path`; None: nothing, or it is another file now."""
        row = None
        with self._lock, self._refusals:
            if self._connection is not None:
                query = "SELECT identity, told, checksum FROM headers WHERE path = ?"
                row = self._connection.execute(query, (os.fsencode(path),)).fetchone()
        if row is None or row[0] != identity or not isinstance(row[1], bytes):
            return None
        told: bytes = row[1]
        return told if zlib.crc32(told) == row[2] else None

    def keep(self, path: str, identity: bytes, told: bytes) -> None:
        """Remember what a file told; `flush` writes it."""
        if len(told) > MAX_ROW_BYTES:
            return
        row = os.fsencode(path), identity, told, zlib.crc32(told)
        with self._lock:
            self._rows.append(row)
            full = len(self._rows) >= _FLUSH_ROWS
        if full:
            self.flush()

    def flush(self) -> None:
        """Write what is new."""
        with self._lock:
            rows, self._rows = self._rows, []
            if self._connection is None or not rows:
                return
            with self._refusals, self._connection as connection:
                connection.execute("BEGIN")
                connection.executemany("REPLACE INTO headers VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Write what is new and close the file; nothing is kept after that."""
        self.flush()
        with self._lock, self._refusals:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()


def _prepare(connection: sqlite3.Connection, version: str) -> None:
    [schema] = connection.execute("PRAGMA user_version").fetchone()
    found = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
    tables = {name for [name] in found}
    if schema == 0 and not tables:
        connection.executescript(_CREATE)
    elif schema != _SCHEMA_VERSION or tables != _TABLES:
        raise NotOurs(f"schema version {schema}")
    if connection.execute("SELECT version FROM readers").fetchall() != [(version,)]:
        connection.execute("DELETE FROM headers")
        connection.execute("DELETE FROM readers")
        connection.execute("INSERT INTO readers VALUES (?)", (version,))
    connection.execute(_TRIM, (MAX_ROWS,))
