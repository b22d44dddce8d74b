"""Jobs on disk: they survive restarts, and no two of them ever have one destination.

Gateways that share a data directory share the file. Each goes on with the jobs of its own seat
(see `seats`), and the one at the first seat with those of seats that nobody has.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Final, Self

import msgspec

from xandrouting.core.errors import DestinationOccupied
from xandrouting.disk.sqlite_file import NotOurs, open_file
from xandrouting.downloads.jobs import ENDED, Job, Order
from xandrouting.downloads.seats import FIRST, Seats

log = logging.getLogger(__name__)

MAX_ENDED: Final = 500  # that are remembered; the oldest are forgotten first

_SCHEMA_VERSION: Final = 2
_ENDED: Final = ", ".join(f"'{state}'" for state in sorted(ENDED))
_CREATE: Final = (
    """
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY,
        destination TEXT NOT NULL,
        state TEXT NOT NULL,
        created_at REAL NOT NULL,
        job TEXT NOT NULL
    )
    """,
    f"CREATE UNIQUE INDEX one_at_a_destination ON jobs (destination) WHERE state NOT IN ({_ENDED})",
)
_ADD_SEATS: Final = f"ALTER TABLE jobs ADD COLUMN seat INTEGER NOT NULL DEFAULT {FIRST}"
_COLUMNS: Final = ("id", "destination", "state", "created_at", "job", "seat")
# Not REPLACE: it would throw out the other job of the same destination.
_SAVE: Final = """
INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET state = excluded.state, job = excluded.job
"""
_TRIM: Final = f"""
DELETE FROM jobs WHERE state IN ({_ENDED}) AND id NOT IN (
    SELECT id FROM jobs WHERE state IN ({_ENDED}) ORDER BY created_at DESC LIMIT ?
)
"""  # noqa: S608 - constants
_UNFINISHED: Final = f"SELECT id, destination FROM jobs WHERE state NOT IN ({_ENDED})"  # noqa: S608
_ENCODE: Final = msgspec.json.Encoder().encode
_JOB: Final = msgspec.json.Decoder(Job)


class JobStore:
    """One SQLite file. Without one that works, jobs do not outlive the process.

    For one user at a time, from whatever thread; every call may wait for the disk.
    """

    def __init__(self, connection: sqlite3.Connection | None, seats: Seats) -> None:
        """Use `open` instead; a connection of None keeps nothing."""
        self._connection = connection
        self._seats = seats
        self._seat = FIRST if connection is None else seats.take_first()
        self.is_alone = self._seat == FIRST  # as far as is known; `load` looks
        self._unsaved: dict[str, Job] = {}  # what the disk did not take yet
        self._warned = False

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the file at `path`, or begin it; a damaged one is moved aside."""
        seats = Seats(path.with_suffix(".lock"))
        return cls(open_file(path, _prepare, holds="downloads"), seats)

    def load(self) -> list[Job]:
        """Return this gateway's jobs, the oldest first, less those of another version."""
        if self._connection is None:
            return []
        try:
            mine = self._take_seats(self._connection)
            rows = self._connection.execute(
                "SELECT id, job, seat FROM jobs ORDER BY created_at, rowid"
            ).fetchall()
        except sqlite3.Error as error:
            self._warn(error)
            return []
        jobs = []
        for job_id, text, seat in rows:
            if seat not in mine:
                continue
            try:
                jobs.append(_JOB.decode(text))
            except (msgspec.DecodeError, TypeError, RecursionError) as error:
                log.warning("download forgotten job=%s reason=%s", job_id, error)
        return jobs

    def _take_seats(self, connection: sqlite3.Connection) -> set[int]:
        """Return which seats' jobs are ours; the first gateway takes those of who is gone."""
        known = connection.execute("SELECT DISTINCT seat FROM jobs").fetchall()
        seats = {self._seat, *(seat for [seat] in known)}
        first = self._seat == FIRST
        mine = {s for s in seats if s == self._seat or (first and self._seats.take(s))}
        self.is_alone = first and mine == seats
        if self.is_alone:
            self._trim(connection)
        else:
            log.warning(
                "another gateway uses this data_dir, its downloads are left to it seat=%d",
                self._seat,
            )
        return mine

    def _trim(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute(_TRIM, (MAX_ENDED,))
        except sqlite3.Error as error:
            self._warn(error)  # what is there can be read on a full disk too

    def unfinished(self) -> dict[str, str]:
        """Return the destination of every job that has not ended, whoever's it is, by id."""
        if self._connection is None:
            return {}
        try:
            return dict(self._connection.execute(_UNFINISHED).fetchall())
        except sqlite3.Error as error:
            self._warn(error)
            return {}

    def save(self, job: Job) -> bool:
        """Keep the job as it is now; False: the disk does not take it before the next one.

        Raises:
            DestinationOccupied: another gateway has a download of the same destination.
        """
        if self._connection is None:
            return True  # nothing of it will be there to be wrong
        self._unsaved[job.id] = job
        if job.id in self._write():
            raise taken(job.order)
        return job.id not in self._unsaved

    def _write(self) -> set[str]:
        """Write what is not written yet; return the jobs whose destination another one has."""
        assert self._connection is not None
        refused = set()
        for job in list(self._unsaved.values()):
            destination, state = job.order.destination, str(job.state)
            text = _ENCODE(job).decode()
            row = job.id, destination, state, job.created_at, text, self._seat
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
        self._seats.close()

    def _warn(self, error: sqlite3.Error) -> None:
        # The next write is tried all the same, and this one with it: a full disk may be emptied.
        if not self._warned:
            log.warning("downloads not written, kept in memory only reason=%s", error)
        self._warned = True


def taken(order: Order) -> DestinationOccupied:
    """Return the refusal of a folder that a download of another gateway has."""
    return DestinationOccupied(
        f"A download of another gateway has the folder {order.destination!r}. Wait for it, cancel "
        "it there, or choose another `destination`.",
        param="destination",
    )


def _prepare(connection: sqlite3.Connection) -> None:
    if _version(connection) < _SCHEMA_VERSION:
        connection.execute("BEGIN IMMEDIATE")  # another gateway may be at it
        _bring_up(connection)
        connection.execute("COMMIT")
    version = _version(connection)
    if version != _SCHEMA_VERSION:
        raise NotOurs(f"schema version {version}")
    columns = connection.execute("SELECT name FROM pragma_table_info('jobs')").fetchall()
    if tuple(name for [name] in columns) != _COLUMNS:
        raise NotOurs("other columns")


def _bring_up(connection: sqlite3.Connection) -> None:
    """Make an empty file ours, and one of an earlier version this one's."""
    version = _version(connection)
    tables = connection.execute("SELECT name FROM sqlite_schema").fetchall()
    if version == 0 and not tables:
        for statement in _CREATE:
            connection.execute(statement)
    elif version != 1:
        return
    connection.execute(_ADD_SEATS)
    connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")


def _version(connection: sqlite3.Connection) -> int:
    [version] = connection.execute("PRAGMA user_version").fetchone()
    return int(version)
