"""A mock engine: OpenAI chat completions, as cheap as Python can answer them.

`python -m bench.mock` prints its port. What it does with a request is told by the field
`bench` of the body (see `Order`). Each chunk carries the time it was made, by the clock that
all processes of the machine share, so that a client knows how long it was on its way.
`GET /` tells what the mock has seen.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import sys
import time
from collections import deque

import msgspec
import uvloop

from bench.processes import raise_file_limit

STEPS = b"STEPS"  # begins a side channel: then ids, four bytes each
MARK = b"@"  # once in each chunk and nowhere else: counting it counts chunks
STAMP_DIGITS = 19

_PLAIN = (
    b'{"id":"chatcmpl-7d3f2a9c1b4e","object":"chat.completion","created":1763817600,"model":"m",'
    b'"choices":[{"index":0,"message":{"role":"assistant","content":"%b"},"logprobs":null,'
    b'"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":12,"completion_tokens":64,"total_tokens":76}}'
) % (b"The quick brown fox jumps over the lazy dog. " * 5)
_HEAD = b"HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: %b\r\n%b\r\n\r\n"
PLAIN_ANSWER = _HEAD % (b"application/json", b"content-length: %d" % len(_PLAIN)) + _PLAIN
STREAM_HEAD = _HEAD % (b"text/event-stream", b"transfer-encoding: chunked")

_EVENT = (
    b'data: {"id":"chatcmpl-7d3f2a9c1b4e","object":"chat.completion.chunk","created":1763817600,'
    b'"model":"m","choices":[{"index":0,"delta":{%b},"finish_reason":%b}]%b}\n\n'
)
_USAGE = b',"usage":{"prompt_tokens":12,"completion_tokens":64,"total_tokens":76}'


def _chunked(data: bytes, size: int | None = None) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data) if size is None else size, data)


def chunk_template(pad_bytes: int) -> bytes:
    """Return one chunk with a place for the time it is made."""
    content = b'"content":"%b%%0%dd%b"' % (MARK, STAMP_DIGITS, b"x" * pad_bytes)
    event = _EVENT % (content, b"null", b"")
    return _chunked(event, len(event % 0))


CHUNK = chunk_template(0)
STREAM_END = (
    _chunked(_EVENT % (b"", b'"stop"', _USAGE)) + _chunked(b"data: [DONE]\n\n") + _chunked(b"")
)


class Order(msgspec.Struct, frozen=True):
    """What the mock shall do with one request."""

    n: int = 1  # chunks of the stream
    every_ms: float = 0.0  # between two chunks of one stream; 0: as fast as they are taken
    pad_bytes: int = 0  # added to each chunk
    lockstep: bool = False  # make a chunk when the client says by `STEPS` that the last one came
    hold: bool = False  # do not end the answer; a plain one is not even begun
    id: int = 0  # what `STEPS` and `GET /` call the request


class Body(msgspec.Struct):
    """What the mock reads of a body."""

    stream: bool = False
    bench: Order = Order()


_BODIES = msgspec.json.Decoder(Body)


class Mock:
    """What all connections share."""

    def __init__(self) -> None:
        self.flooding: deque[Connection] = deque()
        self.pacer = Pacer()
        self.stepping: dict[int, Connection] = {}
        self.left: dict[int, int] = {}  # request id: when its client was seen to have left
        self.written_bytes = 0  # of floods
        self._loop = asyncio.get_running_loop()

    def flood(self, connection: Connection) -> None:
        self.flooding.append(connection)
        if len(self.flooding) == 1:
            self._loop.call_soon(self._flood)

    def _flood(self) -> None:
        """Give each flooding stream one chunk, then let the loop look at its sockets."""
        for connection in tuple(self.flooding):
            if connection.takes_more:
                connection.next_chunk()
        if self.flooding:
            self._loop.call_soon(self._flood)

    def status(self) -> bytes:
        seen = {"left": self.left, "written_bytes": self.written_bytes}
        body = json.dumps(seen).encode()
        return _HEAD % (b"application/json", b"content-length: %d" % len(body)) + body


class Pacer:
    """Gives paced streams their chunks one after the other, spread over the interval.

    A timer of the kernel, because those of the loop have a grain of one millisecond: chunks
    would leave in bursts and wait for each other.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        asyncio.get_running_loop().add_reader(self._timer, self._tick)
        self._streams: deque[Connection] = deque()
        self._every_ms = 0.0

    def add(self, connection: Connection, every_ms: float) -> None:
        self._streams.append(connection)
        self._every_ms = every_ms
        self._set()

    def remove(self, connection: Connection) -> None:
        if connection in self._streams:
            self._streams.remove(connection)
            self._set()

    def _set(self) -> None:
        pause_ns = int(self._every_ms * 1e6 / len(self._streams)) if self._streams else 0
        pause = divmod(pause_ns, 10**9)
        self._libc.timerfd_settime(self._timer, 0, (ctypes.c_long * 4)(*pause, *pause), None)

    def _tick(self) -> None:
        try:
            due = int.from_bytes(os.read(self._timer, 8), sys.byteorder)
        except BlockingIOError:  # it was set anew just now
            return
        for _ in range(min(due, len(self._streams))):
            connection = self._streams[0]
            self._streams.rotate(-1)
            connection.next_chunk()


class Steps(asyncio.Protocol):
    """The side channel of the streams in lockstep."""

    def __init__(self, mock: Mock) -> None:
        self._mock = mock
        self._held = b""

    def data_received(self, data: bytes) -> None:
        data = self._held + data
        whole = len(data) & ~3
        self._held = data[whole:]
        for number in memoryview(data[:whole]).cast("I"):
            connection = self._mock.stepping.get(number)
            if connection is not None:
                connection.next_chunk()


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, mock: Mock) -> None:
        self._mock = mock
        self._held = b""
        self._order: Order | None = None  # of the request that is being answered
        self._left = 0  # chunks to go
        self._chunk = CHUNK
        self.takes_more = True

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._held:
            data = self._held + data
        if data == STEPS:
            self._transport.set_protocol(Steps(self._mock))
            return
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            self._held = data
            return
        if data.startswith(b"GET "):
            self._held = b""
            self._transport.write(self._mock.status())
            return
        head = data[:end].lower()
        at = head.index(b"content-length:") + 15
        size = int(head[at : head.index(b"\r", at)])
        if len(data) < end + size:
            self._held = data
            return
        self._held = b""
        self._answer(_BODIES.decode(data[end:]))

    def _answer(self, body: Body) -> None:
        order = self._order = body.bench
        if not body.stream:
            if not order.hold:
                self._transport.write(PLAIN_ANSWER)
                self._order = None
            return
        self._chunk = chunk_template(order.pad_bytes) if order.pad_bytes else CHUNK
        self._transport.write(STREAM_HEAD + self._chunk % time.monotonic_ns())
        self._left = order.n - 1
        if self._left == 0 and order.hold:
            return
        if order.lockstep:
            self._mock.stepping[order.id] = self
        elif order.every_ms:
            self._mock.pacer.add(self, order.every_ms)
        else:
            self._mock.flood(self)

    def next_chunk(self) -> None:
        """Write a chunk, or the end if there was the last one."""
        if self._left:
            self._left -= 1
            chunk = self._chunk % time.monotonic_ns()
            self._transport.write(chunk)
            self._mock.written_bytes += len(chunk)
            return
        self._transport.write(STREAM_END)
        self._forget()

    def pause_writing(self) -> None:
        self.takes_more = False

    def resume_writing(self) -> None:
        self.takes_more = True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        if self._order is not None:
            self._mock.left[self._order.id] = time.monotonic_ns()
            self._forget()

    def _forget(self) -> None:
        order, self._order = self._order, None
        if order is not None and order.lockstep:
            self._mock.stepping.pop(order.id, None)
        elif order is not None and order.every_ms:
            self._mock.pacer.remove(self)
        elif self in self._mock.flooding:
            self._mock.flooding.remove(self)


async def serve() -> None:
    mock = Mock()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(mock), "127.0.0.1", 0, backlog=4096)
    print(f"ready {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    raise_file_limit()
    gc.disable()  # no pause of its own in what it measures
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
