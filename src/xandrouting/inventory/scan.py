"""Find the models under a root folder.

Only real folders are walked, so a loop of symlinks cannot hold the scan up; a symlink is
another spelling of what it leads to. What a symlink leads to outside the root is never opened.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Final

from xandrouting.inventory import folders
from xandrouting.inventory.folders import FolderCache
from xandrouting.inventory.gguf import (
    GgufHeader,
    InvalidGguf,
    UnreadableGguf,
    join_parts,
    read_gguf,
)
from xandrouting.inventory.model_file import (
    VIRTUAL_ROOT,
    ModelFile,
    ModelFormat,
    ModelPart,
    Snapshot,
    is_gguf,
    is_nameable,
    part_match,
    part_names,
)
from xandrouting.inventory.projectors import with_projectors

log = logging.getLogger(__name__)

_NO_MODELS: Final = {
    "adapter": "an adapter, not a model of its own",
    "imatrix": "an importance matrix, not a model",
}
Header = GgufHeader | str
"""A header, or why there is none."""


class HeaderCache:
    """Headers read before, for as long as their files stay the same."""

    def __init__(self) -> None:
        self.folders = FolderCache()
        self._known: dict[str, tuple[tuple[int, ...], Header]] = {}

    def read(self, path: str, status: os.stat_result) -> Header:
        """Return the header of `path`, which was just seen with `status`."""
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
        header: Header
        try:
            header = read_gguf(path)
        except UnreadableGguf as error:
            return str(error)  # not kept: the next look may succeed on the same file
        except InvalidGguf as error:
            header = str(error)
        self._known[path] = identity, header
        return header

    def keep_only(self, paths: Collection[str]) -> None:
        """Forget the files that are no longer there."""
        self._known = {path: known for path, known in self._known.items() if path in paths}


def scan(root: Path, cache: HeaderCache) -> Snapshot:
    """Find every model under `root`. A root that does not exist holds none.

    It blocks: about 10 ms for each file not in `cache`. Hidden files and folders are skipped.
    """
    base = os.path.realpath(root).rstrip("/")
    tree = _walk(base)
    headers = {
        relative: cache.read(f"{base}/{relative}", status)
        for relative, status in tree.files.items()
    }
    cache.keep_only({f"{base}/{relative}" for relative in headers})
    cache.folders.keep_only(frozenset(tree.models))
    projectors = {name for name, header in headers.items() if _is_projector(name, header)}
    candidates = _candidates(
        {name: status for name, status in tree.files.items() if name not in projectors}
    )
    models = [_model(base, candidate, headers) for candidate in candidates]
    sizes = {
        name: tree.files[name].st_size
        for name in projectors
        if isinstance(headers[name], GgufHeader)
    }
    models = with_projectors(base, models, sizes)
    for relative in tree.models:
        folder = folders.look(base, relative)
        if folder is not None:
            models.append(folders.model_of(base, folder, cache.folders))
    spellings = tree.spellings()
    models = [
        replace(model, spellings=tuple(sorted(spellings[model.relative])))
        if model.relative in spellings
        else model
        for model in models
    ]
    return Snapshot(tuple(sorted(models, key=lambda model: model.id)), tree.all_escaping())


def recheck(root: Path, model: ModelFile, cache: HeaderCache) -> ModelFile | None:
    """Look at one model's files again; headers of those that changed are read. None: it is gone.

    It blocks. A file that a symlink has replaced is gone: where it leads is not looked at.
    """
    base = os.path.realpath(root).rstrip("/")
    if model.format is ModelFormat.SAFETENSORS:
        return _recheck_folder(base, model, cache)
    files = {
        relative: status
        for relative in part_names(model.relative)
        if (status := _real_file(f"{base}/{relative}")) is not None
    }
    if not files:
        return None
    headers = {name: cache.read(f"{base}/{name}", status) for name, status in files.items()}
    [candidate] = _candidates(files)
    eyes = None if model.mmproj is None else _real_file(str(model.mmproj))
    return replace(
        _model(base, candidate, headers),
        mmproj=None if eyes is None else model.mmproj,
        mmproj_bytes=0 if eyes is None else eyes.st_size,
        spellings=model.spellings,
    )


def _recheck_folder(base: str, model: ModelFile, cache: HeaderCache) -> ModelFile | None:
    path = f"{base}/{model.relative}"
    folder = folders.look(base, model.relative) if os.path.realpath(path) == path else None
    if folder is None:
        return None
    return replace(folders.model_of(base, folder, cache.folders), spellings=model.spellings)


@dataclass(slots=True)
class _Tree:
    """What lies under the root; all paths are relative to it."""

    folders: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)  # folders of safetensors
    files: dict[str, os.stat_result] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)  # to where they really lead
    escaping: set[str] = field(default_factory=set)

    def spellings(self) -> Mapping[str, set[str]]:
        found: dict[str, set[str]] = defaultdict(set)
        for link, target in self.links.items():
            if target in self.files or target in self.models:
                found[target].add(link)
        for spelling, below in self._through_folder_links([*self.files, *self.models, *self.links]):
            found[self.links.get(below, below)].add(spelling)
        return found

    def all_escaping(self) -> frozenset[str]:
        through = {spelling for spelling, _ in self._through_folder_links(self.escaping)}
        return frozenset(self.escaping | through)

    def _through_folder_links(self, paths: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield the paths that a symlink to a folder gives a second spelling, behind it."""
        for link, target in self.links.items():
            if target in self.folders:
                inside = f"{target}/" if target else ""
                for path in paths:
                    if path.startswith(inside):
                        yield f"{link}/{path[len(inside) :]}", path


def _walk(base: str) -> _Tree:
    tree = _Tree()
    pending = [""]
    while pending:
        folder = pending.pop()
        tree.folders.add(folder)
        entries = _entries(base, folder)
        if folder and folders.holds_weights([entry.name for entry in entries]):
            tree.models.add(folder)
        for entry in entries:
            relative = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink():
                _add_link(tree, base, relative)
            elif entry.is_dir(follow_symlinks=False):
                pending.append(relative)
            elif is_gguf(entry.name):
                _add_file(tree, base, relative)
    for link, target in tree.links.items():
        # A hub cache keeps `model.gguf` as a symlink to a file named by its hash.
        if is_gguf(link) and target not in tree.files:
            _add_file(tree, base, target)
    return tree


def _entries(base: str, folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(f"{base}/{folder}") as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        log.warning("models folder unreadable folder=%r reason=%s", folder, error.strerror)
        return []
    inside = f"{VIRTUAL_ROOT}/{folder}"
    unusable = [entry.name for entry in visible if not is_nameable(f"{inside}/{entry.name}")]
    if unusable:
        log.warning("file names not usable, rename them folder=%r names=%a", folder, unusable)
    return [entry for entry in visible if entry.name not in unusable]


def _add_link(tree: _Tree, base: str, relative: str) -> None:
    target = os.path.realpath(f"{base}/{relative}")
    if target != base and not target.startswith(f"{base}/"):
        tree.escaping.add(relative)
        return
    inside = target[len(base) :].lstrip("/")
    hidden = any(component.startswith(".") for component in inside.split("/"))
    if not hidden and is_nameable(inside):
        tree.links[relative] = inside


def _add_file(tree: _Tree, base: str, relative: str) -> None:
    status = _regular_file(f"{base}/{relative}")
    if status is not None:
        tree.files[relative] = status


def _regular_file(path: str) -> os.stat_result | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _real_file(path: str) -> os.stat_result | None:
    """Return the status of a regular file that no symlink is on the way to."""
    return _regular_file(path) if os.path.realpath(path) == path else None


def _is_projector(relative: str, header: Header) -> bool:
    if "mmproj" in PurePosixPath(relative).name.lower():
        return True
    return isinstance(header, GgufHeader) and (
        header.architecture == "clip" or header.kind == "mmproj"
    )


@dataclass(slots=True)
class _Candidate:
    """The files of one model, by part number from 1."""

    relative: str
    total: int
    parts: dict[int, tuple[str, os.stat_result]] = field(default_factory=dict)


def _candidates(files: Mapping[str, os.stat_result]) -> list[_Candidate]:
    found: dict[str, _Candidate] = {}
    for relative, status in files.items():
        match = part_match(relative)
        first, total, no = relative, 1, 1
        if match is not None:
            total, no = int(match["total"]), int(match["no"])
            first = f"{match['stem']}-00001-of-{match['total']}{match['suffix']}"
        candidate = found.setdefault(first, _Candidate(first, total))
        candidate.parts[no] = relative, status
    return list(found.values())


def _model(base: str, candidate: _Candidate, headers: Mapping[str, Header]) -> ModelFile:
    parts = [candidate.parts[no] for no in sorted(candidate.parts)]
    statuses = [status for _, status in parts]
    files = tuple(ModelPart(Path(base, name), name, status.st_size) for name, status in parts)
    return ModelFile(
        id=f"{VIRTUAL_ROOT}/{candidate.relative}",
        path=Path(base, candidate.relative),
        folder=candidate.relative.rpartition("/")[0],
        files=files,
        size_bytes=sum(part.size_bytes for part in files),
        header=_joined_header(candidate, headers),
        problem=_problem(candidate, headers),
        modified=max(status.st_mtime for status in statuses),
        revision="+".join(f"{s.st_size}-{s.st_mtime_ns}-{s.st_ino}" for s in statuses),
    )


def _joined_header(candidate: _Candidate, headers: Mapping[str, Header]) -> GgufHeader | None:
    if 1 not in candidate.parts:
        return None
    first = headers[candidate.parts[1][0]]
    if isinstance(first, str):
        return None
    if candidate.total == 1:
        return first
    later = [headers[name] for no, (name, _) in sorted(candidate.parts.items()) if no > 1]
    readable = [header for header in later if isinstance(header, GgufHeader)]
    return join_parts([first, *readable], PurePosixPath(candidate.relative).name)


def _problem(candidate: _Candidate, headers: Mapping[str, Header]) -> str | None:
    total = candidate.total
    missing = [str(no) for no in range(1, total + 1) if no not in candidate.parts]
    if missing:
        more = ", …" if len(missing) > 3 else ""
        return f"{len(missing)} of {total} parts missing: {', '.join(missing[:3])}{more}"
    for no, (name, _) in sorted(candidate.parts.items()):
        problem = _part_problem(headers[name], no, total)
        if problem is not None:
            return problem if total == 1 else f"part {no} of {total}: {problem}"
    first = headers[candidate.parts[1][0]]
    assert isinstance(first, GgufHeader)
    if first.architecture is None:
        return "header damaged: it names no architecture"
    return _NO_MODELS.get(first.kind or "model")


def _part_problem(header: Header, no: int, total: int) -> str | None:
    if isinstance(header, str):
        return header
    # A model merged from parts says `split.count` 0.
    if header.split_count and (header.split_count, header.split_no) != (total, no - 1):
        position = "?" if header.split_no is None else header.split_no + 1
        return f"its header says it is part {position} of {header.split_count}"
    return None
