"""Whatever the bytes: a header or InvalidGguf, and nothing else."""

import struct
import time
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes.gguf_writer import gguf_bytes
from xandrouting.inventory.gguf import GgufHeader, InvalidGguf, read_gguf

QUICK = settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
METADATA = {
    "general.name": "x",
    "general.file_type": 3,
    "llama.attention.head_count_kv": [1, 2],
    "tokenizer.chat_template": "{{ messages }}",
}
WHOLE = gguf_bytes(metadata=METADATA)
HEAD = struct.pack("<4sI", b"GGUF", 3)

edges = st.sampled_from([0, 1, 8, 9, 0x7F, 0xFF, 1 << 16, 1 << 31, 1 << 32, 1 << 40, (1 << 64) - 1])


def check(folder: Path, data: bytes) -> None:
    file = folder / "fuzz.gguf"
    file.write_bytes(data)
    outcome = outcome_of(file)
    if isinstance(outcome, GgufHeader):
        assert outcome.data_bytes <= outcome.file_size == len(data)
    else:
        assert str(outcome)
        assert str(folder) not in str(outcome)


def outcome_of(file: Path) -> GgufHeader | InvalidGguf:
    try:
        return read_gguf(file)
    except InvalidGguf as error:
        return error


@QUICK
@given(data=st.binary(max_size=200))
def test_random_bytes(tmp_path: Path, data: bytes) -> None:
    check(tmp_path, data)


@QUICK
@given(tensors=edges | st.integers(0, 3), keys=edges | st.integers(0, 3), rest=st.binary())
def test_random_bytes_after_the_magic(tmp_path: Path, tensors: int, keys: int, rest: bytes) -> None:
    check(tmp_path, HEAD + struct.pack("<QQ", tensors, keys) + rest)


@QUICK
@given(
    places=st.lists(
        st.tuples(st.integers(4, len(WHOLE) - 1), st.binary(min_size=1, max_size=8)), max_size=4
    ),
    cut=st.integers(0, len(WHOLE)) | st.just(len(WHOLE)),
)
def test_mutated_header(tmp_path: Path, places: list[tuple[int, bytes]], cut: int) -> None:
    data = bytearray(WHOLE)
    for at, patch in places:
        data[at : at + len(patch)] = patch
    check(tmp_path, bytes(data[:cut]))


@QUICK
@given(at=st.integers(8, len(WHOLE) - 8), number=edges)
def test_a_length_that_is_not_true(tmp_path: Path, at: int, number: int) -> None:
    check(tmp_path, WHOLE[:at] + struct.pack("<Q", number) + WHOLE[at + 8 :])


def test_the_longest_vocabulary_ends_in_time(tmp_path: Path) -> None:
    """Sparse, so that the file is large and the test is not."""
    file = tmp_path / "sparse.gguf"
    with file.open("wb") as out:
        out.write(HEAD + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 8, 1_500_000))
        out.truncate(1 << 40)
    began = time.process_time()
    assert read_gguf(file).parameters == 0
    assert time.process_time() - began < 1.0
