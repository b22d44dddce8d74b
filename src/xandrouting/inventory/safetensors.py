"""What a folder of safetensors tells: the weights by their headers, the shape by config.json.

Nothing of it is believed before it is checked. The index's `total_size` is not even read:
the shards' headers tell the same, and they are what an engine reads.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, NamedTuple, TypeVar

import msgspec

_MAX_HEADER_BYTES: Final = 100_000_000  # the format's own bound
_MAX_CONFIG_BYTES: Final = 16 << 20
_MAX_ITEMS: Final = 2_000_000  # a tensor makes about ten; 384 experts in 61 layers are 140,000
_MAX_PARTS: Final = 10_000
_MAX_LAYERS: Final = 4096
_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_CONFIG: Final = "config.json"
# Where a model that sees or hears keeps the shape of its language half.
_NESTED: Final = ("text_config", "llm_config", "language_config")
# The least of them holds, as for vLLM.
_CONTEXT_LENGTHS: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# Layers that keep a state of fixed size and no keys and values.
_STATE_LAYERS: Final = frozenset({"linear_attention", "mamba", "conv", "recurrent"})
_DTYPE_BITS: Final = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class InvalidSafetensors(ValueError):
    """No engine could load this folder; the text says why and never names a path."""


class UnreadableSafetensors(InvalidSafetensors):
    """The system refused to read a file: nothing is known of its content."""


@dataclass(frozen=True, slots=True)
class SafetensorsModel:
    """What a folder tells. None: its config does not say.

    The shape is that of the language half where there are several. `parameters` counts
    stored values: of weights packed into larger ones (GPTQ, AWQ), fewer than there are.
    """

    shards: tuple[str, ...]  # file names, in their order
    weight_bytes: int
    type_bytes: tuple[tuple[str, int], ...]  # bytes per stored dtype, the largest first
    parameters: int
    file_size: int  # all shards together
    architectures: tuple[str, ...]
    dtype: str | None  # what the config says the weights are, `bfloat16`
    quantization_method: str | None  # `awq`, `gptq`, `fp8`, …
    num_hidden_layers: int | None
    hidden_size: int | None
    intermediate_size: int | None  # where layers differ, the largest
    num_attention_heads: int | None
    num_key_value_heads: int | None  # where layers differ, the largest
    head_dim: int | None
    kv_latent_dim: int | None  # what a layer keeps of one token where it is compressed (MLA)
    max_position_embeddings: int | None
    vocab_size: int | None
    sliding_window: int | None  # tokens; None: no layer slides
    layer_types: tuple[str, ...]  # one per layer, or none
    sliding_pattern: int | None  # without layer_types: every n-th layer keeps all tokens
    first_sliding_layer: int  # without both: the layers before it keep all tokens

    @property
    def quantization(self) -> str:
        """How the weights are quantized, else the type that most of them are stored as."""
        return (self.quantization_method or self.type_bytes[0][0]).upper()

    @property
    def kv_values(self) -> int | None:
        """How many values one layer keeps of one token; too many where the config is silent."""
        if self.kv_latent_dim is not None:
            return self.kv_latent_dim
        heads, head_dim = self.num_attention_heads, self.head_dim
        if head_dim is None and heads is not None and self.hidden_size is not None:
            head_dim = self.hidden_size // heads
        kv_heads = self.num_key_value_heads if self.num_key_value_heads is not None else heads
        if head_dim is not None and kv_heads is not None:
            return 2 * kv_heads * head_dim
        # Gemma 3 leaves its heads to the code that reads the config.
        return None if self.hidden_size is None else 2 * self.hidden_size

    @property
    def attention_layers(self) -> tuple[int, int]:
        """How many layers keep all tokens, and how many those of their sliding window only."""
        if self.layer_types:
            keeping = sum(kind not in _STATE_LAYERS for kind in self.layer_types)
            sliding = self.layer_types.count("sliding_attention")
            return (keeping, 0) if self.sliding_window is None else (keeping - sliding, sliding)
        layers = self.num_hidden_layers or 0
        if self.sliding_window is None:
            full = layers
        elif self.sliding_pattern is not None:
            full = layers // self.sliding_pattern
        else:
            full = min(self.first_sliding_layer, layers)
        return full, layers - full


def read_folder(path: str | os.PathLike[str]) -> SafetensorsModel:
    """Read the headers and the config of the folder at `path`, and check that it is whole.

    It blocks: under a millisecond for each part of a usual model, under a second and 300 MB
    for the largest header there can be.

    Raises:
        UnreadableSafetensors: the system refuses; the same folder may do later.
        InvalidSafetensors: a part is missing, cut short or damaged, or there are no weights.
    """
    folder = Path(path)
    files = _files(folder)
    if _CONFIG not in files:
        raise InvalidSafetensors("config.json is missing")
    with _naming(_CONFIG):
        config = _read_config(folder / _CONFIG)
    names = _part_names(folder, files)
    parts: list[_Part] = []
    for no, name in enumerate(names, 1):
        with _naming(f"part {no} of {len(names)}" if len(names) > 1 else ""):
            parts.append(_read_part(folder / name))
    if not any(part.parameters for part in parts):
        raise InvalidSafetensors("no weights: its files hold no tensors")
    with _naming(_CONFIG):
        return _model(config, names, parts)


def _files(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except OSError as error:
        raise UnreadableSafetensors(f"unreadable: {error.strerror}") from error


def _part_names(folder: Path, files: frozenset[str]) -> tuple[str, ...]:
    if _INDEX in files:
        with _naming(_INDEX):
            index = _decode(_INDEX_JSON, _read_all(folder / _INDEX, _MAX_HEADER_BYTES))
        names = tuple(sorted(set(index.weight_map.values())))
    else:
        names = (_SINGLE,) if _SINGLE in files else ()
    if not names:
        raise InvalidSafetensors("no weights: neither model.safetensors nor an index of parts")
    if len(names) > _MAX_PARTS:
        raise InvalidSafetensors("index damaged: an impossible number of parts")
    # A name with a folder in it is not among them either.
    missing = [str(no) for no, name in enumerate(names, 1) if name not in files]
    if missing:
        more = ", …" if len(missing) > 3 else ""
        numbers = ", ".join(missing[:3]) + more
        raise InvalidSafetensors(f"{len(missing)} of {len(names)} parts missing: {numbers}")
    return names


class _Part(NamedTuple):
    type_bytes: Counter[str]
    parameters: int
    file_size: int


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


_Offset = Annotated[int, msgspec.Meta(ge=0, lt=1 << 60)]


class _Tensor(msgspec.Struct):
    dtype: str
    shape: Annotated[list[_Offset], msgspec.Meta(max_length=16)]
    data_offsets: tuple[_Offset, _Offset]


_INDEX_JSON: Final = msgspec.json.Decoder(_Index)
_OBJECT_JSON: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TENSOR_JSON: Final = msgspec.json.Decoder(_Tensor)
_T = TypeVar("_T")


def _read_part(path: Path) -> _Part:
    with _opened(path) as (fd, file_size):
        header = _read_header(fd, file_size)
    tensors = _decode(_OBJECT_JSON, header)
    tensors.pop("__metadata__", None)
    type_bytes: Counter[str] = Counter()
    spans: list[tuple[int, int]] = []
    parameters = 0
    for raw in tensors.values():
        tensor = _decode(_TENSOR_JSON, raw)
        begin, end = tensor.data_offsets
        values = math.prod(tensor.shape)
        bits = _DTYPE_BITS.get(tensor.dtype)
        # A dtype newer than the table is no damage.
        if bits is not None and end - begin != -(-values * bits // 8):
            raise InvalidSafetensors("header damaged: a tensor's size is not that of its shape")
        spans.append((begin, end))
        type_bytes[tensor.dtype] += end - begin
        parameters += values
    end = _end_of(spans)
    whole = 8 + len(header) + end
    if file_size < whole:
        raise InvalidSafetensors(
            f"cut short: the header says {whole} bytes, the file has {file_size}"
        )
    if file_size > whole:
        raise InvalidSafetensors("damaged: there is more in the file than its header says")
    return _Part(type_bytes, parameters, file_size)


def _read_header(fd: int, file_size: int) -> bytes:
    head = os.pread(fd, len(_LFS_POINTER), 0)
    if not head:
        raise InvalidSafetensors("empty file")
    if head == _LFS_POINTER:
        raise InvalidSafetensors("a git-lfs pointer, not the model")
    if len(head) < 8:
        raise InvalidSafetensors("cut short: the file ends inside its header")
    length: int = struct.unpack_from("<Q", head)[0]
    if length > _MAX_HEADER_BYTES:
        raise InvalidSafetensors("not a safetensors file, or its header is damaged")
    header = os.pread(fd, length, 8) if length <= file_size else b""
    if len(header) < length:
        raise InvalidSafetensors("cut short: the file ends inside its header")
    _check_items(header)
    return header


def _check_items(text: bytes) -> None:
    # Before it is decoded, which can take fifty times the memory.
    if text.count(b",") + text.count(b":") > _MAX_ITEMS:
        raise InvalidSafetensors("damaged: an impossible number of entries")


def _end_of(spans: list[tuple[int, int]]) -> int:
    """Return where the last tensor ends; they must lie one behind the other."""
    at = 0
    for begin, end in sorted(spans):
        if begin != at or end < begin:
            raise InvalidSafetensors("header damaged: tensors overlap or leave a gap")
        at = end
    return at


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Put `where` before what is wrong."""
    try:
        yield
    except InvalidSafetensors as error:
        if not where:
            raise
        raise type(error)(f"{where}: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """Open a file for reading; yield its descriptor and its size."""
    try:
        # A named pipe would block in open() without O_NONBLOCK.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise InvalidSafetensors("not a regular file")
            yield fd, status.st_size
        finally:
            os.close(fd)
    except FileNotFoundError as error:
        raise InvalidSafetensors("missing: a symlink that leads nowhere") from error
    except OSError as error:
        raise UnreadableSafetensors(f"unreadable: {error.strerror}") from error


def _read_all(path: Path, max_bytes: int) -> bytes:
    with _opened(path) as (fd, size):
        if size > max_bytes:
            raise InvalidSafetensors("too large to be true")
        text = os.pread(fd, size, 0)
    if text.startswith(_LFS_POINTER):
        raise InvalidSafetensors("a git-lfs pointer, not the model")
    _check_items(text)
    return text


def _decode(decoder: msgspec.json.Decoder[_T], data: bytes | msgspec.Raw) -> _T:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise InvalidSafetensors("damaged: not the JSON it should be") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidSafetensors("damaged: not JSON") from error


_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_COUNT_JSON: Final = msgspec.json.Decoder(_Count | None)
_COUNTS_JSON: Final = msgspec.json.Decoder(_Count | list[_Count | None] | None)
_SIGNED_JSON: Final = msgspec.json.Decoder(int | bool | None)
_PATTERN_JSON: Final = msgspec.json.Decoder(_Count | str | None)
_FLAG_JSON: Final = msgspec.json.Decoder(bool | None)
_TEXT_JSON: Final = msgspec.json.Decoder(str | None)


class _Quantization(msgspec.Struct):
    quant_method: str | None = None


_QUANTIZATION_JSON: Final = msgspec.json.Decoder(_Quantization | None)
_TEXTS_JSON: Final = msgspec.json.Decoder(
    Annotated[list[str], msgspec.Meta(max_length=_MAX_LAYERS)] | None
)


def _read_config(path: Path) -> Mapping[str, msgspec.Raw]:
    config = _decode(_OBJECT_JSON, _read_all(path, _MAX_CONFIG_BYTES))
    for name in _NESTED:
        if name in config and bytes(config[name]).startswith(b"{"):
            nested = _decode(_OBJECT_JSON, config[name])
            nested.pop("architectures", None)  # the half's own; the engine goes by the whole's
            return config | {key: raw for key, raw in nested.items() if bytes(raw) != b"null"}
    return config


def _model(
    config: Mapping[str, msgspec.Raw], names: tuple[str, ...], parts: Sequence[_Part]
) -> SafetensorsModel:
    def value(decoder: msgspec.json.Decoder[_T | None], *names: str) -> _T | None:
        """Return the first of `names` that the config says."""
        for name in names:
            if name in config:
                with _naming(name):
                    found = _decode(decoder, config[name])
                if found is not None:
                    return found
        return None

    def count(*names: str) -> int | None:
        return value(_COUNT_JSON, *names) or None  # some say 0 where they mean nothing

    def largest(*names: str) -> int | None:
        found = value(_COUNTS_JSON, *names)
        if isinstance(found, list):
            found = max((one or 0 for one in found), default=0)
        return found or None

    type_bytes: Counter[str] = Counter()
    for part in parts:
        type_bytes.update(part.type_bytes)
    layers = count("num_hidden_layers", "n_layer", "num_layers")
    quantized = value(_QUANTIZATION_JSON, "quantization_config")
    rank, rope = count("kv_lora_rank"), count("qk_rope_head_dim")
    return SafetensorsModel(
        shards=names,
        weight_bytes=type_bytes.total(),
        type_bytes=tuple(type_bytes.most_common()),
        parameters=sum(part.parameters for part in parts),
        file_size=sum(part.file_size for part in parts),
        architectures=tuple(value(_TEXTS_JSON, "architectures") or ()),
        dtype=value(_TEXT_JSON, "dtype", "torch_dtype"),
        quantization_method=None if quantized is None else quantized.quant_method,
        num_hidden_layers=layers,
        hidden_size=count("hidden_size", "n_embd", "d_model"),
        intermediate_size=largest("intermediate_size", "n_inner", "ffn_hidden_size"),
        num_attention_heads=count("num_attention_heads", "n_head"),
        num_key_value_heads=largest(
            "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"
        ),
        head_dim=count("head_dim"),
        kv_latent_dim=None if rank is None else rank + (rope or 0),
        max_position_embeddings=min(filter(None, map(count, _CONTEXT_LENGTHS)), default=None),
        vocab_size=count("vocab_size", "padded_vocab_size"),
        sliding_window=_window(
            value(_SIGNED_JSON, "sliding_window"), used=value(_FLAG_JSON, "use_sliding_window")
        ),
        layer_types=tuple(value(_TEXTS_JSON, "layer_types") or ())[:layers],
        sliding_pattern=_pattern(
            value(_PATTERN_JSON, "sliding_window_pattern", "_sliding_window_pattern"),
            model_type=value(_TEXT_JSON, "model_type"),
        ),
        first_sliding_layer=count("max_window_layers") or 0,
    )


def _window(tokens: int | None, *, used: bool | None) -> int | None:
    """Return the window; Qwen configs hold one that is not used."""
    if tokens is None or isinstance(tokens, bool) or used is False:
        return None
    return tokens if 0 < tokens < 1 << 32 else None


def _pattern(pattern: int | str | None, *, model_type: str | None) -> int | None:
    if isinstance(pattern, str):
        return 1  # `LLLG` and the like: as if no layer slid, which is never too few bytes
    if pattern is None and model_type in ("gemma2", "gemma2_text"):
        return 2
    return pattern or None
