"""What a scan finds, and how its files are named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Final

from xandrouting.core.quantization import quantization_in_name
from xandrouting.inventory.gguf import GgufHeader
from xandrouting.inventory.safetensors import SafetensorsModel

VIRTUAL_ROOT: Final = "/models"
MAX_NAME_LENGTH: Final = 1024
_SHOWN_LENGTH: Final = 200
_MAX_PARTS: Final = 1000
_PART: Final = re.compile(
    r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE
)
_RANKS: Final = 4  # a GGUF's pooling type
# A backslash, control characters, what bytes that are no UTF-8 become, and what a launcher would
# fill in on an engine's command line.
_UNNAMEABLE: Final = re.compile(
    "[\\\\\x00-\x1f\x7f-\x9f\ud800-\udfff]|\\{(?:port|key|cores|scratch)\\}"
)


class ModelFormat(StrEnum):
    """How a model lies on disk: one file, split or not, or a folder."""

    GGUF = "gguf"
    SAFETENSORS = "safetensors"


@dataclass(frozen=True, slots=True)
class FolderModel:
    """What a folder of safetensors holds besides the shape of its weights."""

    shape: SafetensorsModel
    chat_template: str  # empty: it says none
    pooling: bool  # it says how to pool: a model made for embeddings or ranking
    vision: bool  # it says how to prepare images or sound
    tools: bool = False  # its template puts a request's tools into the prompt


@dataclass(frozen=True, slots=True)
class Traits:
    """What there is to tell of a model, whatever its format. None: it does not say."""

    name: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    context_length: int | None = None
    layers: int | None = None
    heads: int | tuple[int, ...] | None = None
    embedding_length: int | None = None
    vocab_size: int | None = None
    chat_template: bool = False
    pooling: bool = False  # it is made for embeddings or ranking
    ranking: bool = False
    tools: bool = False  # its template puts tools into the prompt
    vision: bool = False


@dataclass(frozen=True, slots=True)
class ModelPart:
    """One file of a model."""

    path: Path
    relative: str  # to the root, with slashes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One loadable thing under the root, or one that would be if it were whole."""

    id: str  # `/models/…`, the real file or folder; of a split model the first part
    path: Path  # the same on this machine
    folder: str  # relative to the root; "" is the root; of a folder of safetensors itself
    files: tuple[ModelPart, ...]
    size_bytes: int  # all parts together
    header: GgufHeader | None
    problem: str | None  # why no engine could load it
    modified: float  # wall time of the last change, seconds since 1970
    revision: str  # changes whenever a file does
    mmproj: Path | None = None  # the projector that gives it eyes
    mmproj_bytes: int = 0
    spellings: tuple[str, ...] = ()  # symlinks inside the root, as ids without `/models/`
    read_only: bool = False  # it lies in a further root, which is not ours to change
    format: ModelFormat = ModelFormat.GGUF
    safetensors: FolderModel | None = None

    @property
    def relative(self) -> str:
        """The id without `/models/`."""
        return self.id.removeprefix(f"{VIRTUAL_ROOT}/")

    @property
    def stem(self) -> str:
        """The file's name without suffix and part number."""
        return stem_of(self.relative)

    @property
    def traits(self) -> Traits:
        """What its header or its config says."""
        if self.safetensors is not None:
            return _traits_of_folder(self.safetensors)
        return _traits_of_header(self.header, vision=self.mmproj is not None)

    @property
    def quantization(self) -> str | None:
        """What the tensors are; where no header tells, what the name says."""
        if self.header is not None:
            return self.header.quantization
        if self.safetensors is not None:
            return self.safetensors.shape.quantization
        return quantization_in_name(self.stem)


def _traits_of_header(header: GgufHeader | None, *, vision: bool) -> Traits:
    if header is None:
        return Traits(vision=vision)
    return Traits(
        name=header.name,
        architecture=header.architecture,
        parameters=header.parameters,
        context_length=header.context_length,
        layers=header.block_count,
        heads=header.head_count,
        embedding_length=header.embedding_length,
        vocab_size=header.vocab_size,
        chat_template=header.chat_template is not None,
        pooling=bool(header.pooling_type),
        ranking=header.pooling_type == _RANKS,
        tools=header.tools,
        vision=vision,
    )


def _traits_of_folder(model: FolderModel) -> Traits:
    shape = model.shape
    return Traits(
        architecture=shape.architectures[0] if shape.architectures else None,
        parameters=shape.parameters,
        context_length=shape.max_position_embeddings,
        layers=shape.num_hidden_layers,
        heads=shape.num_attention_heads,
        embedding_length=shape.hidden_size,
        vocab_size=shape.vocab_size,
        chat_template=bool(model.chat_template),
        pooling=model.pooling,
        tools=model.tools,
        vision=model.vision,
    )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one scan found. Models are in the order of their ids."""

    models: tuple[ModelFile, ...] = ()
    escaping: frozenset[str] = frozenset()  # symlinks that leave the root, relative to it
    troubles: frozenset[str] = frozenset()  # what was not looked at, and why, as the log says it


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
