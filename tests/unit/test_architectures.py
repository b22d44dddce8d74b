"""What the engine's library tells of the architectures it knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.gguf_writer import write_gguf
from xandrouting.core.errors import InvalidModelFile
from xandrouting.inventory.architectures import KnownArchitectures
from xandrouting.inventory.inventory import Inventory


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "engine.so"
    path.write_bytes(b"\x7fELF\0llama\0gemma3\0clip.vision.qwen2\0" + bytes(5000))
    return path


@pytest.mark.parametrize(
    ("name", "known"),
    [("llama", True), ("gemma3", True), ("qwen2", True), ("gemma", False), ("mamba", False)],
)
def test_a_name_is_known_if_it_stands_in_the_library(library: Path, name: str, known: bool) -> None:
    assert KnownArchitectures([library]).knows(name) is known


def test_an_answer_is_remembered(library: Path) -> None:
    architectures = KnownArchitectures([library])
    assert not architectures.knows("mamba")
    library.unlink()
    assert not architectures.knows("mamba")
    assert architectures.knows("llama")


@pytest.mark.parametrize("content", [b"", b"no names in here"])
def test_a_library_that_tells_nothing_excludes_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "engine.so"
    path.write_bytes(content)
    assert KnownArchitectures([path]).knows("mamba")
    assert KnownArchitectures([]).knows("mamba")
    assert KnownArchitectures([tmp_path / "nothing.so"]).knows("mamba")


async def test_an_unknown_architecture_is_refused_before_a_load(
    tmp_path: Path, library: Path
) -> None:
    root = tmp_path / "models"
    write_gguf(root / "known.gguf")
    write_gguf(root / "odd.gguf", arch="mamba")
    inventory = Inventory(root, KnownArchitectures([library]))
    known, odd = (await inventory.refresh()).models
    assert odd.problem == "the engine does not know the architecture 'mamba'"
    assert (await inventory.verify(known)).problem is known.problem is None
    with pytest.raises(InvalidModelFile, match=r"does not know .*'mamba'.* Update the engine"):
        await inventory.verify(odd)
