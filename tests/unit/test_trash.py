"""What a deletion takes away, and what it leaves alone."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.fakes.gguf_writer import write_gguf
from tests.fakes.safetensors_writer import write_folder
from xandrouting.inventory import trash
from xandrouting.inventory.model_file import ModelFile, Snapshot
from xandrouting.inventory.roots import Root
from xandrouting.inventory.scan import HeaderCache, scan
from xandrouting.inventory.trash import Deleted


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def snapshot(root: Path) -> Snapshot:
    return scan(root, HeaderCache())


def delete(root: Path, name: str, *, purge: bool = False) -> Deleted:
    found = snapshot(root)
    [model] = [model for model in found.models if name in (model.relative, *model.spellings)]
    return trash.delete(Root(root), model, found, purge=purge)


def left(root: Path) -> set[str]:
    """Return what is there besides the trash; folders only where they are empty."""
    found = set()
    for path in root.rglob("*"):
        relative = path.relative_to(root).as_posix()
        is_parent = path.is_dir() and not path.is_symlink() and any(path.iterdir())
        if not relative.startswith(".trash") and not is_parent:
            found.add(relative)
    return found


def in_trash(root: Path) -> set[str]:
    """Return what the trash holds, without the folders named by the time."""
    places = (root / ".trash").iterdir() if (root / ".trash").exists() else ()
    return {
        path.relative_to(place).as_posix()
        for place in places
        for path in place.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }


def test_one_file_of_a_shared_folder(root: Path) -> None:
    file = write_gguf(root / "org" / "a.gguf")
    write_gguf(root / "org" / "b.gguf")
    (root / "org" / "notes.txt").write_text("mine")
    size = file.stat().st_size
    before = datetime.now(UTC)
    deleted = delete(root, "org/a.gguf")
    assert (deleted.files, deleted.freed_bytes) == (("org/a.gguf",), size)
    assert deleted.until is not None
    assert timedelta(hours=24) <= deleted.until - before < timedelta(hours=24, minutes=1)
    assert left(root) == {"org/b.gguf", "org/notes.txt"}
    assert in_trash(root) == {"org/a.gguf"}
    assert [model.id for model in snapshot(root).models] == ["/models/org/b.gguf"]

    delete(root, "org/b.gguf")
    assert left(root) == {"org/notes.txt"}


def test_an_empty_folder_goes_with_its_last_model(root: Path) -> None:
    write_gguf(root / "org" / "deep" / "a.gguf")
    (root / "org" / "deep" / ".cache").mkdir()
    (root / "org" / "deep" / ".cache" / "x").touch()
    (root / "org" / "deep" / ".gitattributes").touch()
    delete(root, "org/deep/a.gguf")
    assert left(root) == set()
    assert root.exists()


def test_a_hidden_file_of_the_users_own_keeps_its_folder(root: Path) -> None:
    write_gguf(root / "org" / "a.gguf")
    (root / "org" / ".mine").touch()
    delete(root, "org/a.gguf")
    assert left(root) == {"org/.mine"}


def test_all_parts_of_a_split(root: Path) -> None:
    for no in (1, 2, 3):
        metadata = {"split.count": 3, "split.no": no - 1}
        write_gguf(root / "m" / f"m-0000{no}-of-00003.gguf", metadata=metadata)
    write_gguf(root / "m" / "other.gguf")
    deleted = delete(root, "m/m-00001-of-00003.gguf")
    assert deleted.files == tuple(f"m/m-0000{no}-of-00003.gguf" for no in (1, 2, 3))
    assert left(root) == {"m/other.gguf"}


def test_a_projector_goes_with_the_last_that_sees_by_it(root: Path) -> None:
    write_gguf(root / "vl" / "vl-Q4_0.gguf")
    write_gguf(root / "vl" / "vl-Q8_0.gguf")
    write_gguf(root / "vl" / "mmproj-F16.gguf", arch="clip")
    assert delete(root, "vl/vl-Q4_0.gguf").files == ("vl/vl-Q4_0.gguf",)
    assert left(root) == {"vl/vl-Q8_0.gguf", "vl/mmproj-F16.gguf"}
    assert delete(root, "vl/vl-Q8_0.gguf").files == ("vl/mmproj-F16.gguf", "vl/vl-Q8_0.gguf")
    assert left(root) == set()


def test_a_folder_of_safetensors(root: Path) -> None:
    folder = write_folder(root / "org" / "m", parts=2, README__md="x")
    write_folder(root / "org" / "other")
    names = {f"org/m/{path.name}" for path in folder.iterdir()}
    assert set(delete(root, "org/m").files) == names
    assert {name.split("/")[1] for name in left(root)} == {"other"}


def test_a_folder_of_safetensors_with_other_models_in_it(root: Path) -> None:
    folder = write_folder(root / "m")
    write_gguf(folder / "m-Q4_0.gguf")
    write_folder(folder / "inner")
    (folder / "data").mkdir()
    (folder / "data" / "mine.txt").touch()
    kept = {"m/m-Q4_0.gguf", "m/data/mine.txt"}
    kept |= {f"m/inner/{path.name}" for path in (folder / "inner").iterdir()}
    delete(root, "m")
    assert left(root) == kept
    assert [model.id for model in snapshot(root).models] == [
        "/models/m/inner",
        "/models/m/m-Q4_0.gguf",
    ]


def manifest(folder: Path, *names: str) -> None:
    files = [{"path": name, "size": 1} for name in names]
    (folder / ".xandrouting.json").write_text(json.dumps({"repo_id": "a/b", "files": files}))


def test_the_rest_of_a_download_goes_with_its_last_model(root: Path) -> None:
    folder = root / "m"
    write_gguf(folder / "Q4" / "m-Q4_0.gguf")
    write_gguf(folder / "m-Q8_0.gguf")
    (folder / "README.md").touch()
    (folder / "mine.txt").touch()
    manifest(folder, "Q4/m-Q4_0.gguf", "m-Q8_0.gguf", "README.md")
    delete(root, "m/Q4/m-Q4_0.gguf")
    assert left(root) == {"m/m-Q8_0.gguf", "m/README.md", "m/mine.txt", "m/.xandrouting.json"}
    delete(root, "m/m-Q8_0.gguf")
    assert left(root) == {"m/mine.txt"}


def test_what_lies_beside_a_download_is_not_of_it(root: Path) -> None:
    folder = write_folder(root / "m")
    names = sorted(path.name for path in folder.iterdir())
    manifest(folder, *names)
    (folder / "notes.txt").write_text("mine")
    write_gguf(folder / "extra" / "b.gguf")
    deleted = delete(root, "m")
    assert deleted.files == tuple(f"m/{name}" for name in sorted((*names, trash.MANIFEST)))
    assert left(root) == {"m/notes.txt", "m/extra/b.gguf"}


def test_a_projector_of_a_download_that_another_model_uses(root: Path) -> None:
    for name in ("vl-Q4_0.gguf", "vl-Q8_0.gguf"):
        write_gguf(root / "m" / name)
    write_gguf(root / "m" / "mmproj-F16.gguf", arch="clip")
    manifest(root / "m", "vl-Q4_0.gguf", "mmproj-F16.gguf")
    delete(root, "m/vl-Q4_0.gguf")
    assert {"m/vl-Q8_0.gguf", "m/mmproj-F16.gguf"} <= left(root)


def test_a_model_in_a_subfolder_takes_the_download_above_it_along(root: Path) -> None:
    write_gguf(root / "m" / "Q4" / "m-Q4_0.gguf")
    (root / "m" / "README.md").touch()
    manifest(root / "m", "Q4/m-Q4_0.gguf", "README.md")
    delete(root, "m/Q4/m-Q4_0.gguf")
    assert left(root) == set()


@pytest.mark.parametrize(
    "said",
    [
        '{"files": [{"path": "../outside.txt"}, {"path": "/etc/hosts"}, {"path": "b/../../x"}]}',
        '{"files": ["outside.txt"]}',
        '{"files": 5}',
        "[" * 100_000,
        "",
    ],
)
def test_a_manifest_cannot_lead_elsewhere(root: Path, said: str) -> None:
    write_gguf(root / "m" / "m.gguf")
    (root / "outside.txt").touch()
    (root / "m" / ".xandrouting.json").write_text(said)
    assert "outside.txt" not in " ".join(delete(root, "m/m.gguf").files)
    assert left(root) == {"outside.txt"}


def test_a_manifest_is_not_followed_through_a_symlink(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    write_gguf(root / "m" / "m.gguf")
    (root / "m" / "link").symlink_to(outside)
    manifest(root / "m", "m.gguf", "link/precious")
    delete(root, "m/m.gguf")
    assert (outside / "precious").exists()
    assert left(root) == {"m/link"}


def test_symlinks_inside_the_root_go_too(root: Path) -> None:
    write_gguf(root / "real" / "a.gguf")
    (root / "a.gguf").symlink_to("real/a.gguf")
    (root / "there").symlink_to("real")
    assert delete(root, "a.gguf").files == ("a.gguf", "real/a.gguf")
    assert not os.path.lexists(root / "a.gguf")
    assert snapshot(root) == Snapshot()


def test_a_symlink_in_a_folder_goes_and_what_it_leads_to_stays(root: Path, tmp_path: Path) -> None:
    outside = write_folder(tmp_path / "outside")
    folder = write_folder(root / "m")
    shared = root / "shared"
    shared.mkdir()
    (folder / "tokenizer.json").rename(shared / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to("../shared/tokenizer.json")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(outside / "model.safetensors")
    [model] = snapshot(root).models
    assert model.problem == "a symlink in it leaves the models directory"
    deleted = delete(root, "m")
    assert deleted.freed_bytes == (tmp_path / "outside" / "config.json").stat().st_size
    assert (outside / "model.safetensors").exists()
    assert left(root) == {"shared/tokenizer.json"}


def test_a_folder_that_borrows_anothers_weights(root: Path) -> None:
    write_folder(root / "a")
    borrower = write_folder(root / "b")
    (borrower / "model.safetensors").unlink()
    (borrower / "model.safetensors").symlink_to("../a/model.safetensors")
    delete(root, "b")
    assert [model.problem for model in snapshot(root).models] == [None]


def test_a_hub_cache_loses_what_nothing_else_uses(root: Path) -> None:
    base = root / "models--o--n"
    write_gguf(base / "blobs" / "abc")
    (base / "blobs" / "def").write_text("{}")
    for commit in ("one", "two"):
        (base / "snapshots" / commit).mkdir(parents=True)
        (base / "snapshots" / commit / "m.gguf").symlink_to("../../blobs/abc")
    assert delete(root, "models--o--n/blobs/abc").files == (
        "models--o--n/blobs/abc",
        "models--o--n/snapshots/one/m.gguf",
        "models--o--n/snapshots/two/m.gguf",
    )
    assert left(root) == {"models--o--n/blobs/def"}


def test_a_hub_cache_of_safetensors(root: Path) -> None:
    base = root / "models--o--n"
    real = write_folder(base / "blobs")
    for commit in ("one", "two"):
        (base / "snapshots" / commit).mkdir(parents=True)
        for path in real.iterdir():
            (base / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{path.name}")
    # Blobs have hashes for names.
    for path in list(real.iterdir()):
        blob = path.rename(path.with_name(path.name.encode().hex()))
        for commit in ("one", "two"):
            link = base / "snapshots" / commit / path.name
            link.unlink()
            link.symlink_to(f"../../blobs/{blob.name}")
    delete(root, "models--o--n/snapshots/one")
    assert len(list(real.iterdir())) == 3
    delete(root, "models--o--n/snapshots/two")
    assert left(root) == set()


def test_a_hard_link_frees_nothing(root: Path, tmp_path: Path) -> None:
    write_gguf(root / "a.gguf")
    (tmp_path / "other.gguf").hardlink_to(root / "a.gguf")
    assert delete(root, "a.gguf").freed_bytes == 0


def test_purged_is_gone_at_once(root: Path) -> None:
    file = write_gguf(root / "a.gguf")
    size = file.stat().st_size
    deleted = delete(root, "a.gguf", purge=True)
    assert (deleted.freed_bytes, deleted.until) == (size, None)
    assert list(root.iterdir()) == []


def test_purging_leaves_what_is_in_the_trash(root: Path) -> None:
    write_gguf(root / "a.gguf")
    write_gguf(root / "b.gguf")
    delete(root, "a.gguf")
    delete(root, "b.gguf", purge=True)
    assert in_trash(root) == {"a.gguf"}


def test_all_or_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for no in (1, 2):
        write_gguf(
            root / f"m-0000{no}-of-00002.gguf", metadata={"split.count": 2, "split.no": no - 1}
        )
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "m-00002-of-00002.gguf":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        delete(root, "m-00001-of-00002.gguf")
    assert [model.problem for model in snapshot(root).models] == [None]
    assert in_trash(root) == set()


def test_a_trash_that_leads_elsewhere_is_not_used(root: Path, tmp_path: Path) -> None:
    write_gguf(root / "a.gguf")
    (root / ".trash").symlink_to(tmp_path)
    with pytest.raises(NotADirectoryError):
        delete(root, "a.gguf")
    assert left(root) == {"a.gguf"}


def test_two_of_one_name_in_one_second(root: Path) -> None:
    for folder in ("x", "y"):
        write_gguf(root / folder / "a.gguf")
    delete(root, "x/a.gguf")
    delete(root, "y/a.gguf")
    assert in_trash(root) == {"x/a.gguf", "y/a.gguf"}


def test_a_link_that_leaves_the_root(root: Path, tmp_path: Path) -> None:
    outside = write_gguf(tmp_path / "outside" / "a.gguf")
    (root / "link.gguf").symlink_to(outside)
    assert trash.delete_link(Root(root), "link.gguf").files == ("link.gguf",)
    assert outside.exists()
    assert left(root) == set()
    with pytest.raises(OSError, match="No such file"):
        trash.delete_link(Root(root), "link.gguf")


def test_what_lies_behind_a_link_is_not_taken(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "inner").symlink_to(tmp_path)
    (root / "link").symlink_to(outside)
    with pytest.raises(FileNotFoundError):
        trash.delete_link(Root(root), "link/inner")
    assert (outside / "inner").is_symlink()


def test_the_trash_is_emptied_after_a_day(root: Path) -> None:
    write_gguf(root / "a.gguf")
    delete(root, "a.gguf")
    (root / ".trash" / "mine").mkdir()
    (root / ".trash" / "99999999T999999Z-x").mkdir()
    now = datetime.now(UTC)
    roots = (Root(root), Root(root, "further"))
    assert trash.empty(roots, now=now + timedelta(hours=23, minutes=59)) == 0
    assert in_trash(root) == {"a.gguf"}
    assert trash.empty(roots, now=now + timedelta(hours=24, minutes=1)) == 1
    assert {path.name for path in (root / ".trash").iterdir()} == {"mine", "99999999T999999Z-x"}


def test_a_further_root_is_not_touched(root: Path) -> None:
    old = root / ".trash" / "20200101T000000Z-x"
    old.mkdir(parents=True)
    assert trash.empty((Root(root, "further"),)) == 0
    assert old.exists()
    assert trash.empty((Root(root),)) == 1
    assert list(root.iterdir()) == []


def test_a_models_directory_that_is_not_there(tmp_path: Path) -> None:
    assert trash.empty((Root(tmp_path / "absent"),)) == 0


def test_a_damaged_model_can_be_deleted(root: Path) -> None:
    (root / "m").mkdir()
    (root / "m" / "model.safetensors").write_bytes(b"")
    (root / "bad.gguf").write_bytes(b"x")
    delete(root, "m")
    delete(root, "bad.gguf")
    assert left(root) == set()


def model_file(root: Path, name: str) -> ModelFile:
    [model] = [model for model in snapshot(root).models if model.relative == name]
    return model


def test_what_is_gone_already_is_an_error(root: Path) -> None:
    file = write_gguf(root / "a.gguf")
    found, model = snapshot(root), model_file(root, "a.gguf")
    file.unlink()
    with pytest.raises(FileNotFoundError):
        trash.delete(Root(root), model, found)
    assert in_trash(root) == set()
