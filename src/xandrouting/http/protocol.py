"""uvicorn's HTTP protocol, with one thing ASGI lacks: closing the connection of a stream."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CONNECTION: Final = "xandrouting.connection"


class Protocol(HttpToolsProtocol):
    """Puts the connection's transport into the scope, under its extensions."""

    def on_message_begin(self) -> None:
        """Begin a request's scope."""
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self.transport}  # type: ignore[dict-item]


def close_connection(scope: MutableMapping[str, Any]) -> None:
    """Close the connection once everything sent so far is out.

    Under another server than ours nothing happens: its keep-alive decides.
    """
    connection = scope.get("extensions", {}).get(CONNECTION)
    if connection is not None:
        connection.close()
