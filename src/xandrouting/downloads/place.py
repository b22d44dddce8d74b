"""Where downloads lie on disk: who has a folder, what of a job is there, how much room is left.

Everything here blocks, and belongs into threads.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from xandrouting.core.errors import (
    DestinationOccupied,
    InsufficientDisk,
    InvalidDestination,
    ModelsDirUnusable,
)
from xandrouting.downloads.jobs import Order, RemoteFile
from xandrouting.downloads.names import MANIFEST

log = logging.getLogger(__name__)

INCOMING: Final = ".incoming"
PARTS: Final = ".parts"
TREE: Final = "tree"
GIB: Final = 1 << 30
MAX_RESERVE_BYTES: Final = GIB  # what a download leaves free, or a 50th of a small disk
KEPT_S: Final = 7 * 86_400.0  # the bytes of a job that ended without its model
_MAX_MANIFEST_BYTES: Final = 16 << 20
_FULL: Final = frozenset((errno.ENOSPC, errno.EDQUOT))


class ManifestFile(msgspec.Struct, frozen=True):
    """One file as it was verified when it came. `commit` is the one it was fetched at."""

    path: str
    size: Annotated[int, msgspec.Meta(ge=0)]
    sha256: str | None = None
    blob_id: str | None = None
    commit: str | None = None

    def is_of(self, file: RemoteFile) -> bool:
        """Whether it is the same content."""
        same = (self.sha256, self.blob_id) == (file.sha256, file.blob_id)
        return same and self.size == file.size


class Manifest(msgspec.Struct, frozen=True):
    """What a folder holds and where it came from, beside its files."""

    repo_id: str
    commit: str
    files: tuple[ManifestFile, ...]
    endpoint: str | None = None
    version: int = 1


_MANIFEST: Final = msgspec.json.Decoder(Manifest)


@dataclass(frozen=True, slots=True)
class Found:
    """What is at a destination: `kept` are the wanted files that are there, whole.

    `damaged` were there once, and may be replaced.
    """

    exists: bool = False
    kept: frozenset[str] = frozenset()
    damaged: frozenset[str] = frozenset()
    manifest: Manifest | None = None

    def lacks(self, order: Order) -> tuple[RemoteFile, ...]:
        """Return what has still to be fetched."""
        return tuple(file for file in order.files if file.path not in self.kept)


class Place:
    """The models directory, as far as downloads change it.

    `taken` are names in it that stand for folders elsewhere.
    """

    def __init__(self, root: Path, taken: Collection[str] = ()) -> None:
        self._root = root
        self._taken = frozenset(taken)

    def look(self, order: Order, *, resuming: bool = False) -> Found:
        """Look who is at the order's destination.

        `resuming`: the order was let in before. What lies there of its files may be its own,
        and the mover finds out by their hashes.

        Raises:
            InvalidDestination: it is a symlink.
            DestinationOccupied: it holds another model, or other files of these names.
        """
        if order.destination in self._taken:
            raise _occupied(order, "is a further folder with models, which is only read")
        target = self._base() / order.destination
        try:
            status = target.lstat()
        except FileNotFoundError:
            return Found()
        except OSError as error:
            raise _unusable(error) from error
        if stat.S_ISLNK(status.st_mode):
            raise InvalidDestination(
                f"destination {order.destination!r} is a symlink. Name a folder inside the models "
                "directory.",
                param="destination",
            )
        if not stat.S_ISDIR(status.st_mode):
            raise _occupied(order, "is a file")
        manifest = read_manifest(target)
        if manifest is not None and manifest.repo_id != order.repo_id:
            raise _occupied(order, f"holds {manifest.repo_id}")
        known = {} if manifest is None else {file.path: file for file in manifest.files}
        kept = frozenset(
            file.path
            for file in order.files
            if self._is_kept(order, file, known.get(file.path), resuming=resuming)
        )
        ours = {file.path for file in order.files if file.path in known} - kept
        return Found(exists=True, kept=kept, damaged=frozenset(ours), manifest=manifest)

    def _is_kept(
        self, order: Order, file: RemoteFile, known: ManifestFile | None, *, resuming: bool
    ) -> bool:
        """Whether the file is there already; what is there and is not it, is in the way."""
        target = self._base() / order.destination
        for folder in reversed(Path(file.path).parents[:-1]):
            if (target / folder).is_symlink() or (target / folder).is_file():
                raise _occupied(order, f"holds {str(folder)[:100]!r}, which is no folder")
        path = target / file.path
        try:
            status = path.lstat()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _unusable(error) from error
        regular = stat.S_ISREG(status.st_mode)
        if regular and known is not None and known.is_of(file):
            return status.st_size == file.size  # else it was damaged since: it is fetched again
        if regular and known is None and resuming:
            return False
        if regular and known is not None:
            raise _occupied(order, f"holds {file.path[:100]!r} of another revision")
        raise _occupied(order, f"holds another {file.path[:100]!r}")

    def room_for(self, need_bytes: int, *, promised_bytes: int, repo_id: str) -> None:
        """Check that the disk has room besides what is promised to other downloads.

        Raises:
            InsufficientDisk: it has not; the numbers are in its details.
            ModelsDirUnusable: it cannot be asked.
        """
        try:
            disk = os.statvfs(self._existing())
        except OSError as error:
            raise _unusable(error) from error
        free = disk.f_bavail * disk.f_frsize
        reserve = min(MAX_RESERVE_BYTES, disk.f_blocks * disk.f_frsize // 50)
        if need_bytes <= 0 or need_bytes <= free - promised_bytes - reserve:
            return
        missing = need_bytes - (free - promised_bytes - reserve)
        others = f", other downloads need {_gib(promised_bytes)} of it" if promised_bytes else ""
        raise InsufficientDisk(
            f"{repo_id} needs {_gib(need_bytes)}, and the disk has {_gib(free)} free{others}; "
            f"{_gib(reserve)} stay free. Make room for {_gib(missing)}.",
            details={
                "needed_bytes": need_bytes,
                "free_bytes": free,
                "promised_bytes": promised_bytes,
                "reserve_bytes": reserve,
                "missing_bytes": missing,
            },
        )

    def open_job(self, job_id: str, *, instead_of: str | None = None) -> None:
        """Make a job's folder, or give it the one of an earlier job of the same files.

        Raises:
            ModelsDirUnusable: it cannot be written.
        """
        folder = self._job(job_id)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if folder.parent.is_symlink():
                raise ModelsDirUnusable(
                    f"{INCOMING} in the models directory is a symlink; it has to be a folder."
                )
            if instead_of is not None:
                with contextlib.suppress(FileNotFoundError):
                    self._job(instead_of).rename(folder)
            (folder / PARTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(error) from error

    def drop_job(self, job_id: str) -> None:
        """Delete whatever a job has on disk, but for what is published."""
        _remove(self._job(job_id))

    def drop_forgotten(self, kept: Collection[str]) -> None:
        """Delete the folders of jobs that nobody knows and nobody wrote to for `KEPT_S`."""
        before = time.time() - KEPT_S
        for folder in self._job_folders():
            if folder.name not in kept and _last_written(folder) < before:
                log.info("download parts deleted job=%s", folder.name)
                _remove(folder)

    def on_disk(self, job_id: str, order: Order) -> dict[str, int]:
        """Return how many bytes of each file are there, in parts or published."""
        job, target = self._job(job_id), self._base() / order.destination
        found = {}
        for file in order.files:
            content = file.sha256 or file.blob_id or ""
            sizes = (
                _size(job / TREE / file.path),
                _size(job / PARTS / content),
                _size(target / file.path),
            )
            size = next((size for size in sizes if size is not None), 0)
            found[file.path] = min(size, file.size)
        return found

    def moving(self, job_id: str, order: Order, found: Found) -> dict[str, Any]:
        """Return what the mover has to know of the disk."""
        job = self._job(job_id)
        return {
            "parts": str(job / PARTS),
            "stage": str(job / TREE),
            "target": str(self._base() / order.destination),
            "merge": found.exists,
            "replace": sorted(found.damaged),
            "manifest": manifest_of(order, found),
        }

    def _base(self) -> Path:
        return Path(os.path.realpath(self._root))

    def _existing(self) -> Path:
        base = self._base()
        return next(folder for folder in (base, *base.parents) if folder.exists())

    def _job(self, job_id: str) -> Path:
        return self._base() / INCOMING / job_id

    def _job_folders(self) -> Sequence[Path]:
        try:
            return [one for one in (self._base() / INCOMING).iterdir() if not one.is_symlink()]
        except OSError:
            return []


def read_manifest(folder: Path) -> Manifest | None:
    """Return a folder's manifest; None: there is none that can be believed."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            return _MANIFEST.decode(file.read(_MAX_MANIFEST_BYTES))
    except (OSError, msgspec.DecodeError, ValueError, RecursionError):
        return None


def manifest_of(order: Order, found: Found) -> Mapping[str, Any]:
    """Return the manifest as it is to be once the order is complete."""
    mine = {file.path for file in order.files}
    before = () if found.manifest is None else found.manifest.files
    old = {file.path: file for file in before}
    files = [file for file in before if file.path not in mine]
    for file in order.files:
        at = old[file.path].commit if file.path in found.kept else None
        files.append(
            ManifestFile(file.path, file.size, file.sha256, file.blob_id, at or order.commit)
        )
    manifest = Manifest(order.repo_id, order.commit, tuple(files), order.endpoint)
    told: Mapping[str, Any] = msgspec.to_builtins(manifest)
    return told


def _size(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except OSError:
        return None


def _last_written(folder: Path) -> float:
    return max(_times(folder), default=0.0)


def _times(folder: Path) -> Iterator[float]:
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):
            yield path.lstat().st_mtime


def _remove(folder: Path) -> None:
    def tell(_: object, path: str, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            log.warning("download parts not deleted path=%s reason=%s", path, error)

    shutil.rmtree(folder, onerror=lambda call, path, info: tell(call, path, info[1]))


def _occupied(order: Order, why: str) -> DestinationOccupied:
    return DestinationOccupied(
        f"The folder {order.destination!r} {why}. Choose another `destination` for "
        f"{order.repo_id}, or delete what is there.",
        param="destination",
    )


def _unusable(error: OSError) -> ModelsDirUnusable | InsufficientDisk:
    if error.errno in _FULL:
        return InsufficientDisk("The disk of the models directory is full. Make room on it.")
    return ModelsDirUnusable(
        f"Nothing can be downloaded into the models directory: {error.strerror}. Check that it is "
        "there and can be written, or set models_dir.",
        detail=str(error.filename),
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"
