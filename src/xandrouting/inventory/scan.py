"""Find the models under the roots, from the files and headers that lie there."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Final

from xandrouting.inventory import folders
from xandrouting.inventory.gguf import GgufHeader, join_parts
from xandrouting.inventory.headers import Header, HeaderCache
from xandrouting.inventory.model_file import (
    VIRTUAL_ROOT,
    ModelFile,
    ModelFormat,
    ModelPart,
    Snapshot,
    part_match,
    part_names,
)
from xandrouting.inventory.paths import path_in, real_file, real_path
from xandrouting.inventory.projectors import with_projectors
from xandrouting.inventory.roots import Root, root_of
from xandrouting.inventory.walk import Tree, walk

log = logging.getLogger(__name__)

TELL_EVERY_S: Final = 0.5
_NO_MODELS: Final = {
    "adapter": "an adapter, not a model of its own",
    "imatrix": "an importance matrix, not a model",
}


class ScanStopped(Exception):
    """Nobody wants the scan's result any more."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What one look at all roots found. `folders` are those that were walked, as real paths."""

    snapshot: Snapshot
    folders: frozenset[str]


def scan(root: Path, cache: HeaderCache) -> Snapshot:
    """Find every model under one models directory."""
    return scan_all((Root(root),), cache).snapshot


def scan_all(
    roots: Sequence[Root],
    cache: HeaderCache,
    *,
    before: Snapshot = Snapshot(),  # noqa: B008 - frozen
    tell: Callable[[Snapshot], None] = lambda _: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Scan:
    """Find every model under the roots. A root that does not exist holds none.

    It blocks: about 10 ms for each file not in `cache`. While it reads, `tell` hears every
    half a second what is known so far: what was read, and what was there `before` and still is.
    Hidden files and folders are skipped. Of what it cannot look at, what is new is logged.

    Raises:
        ScanStopped: `is_stopped` said so.
    """
    looks = [_Look(root, base := root.base, _walk(root, base)) for root in roots]
    troubles = {trouble for look in looks for trouble in look.tree.troubles}
    for trouble in sorted(troubles - before.troubles):
        log.warning("%s", trouble)
    told_at = time.monotonic()
    for _ in _read(looks, cache):
        if is_stopped():
            raise ScanStopped
        if time.monotonic() >= told_at + TELL_EVERY_S:
            tell(_so_far(looks, before))
            told_at = time.monotonic()
    cache.keep_only(
        {look.path(name) for look in looks for name in look.headers},
        {look.path(name) for look in looks for name in look.tree.models},
    )
    walked = (look.path(folder) for look in looks for folder in look.tree.folders)
    return Scan(_snapshot(looks), frozenset(filter(os.path.isdir, walked)))


def recheck(root: Path | Sequence[Root], model: ModelFile, cache: HeaderCache) -> ModelFile | None:
    """Look at one model's files again; headers of those that changed are read. None: it is gone.

    It blocks. A file that a symlink has replaced is gone: where it leads is not looked at.
    """
    roots = (Root(root),) if isinstance(root, Path) else root
    home, relative = root_of(roots, model.relative, read_only=model.read_only)
    base = home.base
    if model.format is ModelFormat.SAFETENSORS:
        found = _recheck_folder(base, relative, cache)
    else:
        found = _recheck_files(base, relative, cache)
    if found is None:
        return None
    eyes = None if model.mmproj is None else real_file(str(model.mmproj))
    return replace(
        _as_seen(home, found),
        mmproj=None if eyes is None else model.mmproj,
        mmproj_bytes=0 if eyes is None else eyes.st_size,
        spellings=model.spellings,
    )


def _recheck_files(base: str, relative: str, cache: HeaderCache) -> ModelFile | None:
    files = {
        name: status
        for name in part_names(relative)
        if (status := real_file(f"{base}/{name}")) is not None
    }
    if not files:
        return None
    headers = {name: cache.read(f"{base}/{name}", status) for name, status in files.items()}
    [candidate] = _candidates(files)
    return _model(base, candidate, headers)


def _recheck_folder(base: str, relative: str, cache: HeaderCache) -> ModelFile | None:
    path = path_in(base, relative)
    folder = folders.look(base, relative) if real_path(path) == path else None
    if folder is None:
        return None
    return folders.model_of(base, folder, cache.read_folder(base, folder))


@dataclass(slots=True)
class _Look:
    """One root on one look, and what was read of it so far."""

    root: Root
    base: str
    tree: Tree
    headers: dict[str, Header] = field(default_factory=dict)
    models: dict[str, ModelFile] = field(default_factory=dict)  # the folders among them

    def path(self, relative: str) -> str:
        return path_in(self.base, relative)


def _walk(root: Root, base: str) -> Tree:
    return walk(base, itself=root.read_only, below=not root.itself_only)


def _read(looks: Sequence[_Look], cache: HeaderCache) -> Iterator[None]:
    """Read every header and every folder, and pause after each."""
    for look in looks:
        # First the projectors, by their names: a model is shown when it is known to see.
        for name in sorted(look.tree.files, key=lambda n: (not _is_named_projector(n), n)):
            look.headers[name] = cache.read(look.path(name), look.tree.files[name])
            yield
        for name in sorted(look.tree.models):
            folder = folders.look(look.base, name)
            if folder is not None:
                found = cache.read_folder(look.base, folder)
                look.models[name] = folders.model_of(look.base, folder, found)
            yield


def _snapshot(looks: Sequence[_Look]) -> Snapshot:
    """Return what is known: models of which a part was not read yet are left out."""
    models: dict[str, ModelFile] = {}
    escaping: set[str] = set()
    for look in looks:
        for model in _models(look):
            models.setdefault(model.id, model)  # a further root never hides what is ours
        escaping.update(map(look.root.seen, look.tree.all_escaping()))
    return Snapshot(
        tuple(models[name] for name in sorted(models)),
        frozenset(escaping),
        frozenset(trouble for look in looks for trouble in look.tree.troubles),
    )


def _so_far(looks: Sequence[_Look], before: Snapshot) -> Snapshot:
    found = _snapshot(looks)
    known = {model.id for model in found.models}
    there = {
        look.root.seen(name) for look in looks for name in (*look.tree.files, *look.tree.models)
    }
    kept = [m for m in before.models if m.id not in known and m.relative in there]
    return replace(found, models=tuple(sorted((*found.models, *kept), key=lambda m: m.id)))


def _models(look: _Look) -> Iterator[ModelFile]:
    tree, headers = look.tree, look.headers
    projectors = {name for name, header in headers.items() if _is_projector(name, header)}
    files = {name: status for name, status in tree.files.items() if name not in projectors}
    models = [
        _model(look.base, candidate, headers)
        for candidate in _candidates(files)
        if all(name in headers for name, _ in candidate.parts.values())
    ]
    sizes = {
        name: tree.files[name].st_size
        for name in projectors
        if isinstance(headers[name], GgufHeader)
    }
    models = [*with_projectors(look.base, models, sizes), *look.models.values()]
    spellings = tree.spellings()
    for model in models:
        others = spellings.get(model.relative)
        spelled = replace(model, spellings=tuple(sorted(others))) if others else model
        yield _as_seen(look.root, spelled)


def _as_seen(root: Root, model: ModelFile) -> ModelFile:
    """Return a model of this root, known by paths relative to it, as it is known outside."""
    if not root.read_only:
        return model
    return replace(
        model,
        id=f"{VIRTUAL_ROOT}/{root.seen(model.relative)}",
        folder=root.seen(model.folder),
        files=tuple(replace(part, relative=root.seen(part.relative)) for part in model.files),
        spellings=tuple(map(root.seen, model.spellings)),
        read_only=True,
    )


def _is_named_projector(relative: str) -> bool:
    return "mmproj" in PurePosixPath(relative).name.lower()


def _is_projector(relative: str, header: Header) -> bool:
    return _is_named_projector(relative) or (
        isinstance(header, GgufHeader)
        and (header.architecture == "clip" or header.kind == "mmproj")
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
    parts: list[GgufHeader] = []
    for no, (name, _) in sorted(candidate.parts.items()):
        header = headers[name]
        problem = header if isinstance(header, str) else _part_problem(header, no, total, parts)
        if problem is not None:
            return problem if total == 1 else f"part {no} of {total}: {problem}"
        assert isinstance(header, GgufHeader)
        parts.append(header)
    return _problem_of_all(parts)


def _problem_of_all(parts: Sequence[GgufHeader]) -> str | None:
    """Return what is wrong though each part is right."""
    first = parts[0]
    if first.kind in _NO_MODELS:
        return _NO_MODELS[first.kind]  # an importance matrix names no architecture
    if first.architecture is None:
        return "header damaged: it names no architecture"
    tensors = sum(part.tensors for part in parts)
    if not tensors:
        return "no weights: it holds a vocabulary at most"
    if len(parts) > 1 and first.split_tensors not in (None, tensors):
        return f"a part is of another model: {tensors} tensors, not {first.split_tensors}"
    return None


def _part_problem(
    header: GgufHeader, no: int, total: int, before: Sequence[GgufHeader]
) -> str | None:
    expected = before[0].architecture if before else None
    if expected and header.architecture not in (None, expected):
        return f"of another model, {header.architecture!r}"
    # A model merged from parts says `split.count` 0.
    if header.split_count and (header.split_count, header.split_no) != (total, no - 1):
        position = "?" if header.split_no is None else header.split_no + 1
        return f"its header says it is part {position} of {header.split_count}"
    return None
