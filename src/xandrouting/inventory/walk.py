"""Which files and folders lie under a root.

Only real folders are walked, so a loop of symlinks cannot hold the walk up; a symlink is
another spelling of what it leads to. What a symlink leads to outside the root is never opened.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from xandrouting.inventory import folders
from xandrouting.inventory.model_file import VIRTUAL_ROOT, is_gguf, is_nameable
from xandrouting.inventory.paths import real_path, regular_file


@dataclass(slots=True)
class Tree:
    """What lies under the root; all paths are relative to it."""

    folders: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)  # folders of safetensors
    files: dict[str, os.stat_result] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)  # to where they really lead
    escaping: set[str] = field(default_factory=set)
    troubles: set[str] = field(default_factory=set)  # what was not looked at, and why

    def spellings(self) -> Mapping[str, set[str]]:
        """Return the other paths of each model's file or folder."""
        found: dict[str, set[str]] = defaultdict(set)
        for link, target in self.links.items():
            if target in self.files or target in self.models:
                found[target].add(link)
        for spelling, below in self._through_folder_links([*self.files, *self.models, *self.links]):
            found[self.links.get(below, below)].add(spelling)
        return found

    def all_escaping(self) -> frozenset[str]:
        """Return every path of a symlink that leaves the root."""
        through = {spelling for spelling, _ in self._through_folder_links(self.escaping)}
        return frozenset(self.escaping | through)

    def _through_folder_links(self, paths: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield the paths that a symlink to a folder gives a second spelling, behind it."""
        for link, target in self.links.items():
            if target in self.folders:
                inside = f"{target}/" if target else ""
                for path in paths:
                    if path and path.startswith(inside):
                        yield f"{link}/{path[len(inside) :]}", path


def walk(base: str, *, itself: bool = False, below: bool = True) -> Tree:
    """Return what lies under `base`, a path without symlinks. It blocks.

    `itself`: it may be a model too. Unless `below`, what lies in it is not looked at.
    """
    tree = Tree()
    pending = [""]
    while pending:
        folder = pending.pop()
        tree.folders.add(folder)
        entries = _entries(tree, base, folder)
        names = [entry.name for entry in entries]
        if folders.holds_weights(names) if folder else itself and folders.is_model(names):
            tree.models.add(folder)
        for entry in entries if below else ():
            relative = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_link:
                _add_link(tree, base, relative)
            elif entry.is_folder:
                pending.append(relative)
            elif is_gguf(entry.name):
                _add_file(tree, base, relative)
    for link, target in tree.links.items():
        # A hub cache keeps `model.gguf` as a symlink to a file named by its hash.
        if is_gguf(link) and target not in tree.files:
            _add_file(tree, base, target)
    return tree


class _Entry(NamedTuple):
    name: str
    is_link: bool
    is_folder: bool


def _entries(tree: Tree, base: str, folder: str) -> list[_Entry]:
    try:
        with os.scandir(f"{base}/{folder}") as entries:
            visible = [
                # Some file systems are asked for the kind of each, and may refuse.
                _Entry(entry.name, entry.is_symlink(), entry.is_dir(follow_symlinks=False))
                for entry in entries
                if not entry.name.startswith(".")
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        tree.troubles.add(f"models folder unreadable folder={folder!r} reason={error.strerror}")
        return []
    inside = f"{VIRTUAL_ROOT}/{folder}"
    unusable = [entry.name for entry in visible if not is_nameable(f"{inside}/{entry.name}")]
    if unusable:
        names = sorted(unusable)
        tree.troubles.add(f"file names not usable, rename them folder={folder!r} names={names!a}")
    return [entry for entry in visible if entry.name not in unusable]


def _add_link(tree: Tree, base: str, relative: str) -> None:
    target = real_path(f"{base}/{relative}")
    if target is None:
        return
    if target != base and not target.startswith(f"{base}/"):
        tree.escaping.add(relative)
        return
    inside = target[len(base) :].lstrip("/")
    hidden = any(component.startswith(".") for component in inside.split("/"))
    if not hidden and is_nameable(inside):
        tree.links[relative] = inside


def _add_file(tree: Tree, base: str, relative: str) -> None:
    status = regular_file(f"{base}/{relative}")
    if status is not None:
        tree.files[relative] = status
