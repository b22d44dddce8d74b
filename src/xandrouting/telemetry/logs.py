"""The lines that engines and the gateway itself print: the last of them, and those to come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from xandrouting.core.model import EngineId
from xandrouting.telemetry.reader import Reader

RING_LINES: Final = 5000
QUEUE_LINES: Final = 1000
LINE_CHARACTERS: Final = 2000  # of a line, the rest is dropped

# Where the engines' lines go that an operator reads on stderr: `log_level` debug shows them.
output = logging.getLogger("xandrouting.engine")

_FORMAT: Final = "%(levelname)s %(name)s %(message)s"


class Source(StrEnum):
    """Who printed a line."""

    GATEWAY = "gateway"
    ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line. `level` is known of the gateway's lines, `model` and `engine` of an engine's.

    `at` is wall time; `model` is the canonical id.
    """

    at: float
    source: Source
    text: str
    level: str | None = None
    model: str | None = None
    engine: str | None = None


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Which lines are wanted. None: whatever it is."""

    source: Source | None = None
    model: str | None = None

    def takes(self, line: LogLine) -> bool:
        """Whether a line is wanted."""
        return self.source in (None, line.source) and self.model in (None, line.model)


ALL: Final = LogFilter()


class LogBook:
    """Keeps the last lines and passes new ones on.

    Of one loop: build it there, and call from it.
    """

    def __init__(self) -> None:
        self._on_line: Callable[[LogLine], None] = lambda _: None
        self._ring: deque[LogLine] = deque(maxlen=RING_LINES)
        self._subscriptions: set[LogSubscription] = set()
        self._closed = False
        self._handler = _Handler(self._add)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Take every line the gateway logs, from any thread, for as long as the block."""
        root = logging.getLogger()
        root.addHandler(self._handler)
        try:
            yield
        finally:
            root.removeHandler(self._handler)

    def hear(self, engine: EngineId, text: str) -> None:
        """Take a line an engine printed."""
        output.debug("engine output engine=%s line=%s", engine, text)
        model, label = engine.key.model, engine.label
        self._add(LogLine(time.time(), Source.ENGINE, text, model=model, engine=label))

    def hand_on(self, on_line: Callable[[LogLine], None]) -> None:
        """Have `on_line` called for each line from now on; it may not log."""
        self._on_line = on_line

    def last(self, wanted: LogFilter = ALL, *, limit: int = RING_LINES) -> list[LogLine]:
        """Return the last lines that are wanted, oldest first."""
        found = [line for line in self._ring if wanted.takes(line)]
        return found[max(0, len(found) - limit) :]

    def subscribe(self, wanted: LogFilter = ALL, *, history: bool = True) -> LogSubscription:
        """Listen from now on, after what is kept if `history`; end it by using it as a context."""
        subscription = LogSubscription(self, wanted, self.last(wanted) if history else ())
        if self._closed:
            subscription.end()
        else:
            self._subscriptions.add(subscription)
        return subscription

    @property
    def subscribers(self) -> int:
        """How many listen now."""
        return len(self._subscriptions)

    def forget(self, subscription: LogSubscription) -> None:
        """Tell this subscription nothing more."""
        self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End every subscription after what it has still to read."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.end()
        self._subscriptions.clear()

    def _add(self, line: LogLine) -> None:
        self._ring.append(line)
        for subscription in self._subscriptions:
            subscription.offer(line)
        self._on_line(line)


class LogSubscription(Reader[LogLine]):
    """One subscriber's lines.

    Who reads too slowly, with `QUEUE_LINES` behind, loses the oldest; nobody waits for it.
    """

    def __init__(self, book: LogBook, wanted: LogFilter, first: Iterable[LogLine]) -> None:
        super().__init__()
        self._book = book
        self._wanted = wanted
        self._first = deque(first)  # before the queue, and not of its size: it is known to end
        self._queue: deque[LogLine] = deque(maxlen=QUEUE_LINES)

    def close(self) -> None:
        """End the iteration at once, whatever is still unread."""
        self._book.forget(self)
        self._first.clear()
        self._queue.clear()
        self.end()

    def offer(self, line: LogLine) -> None:
        """Take a line of the book."""
        if self._wanted.takes(line):
            self._queue.append(line)
            self._news.set()

    def end(self) -> None:
        """Take no more lines."""
        self._ended = True
        self._news.set()

    def _next(self) -> LogLine | None:
        waiting = self._first or self._queue
        return waiting.popleft() if waiting else None


class _Handler(logging.Handler):
    """Cuts the gateway's own records into lines."""

    def __init__(self, add: Callable[[LogLine], None]) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(_FORMAT))
        self.addFilter(lambda record: record.name != output.name)  # those are in the book already
        self._add = add
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Add the record; one of another thread is added in the loop's next turn."""
        for text in self.format(record).splitlines():
            line = LogLine(
                record.created, Source.GATEWAY, text[:LINE_CHARACTERS], level=record.levelname
            )
            if threading.get_ident() == self._thread:
                self._add(line)
                continue
            try:
                self._loop.call_soon_threadsafe(self._add, line)
            except RuntimeError:  # the loop is closed: nobody listens any more
                return
