"""Which model a name means where folders of safetensors are models too."""

from __future__ import annotations

from pathlib import Path

import pytest

from xandrouting.core.errors import AmbiguousModel, InvalidModelPath, ModelNotFound
from xandrouting.inventory.model_file import ModelFile, ModelFormat, ModelPart
from xandrouting.routing.names import ModelNames

GGUF, SAFETENSORS = ModelFormat.GGUF, ModelFormat.SAFETENSORS
SMOL = "org/SmolLM2-135M"
SMOL_GGUF = "org/SmolLM2-135M/smol-q4.gguf"
QWEN = "Qwen2.5-7B"
QWEN_Q4, QWEN_Q8 = "gguf/Qwen2.5-7B-Q4_K_M.gguf", "gguf/Qwen2.5-7B-Q8_0.gguf"
TWO, TWO_A, TWO_B = "two", "two/a.gguf", "two/deep/b.gguf"


def file(relative: str) -> ModelFile:
    return _model(relative, [relative], relative.rpartition("/")[0], GGUF)


def folder(relative: str, *spellings: str) -> ModelFile:
    names = ("config.json", "model.safetensors")
    return _model(
        relative, [f"{relative}/{name}" for name in names], relative, SAFETENSORS, spellings
    )


def _model(
    relative: str,
    parts: list[str],
    inside: str,
    kind: ModelFormat,
    spellings: tuple[str, ...] = (),
) -> ModelFile:
    return ModelFile(
        id=f"/models/{relative}",
        path=Path("/srv", relative),
        folder=inside,
        files=tuple(ModelPart(Path("/srv", part), part, 10) for part in parts),
        size_bytes=10 * len(parts),
        header=None,
        problem=None,
        modified=0.0,
        revision="r",
        format=kind,
        spellings=spellings,
    )


NAMES = ModelNames(
    [
        folder(SMOL, "latest", "org-link/SmolLM2-135M"),
        file(SMOL_GGUF),
        folder(QWEN),
        file(QWEN_Q4),
        file(QWEN_Q8),
        folder(TWO),
        file(TWO_A),
        file(TWO_B),
    ],
    escaping=frozenset({"org/SmolLM2-135M/leak.safetensors"}),
)


def resolve(name: str, prefers: ModelFormat | None = None) -> str:
    return NAMES.resolve(name, prefers=prefers).relative


@pytest.mark.parametrize(
    "name",
    [
        "/models/org/SmolLM2-135M",
        "/models/org/SmolLM2-135M/",
        "org/SmolLM2-135M",
        "org//SmolLM2-135M/.",
        "SmolLM2-135M",
        "smollm2-135m",
        "latest",
        "latest/",
        "org-link/SmolLM2-135M",
        # One of its files stands for all.
        "org/SmolLM2-135M/model.safetensors",
        "/models/org/SmolLM2-135M/config.json",
    ],
)
@pytest.mark.parametrize("prefers", [None, SAFETENSORS])
def test_spellings(name: str, prefers: ModelFormat | None) -> None:
    assert resolve(name, prefers) == SMOL


@pytest.mark.parametrize(
    "name",
    [
        "org/SmolLM2-135M/model.safetensors/",
        "org/SmolLM2-135M/other.safetensors",
        "latest/model.safetensors",
        "model.safetensors",
    ],
)
def test_what_is_no_spelling(name: str) -> None:
    with pytest.raises(ModelNotFound):
        resolve(name)


def test_a_file_that_leaves_the_root_is_no_spelling() -> None:
    with pytest.raises(InvalidModelPath):
        resolve("org/SmolLM2-135M/leak.safetensors")


def test_a_folder_that_is_a_model_stands_for_the_one_file_in_it_where_files_are_wanted() -> None:
    for name in (SMOL, f"/models/{SMOL}/", "./org/SmolLM2-135M"):
        assert resolve(name, GGUF) == SMOL_GGUF
    assert NAMES.resolve(SMOL, prefers=GGUF, backend_folder_ok=False).relative == SMOL


def test_several_files_in_it_are_choices() -> None:
    assert resolve(TWO) == resolve(TWO, SAFETENSORS) == TWO
    with pytest.raises(AmbiguousModel) as caught:
        resolve(TWO, GGUF)
    assert caught.value.details == {"choices": ["/models/two/a.gguf", "/models/two/deep/b.gguf"]}


def test_a_folder_without_files_of_the_format_stands_for_itself() -> None:
    # Who asked for another format is told so by the catalog.
    assert resolve(QWEN, GGUF) == QWEN
    assert resolve(QWEN_Q4, SAFETENSORS) == QWEN_Q4
    assert resolve(f"{SMOL}/model.safetensors", GGUF) == SMOL


def test_a_short_name_of_both_formats_means_the_one_that_is_wanted() -> None:
    names = ModelNames([folder("a/smol"), file("b/smol.gguf")])
    assert names.resolve("smol", prefers=SAFETENSORS).relative == "a/smol"
    assert names.resolve("smol", prefers=GGUF).relative == "b/smol.gguf"
    with pytest.raises(AmbiguousModel):
        names.resolve("smol")


def test_a_folder_of_both_formats_means_the_one_that_is_wanted() -> None:
    names = ModelNames([folder("x/deep"), file("x/y.gguf")])
    assert names.resolve("x", prefers=SAFETENSORS).relative == "x/deep"
    assert names.resolve("x", prefers=GGUF).relative == "x/y.gguf"
    with pytest.raises(AmbiguousModel):
        names.resolve("x")


def test_two_of_the_wanted_format_are_choices_and_the_third_is_none() -> None:
    names = ModelNames([folder("a/smol"), file("b/smol.gguf"), file("c/smol.gguf")])
    with pytest.raises(AmbiguousModel) as caught:
        names.resolve("smol", prefers=GGUF)
    assert caught.value.details == {"choices": ["/models/b/smol.gguf", "/models/c/smol.gguf"]}


def others(relative: str) -> list[str]:
    return [model.relative for model in NAMES.quantizations(NAMES.resolve(relative))]


def test_other_quantizations_of_a_folder() -> None:
    assert others(QWEN) == [QWEN_Q4, QWEN_Q8]
    assert others(QWEN_Q4) == [QWEN, QWEN_Q8]
    # What lies in a model's folder is that model, whatever its name.
    assert others(SMOL) == [SMOL_GGUF]
    assert others(TWO) == [TWO_A, TWO_B]
    assert others(SMOL_GGUF) == []
