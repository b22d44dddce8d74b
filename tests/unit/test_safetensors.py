"""A folder of safetensors, whole and damaged."""

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xandrouting.inventory.safetensors import (
    InvalidSafetensors,
    SafetensorsModel,
    UnreadableSafetensors,
    read_folder,
)

QUICK = settings(
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 100,
}
SIZES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
TENSORS = (("model.embed.weight", "BF16", (100, 64)), ("model.norm.weight", "F32", (64,)))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

Tensors = tuple[tuple[str, str, tuple[int, ...]], ...]


def header_of(tensors: Tensors) -> tuple[dict[str, Any], int]:
    """Return the header's entries and the bytes of data behind it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "dtype": "no tensor"}}
    at = 0
    for name, dtype, shape in tensors:
        size = SIZES[dtype]
        for dim in shape:
            size *= dim
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return entries, at


def weights(tensors: Tensors = TENSORS) -> bytes:
    entries, data = header_of(tensors)
    return framed(json.dumps(entries).encode()) + bytes(data)


def framed(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def write(folder: Path, config: Mapping[str, Any] | None = None, **files: bytes) -> Path:
    """Write a folder that a reader must accept: `config` is added to that of a small Llama."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    for name, data in (files or {"model": weights()}).items():
        (folder / f"{name}.safetensors").write_bytes(data)
    return folder


def write_split(folder: Path) -> Path:
    write(folder, b=weights((("x", "BF16", (2, 3)),)), a=weights())
    index = {
        "metadata": {"total_size": 1 << 50},
        "weight_map": {
            "model.embed.weight": "a.safetensors",
            "model.norm.weight": "a.safetensors",
            "x": "b.safetensors",
        },
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def reason(folder: Path) -> str:
    """Return why the folder is refused, which names no path."""
    with pytest.raises(InvalidSafetensors) as caught:
        read_folder(folder)
    text = str(caught.value)
    assert text
    assert str(folder) not in text
    return text


def with_config(folder: Path, **config: object) -> SafetensorsModel:
    return read_folder(write(folder, config))


def test_tells_what_the_files_say(folder: Path) -> None:
    model = read_folder(write(folder))
    assert model.shards == ("model.safetensors",)
    assert model.weight_bytes == 100 * 64 * 2 + 64 * 4
    assert model.type_bytes == (("BF16", 12_800), ("F32", 256))
    assert model.parameters == 6464
    assert model.file_size == (folder / "model.safetensors").stat().st_size
    assert model.architectures == ("LlamaForCausalLM",)
    assert model.dtype == "bfloat16"
    assert (model.num_hidden_layers, model.hidden_size, model.intermediate_size) == (4, 64, 128)
    assert (model.num_attention_heads, model.num_key_value_heads, model.head_dim) == (8, 2, None)
    assert (model.max_position_embeddings, model.vocab_size) == (2048, 100)
    assert model.kv_values == 2 * 2 * 8
    assert model.attention_layers == (4, 0)
    hash(model)


def test_parts_are_counted_together_whatever_the_index_claims(folder: Path) -> None:
    model = read_folder(write_split(folder))
    assert model.shards == ("a.safetensors", "b.safetensors")
    assert model.weight_bytes == 12_800 + 256 + 12
    assert model.parameters == 6464 + 6


def test_the_language_half_gives_the_shape(folder: Path) -> None:
    half = {
        "architectures": None,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": None,
        "torch_dtype": "float16",
    }
    model = with_config(folder, text_config=half, dtype=None)
    assert model.architectures == ("LlamaForCausalLM",)
    assert (model.hidden_size, model.num_attention_heads, model.dtype) == (32, 4, "float16")
    assert model.num_key_value_heads == 2  # said for the whole
    assert with_config(folder, text_config="none").hidden_size == 64
    assert with_config(folder, llm_config={"hidden_size": 48}).hidden_size == 48


@pytest.mark.parametrize(
    ("config", "kv_values"),
    [
        ({"head_dim": 128}, 2 * 2 * 128),
        ({"head_dim": 0}, 2 * 2 * 8),
        ({"num_key_value_heads": None}, 2 * 8 * 8),
        ({"num_key_value_heads": [1, 4, None, 2]}, 2 * 4 * 8),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 576),
        ({"num_attention_heads": None, "num_key_value_heads": None}, 2 * 64),
        ({"num_attention_heads": 0}, 2 * 64),
        ({"num_attention_heads": None, "hidden_size": None}, None),
        ({"hidden_size": None, "n_embd": 96}, 2 * 2 * 12),
    ],
)
def test_what_a_layer_keeps_of_a_token(
    folder: Path, config: dict[str, object], kv_values: int | None
) -> None:
    assert with_config(folder, **config).kv_values == kv_values


SLIDES, KEEPS = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"sliding_window": 512}, (0, 4)),
        ({"sliding_window": None}, (4, 0)),
        ({"sliding_window": 0}, (4, 0)),
        ({"sliding_window": False}, (4, 0)),
        ({"sliding_window": 512, "layer_types": [SLIDES, SLIDES, SLIDES, KEEPS]}, (1, 3)),
        ({"sliding_window": 512, "layer_types": [SLIDES] * 2 + [KEEPS] * 9}, (2, 2)),
        ({"layer_types": [SLIDES, SLIDES, SLIDES, KEEPS]}, (4, 0)),
        ({"layer_types": ["linear_attention", "mamba", "conv", KEEPS]}, (1, 0)),
        ({"sliding_window": 512, "sliding_window_pattern": 3}, (1, 3)),
        ({"sliding_window": 512, "sliding_window_pattern": "LLLG"}, (4, 0)),
        ({"sliding_window": 512, "model_type": "gemma2"}, (2, 2)),
        ({"sliding_window": 512, "use_sliding_window": False}, (4, 0)),
        ({"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 3}, (3, 1)),
        ({"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 9}, (4, 0)),
        ({"sliding_window": 512, "num_hidden_layers": None}, (0, 0)),
    ],
)
def test_which_layers_slide(
    folder: Path, config: dict[str, object], layers: tuple[int, int]
) -> None:
    assert with_config(folder, **config).attention_layers == layers


def test_a_dtype_newer_than_the_table_is_no_damage(folder: Path) -> None:
    entry = {"x": {"dtype": "F2_NEW", "shape": [64], "data_offsets": [0, 16]}}
    model = read_folder(write(folder, model=framed(json.dumps(entry).encode()) + bytes(16)))
    assert model.type_bytes == (("F2_NEW", 16),)
    assert model.parameters == 64


def test_packed_values_of_4_and_6_bits(folder: Path) -> None:
    entries = {
        "a": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]},
        "b": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [3, 9]},
    }
    model = read_folder(write(folder, model=framed(json.dumps(entries).encode()) + bytes(9)))
    assert (model.weight_bytes, model.parameters) == (9, 14)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty file"),
        (b"1234567", "cut short: the file ends inside its header"),
        (LFS, "a git-lfs pointer, not the model"),
        (b"<!DOCTYPE html><html>Not found</html>", "not a safetensors file"),
        (struct.pack("<Q", (24 << 20) + 1) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 24 << 20) + b"{}", "cut short: the file ends inside its header"),
        (framed(b"{}"), "no weights: its files hold no tensors"),
        (framed(b"[]"), "damaged: not the JSON it should be"),
        (framed(b"{'a'}"), "damaged: it cannot be parsed"),
        (framed(b'{"\xff":1}'), "damaged: it cannot be parsed"),
        (framed(b'{"a":' + b"[" * 200_000), "damaged: it cannot be parsed"),
        (framed(b'{"a":{"dtype":"F32","shape":[1]}}'), "damaged: not the JSON it should be"),
        (weights()[:-1], "cut short: the header says 13"),
        (weights() + b"\0", "more in the file than its header says"),
    ],
)
def test_weights_that_are_none(folder: Path, data: bytes, why: str) -> None:
    write(folder, model=data)
    assert why in reason(folder)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "not that of its shape"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "overlap or leave a gap"),
        ({"dtype": "NEW", "shape": [1], "data_offsets": [4, 0]}, "overlap or leave a gap"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "not the JSON it should be"),
        ({"dtype": "F32", "shape": [1] * 17, "data_offsets": [0, 4]}, "not the JSON it should"),
        ({"dtype": "F32", "shape": [1 << 70], "data_offsets": [0, 4]}, "not the JSON it should"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}, "not the JSON it should be"),
    ],
)
def test_tensors_that_cannot_be(folder: Path, entry: dict[str, object], why: str) -> None:
    write(folder, model=framed(json.dumps({"x": entry}).encode()) + bytes(8))
    assert why in reason(folder)


def test_a_folder_without_weights_or_config(folder: Path) -> None:
    assert reason(folder) == "config.json is missing"
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert reason(folder) == "no weights: neither model.safetensors nor an index of parts"
    (folder / "model.safetensors").mkdir()
    assert reason(folder) == "not a regular file"
    assert reason(folder / "config.json") == "unreadable: Not a directory"
    with pytest.raises(UnreadableSafetensors):
        read_folder(folder / "gone")


def test_missing_parts_are_counted(folder: Path) -> None:
    write_split(folder)
    (folder / "a.safetensors").unlink()
    assert reason(folder) == "1 of 2 parts missing: 1"
    (folder / "b.safetensors").unlink()
    assert reason(folder) == "2 of 2 parts missing: 1, 2"


def test_a_damaged_part_is_named_by_its_number(folder: Path) -> None:
    write_split(folder)
    (folder / "b.safetensors").write_bytes(LFS)
    assert reason(folder) == "part 2 of 2: a git-lfs pointer, not the model"
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").symlink_to(folder / "blob")
    assert reason(folder) == "part 2 of 2: missing: a symlink that leads nowhere"


def test_a_hub_caches_symlinks_are_followed(tmp_path: Path) -> None:
    snapshot = write(tmp_path / "snapshot")
    for file in list(snapshot.iterdir()):
        file.rename(tmp_path / f"blob-{file.name}")
        file.symlink_to(f"../blob-{file.name}")
    assert read_folder(snapshot).parameters == 6464


@pytest.mark.parametrize(
    "name",
    ["../outside/model.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "\ud800", "x" * 999],
)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path / "outside")
    folder = write(tmp_path / "model")
    index = json.dumps({"weight_map": {"x": name}})
    (folder / "model.safetensors.index.json").write_text(index)
    assert reason(folder) in (
        "1 of 1 parts missing: 1",
        "model.safetensors.index.json: damaged: it cannot be parsed",
    )


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (b"{}", "model.safetensors.index.json: damaged: not the JSON it should be"),
        (b'{"weight_map":[]}', "model.safetensors.index.json: damaged: not the JSON it should be"),
        (LFS, "model.safetensors.index.json: a git-lfs pointer, not the model"),
        (b"", "model.safetensors.index.json: damaged: it cannot be parsed"),
        (b'{"weight_map":{}}', "no weights: neither model.safetensors nor an index of parts"),
        (
            json.dumps(
                {"weight_map": {str(n): f"{n}.safetensors" for n in range(10_001)}}
            ).encode(),
            "index damaged: an impossible number of parts",
        ),
    ],
)
def test_a_damaged_index(folder: Path, index: bytes, why: str) -> None:
    write(folder)
    (folder / "model.safetensors.index.json").write_bytes(index)
    assert reason(folder) == why


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (b"", "config.json: damaged: it cannot be parsed"),
        (b"[]", "config.json: damaged: not the JSON it should be"),
        (b'{"a":' * 100_000, "config.json: damaged: it cannot be parsed"),
        (LFS, "config.json: a git-lfs pointer, not the model"),
        (b'{"hidden_size":"64"}', "config.json: hidden_size: damaged: not the JSON it should be"),
        (b'{"hidden_size":-1}', "config.json: hidden_size: damaged: not the JSON it should be"),
        (b'{"text_config":{"a"}}', "config.json: damaged: it cannot be parsed"),
    ],
)
def test_a_damaged_config(folder: Path, config: bytes, why: str) -> None:
    write(folder)
    (folder / "config.json").write_bytes(config)
    assert reason(folder) == why


def test_a_config_too_large_to_be_true(folder: Path) -> None:
    write(folder)
    os.truncate(folder / "config.json", (16 << 20) + 1)
    assert reason(folder) == "config.json: too large to be true"


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    write(folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert reason(folder) == "not a regular file"


# Whatever the bytes.

HEADER = json.dumps(header_of(TENSORS)[0]).encode()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
tensor_like = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F4", "NEW"]) | json_values,
        "shape": st.lists(st.integers(-1, 1 << 65), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)


def check(folder: Path) -> None:
    outcome = outcome_of(folder)
    if isinstance(outcome, SafetensorsModel):
        assert 0 <= outcome.weight_bytes <= outcome.file_size
        assert outcome.parameters > 0
    else:
        assert str(outcome)
        assert str(folder) not in str(outcome)


def outcome_of(folder: Path) -> SafetensorsModel | InvalidSafetensors:
    try:
        return read_folder(folder)
    except InvalidSafetensors as error:
        return error


@QUICK
@given(data=st.binary(max_size=200))
def test_random_bytes(tmp_path: Path, data: bytes) -> None:
    check(write(tmp_path, model=data))


@QUICK
@given(
    places=st.lists(
        st.tuples(st.integers(0, len(HEADER) + 7), st.binary(min_size=1, max_size=4)), max_size=3
    ),
    cut=st.integers(0, len(weights())) | st.just(len(weights())),
)
def test_mutated_weights(tmp_path: Path, places: list[tuple[int, bytes]], cut: int) -> None:
    data = bytearray(weights())
    for at, patch in places:
        data[at : at + len(patch)] = patch
    check(write(tmp_path, model=bytes(data[:cut])))


@QUICK
@given(entries=st.dictionaries(st.text(max_size=4), tensor_like | json_values, max_size=4))
def test_headers_of_any_json(tmp_path: Path, entries: dict[str, object]) -> None:
    check(write(tmp_path, model=framed(json.dumps(entries).encode()) + bytes(40)))


@QUICK
@given(config=st.dictionaries(st.sampled_from([*CONFIG, "layer_types"]), json_values))
def test_configs_of_any_json(tmp_path: Path, config: dict[str, object]) -> None:
    check(write(tmp_path, config))


def test_the_largest_header_ends_in_time(folder: Path) -> None:
    entry = b'"%07d":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}'
    entries = b",".join(entry % (n, n, n + 1) for n in range(100_000))
    write(folder, model=framed(b"{" + entries + b"}") + bytes(100_000))
    began = time.process_time()
    assert read_folder(folder).parameters == 100_000
    assert time.process_time() - began < 2.0


def test_more_entries_than_can_be_are_not_decoded(folder: Path) -> None:
    entry = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    entries = b",".join(entry % number for number in range(200_001))
    write(folder, model=framed(b"{" + entries + b"}"))
    assert reason(folder) == "damaged: an impossible number of entries"
    write(folder, model=framed(b'{"a":"' + b"x" * (1 << 20) + b'"}'))
    assert reason(folder) == "damaged: an impossible number of entries"


def test_metadata_may_hold_braces_and_stand_anywhere(folder: Path) -> None:
    entries, data = header_of(TENSORS)
    metadata = {"config": '{"a": {"b": "}"}}', "x": "}, {"}
    rest = {name: entry for name, entry in entries.items() if name != "__metadata__"}
    first, *others = rest
    for order in (
        {"__metadata__": metadata, **rest},
        {first: rest[first], "__metadata__": metadata, **{name: rest[name] for name in others}},
        {**rest, "__metadata__": metadata},
    ):
        for text in (json.dumps(order), json.dumps(order, indent=2), json.dumps(order) + "  "):
            write(folder, model=framed(text.encode()) + bytes(data))
            assert read_folder(folder).weight_bytes == data


def test_metadata_that_is_none(folder: Path) -> None:
    write(folder, model=framed(b'{"__metadata__":[]}'))
    assert reason(folder) == "damaged: not the JSON it should be"
    write(folder, model=framed(b'{"__met\\u0061data__":{}}'))
    assert reason(folder) == "damaged: not the JSON it should be"


def test_a_config_of_more_entries_than_can_be(folder: Path) -> None:
    write(folder)
    (folder / "config.json").write_bytes(b"{" + b'"a":1,' * 100_001 + b'"a":1}')
    assert reason(folder) == "config.json: damaged: an impossible number of entries"


def test_the_largest_index_is_read_in_little_memory(folder: Path) -> None:
    """As that of the largest model there is: 140,000 tensors in 62 files."""
    write(folder)
    names = [f"model-{no:05d}-of-00062.safetensors" for no in range(1, 63)]
    experts = range(140_000)
    weight_map = {f"model.layers.61.mlp.experts.{n}.down_proj": names[n % 62] for n in experts}
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_text(index)
    tracemalloc.start()
    assert reason(folder) == "62 of 62 parts missing: 1, 2, 3, …"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(index) + (8 << 20)


@pytest.mark.parametrize(
    ("said", "stretches"),
    [
        ({}, False),
        ({"rope_scaling": None}, False),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, True),
        ({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, False),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, True),
        ({"model_max_length": 131_072}, True),
    ],
)
def test_whether_a_longer_context_may_do(
    folder: Path, said: dict[str, Any], stretches: bool
) -> None:
    assert with_config(folder, **said).stretches is stretches
