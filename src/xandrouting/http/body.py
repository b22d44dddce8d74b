"""Reading a request's body, no more of it than may be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final

from xandrouting.core.errors import BodyTooLarge, InvalidRequest

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

DISCARD_BYTES: Final = 1 << 30
DISCARD_S: Final = 30.0


class ClientLeft(Exception):
    """The client closed its connection; nobody is there to answer."""


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """Return the whole body.

    A body over `limit` is read on and thrown away before the error, within bounds: a client
    that is still sending would otherwise see a broken connection and not the answer. One
    that waits for "100 Continue" is told at once.

    Raises:
        BodyTooLarge: over `limit` bytes.
        ClientLeft: the client closed before the end.
    """
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise InvalidRequest("Compressed request bodies are not supported.")
    if b"expect" in headers and _length(headers) > limit:
        raise _too_large(limit)
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientLeft
    body: bytes = message.get("body", b"")
    if not message.get("more_body", False) and len(body) <= limit:
        return body
    parts = [body]
    size = len(body)
    while message.get("more_body", False):
        if size > limit:
            parts.clear()
            await _discard(receive)
            break
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
    if size > limit:
        raise _too_large(limit)
    return b"".join(parts)


def _length(headers: Mapping[bytes, bytes]) -> int:
    """Return the body's length as the client says it; 0: it does not."""
    length = headers.get(b"content-length", b"")
    return int(length) if length.isdigit() else 0


async def _discard(receive: Receive) -> None:
    size = 0
    try:
        async with asyncio.timeout(DISCARD_S):
            while size < DISCARD_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The request body is larger than {limit:,} bytes. Send less, or raise max_body_bytes."
    )
