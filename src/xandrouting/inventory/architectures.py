"""Which model architectures the engine knows, told by its own library.

Every architecture's name stands in the library that loads it, and nowhere is there a list to
ask for. So what is found may yet be unknown; what is not there is surely not known, and nobody
need leave for a load that would fail.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

SURELY_KNOWN: Final = "llama"


class KnownArchitectures:
    """Looks names up in the engine's libraries, and remembers what it found."""

    def __init__(self, libraries: Iterable[Path]) -> None:
        self._libraries = tuple(libraries)
        self._known: dict[str, bool] = {}

    def knows(self, architecture: str) -> bool:
        """Whether the engine may know this architecture; True where that cannot be told.

        It blocks, for some 50 ms at the first question for a name: not for the loop.
        """
        if architecture not in self._known:
            if SURELY_KNOWN not in self._known:
                self._known[SURELY_KNOWN] = self._holds(SURELY_KNOWN)
            can_tell = self._known[SURELY_KNOWN]
            self._known[architecture] = not can_tell or self._holds(architecture)
        return self._known[architecture]

    def _holds(self, name: str) -> bool:
        # A compiler may keep a name as the end of a longer one, so only its end is looked for.
        wanted = name.encode() + b"\0"
        return any(_find(library, wanted) for library in self._libraries)


def _find(library: Path, wanted: bytes) -> bool:
    try:
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            return text.find(wanted) >= 0
    except (OSError, ValueError) as error:
        log.warning("engine library unreadable file=%s reason=%s", library.name, error)
        return False
