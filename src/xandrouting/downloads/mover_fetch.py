"""The mover's side of the network: ranges until every file is whole and its hash is right.

Runs in the mover's process; standard library only.
"""

from __future__ import annotations

import queue
import ssl
import threading
from collections import Counter
from http.client import HTTPResponse as Response
from typing import Final

from xandrouting.downloads.mover_board import Board, guarded
from xandrouting.downloads.mover_client import NETWORK, Client, Trouble, words_of
from xandrouting.downloads.mover_files import (
    BUFFER_BYTES,
    Failed,
    File,
    Order,
    Part,
    Stopped,
    check_free,
    disk,
    unpack,
)

_FIRST_WAIT_S, _LAST_WAIT_S = 0.5, 15.0
_FIRST_READ_BYTES: Final = 64 << 10  # at least what the answer's reader has read ahead
_TRIES: Final = {"refused": 8, "wrong_size": 3, "forbidden": 3, "gone": 3}  # in a row, no byte


class Fetcher:
    """Brings the files, several at once, each until its hash is right."""

    def __init__(self, order: Order, board: Board, client: Client) -> None:
        self._order, self._board, self._client = order, board, client
        self._todo: queue.SimpleQueue[File] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []

    def run(self) -> None:
        """Return when every file is whole, right and on the disk; or when another was not."""
        for file in sorted(self._order.files, key=lambda file: -file.size):
            self._todo.put(file)
        count = min(self._order.parallel, len(self._order.files))
        for _ in range(count):
            thread = threading.Thread(target=self._work, daemon=True)
            thread.start()
            self.threads.append(thread)  # not before: the main thread may wait for it already
        for thread in self.threads:
            thread.join()

    def _work(self) -> None:
        with guarded(self._board):
            buffer = memoryview(bytearray(BUFFER_BYTES))
            while not self._board.stopping.is_set():
                try:
                    file = self._todo.get_nowait()
                except queue.Empty:
                    return
                if not (self._order.merge and self._is_in_place(file)):
                    self._fetch(file, buffer)

    def _is_in_place(self, file: File) -> bool:
        """Whether a folder that has other files has this one too, by its hash."""
        file.there = {path for path in file.paths if self._is_right(file, path)}
        check_free(self._order, file)
        if file.in_place:
            file.have = file.size
        return file.in_place

    def _is_right(self, file: File, path: str) -> bool:
        hasher, there = file.hasher(), self._order.target / path
        try:
            if there.is_symlink() or there.stat().st_size != file.size:
                return False
            if hasher is None:
                return True
            with there.open("rb", buffering=0) as content:
                while piece := content.read(BUFFER_BYTES):
                    hasher.update(piece)
                    if self._board.stopping.is_set():
                        raise Stopped
        except OSError:
            return False
        return hasher.hexdigest() == (file.sha256 or file.blob_id)

    def _fetch(self, file: File, buffer: memoryview) -> None:
        if file.archive is None:
            self._bring_right(file, buffer)
        else:
            self._bring_right(file.archive, buffer)
            if not any(unpack(file, self._board.stopping) for _ in range(2)):
                message = f"{file.archive.path} does not hold the {file.path} that was wanted."
                raise Failed("corrupt", message)

    def _bring_right(self, file: File, buffer: memoryview) -> None:
        for _ in range(2):
            part = Part(file, self._board.stopping)
            try:
                self._bring(part, buffer)
                if all(other.have == other.size for other in self._order.files):
                    self._board.tell("verifying")
                if part.is_right():
                    return
            finally:
                part.close()
            with disk(file.path):
                file.part.unlink()
            file.have = 0
        message = f"{file.path} came with a wrong hash, twice. Its bytes were thrown away."
        raise Failed("corrupt", message)

    def _bring(self, part: Part, buffer: memoryview) -> None:
        """Append until the part is whole, however many tries that takes."""
        file, tries = part.file, Counter[str]()
        while file.have < file.size:
            before = file.have
            try:
                self._bring_window(part, buffer)
                tries.clear()
                continue
            except Trouble as error:
                trouble = error
            except TimeoutError:
                trouble = Trouble(f"no byte came for {self._order.stall_s:g} s")
            except ssl.SSLCertVerificationError as error:
                trouble = Trouble(
                    f"its certificate is not trusted: {error.verify_message}", final=True
                )
            except NETWORK as error:
                trouble = Trouble(f"the connection failed: {words_of(error)}")
            if self._board.stopping.is_set():
                raise Stopped
            if file.have > before:
                tries.clear()
            tries[trouble.code] += 1
            if trouble.final or tries[trouble.code] >= _TRIES[trouble.code]:
                raise Failed(trouble.code, f"{file.path} could not be fetched: {trouble.why}.")
            wait_s = trouble.wait_s
            if wait_s is None:
                wait_s = min(_FIRST_WAIT_S * 2 ** (tries.total() - 1), _LAST_WAIT_S)
            if trouble.code != "forbidden" or tries["forbidden"] > 1:  # else a fresh address helps
                self._board.pause(wait_s, f"{file.path}: {trouble.why}")

    def _bring_window(self, part: Part, buffer: memoryview) -> None:
        file = part.file
        start, end = file.have, min(file.have + self._order.window_bytes, file.size)
        with self._client.get(file, start, end) as (answer, begin):
            body = Body(answer, file)
            skipped = begin
            while skipped < start:
                size = body.read_into(buffer[: min(start - skipped, len(buffer))])
                if not size:
                    raise Trouble("the connection ended early")
                skipped += size
            left = file.size - start if begin == 0 else end - start
            if self._append(part, body, buffer, left) < end - start:
                raise Trouble("the connection ended early")

    def _append(self, part: Part, body: Body, buffer: memoryview, left: int) -> int:
        """Append what comes as it comes, at most so much; return how much it was."""
        total = 0
        while total < left and (size := body.read_into(buffer[: left - total])):
            part.append(buffer[:size])
            total += size
        return total


class Body:
    """An answer's body, straight from the socket into a buffer where its length is known."""

    def __init__(self, answer: Response, file: File) -> None:
        self._answer, self._file = answer, file
        self._left = answer.length  # None: in chunks, or until the connection ends
        self._first = True

    def read_into(self, view: memoryview) -> int:
        """Return what came, at least one byte; 0 at the end."""
        if self._left == 0:
            return 0
        if self._left is None or self._first:
            # What came with the headers: `readinto1` would wait for more before it gives that.
            self._first = False
            source = self._answer if self._left is None else self._answer.fp
            data = source.read1(min(len(view), _FIRST_READ_BYTES))
            size = len(data)
            view[:size] = data
        else:
            size = self._answer.fp.readinto1(view[: self._left])
        if self._left is not None:
            self._left -= size
        self._file.fetched += size
        return size
