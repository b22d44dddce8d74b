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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
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
from xandrouting.core.sizes import in_words
from xandrouting.downloads import leftovers
from xandrouting.downloads.jobs import JobState, Order, RemoteFile
from xandrouting.downloads.leftovers import NO_LEFTOVERS, PARTS, TREE, Leftovers, content_of
from xandrouting.downloads.names import MANIFEST

log = logging.getLogger(__name__)

INCOMING: Final = ".incoming"
GIB: Final = 1 << 30
MAX_RESERVE_BYTES: Final = GIB  # what a download leaves free, or a 50th of a small disk
KEPT_S: Final = 7 * 86_400.0  # the bytes of a job that ended without its model
_MAX_MANIFEST_BYTES: Final = 16 << 20
_NO_ROOM_BYTES: Final = 1 << 20
_WEIGHTS: Final = (".gguf", ".safetensors")
_FULL: Final = frozenset((errno.ENOSPC, errno.EDQUOT))
_WISHES: Final = {state: f".{state}" for state in (JobState.PAUSED, JobState.CANCELLED)}


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

    `taken` are names in it that stand for folders elsewhere. `make_room` gives up what is kept
    for a while only, so that this many bytes are free, where it can.
    """

    def __init__(
        self,
        root: Path,
        taken: Collection[str] = (),
        *,
        make_room: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._root = root
        self._taken = frozenset(taken)
        self._noted: set[str] = set()  # the jobs with a wish beside their bytes
        self._make_room = make_room

    def look(self, order: Order, *, resuming: bool = False) -> Found:
        """Look who is at the order's destination.

        A file of the right name and size that no manifest tells of is neither kept nor in the
        way: the mover finds out by its hash. `resuming`: the order was let in before, and the
        mover looks at those of another size too.

        Raises:
            InvalidDestination: it is a symlink, or a disk of its own.
            DestinationOccupied: it holds another model, or other files of these names.
        """
        if order.destination in self._taken:
            raise _occupied(order, "is a further folder with models, which is only read")
        target = self._base() / order.destination
        try:
            status, home = target.lstat(), target.parent.stat()
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
        if status.st_dev != home.st_dev:
            raise InvalidDestination(
                f"destination {order.destination!r} is a disk of its own. What is complete gets "
                "there by a rename, so it has to be on the disk of the models directory: name "
                "another folder, or set models_dir to that disk.",
                param="destination",
            )
        manifest = read_manifest(target)
        if manifest is not None and manifest.repo_id != order.repo_id:
            raise _occupied(order, f"holds {manifest.repo_id}")
        if manifest is None and not resuming:
            _check_no_model(order, target)
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
        if regular and known is None and (resuming or status.st_size == file.size):
            return False
        if regular and known is not None:
            raise _occupied(order, f"holds {file.path[:100]!r} of another revision")
        raise _occupied(order, f"holds another {file.path[:100]!r}")

    def check_usable(self) -> None:
        """Check that something could be downloaded at all.

        Raises:
            ModelsDirUnusable: the models directory is none, or cannot be written.
            InsufficientDisk: its disk is full.
        """
        place = self._existing()
        try:
            if not place.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(place, os.W_OK | os.X_OK):
                code = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
                raise OSError(code, os.strerror(code))
            if self._free_bytes()[0] < _NO_ROOM_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _unusable(error) from error

    def room_for(self, need_bytes: int, *, promised_bytes: int, repo_id: str) -> None:
        """Check that the disk has room besides what is promised to other downloads.

        Raises:
            InsufficientDisk: it has not; the numbers are in its details.
            ModelsDirUnusable: it cannot be asked.
        """
        if need_bytes <= 0:
            return
        try:
            free, reserve = self._free_bytes()
            if need_bytes > free - promised_bytes - reserve:
                self._make_room(need_bytes + promised_bytes + reserve)
                free, reserve = self._free_bytes()
        except OSError as error:
            raise _unusable(error) from error
        if need_bytes <= free - promised_bytes - reserve:
            return
        missing = need_bytes - (free - promised_bytes - reserve)
        promised = in_words(promised_bytes)
        others = f", other downloads need {promised} of it" if promised_bytes else ""
        raise InsufficientDisk(
            f"{repo_id} needs {in_words(need_bytes)}, and the disk has {in_words(free)} free"
            f"{others}; {in_words(reserve)} stay free. Make room for {in_words(missing)}.",
            details={
                "needed_bytes": need_bytes,
                "free_bytes": free,
                "promised_bytes": promised_bytes,
                "reserve_bytes": reserve,
                "missing_bytes": missing,
            },
        )

    def _free_bytes(self) -> tuple[int, int]:
        """Return what is free, and how much of it stays so."""
        disk = os.statvfs(self._existing())
        reserve = min(MAX_RESERVE_BYTES, disk.f_blocks * disk.f_frsize // 50)
        return disk.f_bavail * disk.f_frsize, reserve

    def leftovers(
        self, order: Order, found: Found, spared: Collection[str]
    ) -> AbstractContextManager[Leftovers]:
        """Have what other jobs, but for `spared` ones, left of the files that are lacking."""
        return leftovers.leftovers(self._job_folders(), order, found.lacks(order), spared)

    def open_job(self, job_id: str, left: Leftovers = NO_LEFTOVERS) -> set[str]:
        """Make a job's folder, move leftovers there, and return whose they were.

        Raises:
            ModelsDirUnusable: it cannot be written.
        """
        parts = self._job(job_id) / PARTS
        incoming = parts.parent.parent
        try:
            incoming.mkdir(parents=True, exist_ok=True)
            # From another disk, what is complete could not be renamed.
            if incoming.is_symlink() or incoming.stat().st_dev != self._base().stat().st_dev:
                raise ModelsDirUnusable(
                    f"{INCOMING} in the models directory is a symlink or a disk of its own; it "
                    "has to be a folder."
                )
            parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(error) from error
        return leftovers.take(left, parts)

    def note(self, job_id: str, wish: JobState | None) -> None:
        """Keep beside a job's bytes that it is paused or cancelled; None: take that back.

        For when the store cannot: the disk that it is on is full.
        """
        if wish is None and job_id not in self._noted:
            return
        folder = self._job(job_id)
        try:
            for state, name in _WISHES.items():
                if state is not wish:
                    (folder / name).unlink(missing_ok=True)
            if wish is not None:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / _WISHES[wish]).touch()
                self._noted.add(job_id)
        except OSError as error:
            log.warning("download not noted job=%s state=%s reason=%s", job_id, wish, error)

    def noted(self, job_id: str) -> JobState | None:
        """Return what `note` kept of a job."""
        for state, name in _WISHES.items():
            if _size(self._job(job_id) / name) is not None:
                self._noted.add(job_id)
                return state
        return None

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

    def on_disk(self, job_id: str, order: Order, left: Leftovers = NO_LEFTOVERS) -> dict[str, int]:
        """Return how many bytes of each file are there: in parts, left by others, published."""
        job, target = self._job(job_id), self._base() / order.destination
        packed = () if order.package is None else (order.package.sha256,)
        found = {}
        for file in order.files:
            contents = (content_of(file), *packed)
            sizes = (
                _size(job / TREE / file.path),
                *(_size(job / PARTS / content) for content in contents),
                *(left[content].size for content in contents if content in left),
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


def _check_no_model(order: Order, folder: Path) -> None:
    """Pass a folder in which nobody put weights, but for those that are wanted.

    Raises:
        DestinationOccupied: there are others.
    """
    wanted = {file.path for file in order.files}
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise _unusable(error) from error
    for name in names:
        if name.lower().endswith(_WEIGHTS) and name not in wanted:
            raise _occupied(order, f"holds another model, {name[:100]!r}")


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
