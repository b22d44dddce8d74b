"""The trash gives way to a download: the oldest first, and no more than is needed."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xandrouting.core.errors import InsufficientDisk, ModelsDirUnusable
from xandrouting.downloads.place import Place
from xandrouting.inventory import trash
from xandrouting.inventory.roots import Root
from xandrouting.inventory.scan import HeaderCache, scan

BLOCK = 4096
DISK_BLOCKS = 100


class SmallDisk:
    """A disk of 100 blocks, on which only what lies in the models directory takes any."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.missing = False

    def statvfs(self, path: Any) -> Any:
        if self.missing:
            raise OSError(5, "Input/output error")
        used = sum(f.stat().st_size // BLOCK for f in self.root.rglob("*") if f.is_file())
        return SimpleNamespace(f_bavail=DISK_BLOCKS - used, f_blocks=DISK_BLOCKS, f_frsize=BLOCK)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> SmallDisk:
    found = SmallDisk(root)
    monkeypatch.setattr(os, "statvfs", found.statvfs)
    return found


def put(root: Path, name: str, blocks: int) -> Path:
    """Put a file of so many blocks into a folder of the trash."""
    file = root / ".trash" / name / "m" / "m.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(blocks * BLOCK))
    return file


def names(root: Path) -> set[str]:
    return {path.name for path in (root / ".trash").iterdir()}


OLD, NEWER, NEWEST = (f"2026112{day}T000000Z-m" for day in (1, 2, 3))


def make_room(root: Path, blocks: int) -> None:
    trash.make_room(Root(root), blocks * BLOCK)


def test_the_oldest_go_first_and_no_more_than_needed(
    root: Path, disk: SmallDisk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    put(root, NEWEST, 20)
    put(root, OLD, 20)
    put(root, NEWER, 20)
    make_room(root, 40)
    assert names(root) == {OLD, NEWER, NEWEST}  # so much is free
    make_room(root, 50)
    assert names(root) == {NEWER, NEWEST}
    make_room(root, 99)
    assert names(root) == set()
    assert [record.getMessage() for record in caplog.records] == [
        "trash gave way to a download models=1",
        "trash gave way to a download models=2",
    ]


def test_all_of_it_stays_where_it_would_not_be_enough(root: Path, disk: SmallDisk) -> None:
    put(root, OLD, 20)
    (root / "model.gguf").write_bytes(bytes(50 * BLOCK))
    make_room(root, 51)
    assert names(root) == {OLD}
    make_room(root, 50)
    assert names(root) == set()


def test_what_is_not_ours_stays(root: Path, disk: SmallDisk, tmp_path: Path) -> None:
    put(root, "mine", 20)
    put(root, "99999999T999999Z-m", 20)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (root / ".trash" / OLD).symlink_to(elsewhere)
    make_room(root, 70)
    assert names(root) == {"mine", "99999999T999999Z-m", OLD}
    assert elsewhere.is_dir()


def test_a_hard_link_gives_nothing(root: Path, disk: SmallDisk) -> None:
    os.link(put(root, OLD, 20), root / "kept.gguf")
    make_room(root, 81)
    assert names(root) == {OLD}


def test_a_trash_that_leads_elsewhere_or_is_not_there(
    root: Path, disk: SmallDisk, tmp_path: Path
) -> None:
    make_room(root, DISK_BLOCKS + 1)
    elsewhere = tmp_path / "elsewhere"
    put(elsewhere, OLD, 20)
    (root / ".trash").symlink_to(elsewhere / ".trash")
    make_room(root, DISK_BLOCKS + 1)
    assert (elsewhere / ".trash" / OLD).is_dir()
    make_room(tmp_path / "absent", 1)


def test_what_cannot_be_removed_is_passed_over(
    root: Path, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, OLD, 20)
    put(root, NEWER, 20)
    remove = shutil.rmtree

    def stubborn(path: Path, **options: Any) -> None:
        if path.name == OLD:
            raise PermissionError(13, "Permission denied")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    make_room(root, 80)
    assert names(root) == {OLD}


def test_a_deletion_that_is_under_way_is_waited_for(
    root: Path, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what has been moved already would go, and the rest could not be put back."""
    (root / "m.gguf").write_bytes(bytes(50 * BLOCK))
    found = scan(root, HeaderCache())
    [model] = found.models
    moved, go_on = threading.Event(), threading.Event()
    rename = Path.rename

    def slow(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        moved.set()
        assert go_on.wait(10)
        return renamed

    monkeypatch.setattr(Path, "rename", slow)
    deleting = threading.Thread(target=lambda: trash.delete(Root(root), model, found))
    emptying = threading.Thread(target=lambda: make_room(root, DISK_BLOCKS))
    deleting.start()
    assert moved.wait(10)
    emptying.start()
    emptying.join(0.2)  # it would have ended by now
    assert emptying.is_alive()
    assert len(names(root)) == 1
    go_on.set()
    deleting.join(10)
    emptying.join(10)
    assert names(root) == set()


# What downloads make of it.


def place(root: Path) -> Place:
    return Place(root, make_room=lambda free_bytes: trash.make_room(Root(root), free_bytes))


def test_a_download_gets_the_room_of_the_trash(root: Path, disk: SmallDisk) -> None:
    put(root, OLD, 30)
    put(root, NEWER, 30)
    reserve = 2  # a 50th
    place(root).room_for(40 * BLOCK, promised_bytes=20 * BLOCK, repo_id="o/n")
    assert names(root) == {NEWER}
    place(root).room_for((70 - reserve) * BLOCK, promised_bytes=0, repo_id="o/n")
    assert names(root) == {NEWER}
    place(root).room_for(0, promised_bytes=1000 * BLOCK, repo_id="o/n")
    assert names(root) == {NEWER}


def test_the_trash_is_left_alone_by_what_is_refused(root: Path, disk: SmallDisk) -> None:
    put(root, OLD, 30)
    with pytest.raises(InsufficientDisk) as caught:
        place(root).room_for(100 * BLOCK, promised_bytes=0, repo_id="o/n")
    assert names(root) == {OLD}
    assert (caught.value.details or {})["free_bytes"] == 70 * BLOCK


def test_a_disk_that_cannot_be_asked(root: Path, disk: SmallDisk) -> None:
    put(root, OLD, 30)
    disk.missing = True
    with pytest.raises(ModelsDirUnusable):
        place(root).room_for(90 * BLOCK, promised_bytes=0, repo_id="o/n")
    with pytest.raises(OSError):
        make_room(root, 90)
