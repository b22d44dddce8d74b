"""One who reads what happens, at a pace of its own."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Reader(ABC, Generic[T]):
    """What one subscriber is told, by `async for` in one task. Leaving the context ends it.

    The iteration may be cancelled at any time, by a timeout too: nothing is lost with it.
    """

    def __init__(self) -> None:
        self._ended = False
        self._news = asyncio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while (item := self._next()) is None:
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return item

    @abstractmethod
    def close(self) -> None:
        """End the iteration at once, whatever is still unread."""

    @abstractmethod
    def _next(self) -> T | None:
        """Return what is to be told next; None: nothing yet."""
