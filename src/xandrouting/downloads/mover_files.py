"""The mover's side of the disk: its order, the parts that grow, and how a folder is published.

Runs in the mover's process; standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from _hashlib import HASH

MANIFEST: Final = ".xandrouting.json"
# Of a connection: with less, those who receive and those who hash wait for each other.
BUFFER_BYTES: Final = 4 << 20
_HASHED_BYTES: Final = 256 << 10  # at once; it stays in a core's own cache
_UNPACKED_BYTES: Final = 1 << 20  # at once
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRITEBACK_BYTES: Final = 32 << 20  # so that no fsync has gigabytes to write
_SYNC_FILE_RANGE_WRITE: Final = 2


class Failed(Exception):
    """The job cannot go on; said to the gateway as it is."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Stopped(BaseException):
    """The gateway wants no more, or is gone."""


@contextmanager
def disk(name: str) -> Iterator[None]:
    """Turn what the disk says into a failure that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        if error.errno in _FULL:
            message = f"The disk is full: {name} cannot be written. Make room and resume."
            raise Failed("disk_full", message) from error
        message = f"{name} cannot be written to the models directory: {reason}."
        raise Failed("unwritable", message) from error


class File:
    """One content of the order, at one or more paths, and its part on the disk."""

    def __init__(self, told: dict[str, Any], parts: Path) -> None:
        self.paths = [checked(told["path"])]
        self.url: str = told["url"]
        self.size: int = told["size"]
        self.sha256: str | None = told.get("sha256")
        self.blob_id: str | None = told.get("blob_id")
        self.key = self.sha256 or self.blob_id or hashlib.sha256(self.path.encode()).hexdigest()
        self.part = parts / checked(self.key)
        self.have = 0  # bytes in the part
        self.fetched = 0  # over the wire in this run
        self.archive, self.member = _archive(told.get("package"), parts)
        self.there: set[str] = set()  # of the paths: those where the target has it, hash and all

    @property
    def path(self) -> str:
        """The first path: what the file is called in a message."""
        return self.paths[0]

    @property
    def on_disk(self) -> int:
        """How much of it there is, be it in its archive still."""
        packed = 0 if self.archive is None else self.archive.have
        return max(self.have, min(packed, self.size))

    @property
    def over_wire(self) -> int:
        """What was fetched for it in this run."""
        return self.fetched + (0 if self.archive is None else self.archive.fetched)

    @property
    def in_place(self) -> bool:
        """Whether the target has all of it already."""
        return len(self.there) == len(self.paths)

    def hasher(self) -> HASH | None:
        """Return a fresh hash for this content, or None: the hub told nothing to compare with."""
        if self.sha256 is not None:
            return hashlib.sha256()
        if self.blob_id is not None:
            return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        return None


def _archive(told: dict[str, Any] | None, parts: Path) -> tuple[File | None, str]:
    if told is None:
        return None, ""
    name = told["url"].rpartition("/")[2]
    return File({**told, "path": name}, parts), told["member"]


class Order:
    """What to bring and where; all folders absolute and on one filesystem."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.parts = Path(told["parts"])
        self.stage = Path(told["stage"])
        self.target = Path(told["target"])
        self.manifest: dict[str, Any] = told["manifest"]
        self.merge: bool = told["merge"]
        self.replace = frozenset(told["replace"])  # what the target has of these is damaged
        self.token_hosts = frozenset(told["token_hosts"])
        self.parallel: int = told["parallel"]
        self.window_bytes: int = told["window_bytes"]
        self.stall_s: float = told["stall_s"]
        self.report_s: float = told["report_s"]
        self.files: list[File] = []
        known: dict[str, File] = {}
        for entry in told["files"]:
            file = File(entry, self.parts)
            if file.key in known:
                known[file.key].paths += file.paths
            else:
                known[file.key] = file
                self.files.append(file)


def checked(path: str) -> str:
    """Return a path that stays in its folder, and is not the manifest's."""
    pieces = path.split("/")
    if path.casefold() == MANIFEST or "\0" in path or any(p in ("", ".", "..") for p in pieces):
        raise Failed(
            "unwritable", f"The repository lists a file that cannot be kept: {path[:200]!r}."
        )
    return path


class Digest:
    """A part's hash: a thread reads what was written while more comes.

    It reads from the file, so that a crash before or after makes no difference; what has just been
    written is in memory.
    """

    def __init__(self, file: File, fd: int, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._hash = file.hasher()
        self._fd = fd
        self._at, self._end = 0, file.have  # hashed; written
        self._whole = self._dropped = False  # nothing follows; nobody wants it any more
        self._grown = threading.Condition()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        if self._hash is not None:
            self._thread.start()

    def wrote(self, size: int) -> None:
        """Take in that so much has just been appended."""
        with self._grown:
            self._end += size
            self._grown.notify()

    def _follow(self) -> None:
        assert self._hash is not None
        view = memoryview(bytearray(_HASHED_BYTES))
        while left := self._wait():
            try:
                size = os.preadv(self._fd, [view[: min(left, len(view))]], self._at)
                if not size:
                    raise OSError(errno.EIO, "it became shorter")
            except OSError as error:
                self._error = error
                return
            self._hash.update(view[:size])
            self._at += size

    def _wait(self) -> int:
        """Return how much is there to be hashed; 0: that was all, or everything stops."""
        with self._grown:
            while self._at == self._end and not self._whole:
                self._grown.wait()
            over = self._dropped or self._stopping.is_set()
            return 0 if over else self._end - self._at

    def drop(self) -> None:
        """Have the thread end, wherever it is."""
        self._dropped = True
        self._finish()

    def _finish(self) -> None:
        with self._grown:
            self._whole = True
            self._grown.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def value(self) -> str | None:
        """Return the hash of everything.

        Raises:
            OSError: what was written cannot be read.
            Stopped: it is not known, and there is no time any more.
        """
        self._finish()
        if self._hash is None:
            return None
        if self._error is not None:
            raise self._error
        if self._at < self._end:
            raise Stopped
        return str(self._hash.hexdigest())


class Part:
    """A part file that grows, with its hash."""

    def __init__(self, file: File, stopping: threading.Event) -> None:
        self.file = file
        with disk(file.path):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self.fd = os.open(file.part, flags, 0o644)
            file.have = os.fstat(self.fd).st_size
            if file.have > file.size:
                os.ftruncate(self.fd, 0)
                file.have = 0
        self.digest = Digest(file, self.fd, stopping)
        self._queued = file.have  # for writing back

    def append(self, piece: memoryview) -> None:
        """Append to the file; all of it, or as much as the disk takes before this fails."""
        while piece:
            with disk(self.file.path):
                size = os.pwrite(self.fd, piece, self.file.have)
            self.file.have += size
            self.digest.wrote(size)
            piece = piece[size:]
        if self.file.have - self._queued >= _WRITEBACK_BYTES:
            write_back(self.fd, self._queued, self.file.have - self._queued)
            self._queued = self.file.have

    def is_right(self) -> bool:
        """Whether the whole content's hash is what the hub told; flushed to the disk if so."""
        with disk(self.file.path):
            value = self.digest.value()
            if value is not None and value != (self.file.sha256 or self.file.blob_id):
                return False
            os.fsync(self.fd)
            return True

    def close(self) -> None:
        """Let go of the file."""
        self.digest.drop()
        os.close(self.fd)


def unpack(file: File, stopping: threading.Event) -> bool:
    """Take a file out of its archive, which is whole, and go on from what an earlier run took.

    False: that was not the file, and was thrown away.
    """
    import zipfile
    import zlib

    assert file.archive is not None
    part = Part(file, stopping)
    try:
        with disk(file.path), zipfile.ZipFile(file.archive.part).open(file.member) as packed:
            packed.seek(file.have)
            while file.have <= file.size and (piece := packed.read(_UNPACKED_BYTES)):
                part.append(memoryview(piece)[: file.size + 1 - file.have])
                if stopping.is_set():
                    raise Stopped
        if file.have == file.size and part.is_right():
            return True
    except (KeyError, zipfile.BadZipFile, zlib.error):
        pass  # the archive's hash is right, and yet it is not what the order says
    finally:
        part.close()
    with disk(file.path):
        file.part.unlink()
    file.have = 0
    return False


_LIBC: Final = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def write_back(fd: int, offset: int, size: int) -> None:
    """Have the kernel begin to write these bytes to the disk; Linux only."""
    if _LIBC is not None:
        offset64, size64 = ctypes.c_int64(offset), ctypes.c_int64(size)
        _LIBC.sync_file_range(fd, offset64, size64, _SYNC_FILE_RANGE_WRITE)


def take_over(order: Order, on_wait: Callable[[], None] = lambda: None) -> int:
    """Make the parts what earlier runs left, and return a descriptor that keeps others out.

    Blocks while a mover of the same folder ends, after it has called `on_wait`. What that had put
    into the stage already, but had not published, becomes a part again.
    """
    with disk("The unfinished download"):
        order.parts.mkdir(parents=True, exist_ok=True)
        lock = os.open(order.parts, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a filesystem without locks
        for file in order.files:
            staged = order.stage / file.path
            if staged.is_file() and not staged.is_symlink() and not file.part.exists():
                staged.rename(file.part)
            for content in (file, file.archive):
                if content is not None and content.part.is_file():
                    content.have = min(content.part.stat().st_size, content.size)
            if order.merge and all(_has_size(order.target / path, file) for path in file.paths):
                file.have = file.size  # until its hash is known
        if order.stage.exists():
            shutil.rmtree(order.stage)
    return lock


def _has_size(path: Path, file: File) -> bool:
    return not path.is_symlink() and path.is_file() and path.stat().st_size == file.size


def is_published(order: Order) -> bool:
    """Whether an earlier run came to its end, and only could not say so."""
    try:
        if json.loads((order.target / MANIFEST).read_bytes()) != order.manifest:
            return False
        sizes = [
            ((order.target / path).stat().st_size, file.size)
            for file in order.files
            for path in file.paths
        ]
    except (OSError, ValueError):
        return False
    if any(there != wanted for there, wanted in sizes):
        return False
    for file in order.files:
        file.have = file.size
    return True


def publish(order: Order) -> None:
    """Make the target hold the files, all of them right and flushed; crash-safe at every step."""
    with disk(f"The folder {order.target.name}"):
        _build(order)
        order.target.parent.mkdir(parents=True, exist_ok=True)
        if order.merge:
            _merge(order)
        else:
            order.stage.rename(order.target)
        _flush_folder(order.target.parent)


def clean_up(order: Order) -> None:
    """Remove the job's folder once nothing of it is needed."""
    shutil.rmtree(order.stage, ignore_errors=True)
    shutil.rmtree(order.parts, ignore_errors=True)
    try:
        order.parts.parent.rmdir()
    except OSError:
        pass  # something else is in it, which is not ours


def _build(order: Order) -> None:
    """Build the finished tree beside the parts."""
    order.stage.mkdir(parents=True)
    for file in order.files:
        if file.in_place:
            continue
        first, *others = (order.stage / path for path in file.paths)
        first.parent.mkdir(parents=True, exist_ok=True)
        file.part.rename(first)
        for other in others:
            other.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(first, other)
            _flush(other)
    manifest = order.stage / MANIFEST
    manifest.write_text(json.dumps(order.manifest, indent=1) + "\n", encoding="utf-8")
    _flush(manifest)
    _flush_tree(order.stage)


def check_free(order: Order, file: File) -> None:
    """Check that nothing of somebody else's has one of the file's names in the target."""
    for path in file.paths:
        ours = path in file.there or path in order.replace
        if not ours and os.path.lexists(order.target / path):
            raise Failed(
                "destination_occupied",
                f"The folder {order.target.name!r} has another {path[:100]!r} than the hub. Move "
                "it away and resume: every byte is kept.",
            )


def _merge(order: Order) -> None:
    order.target.mkdir(exist_ok=True)
    home = os.path.realpath(order.target)
    files = [file for file in order.files if not file.in_place]
    for file in files:
        check_free(order, file)
    # Until the last of the weights is there, nobody takes the others for a model.
    moving = sorted((path for file in files for path in file.paths), key=_is_weights)
    for path in moving:
        there = order.target / path
        there.parent.mkdir(parents=True, exist_ok=True)
        if os.path.commonpath([home, os.path.realpath(there.parent)]) != home:
            raise OSError(errno.EXDEV, "a link in it leads elsewhere")
        (order.stage / path).replace(there)
    for folder in {(order.target / path).parent for path in moving}:
        _flush_folder(folder)
    (order.stage / MANIFEST).replace(order.target / MANIFEST)
    _flush_folder(order.target)


def _is_weights(path: str) -> tuple[bool, bool]:
    name = path.rpartition("/")[2].lower()
    return name.endswith((".gguf", ".safetensors")), "mmproj" not in name


def _flush_tree(top: Path) -> None:
    for folder, _, _ in os.walk(top, topdown=False):
        _flush_folder(Path(folder))


def _flush_folder(folder: Path) -> None:
    """Flush a folder's entries; that of a network may not know how, and needs it less."""
    try:
        _flush(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
