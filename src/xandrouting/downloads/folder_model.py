"""Which files of a repository make its folder of safetensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from xandrouting.core.errors import AmbiguousDownload, NothingToDownload
from xandrouting.downloads.jobs import RemoteFile

_WEIGHTS: Final = ".safetensors"
_ADAPTER: Final = "adapter_model"
_INDEX: Final = "model.safetensors.index.json"
_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<total>\d{5})")
# `model.fp16.safetensors` beside `model.safetensors` is the same once more.
_AGAIN: Final = re.compile(r"(?P<stem>.+)\.(?:fp|bf|int)\d+(?:-\d{5}-of-\d{5})?")
_CONSOLIDATED: Final = re.compile(r"consolidated(?:[-.].*)?")  # Mistral's own spelling of it
_BESIDE: Final = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".py")
_INDEX_OF_OTHERS: Final = (".bin.index.json", ".msgpack.index.json", ".h5.index.json")
_LICENCE: Final = re.compile(r"(?:licen[cs]e|notice|use_policy)(?:\..*)?", re.IGNORECASE)
# What a model's own folder may hold below it: modules of sentence-transformers, more templates.
_MODULE: Final = re.compile(r"\d+_[A-Za-z]+|additional_chat_templates")
# The same weights for other programs.
_OTHERS: Final = frozenset(
    ("coreml", "flax", "gguf", "metal", "onnx", "openvino", "original", "tf", "tflite")
)


def choose(repo_id: str, files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    """Return what to fetch for the folder of safetensors; empty: there is none.

    The weights once, the config, the tokenizer, templates, and the licence.

    Raises:
        NothingToDownload: shards are missing, or it is an adapter.
        AmbiguousDownload: several folders are one; the choices are in its details.
    """
    by_folder: dict[str, list[RemoteFile]] = defaultdict(list)
    for file in files:
        by_folder[file.path.rpartition("/")[0]].append(file)
    base = _base(repo_id, by_folder)
    if base is None:
        return ()
    wanted = {
        *_weights(repo_id, by_folder[base]),
        *(file for file in by_folder[base] if _is_beside(_name(file))),
        *(
            file
            for folder in by_folder
            if _is_module(folder, base)
            for file in by_folder[folder]
            if _is_weights(file) or _is_beside(_name(file))
        ),
    }
    return tuple(file for file in files if file in wanted)


def _base(repo_id: str, by_folder: dict[str, list[RemoteFile]]) -> str | None:
    """Return the folder that holds the weights; None: none does."""
    holding = [folder for folder, files in by_folder.items() if any(map(_is_weights, files))]
    if not holding:
        if any(_name(file).startswith(_ADAPTER) for files in by_folder.values() for file in files):
            raise NothingToDownload(
                f"{repo_id} is an adapter and no model of its own. Choose its base model, or one "
                "that it was merged into.",
                param="url",
            )
        return None
    top = min(folder.count("/") if folder else -1 for folder in holding)
    nearest = [folder for folder in holding if (folder.count("/") if folder else -1) == top]
    nearest = [one for one in nearest if one.rpartition("/")[2] not in _OTHERS] or nearest
    if len(nearest) > 1:
        raise AmbiguousDownload(
            f"{len(nearest)} folders of {repo_id} hold a model: {', '.join(nearest[:10])}. Ask for "
            f"one of them by its page, …/{repo_id}/tree/main/FOLDER.",
            param="url",
            details={"choices": [_described(one, by_folder[one]) for one in nearest]},
        )
    return nearest[0]


def _described(folder: str, files: Sequence[RemoteFile]) -> dict[str, object]:
    weights = [file for file in files if _is_weights(file)]
    return {
        "name": folder,
        "files": [file.path for file in weights],
        "size_bytes": sum(file.size for file in weights),
    }


def _weights(repo_id: str, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Return the weights of one folder, once."""
    found = {_stem(file): file for file in files if _is_weights(file)}
    plain = {stem for stem in found if not _CONSOLIDATED.fullmatch(stem)}
    if plain:
        found = {stem: found[stem] for stem in found if stem in plain}
    shards = _shards(repo_id, found)
    kept = {
        stem: file
        for stem, file in found.items()
        if (again := _AGAIN.fullmatch(stem)) is None
        or (again["stem"] not in found and again["stem"] not in shards)
    }
    if "model" in kept and "model" in shards:
        indexed = any(_name(file) == _INDEX for file in files)
        extra = {"model"} if indexed else {stem for stem in kept if _is_shard_of("model", stem)}
        kept = {stem: file for stem, file in kept.items() if stem not in extra}
    return list(kept.values())


def _shards(repo_id: str, found: dict[str, RemoteFile]) -> set[str]:
    """Return the names of what is split; a set of which one is missing is an error."""
    numbers: dict[tuple[str, int], set[int]] = defaultdict(set)
    for stem in found:
        match = _SHARD.fullmatch(stem)
        if match is not None:
            numbers[match["stem"], int(match["total"])].add(int(match["no"]))
    for (stem, total), there in numbers.items():
        # Some count from 0.
        if len(there) < total:
            raise NothingToDownload(
                f"{stem} of {repo_id} is incomplete on the hub: {total - len(there)} of {total} "
                "parts are missing.",
                param="url",
            )
    return {stem for stem, _ in numbers}


def _is_shard_of(name: str, stem: str) -> bool:
    match = _SHARD.fullmatch(stem)
    return match is not None and match["stem"] == name


def _is_weights(file: RemoteFile) -> bool:
    return file.path.endswith(_WEIGHTS) and not _name(file).startswith(_ADAPTER)


def _is_beside(name: str) -> bool:
    if name.startswith(".") or name.endswith(_INDEX_OF_OTHERS):
        return False
    return name.endswith(_BESIDE) or _LICENCE.fullmatch(name) is not None


def _is_module(folder: str, base: str) -> bool:
    parent, _, name = folder.rpartition("/")
    return parent == base and bool(name) and _MODULE.fullmatch(name) is not None


def _name(file: RemoteFile) -> str:
    return file.path.rpartition("/")[2]


def _stem(file: RemoteFile) -> str:
    return _name(file).removesuffix(_WEIGHTS)
