"""Which projector file (`mmproj`) gives which model its eyes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from xandrouting.core.quantization import quantization_in_name, without_quantization
from xandrouting.inventory.model_file import ModelFile, stem_of

_PREFERENCE: Final = ("F16", "BF16", "Q8_0", "F32")


def with_projectors(
    base: str, models: Sequence[ModelFile], projectors: Mapping[str, int]
) -> list[ModelFile]:
    """Return `models`, each with the projector that fits it.

    `projectors` are their sizes in bytes by their paths, relative to `base`.
    """
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in projectors:
        by_folder[name.rpartition("/")[0]].append(name)
    families = {folder: _families(models, folder) for folder in by_folder}

    def seeing(model: ModelFile) -> ModelFile:
        projector = _projector_of(model, by_folder, families)
        if projector is None:
            return model
        size_bytes = projectors[projector]
        return replace(model, mmproj=Path(base, projector), mmproj_bytes=size_bytes)

    return [seeing(model) for model in models] if by_folder else list(models)


def _families(models: Sequence[ModelFile], folder: str) -> set[str]:
    inside = f"{folder}/" if folder else ""
    return {_family(model.stem) for model in models if model.relative.startswith(inside)}


def _family(stem: str) -> str:
    return without_quantization(stem).lower()


def _projector_of(
    model: ModelFile, by_folder: Mapping[str, list[str]], families: Mapping[str, set[str]]
) -> str | None:
    """Return the nearest projector; among several families only one that bears its name."""
    family = _family(model.stem)

    def rank(projector: str) -> tuple[bool, int, str]:
        quantization = quantization_in_name(projector)
        preference = (*_PREFERENCE, quantization).index(quantization)
        return _projector_family(projector) != family, preference, projector

    for folder in _upwards(model.folder):
        alone = len(families.get(folder, ())) == 1
        fitting = [p for p in by_folder.get(folder, ()) if alone or _projector_family(p) == family]
        if fitting:
            return min(fitting, key=rank)
    return None


def _projector_family(projector: str) -> str:
    return re.sub(r"[-._]*mmproj[-._]*", "", _family(stem_of(projector)))


def _upwards(folder: str) -> Iterator[str]:
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]
    yield ""
