"""Headers read before, in memory and on disk, for as long as their files stay the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from xandrouting.core import quantization as names
from xandrouting.inventory import (
    folders,
    gguf,
    gguf_reader,
    json_text,
    model_file,
    paths,
    quantization,
    safetensors,
    safetensors_part,
    templates,
)
from xandrouting.inventory.folders import Folder, Found, read_folder_model
from xandrouting.inventory.gguf import GgufHeader, InvalidGguf, UnreadableGguf, read_gguf
from xandrouting.inventory.header_store import HeaderStore, version_of
from xandrouting.inventory.paths import path_in
from xandrouting.inventory.safetensors import UnreadableSafetensors

Header = GgufHeader | str
"""A header, or why there is none."""

_T = TypeVar("_T")
_ENCODE: Final = msgspec.msgpack.Encoder().encode
_HEADER: Final[msgspec.msgpack.Decoder[Header]] = msgspec.msgpack.Decoder(Header)
_FOUND: Final[msgspec.msgpack.Decoder[Found]] = msgspec.msgpack.Decoder(Found)
_READERS: Final = (
    *(names, folders, gguf, gguf_reader, json_text, model_file, paths, quantization),
    *(safetensors, safetensors_part, templates),
)


def open_header_store(path: Path) -> HeaderStore:
    """Open the file of remembered headers; it is of no use to other readers than these."""
    return HeaderStore.open(path, version_of(_READERS))


class HeaderCache:
    """Reads headers of GGUF files and of folders, each once for as long as it stays the same.

    Without a store nothing is remembered across restarts.
    """

    def __init__(self, store: HeaderStore | None = None) -> None:
        self._store = HeaderStore(None) if store is None else store
        self._known: dict[str, tuple[object, Header]] = {}
        self._folders: dict[str, tuple[object, Found]] = {}

    def read(self, path: str, status: os.stat_result) -> Header:
        """Return the header of `path`, which was just seen with `status`.

        It blocks: for a header that is not known yet about 10 ms.
        """
        identity = (
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
        known = self._known.get(path)
        if known is not None and known[0] == identity:
            return known[1]
        try:
            header = self._remembered(path, identity, _HEADER, lambda: _read_file(path))
        except UnreadableGguf as error:
            return str(error)  # not kept: the next look may succeed on the same file
        self._known[path] = identity, header
        return header

    def read_folder(self, base: str, folder: Folder) -> Found:
        """Return what a folder holds. It blocks for about a millisecond a part."""
        path, identity = path_in(base, folder.relative), folder.identity
        known = self._folders.get(path)
        if known is not None and known[0] == identity:
            return known[1]
        try:
            found = self._remembered(
                path, identity, _FOUND, lambda: read_folder_model(Path(path), folder)
            )
        except UnreadableSafetensors as error:
            return str(error)  # not kept: the next look may succeed on the same files
        self._folders[path] = identity, found
        return found

    def keep_only(self, files: Collection[str], models: Collection[str]) -> None:
        """Forget the files and the folders that are no longer there, and write what is new."""
        self._known = {path: known for path, known in self._known.items() if path in files}
        self._folders = {path: known for path, known in self._folders.items() if path in models}
        self._store.flush()

    def _remembered(
        self,
        path: str,
        identity: object,
        decoder: msgspec.msgpack.Decoder[_T],
        read: Callable[[], _T],
    ) -> _T:
        key = _ENCODE(identity)
        told = self._store.find(path, key)
        if told is not None:
            try:
                return decoder.decode(told)
            except msgspec.DecodeError:
                pass  # what is damaged is read again
        found = read()
        try:
            self._store.keep(path, key, _ENCODE(found))
        except (OverflowError, UnicodeError):
            pass  # a header that tells impossible numbers is read again
        return found


def _read_file(path: str) -> Header:
    try:
        return read_gguf(path)
    except UnreadableGguf:
        raise
    except InvalidGguf as error:
        return str(error)
