"""Figures of earlier loads, kept on disk across restarts."""

from __future__ import annotations

import sqlite3
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Final, Self

import msgspec

from xandrouting.core.figures import MAX_FIGURES, FigureKey, Figures
from xandrouting.core.model import Figure, LoadOptions
from xandrouting.disk.sqlite_file import NotOurs, WarnsOnce, open_file

_Bytes = Annotated[int, msgspec.Meta(ge=0)]


class _Row(msgspec.Struct, array_like=True):
    """One row; the fields are the columns."""

    learned_as: str
    device: str
    placement_cards: int
    options: str  # those that are set, as JSON
    host_bytes: _Bytes
    device_bytes: _Bytes
    load_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)]


_SCHEMA_VERSION: Final = 1
_COLUMNS: Final = ", ".join(_Row.__struct_fields__)
# REPLACE gives a row a new rowid, higher than all: their order is the order of the last loads.
_SAVE: Final = f"REPLACE INTO figures ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - constants
_LOAD: Final = f"SELECT {_COLUMNS} FROM figures ORDER BY rowid"  # noqa: S608 - constants
_CREATE: Final = f"""
BEGIN;
CREATE TABLE figures (
    learned_as TEXT NOT NULL,
    device TEXT NOT NULL,
    placement_cards INTEGER NOT NULL,
    options TEXT NOT NULL,
    host_bytes INTEGER NOT NULL,
    device_bytes INTEGER NOT NULL,
    load_s REAL NOT NULL,
    PRIMARY KEY (learned_as, device, placement_cards, options)
);
PRAGMA user_version = {_SCHEMA_VERSION};
COMMIT;
"""
_TRIM: Final = """
DELETE FROM figures WHERE rowid <= (SELECT rowid FROM figures ORDER BY rowid DESC LIMIT 1 OFFSET ?)
"""
_OPTIONS: Final = frozenset(field.name for field in fields(LoadOptions))


class FigureStore:
    """One SQLite file. It never fails: without a file that works, nothing outlives the process.

    For one user at a time, from whatever thread.
    """

    def __init__(self, connection: sqlite3.Connection | None) -> None:
        """Use `open` instead; a connection of None keeps nothing."""
        self._connection = connection
        self._refusals = WarnsOnce("figures not written, kept in memory only")

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the file at `path`, or begin it, readable for this user only.

        A file that is damaged or none of ours is moved aside to `….damaged`. It blocks for
        some milliseconds.
        """
        return cls(open_file(path, _prepare, holds="figures"))

    def load(self) -> Figures:
        """Read what was saved, less the rows that another version wrote for itself."""
        rows = []
        if self._connection is not None:
            with self._refusals:
                self._connection.execute(_TRIM, (MAX_FIGURES,))
                rows = self._connection.execute(_LOAD).fetchall()
        return Figures(item for row in rows if (item := _item(row)) is not None)

    def save(
        self,
        learned_as: str,
        device: str,
        placement_cards: int,
        options: LoadOptions,
        figure: Figure,
    ) -> None:
        """Keep `figure` in place of the one of the same key; it takes microseconds."""
        if self._connection is None or not learned_as:
            return
        key = learned_as, device, placement_cards, _text(options)
        with self._refusals:
            self._connection.execute(
                _SAVE, (*key, figure.host_bytes, figure.device_bytes, figure.load_s)
            )

    def close(self) -> None:
        """Close the file; later calls keep nothing."""
        if self._connection is not None:
            with self._refusals:
                self._connection.close()
            self._connection = None


def _prepare(connection: sqlite3.Connection) -> None:
    [version] = connection.execute("PRAGMA user_version").fetchone()
    tables = connection.execute("SELECT name FROM sqlite_schema").fetchall()
    if version == 0 and not tables:
        connection.executescript(_CREATE)
    elif version != _SCHEMA_VERSION:
        raise NotOurs(f"schema version {version}")
    columns = connection.execute("SELECT name FROM pragma_table_info('figures')").fetchall()
    if tuple(name for [name] in columns) != _Row.__struct_fields__:
        raise NotOurs("other columns")


def _text(options: LoadOptions) -> str:
    asked = {name: value for name, value in asdict(options).items() if value is not None}
    return msgspec.json.encode(asked, order="deterministic").decode()


def _item(row: tuple[object, ...]) -> tuple[FigureKey, Figure] | None:
    try:
        saved = msgspec.convert(row, _Row)
    except msgspec.ValidationError:
        return None
    options = _options(saved.options)
    if options is None:
        return None
    key = FigureKey(saved.learned_as, saved.device, saved.placement_cards, options)
    return key, Figure(saved.host_bytes, saved.device_bytes, saved.load_s)


def _options(text: str) -> LoadOptions | None:
    try:
        asked = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        if not asked.keys() <= _OPTIONS:
            return None
        return msgspec.json.decode(text, type=LoadOptions)
    except (msgspec.DecodeError, RecursionError):
        return None
