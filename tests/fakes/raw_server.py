"""A server that says on each connection exactly what a test wrote down for it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came."""

    line: str
    headers: dict[str, str]
    body: bytes


class Peer:
    """One connection, seen from the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.sent_bytes = 0

    async def request(self) -> Request:
        """Read the next request."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        line, *fields = head.rstrip("\r\n").split("\r\n")
        headers = dict(field.split(": ", 1) for field in fields)
        length = int(headers.get("content-length", 0))
        return Request(line, headers, await self._reader.readexactly(length))

    async def send(self, *pieces: bytes) -> None:
        """Send the pieces, each in a write of its own, and wait while the other side is full."""
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            self.sent_bytes += len(piece)

    async def left(self) -> bytes:
        """Wait until the other side has closed or cut; return what else it sent."""
        parts = []
        try:
            while data := await self._reader.read(READ_BYTES):
                parts.append(data)
        except ConnectionError:
            pass
        return b"".join(parts)

    def close(self) -> None:
        """Close after what was sent."""
        self._writer.close()

    def reset(self) -> None:
        """Cut the connection, so that the other side gets an error and not an end."""
        connection = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


class RawServer:
    """Where it listens, and how its connections went."""

    def __init__(self, scripts: tuple[Script, ...]) -> None:
        self.url = ""
        self.accepted = 0
        self._scripts = scripts
        self._ends = [asyncio.get_running_loop().create_future() for _ in scripts]
        self._tasks: set[asyncio.Task[None]] = set()
        self._surplus = 0

    async def ended(self, number: int) -> None:
        """Wait for the end of one connection's script, the first is 0; raise what it raised."""
        async with asyncio.timeout(5):
            await asyncio.shield(self._ends[number])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        number = self.accepted
        self.accepted += 1
        try:
            if number >= len(self._scripts):
                self._surplus += 1
                return
            await self._scripts[number](Peer(reader, writer))
            self._ends[number].set_result(None)
        except Exception as error:  # noqa: BLE001 - the test gets it
            self._ends[number].set_exception(error)
        except asyncio.CancelledError:
            self._ends[number].cancel()
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for end in self._ends:
            if end.done() and not end.cancelled():
                end.result()
            end.cancel()
        assert not self._surplus, "more connections than scripts"


@asynccontextmanager
async def raw_server(*scripts: Script, host: str = "127.0.0.1") -> AsyncIterator[RawServer]:
    """Run the first script on the first connection, and so on; one more is an error."""
    served = RawServer(scripts)
    server = await asyncio.start_server(served._serve, host, 0)
    port = server.sockets[0].getsockname()[1]
    served.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    try:
        yield served
    finally:
        server.close()
        await served._close()
