"""Answers that go on for as long as both sides are there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Generic, Protocol, Self, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from xandrouting.http.protocol import connection_of
from xandrouting.net.client import Headers
from xandrouting.proxy.sse import comment

PING_S: Final = 15.0  # of silence, after which a comment shows that the connection lives
PING: Final = comment("ping")

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Live(Protocol[T_co]):
    """Something that brings news until one of both sides ends it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    async def __anext__(self) -> T_co:
        """Return the next one; may be cancelled without losing any."""

    def close(self) -> None:
        """End it at once."""


class LiveStream(Response, Generic[T]):
    """Sends what a subscription brings, each in one piece and as soon as it is there.

    Not Starlette's `StreamingResponse`: that one sees its client leave only by sending.
    """

    def __init__(
        self,
        subscribe: Callable[[], Live[T]],
        encode: Callable[[T], bytes],
        headers: Headers,
        *,
        first: bytes = b"",
        ping: bytes = b"",
    ) -> None:
        """`subscribe` is called when the answer begins. What `encode` makes empty is not sent.

        `first` is sent at once, `ping` after each `PING_S` of silence; empty: nothing is.
        """
        self.status_code = 200
        self.background = None
        self.raw_headers = list(headers)
        self._subscribe = subscribe
        self._encode = encode
        self._first = first
        self._ping = ping

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        """Send until the subscription ends."""
        connection = connection_of(scope)
        with self._subscribe() as subscription:
            connection.on_lost = subscription.close
            try:
                if connection.is_closing():  # `on_lost` may have had its one call before us
                    subscription.close()
                await self._send_all(subscription, send)
            finally:
                connection.on_lost = None

    async def _send_all(self, subscription: Live[T], send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        # Even if it is empty: a client may wait for the headers, which the server holds back.
        await _send_piece(send, self._first)
        while True:
            try:
                async with asyncio.timeout(PING_S if self._ping else None):
                    news = await anext(subscription)
            except TimeoutError:
                await _send_piece(send, self._ping)
            except StopAsyncIteration:
                break
            else:
                data = self._encode(news)
                if data:
                    await _send_piece(send, data)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_piece(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
