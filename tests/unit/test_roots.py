"""Several folders with models: how they are named, and that none hides another's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.gguf_writer import write_gguf
from tests.fakes.safetensors_writer import write_folder
from xandrouting.inventory import folders
from xandrouting.inventory.model_file import Snapshot
from xandrouting.inventory.roots import Root, root_of, roots_of
from xandrouting.inventory.scan import HeaderCache, recheck, scan_all


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def nas(tmp_path: Path) -> Path:
    folder = tmp_path / "mnt" / "nas"
    folder.mkdir(parents=True)
    return folder


def look(*roots: Root) -> Snapshot:
    return scan_all(roots, HeaderCache()).snapshot


def names(models: Path, *further: tuple[str, Path]) -> list[str]:
    return [root.name for root in roots_of(models, further)]


def test_a_root_bears_its_folders_name(models: Path, nas: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(nas)
    assert names(models, ("", nas)) == ["", "nas"]
    assert names(models, ("big", nas)) == ["", "big"]
    assert names(models, ("", tmp_path / "absent")) == ["", "absent"]
    assert names(models, ("", tmp_path / "alias")) == ["", "nas"]


def test_names_that_are_taken_get_a_number(models: Path, nas: Path, tmp_path: Path) -> None:
    (models / "nas").mkdir()
    other = tmp_path / "other" / "nas"
    assert names(models, ("", nas), ("", other)) == ["", "nas-2", "nas-3"]


@pytest.mark.parametrize("name", [".hidden", "a\\b", "x\n"])
def test_names_that_cannot_be_get_another(models: Path, tmp_path: Path, name: str) -> None:
    expected = "hidden" if name == ".hidden" else "root"
    assert names(models, ("", tmp_path / name)) == ["", expected]


def test_roots_that_overlap_are_left_out(
    models: Path, nas: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "alias").symlink_to(models)
    overlapping = [models / "inner", models, tmp_path, tmp_path / "alias", nas / "inner"]
    assert names(models, ("", nas), *(("", path) for path in overlapping)) == ["", "nas"]
    assert caplog.text.count("it overlaps with another") == 5


def test_models_of_all_roots_are_listed(models: Path, nas: Path) -> None:
    write_gguf(models / "a.gguf")
    write_gguf(nas / "org" / "b-Q4_0.gguf")
    write_gguf(nas / "org" / "mmproj.gguf", arch="clip")
    write_folder(nas / "smol")
    (nas / "alias.gguf").symlink_to("org/b-Q4_0.gguf")
    found = {model.id: model for model in look(*roots_of(models, [("", nas)])).models}
    assert list(found) == ["/models/a.gguf", "/models/nas/org/b-Q4_0.gguf", "/models/nas/smol"]
    far = found["/models/nas/org/b-Q4_0.gguf"]
    assert (far.relative, far.folder, far.read_only) == ("nas/org/b-Q4_0.gguf", "nas/org", True)
    assert far.path == nas / "org" / "b-Q4_0.gguf"
    assert [part.relative for part in far.files] == ["nas/org/b-Q4_0.gguf"]
    assert far.spellings == ("nas/alias.gguf",)
    assert far.mmproj == nas / "org" / "mmproj.gguf"
    assert found["/models/nas/smol"].files[0].relative.startswith("nas/smol/")
    assert not found["/models/a.gguf"].read_only


def test_symlinks_are_judged_by_their_own_root(models: Path, nas: Path) -> None:
    write_gguf(models / "a.gguf")
    write_gguf(nas / "b.gguf")
    (models / "to-nas.gguf").symlink_to(nas / "b.gguf")
    (nas / "to-models.gguf").symlink_to(models / "a.gguf")
    found = look(*roots_of(models, [("", nas)]))
    assert [model.id for model in found.models] == ["/models/a.gguf", "/models/nas/b.gguf"]
    assert found.escaping == {"to-nas.gguf", "nas/to-models.gguf"}


def test_a_further_root_hides_nothing_of_the_models_directory(models: Path, nas: Path) -> None:
    roots = roots_of(models, [("", nas)])
    write_gguf(nas / "x.gguf", metadata={"general.name": "far"})
    write_gguf(models / "nas" / "x.gguf", metadata={"general.name": "near"})
    [model] = look(*roots).models
    assert model.header is not None
    assert (model.header.name, model.read_only) == ("near", False)


def test_recheck_in_a_further_root(models: Path, nas: Path) -> None:
    file = write_gguf(nas / "org" / "b.gguf")
    write_folder(nas / "smol")
    roots = roots_of(models, [("", nas)])
    far, folder = look(*roots).models
    assert recheck(roots, far, HeaderCache()) == far
    assert recheck(roots, folder, HeaderCache()) == folder
    file.unlink()
    assert recheck(roots, far, HeaderCache()) is None


def test_which_root_a_path_lies_in(models: Path, nas: Path) -> None:
    roots = roots_of(models, [("", nas)])
    assert root_of(roots, "nas/x.gguf", read_only=True) == (roots[1], "x.gguf")
    assert root_of(roots, "nas/x.gguf", read_only=False) == (roots[0], "nas/x.gguf")
    assert root_of(roots, "nasty/x.gguf", read_only=False) == (roots[0], "nasty/x.gguf")
    with pytest.raises(ValueError, match="nowhere"):
        root_of(roots[1:], "nowhere", read_only=True)


def test_a_folder_that_came_later_may_have_a_further_root_s_name(models: Path, nas: Path) -> None:
    roots = roots_of(models, [("", nas)])
    write_gguf(nas / "far.gguf")
    write_gguf(models / "nas" / "ours.gguf")
    found = {model.id: model for model in look(*roots).models}
    assert list(found) == ["/models/nas/far.gguf", "/models/nas/ours.gguf"]
    for model in found.values():
        assert recheck(roots, model, HeaderCache()) == model


def test_a_further_root_may_be_a_model_itself(nas: Path, models: Path) -> None:
    write_folder(nas, parts=2)
    write_gguf(nas / "gguf" / "x.gguf")
    (nas / "again").symlink_to(".")
    roots = roots_of(models, [("", nas)])
    model, file = look(*roots).models
    assert (model.id, model.folder, model.problem) == ("/models/nas", "nas", None)
    assert (model.path, model.read_only) == (nas, True)
    assert model.spellings == ("nas/again", "nas/again/again")
    assert file.id == "/models/nas/gguf/x.gguf"
    assert {part.relative: part.path for part in model.files} == {
        f"nas/{path.name}": path for path in nas.iterdir() if path.is_file()
    }
    cache = HeaderCache()
    assert recheck(roots, model, cache) == model
    (nas / "model-00002-of-00002.safetensors").unlink()
    now = recheck(roots, model, cache)
    assert now is not None
    assert now.problem == "1 of 2 parts missing: 2"
    (nas / "model-00001-of-00002.safetensors").unlink()
    assert recheck(roots, model, cache) is None
    assert [model.id for model in look(*roots).models] == ["/models/nas/gguf/x.gguf"]


def test_a_models_directory_may_be_a_model_itself(
    nas: Path, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It bears its folder's name, for `/models` is everything in it."""
    write_folder(models / "inner")
    roots = roots_of(models, [])
    assert [root.name for root in roots] == [""]
    write_folder(models)
    write_gguf(models / "loose.gguf")
    roots = roots_of(models, [("", nas)])
    assert [root.name for root in roots] == ["", "models", "nas"]
    assert "set models_dir to the folder above model=/models/models" in caplog.text
    found = {model.id: model for model in look(*roots).models}
    assert list(found) == ["/models/inner", "/models/loose.gguf", "/models/models"]
    itself = found["/models/models"]
    assert (itself.path, itself.read_only, itself.problem) == (models, True, None)
    cache = HeaderCache()
    assert [recheck(roots, model, cache) for model in found.values()] == list(found.values())


def test_its_name_may_be_taken(tmp_path: Path) -> None:
    itself = write_folder(tmp_path / "smol")
    write_folder(itself / "smol")
    roots = roots_of(itself, [])
    assert [model.id for model in look(*roots).models] == ["/models/smol", "/models/smol-2"]


def test_loose_weights_do_not_make_a_root_a_model(nas: Path, models: Path) -> None:
    for folder in (models, nas):
        (folder / "lora.safetensors").touch()
    roots = roots_of(models, [("", nas)])
    assert [root.name for root in roots] == ["", "nas"]
    assert look(*roots) == Snapshot()


def test_a_root_that_is_a_model_is_read_once(
    nas: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = roots_of(models, [("", write_folder(nas))])
    cache = HeaderCache()
    first = scan_all(roots, cache).snapshot
    monkeypatch.setattr(folders, "read_folder", None)
    assert scan_all(roots, cache).snapshot == first


def test_the_walked_folders_are_told(models: Path, nas: Path, tmp_path: Path) -> None:
    write_gguf(models / "org" / "a.gguf")
    (models / ".incoming" / "job").mkdir(parents=True)
    (tmp_path / "alias").symlink_to(models)
    roots = (Root(tmp_path / "alias"), Root(nas, "nas"), Root(tmp_path / "absent", "absent"))
    assert scan_all(roots, HeaderCache()).folders == {
        str(models),
        str(models / "org"),
        str(nas),
    }
