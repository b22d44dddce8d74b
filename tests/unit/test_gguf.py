"""A GGUF header, whole and damaged."""

import os
import struct
from pathlib import Path

import pytest

from tests.fakes.gguf_writer import FILE_TYPES, gguf_bytes, write_gguf
from xandrouting.core.quantization import quantization_in_name, without_quantization
from xandrouting.inventory.gguf import (
    GgufHeader,
    InvalidGguf,
    UnreadableGguf,
    join_parts,
    read_gguf,
)
from xandrouting.inventory.quantization import quantization_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def read(file: Path, data: bytes) -> GgufHeader:
    file.write_bytes(data)
    return read_gguf(file)


@pytest.mark.parametrize("version", [2, 3])
def test_tells_what_the_header_says(file: Path, version: int) -> None:
    metadata = {
        "general.name": "Tiny Llama",
        "general.type": "model",
        "general.size_label": "1K",
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 24,
        "llama.attention.sliding_window": 512,
        "llama.expert_count": 8,
        "llama.pooling_type": 3,
        "llama.rope.freq_base": 10_000.0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}é{% endfor %}",
    }
    header = read_gguf(write_gguf(file, metadata=metadata, version=version))
    assert (header.architecture, header.kind, header.name) == ("llama", "model", "Tiny Llama")
    assert header.size_label == "1K"
    assert (header.context_length, header.block_count, header.embedding_length) == (2048, 2, 64)
    assert (header.head_count, header.head_count_kv) == (4, 2)
    assert (header.key_length, header.value_length, header.sliding_window) == (16, 24, 512)
    assert (header.expert_count, header.pooling_type) == (8, 3)
    assert header.chat_template == "{% for m in messages %}é{% endfor %}"
    assert header.split_count is header.split_no is header.file_type is None


def test_counts_the_tensors(file: Path) -> None:
    header = read_gguf(write_gguf(file))
    assert header.parameters == 64 * 3 + 64
    assert header.type_bytes == (("F32", 256), ("Q4_1", 120))
    assert header.data_bytes == header.file_size == file.stat().st_size


def test_head_count_kv_per_layer(file: Path) -> None:
    metadata = {"llama.attention.head_count_kv": [0, 8, 4]}
    assert read_gguf(write_gguf(file, metadata=metadata)).head_count_kv == (0, 8, 4)


def test_absurd_layer_counts_and_negative_numbers_are_left_out(file: Path) -> None:
    metadata = {"llama.attention.head_count_kv": [1] * 5000, "llama.context_length": -1}
    header = read_gguf(write_gguf(file, metadata=metadata))
    assert header.head_count_kv is None
    assert header.context_length is None


def test_numbers_of_another_architecture_are_not_taken(file: Path) -> None:
    metadata = {"general.architecture": "qwen2", "qwen2.block_count": 7}
    header = read_gguf(write_gguf(file, metadata=metadata))
    assert (header.block_count, header.context_length) == (7, None)


def test_strings_longer_than_a_window_are_stepped_over(file: Path) -> None:
    tokens = ["x" * 700_000, "", "y" * 300_000, *["z" * 9] * 50_000]
    metadata = {"tokenizer.ggml.tokens": tokens, "llama.expert_count": 3, "k" * 300: 1}
    assert read_gguf(write_gguf(file, metadata=metadata)).expert_count == 3


def test_a_chat_template_too_long_to_be_true_is_absent(file: Path) -> None:
    metadata = {"tokenizer.chat_template": "x" * (1 << 21)}
    assert read_gguf(write_gguf(file, metadata=metadata)).chat_template is None


def test_a_vocabulary_without_tensors_is_whole(file: Path) -> None:
    header = read_gguf(write_gguf(file, tensors=()))
    assert (header.parameters, header.quantization) == (0, None)
    assert header.data_bytes == header.file_size


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_alignment_is_obeyed(file: Path, alignment: int) -> None:
    header = read_gguf(write_gguf(file, alignment=alignment))
    assert header.data_bytes == file.stat().st_size


def test_a_tensor_type_newer_than_the_table_is_no_damage(file: Path) -> None:
    tensors = (("new.weight", (64, 2), 77), ("norm.weight", (64,), "F32"))
    header = read_gguf(write_gguf(file, tensors=tensors))
    assert header.parameters == 192
    assert header.type_bytes == (("F32", 256),)


def test_parts_are_counted_together(tmp_path: Path) -> None:
    split = {"split.count": 2, "split.no": 0, "general.file_type": FILE_TYPES["Q8_0"]}
    first = read_gguf(write_gguf(tmp_path / "a.gguf", metadata=split, tensors=()))
    tensors = (("x", (64, 64), "Q8_0"),)
    second = read_gguf(write_gguf(tmp_path / "b.gguf", arch=None, tensors=tensors))
    joined = join_parts([first, second], "a.gguf")
    assert (joined.architecture, joined.split_count, joined.parameters) == ("llama", 2, 4096)
    assert joined.quantization == "Q8_0"
    assert joined.file_size == joined.data_bytes == first.file_size + second.file_size


def test_tells_what_an_engine_keeps_in_memory(file: Path) -> None:
    metadata = {
        "llama.attention.key_length_mla": 192,
        "llama.attention.key_length_swa": 64,
        "llama.attention.value_length_swa": 32,
        "llama.attention.shared_kv_layers": 10,
        "llama.nextn_predict_layers": 1,
        "llama.ssm.conv_kernel": 4,
        "llama.ssm.inner_size": 1024,
        "llama.ssm.state_size": 128,
        "llama.ssm.group_count": 2,
        "llama.expert_feed_forward_length": 512,
        "llama.expert_shared_feed_forward_length": 256,
        "llama.expert_used_count": 6,
    }
    header = read_gguf(write_gguf(file, metadata=metadata))
    assert header.key_length_mla == 192
    assert (header.key_length_swa, header.value_length_swa) == (64, 32)
    assert (header.shared_kv_layers, header.nextn_predict_layers) == (10, 1)
    assert (header.ssm_conv_kernel, header.ssm_inner_size) == (4, 1024)
    assert (header.ssm_state_size, header.ssm_group_count) == (128, 2)
    assert (header.expert_feed_forward_length, header.expert_used_count) == (512, 6)
    assert header.expert_shared_feed_forward_length == 256


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("attention.head_count", "head_count"),
        ("attention.sliding_window_pattern", "sliding_window_pattern"),
        ("attention.recurrent_layers", "recurrent_layers"),
        ("feed_forward_length", "feed_forward_length"),
        ("expert_feed_forward_length", "expert_feed_forward_length"),
        ("expert_used_count", "expert_used_count"),
    ],
)
def test_one_number_or_one_for_each_layer(file: Path, key: str, field: str) -> None:
    one = read_gguf(write_gguf(file, metadata={f"llama.{key}": 6}))
    assert getattr(one, field) == 6
    each = read_gguf(write_gguf(file, metadata={f"llama.{key}": [1, 0, 4]}))
    assert getattr(each, field) == (1, 0, 4)


def test_a_pattern_of_truths(file: Path) -> None:
    metadata = {"llama.attention.sliding_window_pattern": [1, 1, 0]}
    numbers = struct.pack("<IIQ3i", 9, 5, 3, 1, 1, 0)
    truths = struct.pack("<IIQ3?", 9, 7, 3, True, True, False)
    data = gguf_bytes(metadata=metadata, tensors=())
    assert numbers in data
    assert read(file, data.replace(numbers, truths)).sliding_window_pattern == (1, 1, 0)


def test_a_pattern_of_fractions_is_left_out(file: Path) -> None:
    metadata = {"llama.attention.sliding_window_pattern": [1, 1, 0]}
    numbers = struct.pack("<IIQ3i", 9, 5, 3, 1, 1, 0)
    fractions = struct.pack("<IIQ3f", 9, 6, 3, 1.0, 1.0, 0.0)
    data = gguf_bytes(metadata=metadata, tensors=())
    assert read(file, data.replace(numbers, fractions)).sliding_window_pattern is None


def test_every_so_many_layers_attends(file: Path) -> None:
    header = read_gguf(write_gguf(file, metadata={"llama.full_attention_interval": 4}))
    assert header.recurrent_layers == 4


def test_counts_the_vocabulary(file: Path) -> None:
    assert read_gguf(write_gguf(file)).vocab_size == 3
    told = {"general.architecture": "bert", "bert.vocab_size": 30_522}
    assert read_gguf(write_gguf(file, arch=None, metadata=told)).vocab_size == 30_522


def test_tells_the_bytes_of_each_part_of_the_model(file: Path) -> None:
    tensors = (
        ("token_embd.weight", (64, 3), "Q4_1"),
        ("token_embd_norm.weight", (64,), "F32"),
        ("blk.2.attn_q.weight", (64, 2), "Q8_0"),
        ("blk.0.attn_q.weight", (64, 1), "Q8_0"),
        ("blk.0.attn_norm.weight", (64,), "F32"),
        ("output_norm.weight", (64,), "F32"),
        ("output.weight", (64, 3), "Q8_0"),
    )
    header = read_gguf(write_gguf(file, tensors=tensors))
    assert header.block_bytes == (68 + 256, 0, 136)
    assert (header.embedding_bytes, header.embedding_type) == (120, "Q4_1")
    assert header.output_bytes == 204
    assert header.tensor_bytes == 128 + 256 + 160 + 96 + 256 + 256 + 204  # as they are aligned


def test_without_an_output_of_its_own(file: Path) -> None:
    header = read_gguf(write_gguf(file))
    assert (header.embedding_bytes, header.output_bytes) == (120, 0)
    assert header.block_bytes == ()


@pytest.mark.parametrize(
    "name",
    ["blk", "blk.", "blk.x.w", "blk.-1.w", "blk.²", "blk.4096.w", f"blk.{'9' * 200}", "o" * 300],
)
def test_a_tensor_of_no_layer_counts_for_none(file: Path, name: str) -> None:
    header = read_gguf(write_gguf(file, tensors=((name, (64,), "F32"),)))
    assert header.block_bytes == ()
    assert (header.embedding_bytes, header.output_bytes) == (0, 0)
    assert header.type_bytes == (("F32", 256),)


def test_the_parts_of_a_layer_may_lie_in_two_files(tmp_path: Path) -> None:
    parts = [
        (("token_embd.weight", (64, 3), "Q4_1"), ("blk.0.w", (64,), "F32")),
        (("blk.0.v", (64, 1), "Q8_0"), ("blk.2.w", (64,), "F32")),
        (("output.weight", (64, 3), "Q8_0"), ("blk.1.w", (64,), "F32")),
    ]
    headers = [
        read_gguf(write_gguf(tmp_path / f"{number}.gguf", tensors=tensors))
        for number, tensors in enumerate(parts)
    ]
    joined = join_parts(headers, "0.gguf")
    assert joined.block_bytes == (256 + 68, 256, 256)
    assert (joined.embedding_bytes, joined.embedding_type) == (120, "Q4_1")
    assert joined.output_bytes == 204
    assert joined.tensor_bytes == sum(header.tensor_bytes for header in headers)


def test_the_embeddings_may_lie_in_a_later_file(tmp_path: Path) -> None:
    first = read_gguf(write_gguf(tmp_path / "a.gguf", tensors=()))
    assert (first.embedding_type, first.tensor_bytes) == (None, 0)
    second = read_gguf(write_gguf(tmp_path / "b.gguf"))
    joined = join_parts([first, second], "a.gguf")
    assert (joined.embedding_bytes, joined.embedding_type) == (120, "Q4_1")
    assert joined.tensor_bytes == second.tensor_bytes


WHOLE = gguf_bytes()
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98362432\n"


def with_tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + struct.pack("<Q1s", 1, b"t")
    return head + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset) + bytes(256)


def with_value(*packed: bytes) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1s", 1, b"k") + b"".join(packed)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GG", "not a GGUF file"),
        (LFS_POINTER, "a git-lfs pointer, not the model"),
        (b"GGUF", "cut short: the file ends inside its header"),
        (WHOLE[:20], "cut short: the file ends inside its header"),
        (WHOLE[:200], "cut short: the file ends inside its header"),
        (
            WHOLE[:-1],
            f"cut short: the header says {len(WHOLE)} bytes, the file has {len(WHOLE) - 1}",
        ),
        (gguf_bytes(version=1), "unsupported GGUF version 1"),
        (gguf_bytes(version=4), "unsupported GGUF version 4"),
        (gguf_bytes(version=0), "unsupported GGUF version 0"),
        (
            b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
            "a big-endian GGUF file, which no engine here reads",
        ),
        (
            struct.pack("<4sIQQ", b"GGUF", 3, 1 << 62, 0),
            "header damaged: an impossible number of entries",
        ),
        (
            struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 40),
            "header damaged: an impossible number of entries",
        ),
        (with_value(struct.pack("<I", 13)), "header damaged: no such value type, 13"),
        (with_value(struct.pack("<IQ", 8, 1 << 63)), "header damaged: an impossible length"),
        (with_value(struct.pack("<IIQ", 9, 9, 1)), "header damaged: no such array type, 9"),
        (with_value(struct.pack("<IIQ", 9, 4, 1 << 61)), "header damaged: an impossible length"),
        (
            with_value(struct.pack("<IIQ", 9, 8, 1 << 50)),
            "header damaged: an impossible number of strings",
        ),
        (with_tensor((1,) * 5), "header damaged: a tensor of 5 dimensions"),
        (with_tensor((1 << 40, 1 << 40)), "header damaged: an impossible tensor"),
        (with_tensor((1 << 63, 0)), "header damaged: an impossible tensor"),
        (with_tensor((4,), kind=70_000), "header damaged: an impossible tensor"),
        (with_tensor((33,), kind=8), "header damaged: a row of 33 elements in Q8_0"),
        (with_tensor((4,), offset=7), "header damaged: a tensor lies off the alignment"),
        (with_tensor((4,), kind=31), "in an old tensor format that engines no longer read"),
        (gguf_bytes(alignment=24), "header damaged: the alignment is not a power of two"),
        (
            gguf_bytes(metadata={"general.alignment": "32"}),
            "header damaged: the alignment is not a power of two",
        ),
    ],
)
def test_says_what_is_wrong(file: Path, data: bytes, reason: str) -> None:
    with pytest.raises(InvalidGguf) as caught:
        read(file, data)
    assert str(caught.value) == reason


def test_every_cut_is_noticed(file: Path) -> None:
    read(file, WHOLE)
    for length in range(len(WHOLE) - 1, 0, -3):
        os.truncate(file, length)
        with pytest.raises(InvalidGguf):
            read_gguf(file)


def test_a_file_that_shrinks_while_it_is_read_is_cut_short(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(WHOLE)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, at: b"" if at else pread(fd, count, at))
    with pytest.raises(InvalidGguf, match="cut short"):
        read_gguf(file)


def test_what_cannot_be_opened_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableGguf, match=r"^unreadable: No such file or directory$"):
        read_gguf(tmp_path / "absent.gguf")


def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    with pytest.raises(InvalidGguf, match="not a regular file"):
        read_gguf(pipe)


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("qwen2.5-coder-7b-q4_k_m.gguf", "Q4_K_M"),
        ("Model-UD-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL"),
        ("model-BF16.gguf", "BF16"),
        ("model-fp16.gguf", "F16"),
        ("model.i1-IQ2_XXS.gguf", "IQ2_XXS"),
        ("gpt-oss-20b-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("f16-model-Q8_0", "Q8_0"),
        ("BitNet-TQ2_0.gguf", "TQ2_0"),
        ("model-XQ4_0.gguf", None),
        ("model-Q4_0x.gguf", None),
        ("phi-3.gguf", None),
    ],
)
def test_quantization_in_a_name(name: str, quantization: str | None) -> None:
    assert quantization_in_name(name) == quantization


@pytest.mark.parametrize(
    ("stem", "bare"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct"),
        ("qwen-UD-Q4_K_XL", "qwen"),
        ("qwen-Q4_K_M-imat", "qwen-Q4_K_M-imat"),
        ("Q4_K_M", "Q4_K_M"),
    ],
)
def test_a_stem_without_its_quantization(stem: str, bare: str) -> None:
    assert without_quantization(stem) == bare


@pytest.mark.parametrize(
    ("type_bytes", "claimed", "file_name", "quantization"),
    [
        ({"Q4_K": 90, "Q6_K": 10}, "Q4_K_M", "m.gguf", "Q4_K_M"),
        # A row that 256 does not divide is kept in a larger type: the name still holds.
        ({"Q5_0": 60, "Q8_0": 30, "Q4_K": 10}, "Q4_K_M", "m.gguf", "Q4_K_M"),
        # Converted as F16 and quantized by a tool that left the claim.
        ({"Q4_0": 90, "F16": 5, "F32": 5}, "F16", "m-Q4_0.gguf", "Q4_0"),
        ({"Q4_K": 90, "Q6_K": 10}, None, "m-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ({"Q4_K": 90, "Q8_0": 10}, "Q8_0", "m-Q8_0.gguf", "Q4_K"),
        ({"IQ3_XXS": 60, "IQ3_S": 40}, "IQ3_XS", "m.gguf", "IQ3_XS"),
        ({"F16": 90, "F32": 10}, None, "m-fp16.gguf", "F16"),
        ({"Q4_1": 90}, None, "m.gguf", "Q4_1"),
        ({}, None, "m-Q4_0.gguf", "Q4_0"),
        ({}, None, "m.gguf", None),
    ],
)
def test_quantization_is_what_the_tensors_bear_out(
    type_bytes: dict[str, int], claimed: str | None, file_name: str, quantization: str | None
) -> None:
    assert quantization_of(type_bytes, claimed, file_name) == quantization
