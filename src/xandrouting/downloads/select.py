"""Which files of a repository make the model that is asked for."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Final

from xandrouting.core.errors import AmbiguousDownload, NoSuchQuantization, NothingToDownload
from xandrouting.core.quantization import normalized, quantization_in_name, without_quantization
from xandrouting.core.sizes import in_words
from xandrouting.downloads import folder_model
from xandrouting.downloads.jobs import RemoteFile

GIB: Final = 1 << 30
DEFAULTS: Final = ("Q4_K_M", "Q4_0", "Q8_0")  # whichever is there first; else the smallest

_GGUF: Final = ".gguf"
_PART: Final = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<total>\d{5})")
_PROJECTOR: Final = re.compile(r"[-._]*mmproj[-._]*")
_PROJECTORS: Final = ("F16", "BF16", "Q8_0", "F32")  # the best first
_NO_MODEL: Final = ("imatrix", "ggml-vocab")
_PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Wish:
    """What of a repository is wanted. None and empty: not said.

    `file` and `folder` come from the address of a page, `include` and `exclude` are patterns
    as of a shell, for whole paths or for folders.
    """

    quantization: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    file: str | None = None
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """One GGUF model of a repository: all parts of it, and what gives it eyes.

    `quantization` is what its name says; None: nothing. `lacks` counts the missing parts.
    """

    stem: str  # its path without suffix and part number
    quantization: str | None
    parts: tuple[RemoteFile, ...]
    projector: RemoteFile | None
    lacks: int
    is_only_one: bool = True  # no other model of the repository has its quantization

    @property
    def name(self) -> str:
        """What it is asked for by."""
        if not self.is_only_one:
            return self.stem
        return self.quantization or self.file_name

    @property
    def file_name(self) -> str:
        """The name of its file, without suffix and part number."""
        return self.stem.rpartition("/")[2]

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """Everything that is fetched for it."""
        return self.parts if self.projector is None else (*self.parts, self.projector)

    @property
    def size_bytes(self) -> int:
        """Everything that is fetched for it, together."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is fetched. `quantization` is None where the choice was not one of them."""

    files: tuple[RemoteFile, ...]
    quantization: str | None = None


def choose(repo_id: str, listing: Sequence[RemoteFile], wish: Wish) -> Chosen:
    """Return what to fetch of a repository: never nothing, and of a split model every part.

    With `include` it is everything the patterns fit. Else it is a GGUF model where one is
    asked for by its quantization, or where there is nothing else; else the folder of
    safetensors.

    Raises:
        NothingToDownload: nothing fits, parts are missing, or it holds no model.
        NoSuchQuantization: the choices are in its details.
        AmbiguousDownload: several fit; the choices are in its details.
    """
    files = _matching(repo_id, listing, wish)
    found = variants(files)
    if wish.file is not None:
        return _one_file(repo_id, files, found, wish.file)
    if wish.quantization is not None:
        inside = [one for one in found if _is_below(one.stem, wish.folder)]
        return _of_variant(repo_id, _named(repo_id, inside, wish.quantization))
    inside_files = [file for file in files if _is_below(file.path, wish.folder)]
    if not inside_files:
        raise NothingToDownload(f"{repo_id} has no folder {_shown(wish.folder)}.", param="url")
    if wish.include:
        return Chosen(tuple(inside_files))
    folder = folder_model.choose(repo_id, inside_files)
    if folder:
        return Chosen(folder)
    inside = [one for one in found if _is_below(one.stem, wish.folder)]
    if not inside:
        raise _no_model(repo_id, inside_files)
    return _of_variant(repo_id, _default(repo_id, inside))


def variants(files: Iterable[RemoteFile]) -> list[Variant]:
    """Return the GGUF models among `files`, the smallest first."""
    groups: dict[tuple[str, int], dict[int, RemoteFile]] = defaultdict(dict)
    projectors: list[RemoteFile] = []
    for file in files:
        if file.path[-5:].lower() != _GGUF:
            continue
        name = file.path.rpartition("/")[2].lower()
        if "mmproj" in name:
            projectors.append(file)
        elif not name.startswith(_NO_MODEL):
            stem, no, total = _part_of(file.path[:-5])
            groups[stem, total][no] = file
    families = _families_below({stem for stem, _ in groups})
    best = _best(projectors)
    found = [
        Variant(
            stem,
            quantization_in_name(stem),
            tuple(parts[no] for no in sorted(parts)),
            _projector_of(stem, families, best),
            total - len(parts),
        )
        for (stem, total), parts in groups.items()
    ]
    return sorted(found, key=lambda one: (one.size_bytes, one.stem))


def distinct(found: Iterable[Variant]) -> list[Variant]:
    """Return models that can be told apart by their names.

    Of one that is there whole and in parts only one stays: what lacks nothing, in few files.
    """
    by_stem: dict[str, Variant] = {}
    for one in sorted(found, key=lambda one: (one.lacks > 0, len(one.parts))):
        by_stem.setdefault(one.stem, one)
    counts = Counter(one.quantization for one in by_stem.values())
    apart = [replace(one, is_only_one=counts[one.quantization] == 1) for one in by_stem.values()]
    return sorted(apart, key=lambda one: (one.size_bytes, one.stem))


def _matching(repo_id: str, listing: Sequence[RemoteFile], wish: Wish) -> list[RemoteFile]:
    files = [
        file
        for file in listing
        if (not wish.include or _fits(file.path, wish.include))
        and not _fits(file.path, wish.exclude)
    ]
    if not files:
        if not listing:
            raise NothingToDownload(f"{repo_id} holds no files.", param="url")
        raise NothingToDownload(
            f"No file of {repo_id} fits `include` and `exclude`. POST /v1/models/verify-repo lists "
            "what it has.",
            param="include" if wish.include else "exclude",
        )
    return files


def _fits(path: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern fits the path or a folder it lies in."""
    return any(
        fnmatchcase(path, pattern)
        or any(fnmatchcase(folder, pattern.rstrip("/")) for folder in _folders_above(path))
        for pattern in patterns
    )


def _folders_above(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _is_below(path: str, folder: str | None) -> bool:
    return folder is None or path.startswith(f"{folder.strip('/')}/")


def _one_file(
    repo_id: str, files: Sequence[RemoteFile], found: Sequence[Variant], path: str
) -> Chosen:
    """Return the file, or all parts of the model it is one of."""
    for one in found:
        if any(part.path == path for part in one.parts):
            _check_whole(repo_id, one)
            return Chosen(one.parts, one.quantization)
    alone = tuple(file for file in files if file.path == path)
    if not alone:
        raise NothingToDownload(f"{repo_id} has no file {_shown(path)}.", param="url")
    return Chosen(alone)


def _of_variant(repo_id: str, variant: Variant) -> Chosen:
    _check_whole(repo_id, variant)
    return Chosen(variant.files, variant.quantization)


def _check_whole(repo_id: str, variant: Variant) -> None:
    if variant.lacks:
        raise NothingToDownload(
            f"{variant.name} of {repo_id} is incomplete on the hub: {variant.lacks} of "
            f"{variant.lacks + len(variant.parts)} parts are missing. Choose another quantization.",
            param="quantization",
        )


def _named(repo_id: str, found: Sequence[Variant], wanted: str) -> Variant:
    """Return the only variant of that quantization, or of that file name."""
    found = distinct(found)
    fitting = _of_quantization(found, normalized(wanted))
    if not fitting:
        name = wanted[:-5] if wanted[-5:].lower() == _GGUF else wanted
        name = _part_of(name)[0].lower()
        fitting = [one for one in found if one.stem.lower() == name]
        fitting = fitting or [one for one in found if one.file_name.lower() == name]
    if not fitting:
        known = f"It has {_listed(found)}." if found else "It holds no GGUF files."
        raise NoSuchQuantization(
            f"{repo_id} has no quantization {_shown(wanted)}. {known}",
            param="quantization",
            details={"choices": described(found)},
        )
    return _only(repo_id, fitting)


def _default(repo_id: str, found: Sequence[Variant]) -> Variant:
    found = distinct(found)
    whole = [one for one in found if not one.lacks] or found
    for quantization in DEFAULTS:
        fitting = _of_quantization(whole, quantization)
        if fitting:
            return _only(repo_id, fitting)
    return whole[0]  # the smallest


def _of_quantization(found: Sequence[Variant], wanted: str) -> list[Variant]:
    """Return those of exactly that name, else those that differ by `UD-` only."""
    exact = [one for one in found if one.quantization == wanted]
    return exact or [one for one in found if one.quantization == f"UD-{wanted}"]


def _only(repo_id: str, fitting: Sequence[Variant]) -> Variant:
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(one.stem[:100] for one in fitting[:_SHOWN])
    raise AmbiguousDownload(
        f"{len(fitting)} models of {repo_id} are {fitting[0].quantization}: {names}. Say one of "
        "these names as `quantization`, or choose with `include`.",
        param="quantization",
        details={"choices": described(fitting)},
    )


def described(found: Sequence[Variant]) -> list[dict[str, object]]:
    """Return variants as an error's details show them."""
    return [
        {
            "name": one.name,
            "files": [file.path for file in one.files],
            "size_bytes": one.size_bytes,
            "size_gb": round(one.size_bytes / GIB, 2),
        }
        for one in found
    ]


def _listed(found: Sequence[Variant]) -> str:
    names = [f"{one.name[:100]} ({in_words(one.size_bytes)})" for one in found[:_SHOWN]]
    if len(found) > _SHOWN:
        names.append(f"{len(found) - _SHOWN} more")
    return ", ".join(names)


def _part_of(stem: str) -> tuple[str, int, int]:
    match = _PART.fullmatch(stem)
    if match is not None and 1 <= int(match["no"]) <= int(match["total"]):
        return match["stem"], int(match["no"]), int(match["total"])
    return stem, 1, 1


def _projector_of(
    stem: str,
    families: Mapping[str, Collection[str]],
    best: Mapping[tuple[str, str | None], RemoteFile],
) -> RemoteFile | None:
    """Return the nearest projector, F16 first; among several models only one of its name.

    The inventory finds it by the same rule once both are on disk.
    """
    for folder in (*_folders_above(stem), ""):
        found = best.get((folder, _family(stem)))
        if found is None and len(families[folder]) == 1:
            found = best.get((folder, None))
        if found is not None:
            return found
    return None


def _families_below(stems: Iterable[str]) -> Mapping[str, Collection[str]]:
    """Return which models there are in each folder and below it, whatever their quantization."""
    found: dict[str, set[str]] = defaultdict(set)
    for stem in stems:
        family = _family(stem)
        for folder in (*_folders_above(stem), ""):
            found[folder].add(family)
    return found


def _best(projectors: Iterable[RemoteFile]) -> Mapping[tuple[str, str | None], RemoteFile]:
    """Return the best projector of each model's name in a folder, and of each folder (None)."""

    def rank(projector: RemoteFile) -> tuple[int, str]:
        quantization = quantization_in_name(projector.path)
        return (*_PROJECTORS, quantization).index(quantization), projector.path

    best: dict[tuple[str, str | None], RemoteFile] = {}
    for projector in sorted(projectors, key=rank, reverse=True):  # so the best comes last
        folder = projector.path.rpartition("/")[0]
        best[folder, None] = best[folder, _projector_family(projector.path)] = projector
    return best


def _family(stem: str) -> str:
    return without_quantization(stem.rpartition("/")[2]).lower()


def _projector_family(path: str) -> str:
    return _PROJECTOR.sub("", _family(path[:-5]))


def _no_model(repo_id: str, files: Sequence[RemoteFile]) -> NothingToDownload:
    if any(file.path.lower().endswith(_PICKLED) for file in files):
        return NothingToDownload(
            f"{repo_id} has its weights in a format that no engine here loads. Choose a "
            "repository with GGUF or safetensors files.",
            param="url",
        )
    return NothingToDownload(
        f"{repo_id} holds no model: neither GGUF nor safetensors files.", param="url"
    )


def _shown(name: str | None) -> str:
    return repr((name or "")[:100])
