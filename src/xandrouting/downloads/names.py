"""What a folder and a file of a download may be called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from xandrouting.core.errors import InvalidDestination, UnsafeRepository
from xandrouting.downloads.jobs import RemoteFile

MANIFEST: Final = ".xandrouting.json"
MAX_NAME_BYTES: Final = 255  # of one folder or file: what file systems take
MAX_PATH_BYTES: Final = 1024

# What no path may hold; half of a surrogate pair cannot be written as UTF-8.
_UNSAFE: Final = re.compile(r"[\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def check_destination(name: str) -> str:
    """Return `name` if it can be a download's folder: one visible name.

    Raises:
        InvalidDestination: the message says what is wrong with it.
    """
    wrong = _wrong_with(name)
    if wrong is not None:
        raise InvalidDestination(
            f"destination {wrong}. It is the name of one folder inside the models directory, as "
            "in qwen2.5-coder-7b.",
            param="destination",
        )
    return name


def _wrong_with(name: str) -> str | None:
    if not name:
        return "is empty"
    if name.startswith("/"):
        return "is an absolute path"
    if _UNSAFE.search(name) or not name.isprintable():
        return "holds a backslash or a character that cannot be printed"
    if "/" in name:
        return "is a path of several folders"
    if name.startswith("."):
        return "begins with a dot"
    if name != name.strip():
        return "begins or ends with a space"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    return None


def check_listing(repo_id: str, files: Iterable[RemoteFile]) -> None:
    """Check that every file of a repository stays inside its folder, whatever it is called.

    Raises:
        UnsafeRepository: one does not, or two would be one.
    """
    seen: set[str] = set()
    folders: set[str] = set()
    for file in files:
        parts = file.path.split("/")
        if not _is_safe(file.path, parts) or file.path in seen:
            raise _unsafe(repo_id, file.path)
        seen.add(file.path)
        folders.update("/".join(parts[:count]) for count in range(1, len(parts)))
    both = seen & folders
    if both:
        raise _unsafe(repo_id, min(both))


def _is_safe(path: str, parts: Sequence[str]) -> bool:
    if _UNSAFE.search(path) or len(path.encode()) > MAX_PATH_BYTES:
        return False
    return not any(
        part in ("", ".", "..") or part.lower() == MANIFEST or len(part.encode()) > MAX_NAME_BYTES
        for part in parts
    )


def _unsafe(repo_id: str, path: str) -> UnsafeRepository:
    return UnsafeRepository(
        f"{repo_id} lists a file that cannot be kept in a folder of its own: {path[:100]!r}. "
        "Nothing was downloaded.",
        param="url",
    )
