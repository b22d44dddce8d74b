"""Write tiny GGUF files for tests, independently of the reader."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

# Number in the file, elements per block, bytes per block.
TENSOR_TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q6_K": (14, 256, 210),
}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15}

Value = bool | int | float | str | Sequence[int] | Sequence[str]
Tensor = tuple[str, tuple[int, ...], str | int]  # name, shape, type

LLAMA = {
    "llama.context_length": 2048,
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": ["<s>", "hello", "wörld"],
}
TENSORS: Sequence[Tensor] = (("token_embd.weight", (64, 3), "Q4_1"), ("norm.weight", (64,), "F32"))


def write_gguf(
    path: Path,
    arch: str | None = "llama",
    metadata: Mapping[str, Value] | None = None,
    tensors: Sequence[Tensor] = TENSORS,
    truncate: int | None = None,
    **options: int,
) -> Path:
    """Write a file that a reader must accept; `truncate` cuts it to so many bytes.

    `metadata` is added to that of a small llama (an `arch` of None leaves both out).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf_bytes(arch, metadata, tensors, **options)[:truncate])
    return path


def gguf_bytes(
    arch: str | None = "llama",
    metadata: Mapping[str, Value] | None = None,
    tensors: Sequence[Tensor] = TENSORS,
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    values: dict[str, Value] = {}
    if arch is not None:
        values["general.architecture"] = arch
        values |= LLAMA if arch == "llama" else {}
    if alignment != 32:
        values["general.alignment"] = alignment
    values |= metadata or {}
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(values))
    head += b"".join(_string(key) + _typed(value) for key, value in values.items())
    infos, data_bytes = _tensor_infos(tensors, alignment)
    head += infos
    return head + bytes(-len(head) % alignment if tensors else 0) + bytes(data_bytes)


def _tensor_infos(tensors: Sequence[Tensor], alignment: int) -> tuple[bytes, int]:
    infos, offset, end = b"", 0, 0
    for name, shape, kind in tensors:
        number, block, block_bytes = (kind, 1, 4) if isinstance(kind, int) else TENSOR_TYPES[kind]
        elements = 1
        for dim in shape:
            elements *= dim
        infos += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        infos += struct.pack("<IQ", number, offset)
        end = offset + elements // block * block_bytes
        offset = end + -end % alignment
    return infos, end


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Value) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int() if 0 <= value < 1 << 32:
            return struct.pack("<II", 4, value)
        case int():
            return struct.pack("<Iq", 11, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _string(value)
        case [str(), *_]:
            items = b"".join(_string(str(item)) for item in value)
            return struct.pack("<IIQ", 9, 8, len(value)) + items
        case _:
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
