"""Paths of what may change while it is looked at."""

from __future__ import annotations

import os
import stat


def path_in(base: str, relative: str) -> str:
    """Return the path of what lies in `base`; "" is the folder itself."""
    return f"{base}/{relative}" if relative else base


def real_path(path: str | os.PathLike[str]) -> str | None:
    """Return a path without symlinks, whether or not it leads anywhere; None: it goes just now."""
    try:
        return os.path.realpath(path)
    except OSError:
        return None  # a symlink that was seen is read a moment later


def regular_file(path: str) -> os.stat_result | None:
    """Return the status of a regular file; None: there is none, or it is a symlink."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def real_file(path: str) -> os.stat_result | None:
    """Return the status of a regular file that no symlink is on the way to."""
    return regular_file(path) if real_path(path) == path else None
