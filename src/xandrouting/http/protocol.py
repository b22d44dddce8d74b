"""uvicorn's HTTP protocol, with two things ASGI lacks.

A stream that fails can have its connection closed, and an answer's headers leave in one
write with the first piece of its body: one system call and one wake-up of the client less.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator, MutableMapping
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CONNECTION: Final = "xandrouting.connection"


class _Joining:
    """A transport that joins the write of an answer's headers with the next one.

    Headers that nothing follows in the same turn of the loop leave at its end.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._headers_next = False
        self._held = b""

    def expect_headers(self) -> None:
        """Hold back what is written next."""
        self._headers_next = True

    def write(self, data: bytes) -> None:
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
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            data, self._held = self._held, b""
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - all else is the transport's
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """Puts the connection's transport into the scope, under its extensions."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        super().connection_made(transport)
        self._joining = _Joining(transport)
        self.transport = cast("asyncio.Transport", self._joining)

    def on_message_begin(self) -> None:
        """Begin a request's scope."""
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self.transport}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        """Begin a request's answer."""
        self._joining.expect_headers()
        super().on_headers_complete()


@contextlib.contextmanager
def closing_connection(scope: MutableMapping[str, Any]) -> Iterator[None]:
    """Close the connection after what the block sends, and let both leave in one packet.

    A client that saw the end of the answer first would take the connection for kept, and
    lose its next request with it. Under another server than ours nothing is closed.
    """
    connection = scope.get("extensions", {}).get(CONNECTION)
    if connection is None:
        yield
        return
    if hasattr(socket, "TCP_CORK"):
        fd = connection.get_extra_info("socket").fileno()
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as same:
            same.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    try:
        yield
    finally:
        connection.close()
