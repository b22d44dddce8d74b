"""The log: what is kept, who is told, and that nobody is waited for."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from tests.fakes.loop import virtual_time
from xandrouting.core.model import Backend, EngineId, ModelKey
from xandrouting.http.logs import HISTORY_BYTES, _tail
from xandrouting.telemetry.logs import (
    LINE_CHARACTERS,
    QUEUE_LINES,
    RING_LINES,
    LogBook,
    LogFilter,
    LogLine,
    LogSubscription,
    Source,
)

log = logging.getLogger("tests.logs")

A, B = (EngineId(ModelKey(f"/models/{n}.gguf", Backend.LLAMACPP, "cpu"), 1) for n in "ab")
OF_A = LogFilter(model="/models/a.gguf")


def texts(lines: list[LogLine]) -> list[str]:
    return [line.text for line in lines]


async def read(subscription: LogSubscription) -> list[str]:
    """Return what can be read without waiting."""

    found: list[LogLine] = []
    try:
        while True:
            async with asyncio.timeout(0.0):
                found.append(await anext(subscription))
    except TimeoutError:
        return texts(found)


@virtual_time
async def test_lines_are_kept_with_who_printed_them() -> None:
    book = LogBook()
    book.hear(A, "loading model")
    with book.heard():
        log.warning("engine %s", "ready")
    engine, gateway = book.last()
    assert (engine.source, engine.text, engine.level) == (Source.ENGINE, "loading model", None)
    assert (engine.model, engine.engine) == ("/models/a.gguf", "llamacpp/cpu#1")
    assert (gateway.source, gateway.level, gateway.model) == (Source.GATEWAY, "WARNING", None)
    assert gateway.text == "WARNING tests.logs engine ready"


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (LogFilter(), ["a", "b", "WARNING tests.logs c"]),
        (OF_A, ["a"]),
        (LogFilter(Source.ENGINE), ["a", "b"]),
        (LogFilter(Source.GATEWAY), ["WARNING tests.logs c"]),
        (LogFilter(Source.GATEWAY, "/models/a.gguf"), []),
    ],
)
@virtual_time
async def test_filters(wanted: LogFilter, found: list[str]) -> None:
    book = LogBook()
    with book.subscribe(wanted) as subscription, book.heard():
        book.hear(A, "a")
        book.hear(B, "b")
        log.warning("c")
        assert await read(subscription) == found
    assert texts(book.last(wanted)) == found


@virtual_time
async def test_only_the_last_lines_are_kept() -> None:
    book = LogBook()
    for number in range(RING_LINES + 5):
        book.hear(A, str(number))
    assert len(book.last()) == RING_LINES
    assert book.last()[0].text == "5"
    assert texts(book.last(limit=2)) == [str(RING_LINES + 3), str(RING_LINES + 4)]


@virtual_time
async def test_history_comes_first_unless_it_is_not_wanted() -> None:
    book = LogBook()
    for number in range(QUEUE_LINES + 1):  # more than a slow reader may have behind
        book.hear(A, str(number))
    with book.subscribe() as one, book.subscribe(history=False) as other:
        book.hear(A, "new")
        assert await read(one) == [*(str(n) for n in range(QUEUE_LINES + 1)), "new"]
        assert await read(other) == ["new"]
    assert book.subscribers == 0


@virtual_time
async def test_who_reads_too_slowly_loses_the_oldest() -> None:
    book = LogBook()
    with book.subscribe() as subscription:
        for number in range(QUEUE_LINES + 3):
            book.hear(A, str(number))
        lines = await read(subscription)
    assert lines == [str(number) for number in range(3, QUEUE_LINES + 3)]


@virtual_time
async def test_closing_ends_after_what_is_unread() -> None:
    book = LogBook()
    with book.subscribe() as subscription:
        book.hear(A, "last words")
        book.close()
        assert [line.text async for line in subscription] == ["last words"]
        book.hear(A, "too late")
        assert [line.text async for line in subscription] == []
    with book.subscribe() as late:
        assert [line.text async for line in late] == ["last words", "too late"]


@virtual_time
async def test_leaving_ends_a_wait_at_once() -> None:
    book = LogBook()
    with book.subscribe() as subscription:
        waiting = asyncio.create_task(subscription.__anext__())
        await asyncio.sleep(1.0)
        subscription.close()
        with pytest.raises(StopAsyncIteration):
            await waiting
        assert book.subscribers == 0


@virtual_time
async def test_a_record_of_several_lines_is_several() -> None:
    book = LogBook()
    with book.heard():
        log.warning("one\ntwo\r\n%s", "x" * (LINE_CHARACTERS + 9))
    assert texts(book.last()) == ["WARNING tests.logs one", "two", "x" * LINE_CHARACTERS]


@virtual_time
async def test_lines_are_handed_on() -> None:
    book = LogBook()
    told: list[LogLine] = []
    book.hand_on(told.append)
    book.hear(A, "a")
    assert told == book.last()


async def test_other_threads_may_log(caplog: pytest.LogCaptureFixture) -> None:
    book = LogBook()
    with book.heard(), book.subscribe() as subscription:
        await asyncio.to_thread(log.warning, "from a thread")
        line = await asyncio.wait_for(anext(subscription), 5.0)
    assert line.text == "WARNING tests.logs from a thread"
    log.warning("after the block")
    assert len(book.last()) == 1


@virtual_time
async def test_a_loop_that_is_closed_hears_nothing() -> None:
    book = LogBook()

    def closed(*_: Any) -> None:
        raise RuntimeError("Event loop is closed")

    book._handler._loop = type("Loop", (), {"call_soon_threadsafe": closed})()  # type: ignore[assignment]
    book._handler._thread = 0
    with book.heard():
        log.warning("a last word")
    assert book.last() == []


def test_the_tail_is_of_whole_lines() -> None:
    lines = [LogLine(0.0, Source.ENGINE, text) for text in ("é" * HISTORY_BYTES, "b", "c")]
    assert _tail(lines) == "b\nc\n"
    assert _tail(lines[:1]) == ""
    full = [LogLine(0.0, Source.ENGINE, "x" * 99)] * (HISTORY_BYTES // 100 + 7)
    assert len(_tail(full)) == HISTORY_BYTES // 100 * 100
