"""What the mover's threads share, and how one of them ends the others.

Runs in the mover's process; standard library only.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xandrouting.downloads.mover_files import Failed, File, Stopped


class Board:
    """What the threads share. The main thread alone speaks to the gateway."""

    def __init__(self, files: list[File]) -> None:
        self.files = files
        self.stopping = threading.Event()
        self.news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.failure: Failed | None = None
        self.bug = False
        self.woken, self._wake = os.pipe()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()

    def tell(self, event: str, **facts: float | str) -> None:
        """Have the main thread say this to the gateway."""
        self.news.put({"event": event, **facts})
        self.wake()

    def wake(self) -> None:
        """Have the main thread look."""
        os.write(self._wake, b"!")

    def fail(self, failure: Failed | None) -> None:
        """Remember why the job cannot go on, and end the other threads; None: a bug."""
        with self._lock:
            self.failure = self.failure or failure
        self.bug = self.bug or failure is None
        self.stop()

    def stop(self) -> None:
        """End every transfer; who waits for bytes gets an end of file."""
        self.stopping.set()
        with self._lock:
            for connection in self._connections:
                _shut(connection)

    @contextmanager
    def holding(self, connection: socket.socket) -> Iterator[None]:
        """Have a connection shut when everything stops."""
        with self._lock:
            self._connections.add(connection)
        try:
            if self.stopping.is_set():
                raise Stopped
            yield
        finally:
            with self._lock:
                self._connections.discard(connection)

    def pause(self, seconds: float, why: str) -> None:
        """Wait before the next try; raise Stopped as soon as everything stops."""
        self.tell("waiting", seconds=round(seconds, 3), why=why)
        if self.stopping.wait(seconds):
            raise Stopped

    def progress(self) -> dict[str, Any]:
        """Return what is on the disk now, as an event."""
        done = {path: file.on_disk for file in self.files for path in file.paths}
        return {"event": "progress", "done": done, "fetched": sum(f.over_wire for f in self.files)}


def _shut(connection: socket.socket) -> None:
    try:
        # Not SSLSocket's own: that would let the ciphertext through as if it were the file.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        pass  # it is over already


@contextmanager
def guarded(board: Board) -> Iterator[None]:
    """End a thread of the mover's: what it raises is for the board, and ends the others."""
    try:
        yield
    except Stopped:
        pass
    except Failed as failure:
        board.fail(failure)
    except BaseException:  # noqa: BLE001 - the edge of a thread; the gateway logs stderr
        traceback.print_exc()
        board.fail(None)
