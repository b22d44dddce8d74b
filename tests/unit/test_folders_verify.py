"""Folders of safetensors right before a load: as they are now, or why not and what helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.safetensors_writer import LFS_POINTER, write_folder
from xandrouting.core.errors import InvalidModelFile, ModelNotFound
from xandrouting.inventory.inventory import Inventory
from xandrouting.inventory.scan import HeaderCache, recheck, scan


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "outside")


def test_a_model_as_it_is_now(root: Path) -> None:
    folder, cache = write_folder(root / "m"), HeaderCache()
    (root / "link").symlink_to("m")
    [model] = scan(root, cache).models
    assert recheck(root, model, cache) == model
    (folder / "tokenizer.json").unlink()
    found = recheck(root, model, cache)
    assert found is not None
    assert found.problem == "its tokenizer is missing"
    assert found.spellings == ("link",)


def test_a_folder_that_a_symlink_has_replaced_is_gone(root: Path, outside: Path) -> None:
    folder, cache = write_folder(root / "m"), HeaderCache()
    [model] = scan(root, cache).models
    folder.rename(root / "elsewhere")
    assert recheck(root, model, cache) is None
    folder.symlink_to(outside)
    assert recheck(root, model, cache) is None
    (root / "m").unlink()
    (root / "m").symlink_to("elsewhere")
    assert recheck(root, model, cache) is None


def damage(folder: Path, outside: Path, what: str) -> None:
    weights = folder / "model.safetensors"
    if what == "no config":
        (folder / "config.json").unlink()
    elif what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif what == "pointer":
        weights.write_bytes(LFS_POINTER)
    elif what == "outside":
        weights.unlink()
        weights.symlink_to(outside / "model.safetensors")
    elif what == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    else:
        weights.write_bytes(b"")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "no config",
            (
                "config.json is missing. vLLM needs all of the model's repository: download the "
                "rest into the same folder."
            ),
        ),
        (
            "no tokenizer",
            (
                "its tokenizer is missing. vLLM needs all of the model's repository: download the "
                "rest into the same folder."
            ),
        ),
        (
            "pointer",
            (
                "a git-lfs pointer, not the model. Fetch it with `git lfs pull`, or download it "
                "again."
            ),
        ),
        (
            "outside",
            (
                "a symlink in it leaves the models directory. Put the file itself where the "
                "symlink is."
            ),
        ),
        ("adapter", "an adapter, not a model of its own. Ask for the model it belongs to."),
        ("empty", "empty file. Download it again, or delete it."),
    ],
)
async def test_the_remedy_is_named(root: Path, outside: Path, what: str, message: str) -> None:
    inventory = Inventory(root)
    damage(write_folder(root / "m"), outside, what)
    [model] = (await inventory.refresh()).models
    with pytest.raises(InvalidModelFile) as caught:
        await inventory.verify(model)
    assert caught.value.message == f"'/models/m' cannot be loaded: {message}"


async def test_a_folder_that_is_gone(root: Path) -> None:
    inventory = Inventory(root)
    folder = write_folder(root / "m")
    [model] = (await inventory.refresh()).models
    assert await inventory.verify(model) == model
    folder.rename(root.parent / "aside")
    with pytest.raises(ModelNotFound, match="no longer there"):
        await inventory.verify(model)
