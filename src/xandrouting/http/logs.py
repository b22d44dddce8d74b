"""The log: `GET /v1/logs`, and llama-swap's `/logs` and `/logs/stream`."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import FastAPI, Query, Request
from fastapi.responses import PlainTextResponse

from xandrouting.core.errors import GatewayError, InvalidRequest
from xandrouting.http.lists import iso
from xandrouting.http.model_path import named
from xandrouting.http.schemas import LogItem, LogLines
from xandrouting.http.services import Services
from xandrouting.http.stream import LiveStream
from xandrouting.net.client import Headers
from xandrouting.telemetry.logs import (
    ALL,
    RING_LINES,
    LogBook,
    LogFilter,
    LogLine,
    Source,
)

HISTORY_BYTES: Final = 10 * 1024  # llama-swap's "up to the last 10KB"
TEXT_HEADERS: Final[Headers] = [
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-accel-buffering", b"no"),
]
_MONITORS: Final = {
    "": ALL,
    "proxy": LogFilter(source=Source.GATEWAY),
    "upstream": LogFilter(source=Source.ENGINE),
}


def add_log_calls(app: FastAPI, services: Services) -> None:
    """Add the calls that show the log. The streams end with their client or the server."""
    book = services.logs

    @app.get("/v1/logs", tags=["logs"])
    async def log_lines(
        source: Annotated[Source | None, Query(description="Whose lines; all without it.")] = None,
        model: Annotated[
            str | None, Query(description="Only what engines of this model printed.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=RING_LINES, description="At most so many.")] = 1000,
    ) -> LogLines:
        """Return the last lines of the log, oldest first."""
        wanted = LogFilter(source, None if model is None else _id_of(services, model))
        return LogLines(lines=[_item(line) for line in book.last(wanted, limit=limit)])

    @app.get("/logs", tags=["llama-swap"], response_class=PlainTextResponse)
    async def history() -> str:
        """Return the log's last 10 KB as text, as llama-swap does."""
        return _tail(book.last())

    @app.get("/logs/stream", tags=["llama-swap"], status_code=200, response_class=LogStream)
    async def stream(request: Request) -> LogStream:
        """Send the log as text for as long as the client stays; `?no-history`: only new lines."""
        return LogStream(book, ALL, history="no-history" not in request.query_params)

    @app.get(
        "/logs/stream/{monitor:path}",
        tags=["llama-swap"],
        status_code=200,
        response_class=LogStream,
    )
    async def stream_of(monitor: str, request: Request) -> LogStream:
        """Send the lines of `proxy`, of `upstream` (all engines) or of one model's engines."""
        wanted = _MONITORS.get(monitor)
        if wanted is None:
            wanted = LogFilter(model=_monitored(services, monitor))
        return LogStream(book, wanted, history="no-history" not in request.query_params)


class LogStream(LiveStream[LogLine]):
    """Sends lines as text for as long as both sides are there."""

    media_type = "text/plain"

    def __init__(self, book: LogBook, wanted: LogFilter, *, history: bool) -> None:
        super().__init__(
            lambda: book.subscribe(wanted, history=history),
            lambda line: line.text.encode() + b"\n",
            TEXT_HEADERS,
        )


def _id_of(services: Services, name: str) -> str:
    """Return a model's canonical id.

    Raises:
        GatewayError: no such model.
    """
    return services.catalog.model_meant(named(name)).id


def _monitored(services: Services, name: str) -> str:
    """Return the model whose lines are asked for.

    Raises:
        InvalidRequest: no such model, nor any other log.
    """
    try:
        return _id_of(services, name)
    except GatewayError as error:
        raise InvalidRequest(
            f"invalid logger. Use 'proxy', 'upstream' or a model's ID. {error.message}",
            param="monitor",
        ) from None


def _tail(lines: list[LogLine]) -> str:
    """Return the last whole lines that fit `HISTORY_BYTES`."""
    size, first = 0, len(lines)
    while first and (size := size + len(lines[first - 1].text.encode()) + 1) <= HISTORY_BYTES:
        first -= 1
    return "".join(f"{line.text}\n" for line in lines[first:])


def _item(line: LogLine) -> LogItem:
    return LogItem(
        at=iso(line.at) or "",
        source=line.source,
        text=line.text,
        level=line.level,
        model=line.model,
        engine=line.engine,
    )
