"""Jobs on disk: they survive restarts, and no two of them ever have one destination."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Final, Self

import msgspec

from xandrouting.core.errors import DestinationOccupied
from xandrouting.disk.sqlite_file import NotOurs, open_file
from xandrouting.downloads.jobs import ENDED, Job

log = logging.getLogger(__name__)

MAX_ENDED: Final = 500  # that are remembered; the oldest are forgotten first

_SCHEMA_VERSION: Final = 1
_ENDED: Final = ", ".join(f"'{state}'" for state in sorted(ENDED))
_CREATE: Final = f"""
BEGIN;
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    destination TEXT NOT NULL,
    state TEXT NOT NULL,
    created_at REAL NOT NULL,
    job TEXT NOT NULL
);
CREATE UNIQUE INDEX one_at_a_destination ON jobs (destination) WHERE state NOT IN ({_ENDED});
PRAGMA user_version = {_SCHEMA_VERSION};
COMMIT;
"""
_COLUMNS: Final = ("id", "destination", "state", "created_at", "job")
# Not REPLACE: it would throw out the other job of the same destination.
_SAVE: Final = """
INSERT INTO jobs VALUES (?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET state = excluded.state, job = excluded.job
"""
_TRIM: Final = f"""
DELETE FROM jobs WHERE state IN ({_ENDED}) AND id NOT IN (
    SELECT id FROM jobs WHERE state IN ({_ENDED}) ORDER BY created_at DESC LIMIT ?
)
"""  # noqa: S608 - constants
_ENCODE: Final = msgspec.json.Encoder().encode
_JOB: Final = msgspec.json.Decoder(Job)


class JobStore:
    """One SQLite file. Without one that works, jobs do not outlive the process.

    For one user at a time, from whatever thread; every call may wait for the disk.
    """

    def __init__(self, connection: sqlite3.Connection | None) -> None:
        """Use `open` instead; a connection of None keeps nothing."""
        self._connection = connection
        self._unsaved: dict[str, Job] = {}  # what the disk did not take yet
        self._warned = False

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the file at `path`, or begin it; a damaged one is moved aside."""
        return cls(open_file(path, _prepare, holds="downloads"))

    def load(self) -> list[Job]:
        """Return every job, the oldest first, less those that another version wrote for itself."""
        if self._connection is None:
            return []
        try:
            self._connection.execute(_TRIM, (MAX_ENDED,))
        except sqlite3.Error as error:
            self._warn(error)  # what is there can be read on a full disk too
        try:
            rows = self._connection.execute(
                "SELECT id, job FROM jobs ORDER BY created_at, rowid"
            ).fetchall()
        except sqlite3.Error as error:
            self._warn(error)
            return []
        jobs = []
        for job_id, text in rows:
            try:
                jobs.append(_JOB.decode(text))
            except (msgspec.DecodeError, TypeError, RecursionError) as error:
                log.warning("download forgotten job=%s reason=%s", job_id, error)
        return jobs

    def save(self, job: Job) -> None:
        """Keep the job as it is now; where the disk does not take it, with the next one.

        Raises:
            DestinationOccupied: another gateway has a download of the same destination.
        """
        if self._connection is None:
            return
        self._unsaved[job.id] = job
        if job.id in self._write():
            raise DestinationOccupied(
                f"Another download fetches into {job.order.destination!r}.", param="destination"
            )

    def _write(self) -> set[str]:
        """Write what is not written yet; return the jobs whose destination another one has."""
        assert self._connection is not None
        refused = set()
        for job in list(self._unsaved.values()):
            destination, state = job.order.destination, str(job.state)
            row = job.id, destination, state, job.created_at, _ENCODE(job).decode()
            try:
                self._connection.execute(_SAVE, row)
            except sqlite3.IntegrityError:
                refused.add(job.id)
            except sqlite3.Error as error:
                self._warn(error)
                break
            del self._unsaved[job.id]
        return refused

    def forget(self, job_id: str) -> None:
        """Keep nothing of a job any more."""
        self._unsaved.pop(job_id, None)
        if self._connection is None:
            return
        try:
            self._connection.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        except sqlite3.Error as error:
            self._warn(error)

    def close(self) -> None:
        """Close the file; later calls keep nothing."""
        if self._connection is not None:
            self._write()
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except sqlite3.Error as error:
                self._warn(error)

    def _warn(self, error: sqlite3.Error) -> None:
        # The next write is tried all the same, and this one with it: a full disk may be emptied.
        if not self._warned:
            log.warning("downloads not written, kept in memory only reason=%s", error)
        self._warned = True


def _prepare(connection: sqlite3.Connection) -> None:
    [version] = connection.execute("PRAGMA user_version").fetchone()
    tables = connection.execute("SELECT name FROM sqlite_schema").fetchall()
    if version == 0 and not tables:
        connection.executescript(_CREATE)
    elif version != _SCHEMA_VERSION:
        raise NotOurs(f"schema version {version}")
    columns = connection.execute("SELECT name FROM pragma_table_info('jobs')").fetchall()
    if tuple(name for [name] in columns) != _COLUMNS:
        raise NotOurs("other columns")
