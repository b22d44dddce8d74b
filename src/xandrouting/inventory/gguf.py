"""What a GGUF file's header tells, whatever the bytes."""

from __future__ import annotations

import math
import os
import stat
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

from xandrouting.inventory.gguf_reader import (
    INTEGER_KINDS,
    SCALARS,
    U32,
    ArrayAt,
    HeaderReader,
    InvalidGguf,
    UnreadableGguf,
)
from xandrouting.inventory.quantization import (
    FILE_TYPES,
    MAX_TENSOR_TYPE,
    RETIRED_TENSOR_TYPES,
    TENSOR_TYPES,
    quantization_of,
)
from xandrouting.inventory.templates import takes_tools

__all__ = ["GgufHeader", "InvalidGguf", "UnreadableGguf", "join_parts", "read_gguf"]

_MAX_KEYS: Final = 16_384
_MAX_KEY_BYTES: Final = 256  # a longer key is none of ours
_MAX_TENSORS: Final = 50_000
_MAX_LAYERS: Final = 4096
_MAX_TENSOR_NAME: Final = 256
_MAX_DIMS: Final = 4
_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"

_TENSOR_INFO: Final = [struct.Struct(f"<{dims}QIQ") for dims in range(_MAX_DIMS + 1)]
_BOOL, _STRING, _ARRAY = 7, 8, 9
_EMBEDDING, _OUTPUT = "token_embd", "output"
_VOCABULARY: Final = "tokenizer.ggml.tokens"
# How many bytes of each text are kept; a longer one counts as absent.
_TEXTS: Final = {
    "general.architecture": 256,
    "general.type": 256,
    "general.name": 4096,
    "general.size_label": 256,
    "tokenizer.chat_template": 1 << 20,
    "tokenizer.chat_template.tool_use": 1 << 20,
}
_TEMPLATES: Final = ("tokenizer.chat_template", "tokenizer.chat_template.tool_use")
_NUMBERS: Final = frozenset(
    {"general.file_type", "general.alignment", "split.count", "split.no", "split.tensors.count"},
)
_ARCHITECTURE_NUMBERS: Final = frozenset(
    {
        "context_length",
        "block_count",
        "embedding_length",
        "expert_count",
        "pooling_type",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "attention.key_length_mla",
        "attention.key_length_swa",
        "attention.value_length_swa",
        "attention.shared_kv_layers",
        "attention.recurrent_layers",
        "full_attention_interval",
        "nextn_predict_layers",
        "ssm.conv_kernel",
        "ssm.inner_size",
        "ssm.state_size",
        "ssm.group_count",
        "feed_forward_length",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
        "expert_used_count",
        "vocab_size",
    }
)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF header tells. None: the header does not say."""

    architecture: str | None
    kind: str | None  # `model`, `adapter`, `mmproj`, …; absent in older files
    name: str | None
    size_label: str | None
    context_length: int | None
    block_count: int | None
    embedding_length: int | None
    head_count: int | tuple[int, ...] | None  # a tuple: one number per layer
    head_count_kv: int | tuple[int, ...] | None
    key_length: int | None
    value_length: int | None
    sliding_window: int | None
    sliding_window_pattern: int | tuple[int, ...] | None  # every so many is full; or 1: it slides
    key_length_mla: int | None  # set: the cache holds latents, values inside the keys
    key_length_swa: int | None  # in layers that slide
    value_length_swa: int | None
    shared_kv_layers: int | None  # the last ones, which use the cache of others
    nextn_predict_layers: int | None  # the last ones, for a draft: not in the model's own run
    recurrent_layers: int | tuple[int, ...] | None  # every so many attends; or 1: it has a state
    ssm_conv_kernel: int | None
    ssm_inner_size: int | None
    ssm_state_size: int | None
    ssm_group_count: int | None
    feed_forward_length: int | tuple[int, ...] | None
    expert_feed_forward_length: int | tuple[int, ...] | None
    expert_shared_feed_forward_length: int | None
    expert_used_count: int | tuple[int, ...] | None
    expert_count: int | None
    vocab_size: int | None
    pooling_type: int | None  # 0 none, 1 mean, 2 cls, 3 last, 4 rank
    chat_template: str | None
    tools: bool  # a template of its puts a request's tools into the prompt
    split_count: int | None
    split_no: int | None  # from 0
    split_tensors: int | None  # how many all parts hold together
    file_type: str | None  # what the header claims, `Q4_K_M`
    type_bytes: tuple[tuple[str, int], ...]  # bytes per tensor type, the largest first
    block_bytes: tuple[int, ...]  # of the tensors of each layer
    embedding_bytes: int  # of `token_embd`
    embedding_type: str | None  # of `token_embd`
    output_bytes: int  # of `output`; 0: `token_embd` is used for it
    tensor_bytes: int  # the file without its header
    quantization: str | None
    tensors: int  # how many
    parameters: int
    data_bytes: int  # what the file must hold to be whole
    file_size: int


def read_gguf(path: str | os.PathLike[str]) -> GgufHeader:
    """Read the header of the file at `path`, and check that the file is whole.

    It takes 10 ms of CPU for a usual model, under a second and 50 MB whatever the bytes.

    Raises:
        UnreadableGguf: the system refuses; the same file may do later.
        InvalidGguf: empty, cut short, damaged, or not such a file.
    """
    try:
        # A named pipe would block in open() without O_NONBLOCK.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _read(fd, Path(path).name)
        finally:
            os.close(fd)
    except OSError as error:
        raise UnreadableGguf(f"unreadable: {error.strerror}") from error


def join_parts(parts: Sequence[GgufHeader], file_name: str) -> GgufHeader:
    """Return the first part's header with what counts all parts together."""
    type_bytes: Counter[str] = Counter()
    for part in parts:
        type_bytes.update(dict(part.type_bytes))
    first = parts[0]
    layers = max(len(part.block_bytes) for part in parts)
    return replace(
        first,
        block_bytes=tuple(
            sum(part.block_bytes[layer] for part in parts if layer < len(part.block_bytes))
            for layer in range(layers)
        ),
        embedding_bytes=sum(part.embedding_bytes for part in parts),
        embedding_type=next((part.embedding_type for part in parts if part.embedding_type), None),
        output_bytes=sum(part.output_bytes for part in parts),
        tensor_bytes=sum(part.tensor_bytes for part in parts),
        type_bytes=tuple(type_bytes.most_common()),
        quantization=quantization_of(type_bytes, first.file_type, file_name),
        tensors=sum(part.tensors for part in parts),
        parameters=sum(part.parameters for part in parts),
        data_bytes=sum(part.data_bytes for part in parts),
        file_size=sum(part.file_size for part in parts),
    )


_Value = int | float | str | ArrayAt | None


def _read(fd: int, file_name: str) -> GgufHeader:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidGguf("not a regular file")
    _check_magic(os.pread(fd, len(_LFS_POINTER), 0))
    reader = HeaderReader(fd, status.st_size)
    reader.skip(8)
    tensors, keys = reader.u64(), reader.u64()
    if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
        raise InvalidGguf("header damaged: an impossible number of entries")
    metadata = _read_metadata(reader, keys)
    layout = _read_tensors(reader, tensors, alignment=_alignment(metadata))
    if layout.data_bytes > status.st_size:
        raise InvalidGguf(
            f"cut short: the header says {layout.data_bytes} bytes, the file has {status.st_size}"
        )
    return _header(reader, metadata, layout, file_name=file_name, file_size=status.st_size)


def _check_magic(head: bytes) -> None:
    if not head:
        raise InvalidGguf("empty file")
    if head == _LFS_POINTER:
        raise InvalidGguf("a git-lfs pointer, not the model")
    if head[:4] != b"GGUF":
        raise InvalidGguf("not a GGUF file")
    if len(head) < 8:
        raise InvalidGguf("cut short: the file ends inside its header")
    version = U32.unpack_from(head, 4)[0]
    if version and not version & 0xFFFF:
        raise InvalidGguf("a big-endian GGUF file, which no engine here reads")
    if version not in (2, 3):
        raise InvalidGguf(f"unsupported GGUF version {version}")


def _read_metadata(reader: HeaderReader, keys: int) -> dict[str, _Value]:
    metadata: dict[str, _Value] = {}
    for _ in range(keys):
        key = _read_key(reader)
        kind = reader.u32()
        value = _read_value(reader, kind, text_limit=_TEXTS.get(key, 0))
        wanted = key in _TEXTS or key in _NUMBERS or key == _VOCABULARY
        if wanted or key.partition(".")[2] in _ARCHITECTURE_NUMBERS:
            metadata[key] = value
    return metadata


def _read_key(reader: HeaderReader) -> str:
    length = reader.u64()
    if length <= _MAX_KEY_BYTES:
        return reader.text(length)
    reader.skip(length)
    return ""


def _read_value(reader: HeaderReader, kind: int, *, text_limit: int) -> _Value:
    if kind == _STRING:
        length = reader.u64()
        if length <= text_limit:
            return reader.text(length)
        reader.skip(length)
        return None
    if kind == _ARRAY:
        return _read_array(reader)
    if kind not in SCALARS:
        raise InvalidGguf(f"header damaged: no such value type, {kind}")
    value: int | float = reader.unpack(SCALARS[kind])[0]
    return value


def _read_array(reader: HeaderReader) -> ArrayAt | None:
    kind, count = reader.u32(), reader.u64()
    if kind == _STRING:
        array = ArrayAt(reader.position, kind, count)
        reader.skip_strings(count)
        return array
    if kind not in SCALARS:
        raise InvalidGguf(f"header damaged: no such array type, {kind}")
    array = ArrayAt(reader.position, kind, count)
    reader.skip(count * SCALARS[kind].size)
    return array


def _alignment(metadata: Mapping[str, _Value]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise InvalidGguf("header damaged: the alignment is not a power of two")
    return alignment


class _Layout(NamedTuple):
    tensors: int
    parameters: int
    type_bytes: Counter[str]
    place_bytes: Counter[int | str | None]  # by layer; `_EMBEDDING`, `_OUTPUT`; None: elsewhere
    embedding_type: str | None
    start: int  # where the tensors begin
    data_bytes: int


def _read_tensors(reader: HeaderReader, count: int, *, alignment: int) -> _Layout:
    parameters = end = 0
    type_bytes: Counter[str] = Counter()
    place_bytes: Counter[int | str | None] = Counter()
    embedding_type = None
    for _ in range(count):
        place = _read_place(reader)
        name, elements, size, offset = _read_tensor(reader)
        if offset % alignment:
            raise InvalidGguf("header damaged: a tensor lies off the alignment")
        parameters += elements
        end = max(end, offset + size)
        place_bytes[place] += size
        if name is not None:
            type_bytes[name] += size
        if place == _EMBEDDING:
            embedding_type = name
    start = reader.position
    if count:
        start += -start % alignment
    return _Layout(count, parameters, type_bytes, place_bytes, embedding_type, start, start + end)


def _read_place(reader: HeaderReader) -> int | str | None:
    """Read a tensor's name and return which part of the model it is of."""
    length = reader.u64()
    if length > _MAX_TENSOR_NAME:
        reader.skip(length)
        return None
    part, _, rest = reader.text(length).partition(".")
    if part == "blk":
        layer = rest.partition(".")[0]
        if layer.isascii() and layer.isdigit() and len(layer) <= 4 and int(layer) < _MAX_LAYERS:
            return int(layer)
    return part if part in (_EMBEDDING, _OUTPUT) else None


def _read_tensor(reader: HeaderReader) -> tuple[str | None, int, int, int]:
    """Return type, elements, bytes and offset; a type newer than the table has no name or bytes."""
    dims = reader.u32()
    if dims > _MAX_DIMS:
        raise InvalidGguf(f"header damaged: a tensor of {dims} dimensions")
    *shape, kind, offset = reader.unpack(_TENSOR_INFO[dims])
    elements = math.prod(shape)
    if max(elements, offset, *shape, 0) >= 1 << 63 or kind > MAX_TENSOR_TYPE:
        raise InvalidGguf("header damaged: an impossible tensor")
    if kind in RETIRED_TENSOR_TYPES:
        raise InvalidGguf("in an old tensor format that engines no longer read")
    if kind not in TENSOR_TYPES:
        return None, elements, 0, offset
    name, block, size = TENSOR_TYPES[kind]
    if shape and shape[0] % block:
        raise InvalidGguf(f"header damaged: a row of {shape[0]} elements in {name}")
    return name, elements, -(-elements // block) * size, offset


def _header(
    reader: HeaderReader,
    metadata: Mapping[str, _Value],
    layout: _Layout,
    *,
    file_name: str,
    file_size: int,
) -> GgufHeader:
    architecture = _text(metadata, "general.architecture")
    places = layout.place_bytes
    layers = max((place for place in places if isinstance(place, int)), default=-1) + 1
    tokens = metadata.get(_VOCABULARY)
    vocabulary = tokens.length if isinstance(tokens, ArrayAt) else None
    file_type_number = _integer(metadata, "general.file_type")
    file_type = FILE_TYPES.get(file_type_number) if file_type_number is not None else None

    def number(key: str) -> int | None:
        return _integer(metadata, f"{architecture}.{key}")

    def per_layer(key: str) -> int | tuple[int, ...] | None:
        value = metadata.get(f"{architecture}.{key}")
        if isinstance(value, ArrayAt):
            return _layers(reader, value)
        return number(key)

    return GgufHeader(
        architecture=architecture,
        kind=_text(metadata, "general.type"),
        name=_text(metadata, "general.name"),
        size_label=_text(metadata, "general.size_label"),
        context_length=number("context_length"),
        block_count=number("block_count"),
        embedding_length=number("embedding_length"),
        head_count=per_layer("attention.head_count"),
        head_count_kv=per_layer("attention.head_count_kv"),
        key_length=number("attention.key_length"),
        value_length=number("attention.value_length"),
        sliding_window=number("attention.sliding_window"),
        sliding_window_pattern=per_layer("attention.sliding_window_pattern"),
        key_length_mla=number("attention.key_length_mla"),
        key_length_swa=number("attention.key_length_swa"),
        value_length_swa=number("attention.value_length_swa"),
        shared_kv_layers=number("attention.shared_kv_layers"),
        nextn_predict_layers=number("nextn_predict_layers"),
        recurrent_layers=(
            per_layer("attention.recurrent_layers") or number("full_attention_interval")
        ),
        ssm_conv_kernel=number("ssm.conv_kernel"),
        ssm_inner_size=number("ssm.inner_size"),
        ssm_state_size=number("ssm.state_size"),
        ssm_group_count=number("ssm.group_count"),
        feed_forward_length=per_layer("feed_forward_length"),
        expert_feed_forward_length=per_layer("expert_feed_forward_length"),
        expert_shared_feed_forward_length=number("expert_shared_feed_forward_length"),
        expert_used_count=per_layer("expert_used_count"),
        expert_count=number("expert_count"),
        vocab_size=vocabulary or number("vocab_size"),
        pooling_type=number("pooling_type"),
        chat_template=_text(metadata, "tokenizer.chat_template"),
        tools=any(takes_tools(_text(metadata, key) or "") for key in _TEMPLATES),
        split_count=_integer(metadata, "split.count"),
        split_no=_integer(metadata, "split.no"),
        split_tensors=_integer(metadata, "split.tensors.count"),
        file_type=file_type,
        type_bytes=tuple(layout.type_bytes.most_common()),
        block_bytes=tuple(places[layer] for layer in range(layers)),
        embedding_bytes=places[_EMBEDDING],
        embedding_type=layout.embedding_type,
        output_bytes=places[_OUTPUT],
        tensor_bytes=file_size - layout.start,
        quantization=quantization_of(layout.type_bytes, file_type, file_name),
        tensors=layout.tensors,
        parameters=layout.parameters,
        data_bytes=layout.data_bytes,
        file_size=file_size,
    )


def _text(metadata: Mapping[str, _Value], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) else None


def _integer(metadata: Mapping[str, _Value], key: str) -> int | None:
    value = metadata.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32:
        return value
    return None


def _layers(reader: HeaderReader, array: ArrayAt) -> tuple[int, ...] | None:
    if array.length > _MAX_LAYERS or array.kind not in (*INTEGER_KINDS, _BOOL):
        return None
    return reader.integers(array)
