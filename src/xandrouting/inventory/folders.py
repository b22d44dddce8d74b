"""Folders of safetensors as models: which there are, what they hold, why one cannot be loaded."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final

import msgspec

from xandrouting.inventory.model_file import (
    VIRTUAL_ROOT,
    FolderModel,
    ModelFile,
    ModelFormat,
    ModelPart,
    is_gguf,
    is_nameable,
)
from xandrouting.inventory.paths import real_path
from xandrouting.inventory.safetensors import (
    InvalidSafetensors,
    UnreadableSafetensors,
    read_folder,
)
from xandrouting.inventory.safetensors_part import naming, opened
from xandrouting.inventory.templates import takes_tools

WEIGHTS: Final = ".safetensors"
_CONFIG: Final = "config.json"
_ADAPTER: Final = "adapter_config.json"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_TEMPLATE: Final = "chat_template.jinja"
_TEMPLATE_JSON: Final = "chat_template.json"
_SENTENCES: Final = "sentence_bert_config.json"
_MAX_TEXT_FILE: Final = 16 << 20
_MAX_TEMPLATE: Final = 1 << 20  # a longer one counts as absent
# A tokenizer is one of these, or the two halves of a byte-pair encoding, or code of its own.
_TOKENIZERS: Final = frozenset(
    ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.txt", "spiece.model")
)
_BPE: Final = frozenset(("vocab.json", "merges.txt"))
_TOKENIZER_SUFFIXES: Final = (".tiktoken", ".spm", ".bpe")


class _NamedTemplate(msgspec.Struct):
    template: str = ""


class _Templates(msgspec.Struct):
    chat_template: msgspec.Raw = msgspec.Raw(b"null")


class _Sentences(msgspec.Struct):
    """How a model was taught to make one vector of a text: vLLM holds it to that length."""

    max_seq_length: Annotated[int, msgspec.Meta(gt=0, lt=1 << 32)]


class _Positions(msgspec.Struct):
    position_embedding_type: str | None = None


class _Tokenizer(msgspec.Struct):
    model_max_length: float | None = None  # 1e30 where nobody said


_POSITIONS_DECODER: Final = msgspec.json.Decoder(_Positions)
_TOKENIZER_DECODER: Final = msgspec.json.Decoder(_Tokenizer)
_TEMPLATES_DECODER: Final = msgspec.json.Decoder(_Templates)
_TEMPLATE_DECODER: Final = msgspec.json.Decoder(str | list[_NamedTemplate] | None)
_SENTENCES_DECODER: Final = msgspec.json.Decoder(_Sentences)

_UNREAD: Final = (".md", ".png", ".jpg", ".pdf", "LICENSE")  # by an engine

Found = FolderModel | str
"""What a folder holds, or why it cannot be loaded."""


@dataclass(slots=True)
class Folder:
    """The files of one folder; `outside` are symlinks that leave the root."""

    relative: str
    files: dict[str, os.stat_result] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)

    @property
    def identity(self) -> tuple[object, ...]:
        """Changes whenever a file does, or a symlink that leaves the root."""
        return (
            *sorted(self.outside),
            *(
                (name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
                for name, s in sorted(self.files.items())
            ),
        )


def read_folder_model(path: Path, folder: Folder) -> Found:
    """Return what `folder`, which lies at `path`, holds. It blocks for a millisecond a part.

    Raises:
        UnreadableSafetensors: the system refuses; the same files may do later.
    """
    try:
        return _read(path, folder)
    except UnreadableSafetensors:
        raise
    except InvalidSafetensors as error:
        return str(error)


def holds_weights(names: list[str]) -> bool:
    """Whether a folder with files of these names is a model, whole or not."""
    return any(name.endswith(WEIGHTS) for name in names)


def is_model(names: list[str]) -> bool:
    """Whether a folder with files of these names is meant as a model, and not weights alone."""
    return _CONFIG in names and holds_weights(names)


def look(base: str, relative: str) -> Folder | None:
    """List a folder's files; None: it is gone, or holds no weights.

    A symlink counts as the file it leads to; where it leaves the root it is not followed. Names
    that no list can show are left out: no engine reads such a file.
    """
    folder = Folder(relative)
    try:
        with os.scandir(f"{base}/{relative}") as entries:
            for entry in entries:
                name = entry.name
                if not name.startswith(".") and not is_gguf(name) and is_nameable(name):
                    _add(folder, base, entry)
    except OSError:
        return None
    return folder if holds_weights([*folder.files, *folder.outside]) else None


def _add(folder: Folder, base: str, entry: os.DirEntry[str]) -> None:
    if entry.is_symlink():
        target = real_path(entry.path)
        if target is not None and target != base and not target.startswith(f"{base}/"):
            folder.outside.add(entry.name)
            return
    try:
        status = entry.stat()
    except OSError:
        return  # a symlink that leads nowhere
    if stat.S_ISREG(status.st_mode):
        folder.files[entry.name] = status


def model_of(base: str, folder: Folder, found: Found) -> ModelFile:
    """Return a folder, in which this was found, as a model."""
    model = found if isinstance(found, FolderModel) else None
    inside = f"{folder.relative}/" if folder.relative else ""
    files = tuple(
        ModelPart(Path(base, inside + name), inside + name, status.st_size)
        for name, status in sorted(folder.files.items())
    )
    return ModelFile(
        id=f"{VIRTUAL_ROOT}/{folder.relative}",
        path=Path(base, folder.relative),
        folder=folder.relative,
        files=files,
        size_bytes=sum(part.size_bytes for part in files),
        header=None,
        problem=found if isinstance(found, str) else None,
        modified=max((s.st_mtime for s in folder.files.values()), default=0.0),
        revision="+".join(
            f"{s.st_size}-{s.st_mtime_ns}-{s.st_ino}"
            for name, s in sorted(folder.files.items())
            if not name.endswith(_UNREAD)
        ),
        format=ModelFormat.SAFETENSORS,
        safetensors=model,
    )


def _read(path: Path, folder: Folder) -> FolderModel:
    names = folder.files.keys()
    if folder.outside:
        raise InvalidSafetensors("a symlink in it leaves the models directory")
    if _ADAPTER in names:
        raise InvalidSafetensors("an adapter, not a model of its own")
    shape = read_folder(path)
    tokenizes = (
        _TOKENIZERS & names
        or names >= _BPE
        or any(name.endswith(_TOKENIZER_SUFFIXES) for name in names)
    )
    if not tokenizes:
        raise InvalidSafetensors("its tokenizer is missing")
    length = _sentence_length(path, folder)
    if length is None:
        length = _tokenized_length(path, folder, shape.max_position_embeddings)
    template = _template(path, folder)
    return FolderModel(
        replace(shape, max_position_embeddings=length),
        chat_template=template,
        pooling="modules.json" in names,
        vision="preprocessor_config.json" in names,
        tools=takes_tools(template),
    )


def _sentence_length(path: Path, folder: Folder) -> int | None:
    if _SENTENCES not in folder.files:
        return None
    text = _text(path / _SENTENCES)
    try:
        return _SENTENCES_DECODER.decode(text).max_seq_length
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _tokenized_length(path: Path, folder: Folder, positions: int | None) -> int | None:
    """Return how long a text may be: some positions of a table may be no token's.

    RoBERTa has 514 for texts of 512 tokens. vLLM believes the tokenizer where there is a table.
    """
    if positions is None or _TOKENIZER_CONFIG not in folder.files:
        return positions
    config, tokenizer = _text(path / _CONFIG), _text(path / _TOKENIZER_CONFIG)
    try:
        kind = _POSITIONS_DECODER.decode(config).position_embedding_type
        longest = _TOKENIZER_DECODER.decode(tokenizer).model_max_length
    except (msgspec.DecodeError, ValueError, RecursionError):
        return positions
    if kind != "absolute" or longest is None or longest < 1:
        return positions
    return int(min(positions, longest))


def _template(path: Path, folder: Folder) -> str:
    """Return the chat template; what cannot be read as one is none."""
    if _TEMPLATE in folder.files:
        text = _text(path / _TEMPLATE)
        return text.decode(errors="replace") if len(text) <= _MAX_TEMPLATE else ""
    for name in (_TEMPLATE_JSON, _TOKENIZER_CONFIG):
        if name in folder.files:
            text = _text(path / name)
            try:
                raw = _TEMPLATES_DECODER.decode(text).chat_template
                if memoryview(raw).nbytes > _MAX_TEMPLATE:
                    return ""
                said = _TEMPLATE_DECODER.decode(raw)
            except (msgspec.DecodeError, ValueError, RecursionError):
                return ""
            if said:
                return said if isinstance(said, str) else "\n".join(one.template for one in said)
    return ""


def _text(path: Path) -> bytes:
    with naming(path.name), opened(path) as (fd, size):
        return os.pread(fd, min(size, _MAX_TEXT_FILE), 0)
