"""Where models lie: the models directory, and further folders that are only read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xandrouting.inventory.folders import is_model
from xandrouting.inventory.model_file import VIRTUAL_ROOT, is_nameable
from xandrouting.inventory.paths import real_path

log = logging.getLogger(__name__)

_NAMELESS: Final = "root"
Further = tuple[str, Path]
"""A further folder and the name it shall have; an empty one: that of the folder."""


@dataclass(frozen=True, slots=True)
class Root:
    """One folder with models. What lies in it is `/models/NAME/…`; without a name `/models/…`."""

    path: Path
    name: str = ""
    itself_only: bool = False  # it is a model, and what lies below is another root's

    @property
    def read_only(self) -> bool:
        """Whether nothing may be written to it or deleted in it."""
        return bool(self.name)

    @property
    def base(self) -> str:
        """Its path without symlinks, as it is now. It blocks."""
        return (real_path(self.path) or str(self.path.absolute())).rstrip("/")

    def seen(self, relative: str) -> str:
        """Return a path relative to this folder as one relative to `/models`."""
        return "/".join(filter(None, (self.name, relative)))

    def within(self, seen: str) -> str | None:
        """Return a path relative to `/models` as one relative to this folder; None: elsewhere."""
        if not self.name:
            return seen
        if seen == self.name:
            return ""
        return seen[len(self.name) + 1 :] if seen.startswith(f"{self.name}/") else None


def roots_of(models_dir: Path, further: Iterable[Further]) -> tuple[Root, ...]:
    """Return the models directory and the further folders, each with a name of its own.

    A models directory that is a model itself is one more, by its folder's name: `/models` means
    all that lies in it. A name that is taken, by a folder of the models directory too, gets a
    number. A folder that is in another one, or holds it, is left out. It blocks.
    """
    roots = [Root(models_dir)]
    inside = _names_in(models_dir)
    taken = set(inside)
    if is_model(inside):
        unique = _unique(models_dir.resolve().name, taken)
        taken.add(unique)
        roots.append(Root(models_dir, unique, itself_only=True))
        log.warning(
            "models directory is a model itself, set models_dir to the folder above model=%s/%s",
            *(VIRTUAL_ROOT, unique),
        )
    for name, path in further:
        if any(_overlap(path, root.path) for root in roots):
            log.warning("model root left out, it overlaps with another path=%s", path)
            continue
        unique = _unique(name or path.resolve().name, taken)
        taken.add(unique)
        roots.append(Root(path, unique))
    return tuple(roots)


def root_of(roots: Sequence[Root], seen: str, *, read_only: bool) -> tuple[Root, str]:
    """Return the root that a path relative to `/models` lies in, and the path relative to that.

    `read_only`: in a further one. A folder of the models directory may have the name of one.
    """
    for root in roots:
        inside = root.within(seen)
        if root.read_only is read_only and inside is not None:
            return root, inside
    raise ValueError(f"not under {VIRTUAL_ROOT}: {seen}")


def _names_in(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _overlap(one: Path, other: Path) -> bool:
    real, other_real = one.resolve(), other.resolve()
    return real.is_relative_to(other_real) or other_real.is_relative_to(real)


def _unique(name: str, taken: set[str]) -> str:
    bare = name.strip("./ ").replace("/", "-")
    if not bare or not is_nameable(bare):
        bare = _NAMELESS
    unique, number = bare, 1
    while unique in taken:
        number += 1
        unique = f"{bare}-{number}"
    return unique
