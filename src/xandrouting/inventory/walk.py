"""Which files and folders lie under a root.

Only real folders are walked, so a loop of symlinks cannot hold the walk up; a symlink is
another spelling of what it leads to. What a symlink leads to outside the root is never opened.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from xandrouting.inventory import folders
from xandrouting.inventory.model_file import VIRTUAL_ROOT, is_gguf, is_nameable

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Tree:
    """What lies under the root; all paths are relative to it."""

    folders: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)  # folders of safetensors
    files: dict[str, os.stat_result] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)  # to where they really lead
    escaping: set[str] = field(default_factory=set)

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
                    if path.startswith(inside):
                        yield f"{link}/{path[len(inside) :]}", path


def walk(base: str) -> Tree:
    """Return what lies under `base`, a path without symlinks. It blocks."""
    tree = Tree()
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


def _add_link(tree: Tree, base: str, relative: str) -> None:
    target = os.path.realpath(f"{base}/{relative}")
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


def regular_file(path: str) -> os.stat_result | None:
    """Return the status of a regular file; None: there is none, or it is a symlink."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def real_file(path: str) -> os.stat_result | None:
    """Return the status of a regular file that no symlink is on the way to."""
    return regular_file(path) if os.path.realpath(path) == path else None
