"""One file of safetensors, and the index of many, by what stands at their beginning.

Whatever the bytes, it takes under a second and 50 MB.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, NamedTuple, TypeVar

import msgspec

from xandrouting.inventory.json_text import pieces

_MAX_HEADER_BYTES: Final = 24 << 20  # the format's own bound is 100 MB, of which none is near
_MAX_INDEX_BYTES: Final = 40 << 20
_MAX_TENSORS: Final = 200_000  # in a file; 384 experts in 61 layers are 140,000 in 62 files
_MAX_PIECE_BYTES: Final = 1 << 20  # of entries that are decoded together
_MAX_NAMES: Final = 100_000  # of files in an index
_LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_METADATA: Final = "__metadata__"
_WEIGHT_MAP: Final = "weight_map"

_DTYPE_BITS: Final = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_T = TypeVar("_T")


class InvalidSafetensors(ValueError):
    """No engine could load this folder; the text says why and never names a path."""


class UnreadableSafetensors(InvalidSafetensors):
    """The system refused to read a file: nothing is known of its content."""


class Part(NamedTuple):
    """What one file holds."""

    type_bytes: Counter[str]
    parameters: int
    file_size: int


_Offset = Annotated[int, msgspec.Meta(ge=0, lt=1 << 60)]


class _Tensor(msgspec.Struct):
    dtype: Annotated[str, msgspec.Meta(max_length=64)]
    shape: Annotated[list[_Offset], msgspec.Meta(max_length=16)]
    data_offsets: tuple[_Offset, _Offset]


class _Header(msgspec.Struct):
    metadata: msgspec.Raw = msgspec.field(name=_METADATA, default=msgspec.Raw())


class _Index(msgspec.Struct):
    weight_map: msgspec.Raw


_HEADER_JSON: Final = msgspec.json.Decoder(_Header)
_INDEX_JSON: Final = msgspec.json.Decoder(_Index)
_TENSORS_JSON: Final = msgspec.json.Decoder(dict[str, _Tensor])
_NAMES_JSON: Final = msgspec.json.Decoder(dict[str, str])


def read_part(path: Path) -> Part:
    """Read the header of one file, and check that the file is whole.

    Raises:
        InvalidSafetensors: it is damaged, cut short, or none; or the system refuses.
    """
    with opened(path) as (fd, file_size):
        header = _read_header(fd, file_size)
    type_bytes: Counter[str] = Counter()
    begins, ends = array("Q"), array("Q")
    parameters = 0
    for tensor in _tensors(header):
        begin, end = tensor.data_offsets
        values = math.prod(tensor.shape)
        bits = _DTYPE_BITS.get(tensor.dtype)
        # A dtype newer than the table is no damage.
        if bits is not None and end - begin != -(-values * bits // 8):
            raise InvalidSafetensors("header damaged: a tensor's size is not that of its shape")
        begins.append(begin)
        ends.append(end)
        type_bytes[tensor.dtype] += end - begin
        parameters += values
        if len(begins) > _MAX_TENSORS or len(type_bytes) > len(_DTYPE_BITS) * 2:
            raise InvalidSafetensors("damaged: an impossible number of entries")
    whole = 8 + len(header) + _end_of(begins, ends)
    if file_size < whole:
        raise InvalidSafetensors(
            f"cut short: the header says {whole} bytes, the file has {file_size}"
        )
    if file_size > whole:
        raise InvalidSafetensors("damaged: there is more in the file than its header says")
    return Part(type_bytes, parameters, file_size)


def read_index(path: Path) -> list[str]:
    """Return the names of the files that an index names, in their order.

    Raises:
        InvalidSafetensors: it is damaged; or the system refuses.
    """
    text = read_all(path, _MAX_INDEX_BYTES)
    at, end = _place(text, _WEIGHT_MAP, decode(_INDEX_JSON, text).weight_map)
    names: set[str] = set()
    for piece in pieces(text, at + 1, end - 1, b'",'):
        names.update(_entries(_NAMES_JSON, piece).values())
        if len(names) > _MAX_NAMES:
            raise InvalidSafetensors("damaged: an impossible number of entries")
    return sorted(names)


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
    return header


def _tensors(header: bytes) -> Iterator[_Tensor]:
    metadata = decode(_HEADER_JSON, header).metadata
    begin, end = header.index(b"{") + 1, header.rindex(b"}")
    spans = [(begin, end)]
    if memoryview(metadata).nbytes:
        at, behind = _place(header, _METADATA, metadata)
        spans = [(begin, header.rindex(b'"%b"' % _METADATA.encode(), begin, at)), (behind, end)]
    for first, last in spans:
        for piece in pieces(header, first, last, b"}"):
            yield from _entries(_TENSORS_JSON, piece).values()


def _entries(decoder: msgspec.json.Decoder[_T], piece: bytes) -> _T:
    if len(piece) > _MAX_PIECE_BYTES:
        raise InvalidSafetensors("damaged: an impossible number of entries")
    return decode(decoder, piece)


def _place(text: bytes, name: str, value: msgspec.Raw) -> tuple[int, int]:
    """Return where an entry's value, which is an object, begins and ends."""
    if bytes(memoryview(value)[:1]) != b"{":
        raise InvalidSafetensors("damaged: not the JSON it should be")
    key = text.find(b'"%b"' % name.encode())
    at = text.find(value, key) if key >= 0 else -1
    if at < 0:  # a name that is spelled in a way of its own
        raise InvalidSafetensors("damaged: not the JSON it should be")
    return at, at + memoryview(value).nbytes


def _end_of(begins: array[int], ends: array[int]) -> int:
    """Return where the last tensor ends; they must lie one behind the other.

    Where each begins there another ends, and so every byte is of one tensor.
    """
    at = 0
    for begin, end in zip(sorted(begins), sorted(ends), strict=True):
        if begin != at or end < begin:
            raise InvalidSafetensors("header damaged: tensors overlap or leave a gap")
        at = end
    return at


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Put `where` before what is wrong."""
    try:
        yield
    except InvalidSafetensors as error:
        if not where:
            raise
        raise type(error)(f"{where}: {error}") from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
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


def read_all(path: Path, max_bytes: int) -> bytes:
    """Return what is in a file of text.

    Raises:
        InvalidSafetensors: it is larger than can be, or no such file; or the system refuses.
    """
    with opened(path) as (fd, size):
        if size > max_bytes:
            raise InvalidSafetensors("too large to be true")
        text = os.pread(fd, size, 0)
    if text.startswith(_LFS_POINTER):
        raise InvalidSafetensors("a git-lfs pointer, not the model")
    return text


def decode(decoder: msgspec.json.Decoder[_T], data: bytes | msgspec.Raw) -> _T:
    """Return what JSON holds.

    Raises:
        InvalidSafetensors: it is none, or not what it should be.
    """
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise InvalidSafetensors("damaged: not the JSON it should be") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidSafetensors("damaged: it cannot be parsed") from error
