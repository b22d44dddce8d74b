"""Deletes models: what is a model's alone is moved to a trash folder, which is emptied later.

Everything here blocks: for threads.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec

from xandrouting.inventory.model_file import ModelFile, ModelFormat, Snapshot, is_gguf
from xandrouting.inventory.roots import Root
from xandrouting.inventory.walk import Tree, walk

log = logging.getLogger(__name__)

FOLDER: Final = ".trash"
KEPT: Final = timedelta(days=1)
MANIFEST: Final = ".xandrouting.json"
_STAMP: Final = "%Y%m%dT%H%M%SZ"
_NAME: Final = re.compile(r"(\d{8}T\d{6}Z)-.*")
_MAX_NAME: Final = 60
_BLOCK_BYTES: Final = 512  # stat(2)'s
_MAX_MANIFEST_BYTES: Final = 16 << 20
# What tools leave beside a model and nobody keeps for its own sake.
_LEFTOVERS: Final = frozenset(
    (MANIFEST, ".cache", ".huggingface", ".git", ".gitattributes", ".gitignore", ".DS_Store")
)

# Whoever moves into the trash holds it: what is there of a deletion may still be put back.
_moving = threading.Lock()


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a deletion took away. `freed_bytes` are on the disk until the trash is emptied.

    `files` are paths as the inventory names them, without `/models/`. `until`: when the trash
    loses them; None: they are gone.
    """

    files: tuple[str, ...]
    freed_bytes: int
    until: datetime | None


def delete(root: Root, model: ModelFile, snapshot: Snapshot, *, purge: bool = False) -> Deleted:
    """Take a model of the models directory away: its files, and nothing another model needs.

    They are moved to the trash in one go, or not at all. `purge`: they are gone at once.

    Raises:
        OSError: the system refuses; everything is where it was.
    """
    base = root.base
    tree = walk(base)
    paths = _paths_of(base, tree, model, snapshot)
    deleted = _take(base, paths, model.stem, purge=purge)
    for folder in sorted({path.rpartition("/")[0] for path in paths}, reverse=True):
        _remove_empty(base, folder)
    log.info("model deleted model=%s files=%d bytes=%d", model.id, len(paths), deleted.freed_bytes)
    return deleted


def delete_link(root: Root, relative: str, *, purge: bool = False) -> Deleted:
    """Take away a symlink that leaves the models directory; what it leads to stays.

    Raises:
        OSError: the system refuses, or there is no such symlink.
    """
    base = root.base
    path = Path(base, relative)
    path.readlink()
    if not _is_reached_without_links(base, relative):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return _take(base, [relative], path.name, purge=purge)


def empty(roots: Sequence[Root], *, now: datetime | None = None) -> int:
    """Remove what has been in the trash for long enough; return how many models that were."""
    count = 0
    until = (datetime.now(UTC) if now is None else now) - KEPT
    for root in roots:
        if root.read_only:
            continue
        base = root.base
        for folder in _trashes(base):
            count += sum(_expire(place, until) for place in _children(folder))
            with suppress(OSError):
                folder.rmdir()
    if count:
        log.info("trash emptied models=%d", count)
    return count


def make_room(root: Root, free_bytes: int) -> None:
    """Have so many bytes free on the disk of the models directory, if its trash has them.

    The oldest deletions go first, and no more of them than it takes; none where all together
    would not be enough.

    Raises:
        OSError: nobody knows how much is free.
    """
    base = root.base
    trash = Path(base, FOLDER)
    if trash.is_symlink() or not trash.is_dir():
        return
    count = 0
    with _moving:
        ours = [place for place in _children(trash) if _deleted_at(place) is not None]
        free = _free_bytes(base)
        if free >= free_bytes or free + sum(map(_disk_bytes, ours)) < free_bytes:
            return
        for place in ours:  # by name, and so by age
            count += _remove(place)
            if _free_bytes(base) >= free_bytes:
                break
    log.info("trash gave way to a download models=%d", count)


def _take(base: str, paths: Sequence[str], stem: str, *, purge: bool) -> Deleted:
    now = datetime.now(UTC)
    size_bytes = sum(_size_bytes(Path(base, path)) for path in paths)
    with _moving:
        places = _move(base, paths, f"{now.strftime(_STAMP)}-{_plain(stem)}")
        if purge:
            for place in places:
                shutil.rmtree(place)
                with suppress(OSError):
                    place.parent.rmdir()
    return Deleted(tuple(paths), size_bytes, None if purge else now + KEPT)


def _paths_of(base: str, tree: Tree, model: ModelFile, snapshot: Snapshot) -> list[str]:
    """Return what goes: the model's files, its symlinks, and what is left without a purpose."""
    others = [other for other in snapshot.models if other.id != model.id]
    needed = {part.relative for other in others for part in other.files}
    needed |= {p.relative_to(base).as_posix() for o in others if (p := o.mmproj) is not None}
    going = {part.relative for part in model.files}
    if model.format is ModelFormat.SAFETENSORS:
        mine = going & _downloaded(base, model.relative)
        if any(path.endswith(".safetensors") for path in mine):
            going = mine  # what did not come with the weights is somebody's own
        going |= _links_in(base, model.relative)
    if model.mmproj is not None:
        going.add(model.mmproj.relative_to(base).as_posix())
    going |= _links_to(tree, going, model, others)
    going |= _blobs_of(tree, going)
    for folder in {above for path in going for above in _folders_above(path)}:
        came = _downloaded(base, folder)
        if not came & needed:  # no model of it is left
            going |= came
    return sorted(going - needed)


def _links_in(base: str, folder: str) -> set[str]:
    """Return the symlinks in a model's folder, also those that no scan follows."""
    return {
        f"{folder}/{entry.name}"
        for entry in _children(Path(base, folder))
        if entry.is_symlink() and not is_gguf(entry.name)
    }


def _links_to(
    tree: Tree, going: set[str], model: ModelFile, others: Iterable[ModelFile]
) -> set[str]:
    """Return the symlinks that would lead nowhere."""
    inside = f"{model.relative}/"
    alone = not any(other.relative.startswith(inside) for other in others)
    gone = going | {model.relative} if alone else going
    return {link for link, target in tree.links.items() if target in gone}


def _blobs_of(tree: Tree, going: set[str]) -> set[str]:
    """Return the files of a hub's cache that nothing but symlinks that go lead to."""
    kept = {target for link, target in tree.links.items() if link not in going}
    leads = {target for link, target in tree.links.items() if link in going}
    return {target for target in leads - kept if PurePosixPath(target).parent.name == "blobs"}


def _downloaded(base: str, folder: str) -> set[str]:
    """Return what is there of the repository that was downloaded into a folder, and its note."""
    inside = f"{folder}/"
    return {
        inside + name
        for name in _manifest_files(Path(base, folder, MANIFEST))
        if Path(base, inside + name).is_file() and _is_reached_without_links(base, inside + name)
    }


class _ManifestFile(msgspec.Struct):
    path: str


class _Manifest(msgspec.Struct):
    files: list[_ManifestFile]


_MANIFEST_JSON: Final = msgspec.json.Decoder(_Manifest)


def _manifest_files(manifest: Path) -> list[str]:
    """Return the files that a download wrote, with its note of them; none where there is none."""
    try:
        with manifest.open("rb") as file:
            told = _MANIFEST_JSON.decode(file.read(_MAX_MANIFEST_BYTES))
    except (OSError, msgspec.DecodeError, RecursionError):
        return []
    paths = [PurePosixPath(file.path) for file in told.files]
    plain = [str(path) for path in paths if not path.is_absolute() and ".." not in path.parts]
    return [*plain, MANIFEST]


def _folders_above(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path


def _is_reached_without_links(base: str, relative: str) -> bool:
    """Whether no symlink is on the way to a file: what lies behind one may not be ours."""
    above = Path(base, relative).parent
    return above.resolve() == above


def _move(base: str, paths: Sequence[str], name: str) -> list[Path]:
    """Move these to a new folder of the trash, all or none; return it.

    A file system of its own under the models directory has a trash of its own, so there may be
    several.
    """
    places: dict[str, Path] = {}
    moved: list[tuple[Path, Path]] = []
    try:
        for path in paths:
            top = _top_of_its_disk(base, path)
            if top not in places:
                places[top] = _new_folder(Path(base, top, FOLDER), name)
            source, target = Path(base, path), places[top] / path
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
            moved.append((source, target))
    except OSError:
        for source, target in reversed(moved):
            target.rename(source)
        for place in places.values():
            shutil.rmtree(place, ignore_errors=True)
        raise
    return list(places.values())


def _top_of_its_disk(base: str, path: str) -> str:
    """Return the highest folder above `path`, relative to the base, on the same file system."""
    device = Path(base, path).lstat().st_dev
    top = path.rpartition("/")[0]
    for folder in (*_folders_above(top), ""):
        if Path(base, folder).lstat().st_dev != device:
            break
        top = folder
    return top


def _new_folder(trash: Path, name: str) -> Path:
    if trash.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    number = 1
    while True:
        place = trash / (name if number == 1 else f"{name}-{number}")
        try:
            place.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return place


def _remove_empty(base: str, folder: str) -> None:
    """Remove a folder in which nothing is left, and those above it in turn."""
    while folder:
        path = Path(base, folder)
        names = {entry.name for entry in _children(path)}
        if path.is_symlink() or not names <= _LEFTOVERS:
            return
        try:
            for name in names:
                inside = path / name
                if inside.is_dir() and not inside.is_symlink():
                    shutil.rmtree(inside)
                else:
                    inside.unlink()
            path.rmdir()
        except OSError as error:
            log.warning("folder kept folder=%r reason=%s", folder, error.strerror)
            return
        folder = folder.rpartition("/")[0]


def _trashes(base: str) -> Iterator[Path]:
    """Yield the trash of the models directory and those of the file systems under it."""
    for folder in sorted(walk(base).folders):
        path = Path(base, folder)
        if not folder or os.path.ismount(path):
            trash = path / FOLDER
            if trash.is_dir() and not trash.is_symlink():
                yield trash


def _expire(place: Path, until: datetime) -> bool:
    """Remove one deletion's folder if it is old enough; what we did not put there stays."""
    at = _deleted_at(place)
    return at is not None and at <= until and _remove(place)


def _deleted_at(place: Path) -> datetime | None:
    """Return when a folder of the trash was made; None: it is not one of a deletion."""
    match = _NAME.fullmatch(place.name)
    if match is None or place.is_symlink():
        return None
    try:
        return datetime.strptime(match[1], _STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None


def _remove(place: Path) -> bool:
    try:
        shutil.rmtree(place)
    except OSError as error:
        log.warning("trash not emptied folder=%s reason=%s", place.name, error.strerror)
        return False
    return True


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _size_bytes(path: Path) -> int:
    """Return what a file takes: a symlink nothing, nor a file that has another name too."""
    status = path.lstat()
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0


def _free_bytes(base: str) -> int:
    disk = os.statvfs(base)
    return disk.f_bavail * disk.f_frsize


def _disk_bytes(place: Path) -> int:
    """Return what the disk gets back with a folder: nothing for files that have other names too."""
    found = 0
    for path in place.rglob("*"):
        with suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                found += status.st_blocks * _BLOCK_BYTES
    return found


def _plain(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem)[:_MAX_NAME].strip("-.") or "model"
