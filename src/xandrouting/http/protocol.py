"""uvicorn's HTTP protocol, with three things ASGI lacks.

A request is told at once that its client has left, without a task of its own that waits for
it; a stream that fails can have its connection closed; and an answer's headers leave in one
write with the first piece of its body.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CONNECTION: Final = "xandrouting.connection"


class Connection:
    """A transport that joins the write of an answer's headers with the next one.

    Headers that nothing follows in the same turn of the loop leave at its end. `on_lost` is
    called when the connection is gone, whoever closed it; whose request is under way sets it.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self.on_lost: Callable[[], None] | None = None
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._headers_next = False
        self._held = b""

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Close after what the block sends, and let both leave in one packet.

        A client that saw the end of the answer first would take the connection for kept,
        and lose its next request with it.
        """
        if hasattr(socket, "TCP_CORK"):
            fd = self._transport.get_extra_info("socket").fileno()
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as same:
                same.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        try:
            yield
        finally:
            self.close()

    def expect_headers(self) -> None:
        """Hold back what is written next."""
        self._headers_next = True

    def write(self, data: bytes) -> None:
        """Send, or hold back for the next write."""
        if self._headers_next:
            self._headers_next = False
            self._held = data
            self._loop.call_soon(self._flush)
        elif self._held:
            data = self._held + data
            self._held = b""
            self._transport.write(data)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Close once everything written is out."""
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self._transport.is_closing()

    def _flush(self) -> None:
        if self._held:
            data, self._held = self._held, b""
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - all else is the transport's
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """Puts the connection into each request's scope, under its extensions."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        super().connection_made(transport)
        self._connection = Connection(transport)
        self.transport = cast("asyncio.Transport", self._connection)

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        super().connection_lost(exc)
        if self._connection.on_lost is not None:
            self._connection.on_lost()

    def on_message_begin(self) -> None:
        """Begin a request's scope."""
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self._connection}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        """Begin a request's answer."""
        self._connection.expect_headers()
        super().on_headers_complete()


def connection_of(scope: MutableMapping[str, Any]) -> Connection:
    """Return the connection a request came on."""
    connection: Connection = scope["extensions"][CONNECTION]
    return connection
