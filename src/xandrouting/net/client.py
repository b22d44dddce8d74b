"""The upstream HTTP client: one small pool of HTTP/1.1 connections per engine.

Made for relaying: it hands on what came as it came, joined per wake-up, and never decodes
a chunk. Figures and the traps it avoids: `docs/adr/0001-data-plane.md`.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Final, cast
from urllib.parse import urlsplit

import httptools

from xandrouting.net.reasons import why_not
from xandrouting.net.resolve import Name

PAUSE_BYTES: Final = 64 * 1024  # unread bytes at which a socket is not read on; handed on at once
IDLE_S: Final = 4.0  # engines close a connection after 5 idle seconds; be earlier
RACE_S: Final = 1.0  # one that closes later than this after a request had read it
MAX_IDLE: Final = 128  # idle connections kept per engine
JOIN_BYTES: Final = 64 * 1024  # a request up to this size leaves in one write
MAX_HEAD_BYTES: Final = 256 * 1024  # an answer's headers; what is larger has no end

Headers = list[tuple[bytes, bytes]]


class UpstreamError(Exception):
    """The upstream broke off or spoke something that is not HTTP/1.1.

    `began` tells whether any byte of its answer had come.
    """

    def __init__(self, message: str, *, began: bool) -> None:
        super().__init__(message)
        self.began = began


class SilentError(UpstreamError):
    """The upstream sent nothing for as long as the request allowed."""


class ConnectError(UpstreamError):
    """No connection to the upstream could be made; the text says why, for people."""

    def __init__(self, message: str) -> None:
        super().__init__(message, began=False)


class Response:
    """One answer as it arrives. Read it to its end or `close()` it; both free the connection.

    `headers` are as sent, names in lower case.
    """

    __slots__ = ("_chunks", "_connection", "_size", "complete", "error", "headers", "status")

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._chunks: list[bytes] = []
        self._size = 0
        self.status = 0
        self.headers: Headers = []
        self.complete = False
        self.error: UpstreamError | None = None

    def header(self, name: bytes) -> bytes | None:
        """Return the first header of this name, in lower case."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def take(self) -> bytes:
        """Return body bytes that have come and were not taken yet; b"" for none.

        All of them, up to about `PAUSE_BYTES`: what a client that does not read keeps in
        memory is a few times this much.
        """
        chunks = self._chunks
        if self._size < PAUSE_BYTES:
            data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            chunks.clear()
            self._size = 0
            return data
        data = self._take_some()
        self._size -= len(data)
        if self._size < PAUSE_BYTES:
            self._connection.resume_reading()
        return data

    def _take_some(self) -> bytes:
        size = count = 0
        while size < PAUSE_BYTES:
            size += len(self._chunks[count])
            count += 1
        data = b"".join(self._chunks[:count])
        del self._chunks[:count]
        if size > PAUSE_BYTES:
            self._chunks.insert(0, data[PAUSE_BYTES:])
        return data[:PAUSE_BYTES]

    @property
    def ended(self) -> bool:
        """Whether the body has come and was taken to its end."""
        return self.complete and not self._chunks

    async def more(self) -> bool:
        """Wait until `take` has something; return False when the body has ended instead.

        Raises:
            UpstreamError: the upstream broke off before the end of its answer.
        """
        while not self._chunks:
            if self.error is not None:
                raise self.error
            if self.complete:
                return False
            await self._connection.wait()
        return True

    async def read(self, limit: int) -> bytes:
        """Return the rest of the body, at most `limit` bytes of it."""
        parts: list[bytes] = []
        size = 0
        while size < limit and await self.more():
            parts.append(self.take())
            size += len(parts[-1])
        return b"".join(parts)[:limit]

    def close(self) -> None:
        """Give the connection back if the answer was read to its end, else cut it."""
        self._connection.finish(self)

    def feed(self, chunk: bytes) -> None:
        """Take a body chunk from the connection."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size >= PAUSE_BYTES:
            self._connection.pause_reading()


class _Connection(asyncio.Protocol):
    """One connection: at most one exchange at a time, its parser kept for all of them."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._response: Response | None = None
        self._began = False  # a byte of the current answer has come
        self._head_bytes = 0  # of what came before the end of its headers
        self._to_eof = False  # the answer's end is the connection's end
        self._paused = False
        self._keep = False  # both sides want the connection to stay
        self._heard = 0.0  # when the last byte came, or the request began
        self._silence: asyncio.TimerHandle | None = None
        self.idle_since = 0.0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._client.remember(self)

    def data_received(self, data: bytes) -> None:
        if self._response is None:
            self.abort()  # an idle connection has nothing to say
            return
        self._began = True
        if self._silence is not None:
            self._heard = self._loop.time()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"not an HTTP/1.1 answer: {type(error).__name__}")
            self.abort()
            return
        if not self._response.status:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._fail("its headers have no end")
                self.abort()
                return
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._client.forget(self)
        response = self._response
        if response is not None and not response.complete:
            if self._to_eof and exc is None:
                response.complete = True
            else:
                self._fail("the connection was closed before the end of the answer")
        self._wake()

    # httptools

    def on_message_begin(self) -> None:
        if self._response is not None and self._response.complete:
            raise ValueError("more than one answer")  # feed_data raises HttpParserError then

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._response is not None and not self._response.status:  # else it is a trailer
            self._response.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        response = self._response
        if response is None:
            return
        status = self._parser.get_status_code()
        if status < 200:  # "100 Continue" and its like: the real answer follows
            response.headers.clear()
            return
        length = response.header(b"content-length")
        coding = response.header(b"transfer-encoding") or b""
        self._to_eof = length is None and b"chunked" not in coding.lower() and status != 204
        response.status = status

    def on_body(self, body: bytes) -> None:
        if self._response is not None:
            self._response.feed(body)

    def on_message_complete(self) -> None:
        if self._response is not None and self._response.status:
            self._response.complete = True
            self._keep = self._parser.should_keep_alive()

    # The client's side.

    @property
    def usable(self) -> bool:
        """Whether another request may be written to it."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, head: bytes, body: bytes, silence_s: float | None) -> Response:
        """Write one request and return its answer once its headers are here.

        The answer fails when nothing comes for `silence_s`, to its end.
        """
        transport = self._transport
        if transport is None:
            raise UpstreamError("the connection is closed", began=False)
        response = self._response = Response(self)
        self._began = self._to_eof = self._keep = False
        self._head_bytes = 0
        if silence_s is not None:
            self._heard = self._loop.time()
            self._listen_for(silence_s, silence_s)
        if len(body) <= JOIN_BYTES:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)
        try:
            while not response.status:
                if response.error is not None:
                    raise response.error
                await self.wait()
        except BaseException:
            self.abort()
            raise
        return response

    def wait(self) -> asyncio.Future[None]:
        """Return what the next news of this connection ends; one waits at a time."""
        waiter = self._waiter = self._loop.create_future()
        return waiter

    def pause_reading(self) -> None:
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._heard = self._loop.time()  # it was not silent: it was not listened to
            self._transport.resume_reading()

    def finish(self, response: Response) -> None:
        """End the exchange `response` belongs to; a second call does nothing."""
        if self._response is not response:
            return
        self._response = None
        self._stop_listening()
        if response.complete and self._keep and not self._to_eof:
            self.resume_reading()
            self._client.give_back(self)
        else:
            self.abort()

    def abort(self) -> None:
        """Cut the connection now, without sending what was not sent yet."""
        self._response = None
        self._stop_listening()
        if self._transport is not None:
            self._transport.abort()

    def cut(self) -> None:
        """Close the connection under whoever reads from it."""
        self._fail("the connection was cut")
        self.abort()

    def _listen_for(self, silence_s: float, next_s: float) -> None:
        self._silence = self._loop.call_later(next_s, self._check_silence, silence_s)

    def _stop_listening(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    def _check_silence(self, silence_s: float) -> None:
        response = self._response
        left_s = silence_s if self._paused else self._heard + silence_s - self._loop.time()
        if response is None or response.complete:
            self._silence = None
        elif left_s > 0:
            self._listen_for(silence_s, left_s)
        else:
            response.error = SilentError(f"nothing came for {silence_s:g} s", began=self._began)
            self.abort()
            self._wake()

    def _fail(self, message: str) -> None:
        response = self._response
        if response is not None and response.error is None and not response.complete:
            response.error = UpstreamError(message, began=self._began)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Client:
    """Requests to one upstream, over kept connections.

    `base_url` is `http://host[:port][/prefix]` or the same with https. `api_key` is sent
    as a bearer token with every request.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        connect_timeout_s: float = 5.0,
    ) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("an upstream's address begins with http:// or https://")
        self._host = url.hostname
        self._name = Name(url.hostname)
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if url.scheme == "https" else None
        self._prefix = url.path.rstrip("/").encode()
        self._connect_timeout_s = connect_timeout_s
        authority = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
        fixed = f" HTTP/1.1\r\nhost: {authority}:{self._port}\r\naccept: */*\r\n"
        if api_key:
            fixed += f"authorization: Bearer {api_key}\r\n"
        self._fixed = fixed.encode()
        self._idle: list[_Connection] = []  # the last one used is the first one taken
        self._connections: set[_Connection] = set()
        self._closed = False
        self._loop = asyncio.get_running_loop()

    @property
    def connections(self) -> int:
        """How many connections are open, idle ones included."""
        return len(self._connections)

    async def request(
        self,
        method: bytes,
        path: bytes,
        body: bytes = b"",
        headers: bytes = b"",
        *,
        silence_s: float | None = None,
    ) -> Response:
        """Send one request and return the answer once its headers are here.

        `headers` are whole lines, each with its CRLF. A request that went out on a kept
        connection which closed at once and without one byte of answer is sent once more on
        a fresh one: the upstream closed it for idleness and never read the request.
        Cancelling cuts the connection. `silence_s` is how long the upstream may send nothing
        before and during its answer, while that is read; None: for ever.

        Raises:
            ConnectError: nobody listens there, or not within the connect timeout, or this client
                is closed.
            SilentError: it was silent for too long; reading the answer raises it too.
            UpstreamError: it closed or broke the connection before its headers were here.
        """
        head = b"%b %b%b%b%bcontent-length: %d\r\n\r\n" % (
            method,
            self._prefix,
            path,
            self._fixed,
            headers,
            len(body),
        )
        if self._closed:
            raise ConnectError("it has been ended")
        kept = self._take_idle()
        if kept is not None:
            sent = self._loop.time()
            try:
                return await kept.exchange(head, body, silence_s)
            except UpstreamError as error:
                if error.began or self._loop.time() - sent > RACE_S:
                    raise
        connection = await self._connect()
        return await connection.exchange(head, body, silence_s)

    async def get(self, path: bytes, *, limit: int = 1 << 20) -> tuple[int, bytes]:
        """Return status and body of a GET, at most `limit` bytes of it."""
        response = await self.request(b"GET", path)
        try:
            return response.status, await response.read(limit)
        finally:
            response.close()

    def close(self) -> None:
        """Cut every connection, those in use too; a later one is cut as soon as it is made."""
        self._closed = True
        for connection in list(self._connections):
            connection.cut()

    def give_back(self, connection: _Connection) -> None:
        """Keep a connection for the next request."""
        if not connection.usable or len(self._idle) >= MAX_IDLE:
            connection.abort()
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)

    def remember(self, connection: _Connection) -> None:
        """Know of a connection that was made."""
        self._connections.add(connection)
        if self._closed:
            connection.abort()

    def forget(self, connection: _Connection) -> None:
        """Drop a connection that is closed."""
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def _take_idle(self) -> _Connection | None:
        oldest = self._loop.time() - IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since >= oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                *others, last = await self._name.addresses()
                for address in others:
                    try:
                        return await self._connect_to(address)
                    except OSError:
                        pass  # the name has another
                return await self._connect_to(last)
        except OSError as error:  # TimeoutError is one
            raise ConnectError(why_not(error, self._connect_timeout_s)) from error

    async def _connect_to(self, address: str) -> _Connection:
        _, connection = await self._loop.create_connection(
            lambda: _Connection(self),
            address,
            self._port,
            ssl=self._ssl,
            server_hostname=None if self._ssl is None else self._host,
        )
        return connection
