"""The mover's side of the network: ranges until every file is whole and its hash is right.

Runs in the mover's process; standard library only.
"""

from __future__ import annotations

import http.client
import os
import queue
import re
import socket
import ssl
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import mktime_tz, parsedate_tz
from http.client import HTTPResponse as Response
from typing import Any, Final
from urllib.parse import SplitResult, urljoin, urlsplit

from xandrouting.downloads.mover_files import (
    BUFFER_BYTES,
    Failed,
    File,
    Order,
    Part,
    Stopped,
    check_free,
    disk,
)

_FIRST_WAIT_S, _LAST_WAIT_S, _LAST_RETRY_AFTER_S = 0.5, 15.0, 60.0
_CONNECT_S: Final = 10.0
_FIRST_READ_BYTES: Final = 64 << 10  # at least what the answer's reader has read ahead
_MAX_HOPS: Final = 5
_TRIES: Final = {"refused": 8, "wrong_size": 3, "forbidden": 3, "gone": 3}  # in a row, no byte
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_NETWORK: Final = (OSError, http.client.HTTPException, UnicodeError)  # the last: a host's name
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class Trouble(Exception):
    """One try failed. `final`: another one would fail too; `wait_s`: what the server asked for."""

    def __init__(
        self, why: str, code: str = "refused", *, final: bool = False, wait_s: float | None = None
    ) -> None:
        super().__init__(why)
        self.code, self.why, self.final, self.wait_s = code, why, final, wait_s


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
        done = {path: file.have for file in self.files for path in file.paths}
        return {"event": "progress", "done": done, "fetched": sum(f.fetched for f in self.files)}


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


class Client:
    """Asks for ranges, follows redirects, and tells the token to whom it may be told."""

    def __init__(self, order: Order, board: Board, token: str | None) -> None:
        self._order, self._board, self._token = order, board, token
        self._tls: ssl.SSLContext | None = None

    @contextmanager
    def get(self, file: File, start: int, end: int) -> Iterator[tuple[Response, int]]:
        """Ask for a range; yield the answer and the offset its body begins at.

        Raises:
            Trouble: an answer without bytes of this file, or none.
            OSError, HTTPException: the network's.
        """
        url, home = file.url, _authority(_split(file.url))
        for _ in range(_MAX_HOPS):
            parts = _split(url)
            connection = self._connect(parts)
            try:
                with self._board.holding(connection.sock):
                    answer = self._ask(connection, parts, f"bytes={start}-{end - 1}")
                    if answer.status not in _REDIRECTS:
                        at_home = _authority(parts) == home
                        yield answer, body_start(answer, file, start, at_home=at_home)
                        return
                    url = _split(answer.headers["location"] or "", url).geturl()
            finally:
                connection.close()
            if parts.scheme == "https" and _split(url).scheme != "https":
                raise Trouble("the hub redirects to an address without TLS", final=True)
        raise Trouble("the hub redirects in a circle")

    def _connect(self, parts: SplitResult) -> http.client.HTTPConnection:
        assert parts.hostname is not None
        timeout_s = min(_CONNECT_S, self._order.stall_s)
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            self._tls = self._tls or ssl.create_default_context()
            connection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=timeout_s, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
        connection.connect()
        connection.sock.settimeout(self._order.stall_s)
        return connection

    def _ask(
        self, connection: http.client.HTTPConnection, parts: SplitResult, span: str
    ) -> Response:
        headers = {"Range": span, "Accept-Encoding": "identity", "User-Agent": "xandrouting"}
        if self._token and _authority(parts) in self._order.token_hosts:
            headers["Authorization"] = f"Bearer {self._token}"
        path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        connection.request("GET", path, headers=headers)
        return connection.getresponse()


def _split(url: str, base: str = "") -> SplitResult:
    try:
        parts = urlsplit(urljoin(base, url))
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass  # a port that is no number, or half an IPv6 address
    raise Trouble("the hub redirects to what is no web address", final=True)


def _authority(parts: SplitResult) -> str:
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or ""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def body_start(answer: Response, file: File, start: int, *, at_home: bool) -> int:
    """Return the offset at which an answer's body begins; raise Trouble if it has no such body."""
    status, headers = answer.status, answer.headers
    if status in (200, 206):
        if headers["content-encoding"] not in (None, "", "identity"):
            raise Trouble("the hub sent it packed", final=True)
        if headers.get_content_type() == "text/html" and not file.path.endswith((".html", ".htm")):
            raise Trouble("something between here and the hub sent a web page instead")
    if status == 206:
        match = _CONTENT_RANGE.fullmatch(headers["content-range"] or "")
        if match is None or int(match[1]) > start:
            raise Trouble("the hub sent another range than it was asked for")
        if match[3] != "*" and int(match[3]) != file.size:
            raise Trouble(f"it has {match[3]} bytes now, not {file.size}", "wrong_size")
        return int(match[1])
    if status == 200:
        if answer.length is None or answer.length == file.size:
            return 0
        raise Trouble(f"it has {answer.length} bytes now, not {file.size}", "wrong_size")
    if status == 416:
        raise Trouble(f"it is shorter than {file.size} bytes now", "wrong_size")
    if status in (401, 403):
        remedy = ": accept its terms on the hub, and check HF_TOKEN" if at_home else ""
        raise Trouble(f"access was refused ({status}){remedy}", "forbidden", final=at_home)
    if status in (404, 410):
        raise Trouble(f"it is not there any more ({status})", "gone", final=at_home)
    again = status in (408, 429) or status >= 500
    raise Trouble(f"the hub answered {status}", final=not again, wait_s=retry_after_s(answer))


def retry_after_s(answer: Response) -> float | None:
    """Return how long the server asks to wait, at most a minute."""
    told = answer.headers["retry-after"]
    if told is None and answer.status == 429:  # the hub's own way to say it
        match = re.search(r";\s*t=(\d+)", answer.headers["ratelimit"] or "")
        told = match[1] if match else None
    if told is None:
        return None
    try:
        seconds = float(told)
    except ValueError:
        date = parsedate_tz(told)
        if date is None:
            return None
        seconds = mktime_tz(date) - time.time()
    return min(max(0.0, seconds), _LAST_RETRY_AFTER_S)


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
            except _NETWORK as error:
                trouble = Trouble(f"the connection failed: {_words(error)}")
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


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
