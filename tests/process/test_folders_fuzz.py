"""Whatever stands in a folder's small files: a model, or why it is none, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes.safetensors_writer import CONFIG, write_folder
from xandrouting.inventory.scan import HeaderCache, scan

QUICK = settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MAX_BYTES = 50 << 20
FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer_config.json",
    "sentence_bert_config.json",
    "modules.json",
    "config.json",
    "model.safetensors.index.json",
)
NAMES = ("chat_template", "template", "name", "max_seq_length", "model_max_length", "rope_scaling")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*NAMES, *CONFIG]), inner, max_size=4)
    ),
    max_leaves=8,
)


def check(folder: Path, name: str, data: bytes) -> None:
    write_folder(folder / "m", {"position_embedding_type": "absolute"})
    for other in FILES:
        if other != "config.json":
            (folder / "m" / other).unlink(missing_ok=True)
    (folder / "m" / name).write_bytes(data)
    [model] = scan(folder, HeaderCache()).models
    assert (model.safetensors is None) is (model.problem is not None)
    assert model.traits is not None
    assert str(folder) not in (model.problem or "")


@QUICK
@given(name=st.sampled_from(FILES), data=st.binary(max_size=200))
def test_random_bytes(tmp_path: Path, name: str, data: bytes) -> None:
    check(tmp_path, name, data)


@QUICK
@given(name=st.sampled_from(FILES), said=values)
def test_any_json(tmp_path: Path, name: str, said: object) -> None:
    check(tmp_path, name, json.dumps(said).encode())


@QUICK
@given(
    name=st.sampled_from(FILES),
    said=st.dictionaries(st.sampled_from(NAMES), values, max_size=3),
    cut=st.integers(0, 80),
)
def test_json_that_is_cut(tmp_path: Path, name: str, said: object, cut: int) -> None:
    check(tmp_path, name, json.dumps(said).encode()[:cut])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "entry",
    [b'"%07d":"x",', b'"%07d": 1 ,'],
    ids=["texts", "spaces"],
)
def test_a_million_entries(tmp_path: Path, name: str, entry: bytes) -> None:
    head = b'{"weight_map":{' if "index" in name else b"{"
    tail = b'"":""}}' if "index" in name else b'"":""}'
    text = head + b"".join(entry % number for number in range(1_000_000)) + tail
    write_folder(tmp_path / "m")
    (tmp_path / "m" / name).write_bytes(text)
    del text
    assert _peak_bytes(tmp_path) < MAX_BYTES


@pytest.mark.parametrize("letter", ["\U0001f600", "é", "x", "\\n"])
def test_a_template_that_never_ends(tmp_path: Path, letter: str) -> None:
    write_folder(tmp_path / "m")
    text = '{"chat_template":[{"template":"' + letter * (8 << 20) + '"}]}'
    (tmp_path / "m" / "tokenizer_config.json").write_text(text)
    del text
    assert _peak_bytes(tmp_path) < MAX_BYTES
    [model] = scan(tmp_path, HeaderCache()).models
    assert model.traits.chat_template is False


def _peak_bytes(root: Path) -> int:
    tracemalloc.start()
    try:
        scan(root, HeaderCache())
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
