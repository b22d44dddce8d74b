"""What a scan finds, and how its files are named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from xandrouting.inventory.gguf import GgufHeader
from xandrouting.inventory.quantization import quantization_in_name

VIRTUAL_ROOT: Final = "/models"
MAX_NAME_LENGTH: Final = 1024
_SHOWN_LENGTH: Final = 200
_MAX_PARTS: Final = 1000
_PART: Final = re.compile(
    r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE
)
# A backslash, control characters, and what bytes that are no UTF-8 become.
_UNNAMEABLE: Final = re.compile("[\\\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class ModelPart:
    """One file of a model."""

    path: Path
    relative: str  # to the root, with slashes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One loadable thing under the root, or one that would be if it were whole."""

    id: str  # `/models/…`, the real file; of a split model the first part
    path: Path  # the same on this machine
    folder: str  # relative to the root; "" is the root
    files: tuple[ModelPart, ...]
    size_bytes: int  # all parts together
    header: GgufHeader | None
    problem: str | None  # why no engine could load it
    modified: float  # wall time of the last change, seconds since 1970
    revision: str  # changes whenever a file does
    mmproj: Path | None = None  # the projector that gives it eyes
    mmproj_bytes: int = 0
    spellings: tuple[str, ...] = ()  # symlinks inside the root, relative to it

    @property
    def relative(self) -> str:
        """The id without `/models/`."""
        return self.id.removeprefix(f"{VIRTUAL_ROOT}/")

    @property
    def stem(self) -> str:
        """The file's name without suffix and part number."""
        return stem_of(self.relative)

    @property
    def quantization(self) -> str | None:
        """What the tensors are; where no header tells, what the name says."""
        if self.header is not None:
            return self.header.quantization
        return quantization_in_name(self.stem)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one scan found. Models are in the order of their ids."""

    models: tuple[ModelFile, ...] = ()
    escaping: frozenset[str] = frozenset()  # symlinks that leave the root, relative to it


def stem_of(relative: str) -> str:
    """Return a model file's short name: no folder, no suffix, no part number."""
    name = PurePosixPath(relative).name
    part = part_match(name)
    if part is not None:
        return part["stem"]
    return name[:-5] if is_gguf(name) else name


def is_nameable(name: str) -> bool:
    """Whether a request may use `name` at all."""
    return len(name) <= MAX_NAME_LENGTH and _UNNAMEABLE.search(name) is None


def shown(name: str) -> str:
    """Return `name` as an error message may hold it: printable, and not too long.

    The XandAI front end swallows messages with two words, which a model's name may hold.
    """
    printable = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in name[:_SHOWN_LENGTH]
    )
    if len(name) > _SHOWN_LENGTH or len(printable) > _SHOWN_LENGTH:
        printable = printable[: _SHOWN_LENGTH - 1] + "…"
    return printable.replace("JSON", "json").replace("Unexpected", "unexpected")


def is_gguf(name: str) -> bool:
    """Whether a file's name says that it is a GGUF file."""
    return name[-5:].lower() == ".gguf"


def part_match(relative: str) -> re.Match[str] | None:
    """Match the path of one part of a split model: `stem`, `no`, `total`, `suffix`."""
    match = _PART.fullmatch(relative)
    if match is not None and 1 <= int(match["no"]) <= int(match["total"]) <= _MAX_PARTS:
        return match
    return None


def part_names(relative: str) -> list[str]:
    """Return the paths of all parts of the model that `relative` is the, or a part, of."""
    match = part_match(relative)
    if match is None:
        return [relative]
    stem, total, suffix = match["stem"], match["total"], match["suffix"]
    return [f"{stem}-{no:05d}-of-{total}{suffix}" for no in range(1, int(total) + 1)]
