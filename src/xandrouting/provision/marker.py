"""What an environment that we build says of itself.

An environment cannot be built aside and renamed: its scripts hold its path. So it carries a
file from its first moment to its last, and whoever builds it holds the file's lock.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

NAME: Final = ".xandrouting"
UNFINISHED: Final = "unfinished"
WHOLE: Final = "whole"


def is_ours(folder: Path) -> bool:
    """Whether the folder was made by an installation, whole or not."""
    return (folder / NAME).exists()


def is_unfinished(folder: Path) -> bool:
    """Whether an installation in the folder runs, or ended before its end."""
    try:
        return (folder / NAME).read_text() != WHOLE
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def locked(folder: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Have the folder alone; `on_wait` is called once if another process has it.

    Yields the lock's descriptor: a child that inherits it keeps the lock if we are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def say(folder: Path, state: str) -> None:
    """Write the folder's state, in place: the lock is on this very file."""
    with (folder / NAME).open("r+") as file:
        file.truncate()
        file.write(state)
