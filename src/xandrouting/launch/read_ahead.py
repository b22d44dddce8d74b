"""Reading files into the page cache before anybody asks for them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from typing import Final

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 8 << 20  # asked for at once, and waited for: it can be ended in between


def read_ahead(files: Iterable[str], *, limit_bytes: int, ended: threading.Event) -> int:
    """Have the system read the files, in their order, until `limit_bytes` were; return how many.

    Blocks for as long as the disk takes: it belongs in a thread. What cannot be read is left
    to the load, which can say why. Where the system has no `posix_fadvise` nothing is read.
    """
    if not hasattr(os, "posix_fadvise"):
        return 0
    done = 0
    for path in files:
        try:
            done += _read(path, limit_bytes - done, ended)
        except OSError as error:
            log.debug("not read ahead error=%s", error.strerror)
    return done


def _read(path: str, limit_bytes: int, ended: threading.Event) -> int:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = min(os.fstat(file).st_size, limit_bytes)
        at = 0
        while at < size and not ended.is_set():
            length = min(CHUNK_BYTES, size - at)
            os.posix_fadvise(file, at, length, os.POSIX_FADV_WILLNEED)
            os.pread(file, 1, at + length - 1)  # waits for it: what is asked for is never far ahead
            at += length
        return at
    finally:
        os.close(file)
