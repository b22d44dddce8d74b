"""Folders of safetensors under a root: which are models, and why one cannot be loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.fakes.gguf_writer import write_gguf
from tests.fakes.safetensors_writer import LFS_POINTER, weights_bytes, write_folder
from xandrouting.inventory import folders as module
from xandrouting.inventory.model_file import ModelFile, ModelFormat, Snapshot, Traits
from xandrouting.inventory.safetensors import read_folder
from xandrouting.inventory.scan import HeaderCache, scan


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "outside")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Journal the folders that are read."""
    journal: list[str] = []

    def journaled(path: Path) -> object:
        journal.append(path.name)
        return read_folder(path)

    monkeypatch.setattr(module, "read_folder", journaled)
    return journal


def look(root: Path) -> Snapshot:
    return scan(root, HeaderCache())


def ids(root: Path) -> list[str]:
    return [model.id for model in look(root).models]


def only(root: Path) -> ModelFile:
    [model] = look(root).models
    return model


def problem(root: Path) -> str | None:
    model = only(root)
    assert (model.safetensors is None) is (model.problem is not None)
    assert str(root) not in (model.problem or "")
    return model.problem


# What is a model.


def test_a_folder_is_one_model(root: Path) -> None:
    folder = write_folder(root / "org" / "smol", chat_template__jinja="{{ messages }}")
    model = only(root)
    assert (model.id, model.path) == ("/models/org/smol", folder)
    assert (model.relative, model.folder, model.stem) == ("org/smol", "org/smol", "smol")
    assert model.format is ModelFormat.SAFETENSORS
    names = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert [part.relative for part in model.files] == [f"org/smol/{name}" for name in names]
    assert [part.path for part in model.files] == [folder / name for name in names]
    assert model.size_bytes == sum((folder / name).stat().st_size for name in names)
    assert model.modified == max((folder / name).stat().st_mtime for name in names)
    assert (model.header, model.problem, model.mmproj) == (None, None, None)
    assert model.quantization == "BF16"
    assert model.traits == Traits(
        architecture="LlamaForCausalLM",
        parameters=64,
        context_length=2048,
        layers=4,
        heads=8,
        embedding_length=64,
        vocab_size=100,
        chat_template=True,
    )


def test_parts_are_one_model(root: Path) -> None:
    write_folder(root / "big", parts=3)
    model = only(root)
    assert model.problem is None
    assert model.safetensors is not None
    assert len(model.safetensors.shape.shards) == 3


def test_folders_lie_in_folders(root: Path) -> None:
    write_folder(root / "b")
    write_folder(root / "b" / "inside")
    write_folder(root / "a" / "deep" / "er")
    assert ids(root) == ["/models/a/deep/er", "/models/b", "/models/b/inside"]


def test_what_holds_no_weights_is_no_model(root: Path) -> None:
    (root / "empty").mkdir()
    (root / "config" / "model.safetensors").mkdir(parents=True)
    (root / "config" / "config.json").write_text("{}")
    write_folder(root / "model").joinpath("model.safetensors").rename(root / "model" / "x.bin")
    write_folder(root / ".hidden")
    assert ids(root) == []


def test_weights_in_the_root_itself_are_no_folder(root: Path) -> None:
    write_folder(root)
    assert ids(root) == []


def test_hidden_files_are_none_of_it(root: Path) -> None:
    write_folder(root / "m", __gitattributes=b"x", __partial__safetensors=b"x")
    assert [part.path.name for part in only(root).files] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_folder_of_both_formats_is_several_models(root: Path) -> None:
    write_folder(root / "both")
    write_gguf(root / "both" / "both-Q4_1.gguf")
    write_gguf(root / "both" / "gguf" / "both-Q8_0.gguf")
    folder, *files = look(root).models
    assert folder.id == "/models/both"
    assert [file.id for file in files] == [
        "/models/both/both-Q4_1.gguf",
        "/models/both/gguf/both-Q8_0.gguf",
    ]
    assert not any(part.relative.endswith(".gguf") for part in folder.files)
    assert all(file.format is ModelFormat.GGUF for file in files)


# Why one cannot be loaded.


def test_without_a_config(root: Path) -> None:
    (write_folder(root / "m") / "config.json").unlink()
    assert problem(root) == "config.json is missing"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"num_hidden_layers": "four"}'])
def test_with_a_config_that_is_none(root: Path, content: str) -> None:
    (write_folder(root / "m") / "config.json").write_text(content)
    assert (problem(root) or "").startswith("config.json: ")


def test_without_a_part(root: Path) -> None:
    (write_folder(root / "m", parts=3) / "model-00002-of-00003.safetensors").unlink()
    assert problem(root) == "1 of 3 parts missing: 2"


def test_with_a_part_that_is_cut_short(root: Path) -> None:
    folder = write_folder(root / "m", parts=2)
    (folder / "model-00002-of-00002.safetensors").write_bytes(weights_bytes()[:-1])
    assert (problem(root) or "").startswith("part 2 of 2: cut short")


def test_with_a_git_lfs_pointer(root: Path) -> None:
    (write_folder(root / "m") / "model.safetensors").write_bytes(LFS_POINTER)
    assert problem(root) == "a git-lfs pointer, not the model"


def test_with_weights_of_another_name(root: Path) -> None:
    folder = write_folder(root / "m")
    (folder / "model.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")
    assert (problem(root) or "").startswith("no weights")


def test_an_adapter(root: Path) -> None:
    folder = write_folder(root / "m", adapter_config__json="{}")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert problem(root) == "an adapter, not a model of its own"


def test_without_a_tokenizer(root: Path) -> None:
    write_folder(root / "m", tokenizer=None, tokenizer_config__json="{}", vocab__json="{}")
    assert problem(root) == "its tokenizer is missing"


@pytest.mark.parametrize(
    "files",
    [
        ["tokenizer.json"],
        ["tokenizer.model"],
        ["tekken.json"],
        ["vocab.txt"],
        ["spiece.model"],
        ["vocab.json", "merges.txt"],
        ["qwen.tiktoken"],
        ["sentencepiece.bpe"],
    ],
)
def test_what_a_tokenizer_may_be(root: Path, files: list[str]) -> None:
    folder = write_folder(root / "m", tokenizer=None)
    for name in files:
        (folder / name).write_text("{}")
    assert problem(root) is None


def test_a_file_that_may_not_be_read_is_looked_at_again(
    root: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(root / "m")
    cache = HeaderCache()

    def refuse(*args: object) -> int:
        raise PermissionError(13, "Permission denied", str(root))

    with monkeypatch.context() as patch:
        patch.setattr("os.open", refuse)
        [model] = scan(root, cache).models
    assert model.problem == "config.json: unreadable: Permission denied"
    assert scan(root, cache).models[0].problem is None
    assert read == ["m", "m"]


# Templates.


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, ""),
        ({"chat_template__jinja": "J é"}, "J é"),
        ({"chat_template__jinja": b"J \xff"}, "J \ufffd"),
        ({"chat_template__json": '{"chat_template": "T"}'}, "T"),
        ({"tokenizer_config__json": '{"chat_template": "C", "x": 1}'}, "C"),
        ({"chat_template__jinja": "J", "tokenizer_config__json": '{"chat_template": "C"}'}, "J"),
        (
            {
                "chat_template__json": '{"chat_template": "T"}',
                "tokenizer_config__json": '{"chat_template": "C"}',
            },
            "T",
        ),
        (
            {
                "tokenizer_config__json": json.dumps(
                    {
                        "chat_template": [
                            {"name": "default", "template": "A"},
                            {"name": "tool_use", "template": "B"},
                        ]
                    }
                )
            },
            "A\nB",
        ),
        ({"tokenizer_config__json": "{}"}, ""),
        ({"tokenizer_config__json": '{"chat_template": null}'}, ""),
        ({"tokenizer_config__json": '{"chat_template": 7}'}, ""),
        ({"tokenizer_config__json": "{"}, ""),
        ({"tokenizer_config__json": b"\xff"}, ""),
        ({"tokenizer_config__json": "[" * 100_000}, ""),
    ],
)
def test_the_chat_template(root: Path, files: dict[str, str | bytes], template: str) -> None:
    write_folder(root / "m", **files)
    model = only(root)
    assert model.problem is None
    assert model.safetensors is not None
    assert model.safetensors.chat_template == template
    assert model.traits.chat_template is bool(template)


def test_what_the_other_files_tell(root: Path) -> None:
    write_folder(root / "a", modules__json="[]")
    write_folder(root / "b", preprocessor_config__json="{}")
    vectors, eyes = (model.traits for model in look(root).models)
    assert (vectors.pooling, vectors.vision) == (True, False)
    assert (eyes.pooling, eyes.vision) == (False, True)


@pytest.mark.parametrize(
    ("content", "context"),
    [
        ('{"max_seq_length": 256, "do_lower_case": false}', 256),
        ('{"max_seq_length": 4096, "do_lower_case": false}', 4096),
        ("{}", 2048),
        ('{"max_seq_length": null, "do_lower_case": false}', 2048),
        ('{"max_seq_length": 0, "do_lower_case": false}', 2048),
        ("{", 2048),
        (b"\xff", 2048),
    ],
)
def test_a_model_for_vectors_is_held_to_the_length_of_its_texts(
    root: Path, content: str | bytes, context: int
) -> None:
    write_folder(root / "m", modules__json="[]", sentence_bert_config__json=content)
    assert only(root).traits.context_length == context


@pytest.mark.parametrize(
    "key", ["n_positions", "max_seq_len", "seq_length", "max_sequence_length", "seq_len"]
)
def test_a_context_length_has_many_names(root: Path, key: str) -> None:
    write_folder(root / "m", {"max_position_embeddings": None, key: 777})
    assert only(root).traits.context_length == 777


def test_a_quantized_one(root: Path) -> None:
    write_folder(root / "m", {"quantization_config": {"quant_method": "awq", "bits": 4}})
    assert only(root).quantization == "AWQ"


# Symlinks.


def cached_by_the_hub(root: Path) -> Path:
    """Write a model as the hub's cache does: the files lie elsewhere under their hashes."""
    snapshot = write_folder(root / "models--org--smol" / "snapshots" / "abc")
    blobs = root / "models--org--smol" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = file.rename(blobs / f"{number}f00d")
        file.symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_a_folder_of_symlinks_counts_as_what_they_lead_to(root: Path) -> None:
    snapshot = cached_by_the_hub(root)
    model = only(root)
    assert model.id == "/models/models--org--smol/snapshots/abc"
    assert model.problem is None
    assert [part.path for part in model.files] == sorted(snapshot.iterdir())
    assert model.size_bytes == sum(file.stat().st_size for file in snapshot.iterdir())


def test_a_symlink_to_nowhere_is_a_part_that_is_missing(root: Path) -> None:
    folder = write_folder(root / "m", parts=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").symlink_to("gone")
    assert problem(root) == "part 2 of 2: missing: a symlink that leads nowhere"
    (folder / "gone").write_bytes(weights_bytes())
    assert problem(root) is None


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_a_symlink_that_leaves_the_root_is_not_followed(
    root: Path, outside: Path, read: list[str], name: str
) -> None:
    folder = write_folder(root / "m")
    (outside / "README.md").touch()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside / name)
    assert problem(root) == "a symlink in it leaves the models directory"
    assert name not in [part.path.name for part in only(root).files]
    assert read == []


def test_a_symlink_that_leaves_the_root_comes_and_goes(root: Path, outside: Path) -> None:
    folder, cache = write_folder(root / "m"), HeaderCache()
    assert scan(root, cache).models[0].problem is None
    (folder / "extra.safetensors").symlink_to(outside / "model.safetensors")
    assert scan(root, cache).models[0].problem == "a symlink in it leaves the models directory"
    (folder / "extra.safetensors").unlink()
    assert scan(root, cache).models[0].problem is None


def test_a_folder_outside_the_root_is_not_opened(
    root: Path, outside: Path, read: list[str]
) -> None:
    (root / "link").symlink_to(outside)
    assert look(root) == Snapshot((), frozenset({"link"}))
    assert read == []


def test_a_symlink_to_a_folder_is_another_spelling(root: Path) -> None:
    write_folder(root / "org" / "smol")
    (root / "latest").symlink_to("org/smol")
    (root / "org-link").symlink_to("org")
    assert only(root).spellings == ("latest", "org-link/smol")


# What is kept.


def test_what_has_not_changed_is_not_read_again(root: Path, read: list[str]) -> None:
    folder, cache = write_folder(root / "m"), HeaderCache()
    write_folder(root / "n")
    first = scan(root, cache)
    assert scan(root, cache) == first
    assert sorted(read) == ["m", "n"]
    (folder / "tokenizer.json").write_text("{ }")
    second = scan(root, cache)
    assert sorted(read) == ["m", "m", "n"]
    assert second.models[0].revision != first.models[0].revision
    assert second.models[1].revision == first.models[1].revision


def test_a_damaged_one_is_not_read_again_either(root: Path, read: list[str]) -> None:
    (write_folder(root / "m") / "config.json").write_text("{")
    cache = HeaderCache()
    assert scan(root, cache) == scan(root, cache)
    assert read == ["m"]


def test_what_is_gone_is_forgotten(root: Path, read: list[str]) -> None:
    folder, cache = write_folder(root / "m"), HeaderCache()
    scan(root, cache)
    aside = folder.rename(root.parent / "aside")
    assert scan(root, cache).models == ()
    aside.rename(folder)
    scan(root, cache)
    assert read == ["m", "m"]
