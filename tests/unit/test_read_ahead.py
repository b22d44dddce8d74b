"""Read-ahead: what is asked of the system, and how much."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from xandrouting.launch.read_ahead import CHUNK_BYTES, read_ahead

pytestmark = pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="this system cannot be asked to read ahead"
)
MIB = 1 << 20


class Asked:
    """What was asked to be read: file, offset and length; and which bytes were waited for."""

    def __init__(self) -> None:
        self.pieces: list[tuple[str, int, int]] = []
        self.waited: list[int] = []
        self.then: Callable[[], object] = lambda: None  # called with each piece

    @property
    def size_bytes(self) -> int:
        return sum(length for _, _, length in self.pieces)

    def advise(self, file: int, at: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        self.pieces.append((Path(os.readlink(f"/proc/self/fd/{file}")).name, at, length))  # noqa: PTH115
        self.then()

    def pread(self, _file: int, length: int, at: int) -> bytes:
        assert length == 1
        self.waited.append(at)
        return b"x"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(os, "posix_fadvise", asked.advise)
    monkeypatch.setattr(os, "pread", asked.pread)
    return asked


@pytest.fixture
def ended() -> threading.Event:
    return threading.Event()


def file_of(folder: Path, name: str, size_bytes: int) -> str:
    path = folder / name
    with path.open("wb") as file:
        file.truncate(size_bytes)  # a hole takes no disk
    return str(path)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_files_are_read_in_pieces_and_in_their_order(
    tmp_path: Path, asked: Asked, ended: threading.Event
) -> None:
    files = [file_of(tmp_path, "b", CHUNK_BYTES + 5), file_of(tmp_path, "a", 7)]
    assert read_ahead(files, limit_bytes=1 << 40, ended=ended) == CHUNK_BYTES + 12
    assert asked.pieces == [("b", 0, CHUNK_BYTES), ("b", CHUNK_BYTES, 5), ("a", 0, 7)]
    assert asked.waited == [CHUNK_BYTES - 1, CHUNK_BYTES + 4, 6]  # the last byte of each


@pytest.mark.parametrize("limit_bytes", [1, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 3])
def test_no_more_is_read_than_may_be(
    tmp_path: Path, asked: Asked, ended: threading.Event, limit_bytes: int
) -> None:
    files = [file_of(tmp_path, name, CHUNK_BYTES + 1) for name in ("a", "b", "c")]
    assert read_ahead(files, limit_bytes=limit_bytes, ended=ended) == limit_bytes
    assert asked.size_bytes == limit_bytes


@pytest.mark.parametrize("limit_bytes", [0, -5])
def test_where_nothing_may_be_read_nothing_is(
    tmp_path: Path, asked: Asked, ended: threading.Event, limit_bytes: int
) -> None:
    assert read_ahead([file_of(tmp_path, "a", 9)], limit_bytes=limit_bytes, ended=ended) == 0
    assert asked.pieces == []


def test_what_cannot_be_read_is_left_to_the_load(
    tmp_path: Path, asked: Asked, ended: threading.Event
) -> None:
    files = [str(tmp_path / "none"), file_of(tmp_path, "empty", 0), file_of(tmp_path, "a", 9)]
    assert read_ahead(files, limit_bytes=100, ended=ended) == 9
    assert asked.pieces == [("a", 0, 9)]


def test_a_folder_in_a_file_s_place_is_no_fault(tmp_path: Path, ended: threading.Event) -> None:
    (tmp_path / "shards").mkdir()
    files = [str(tmp_path / "shards"), file_of(tmp_path, "a", 9)]
    assert read_ahead(files, limit_bytes=100, ended=ended) == 9


def test_it_ends_with_the_piece_it_is_at(
    tmp_path: Path, asked: Asked, ended: threading.Event
) -> None:
    def end() -> None:
        if len(asked.pieces) == 2:
            ended.set()

    asked.then = end
    files = [file_of(tmp_path, name, 3 * CHUNK_BYTES) for name in ("a", "b")]
    assert read_ahead(files, limit_bytes=1 << 40, ended=ended) == 2 * CHUNK_BYTES
    assert {name for name, _, _ in asked.pieces} == {"a"}


def test_it_does_not_begin_when_it_has_ended(
    tmp_path: Path, asked: Asked, ended: threading.Event
) -> None:
    ended.set()
    assert read_ahead([file_of(tmp_path, "a", 9)], limit_bytes=100, ended=ended) == 0
    assert asked.pieces == []


@pytest.mark.parametrize("fails", [False, True])
def test_every_file_is_closed_again(
    tmp_path: Path,
    asked: Asked,
    ended: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    fails: bool,
) -> None:
    def broken(*_: int) -> bytes:
        raise OSError(5, "Input/output error")

    if fails:
        monkeypatch.setattr(os, "pread", broken)
    before = open_files()
    files = [file_of(tmp_path, name, 9) for name in "abcd"]
    assert read_ahead(files, limit_bytes=100, ended=ended) == (0 if fails else 36)
    assert len(asked.pieces) == 4
    assert open_files() == before


def test_a_system_that_cannot_be_asked_reads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: threading.Event
) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    assert read_ahead([file_of(tmp_path, "a", 9)], limit_bytes=100, ended=ended) == 0


def test_the_real_system_takes_it(tmp_path: Path, ended: threading.Event) -> None:
    path = tmp_path / "model"
    path.write_bytes(os.urandom(MIB))
    assert read_ahead([str(path)], limit_bytes=10 * MIB, ended=ended) == MIB
