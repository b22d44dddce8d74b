"""`GET /v1/events`: the event bus as server-sent events."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from fastapi import FastAPI, Header, Query

from xandrouting.core.errors import InvalidRequest
from xandrouting.http.stream import PING, LiveStream
from xandrouting.proxy.headers import EVENT_STREAM, EVENT_STREAM_HEADERS
from xandrouting.telemetry.events import TOPICS, Event, EventBus

RETRY: Final = b"retry: 2000\n\n"  # ms until a browser whose connection broke comes back

_CHOICES: Final = sorted(TOPICS)
_ENCODE: Final = msgspec.json.Encoder().encode


def add_event_calls(app: FastAPI, bus: EventBus) -> None:
    """Add the stream of events. It ends with its client or with `bus.close()`."""

    @app.get("/v1/events", tags=["events"], status_code=200, response_class=EventStream)
    async def events(
        topics: Annotated[
            str | None,
            Query(
                description=f"Which of {', '.join(_CHOICES)}, with commas; without it all but log.",
                examples=["model,gauge"],
            ),
        ] = None,
        last_event_id: Annotated[
            str | None,
            Query(description="As the header `Last-Event-ID`, for who cannot send headers."),
        ] = None,
        last_event_id_header: Annotated[
            str | None,
            Header(
                alias="Last-Event-ID",
                description="The id of the last event received: what came after it is sent "
                "first. Without it, or where that is not known any more, it is a snapshot.",
            ),
        ] = None,
    ) -> EventStream:
        """Tell what happens as server-sent events, beginning with a snapshot of what is."""
        # The header wins: a browser that comes back asks the same address as at first.
        return EventStream(bus, _topics(topics), last_event_id_header or last_event_id)


def _topics(listed: str | None) -> frozenset[str] | None:
    """Return the topics a client lists.

    Raises:
        InvalidRequest: one of them is none.
    """
    if listed is None:
        return None
    names = [name.strip() for name in listed.split(",")]
    for name in names:
        if name not in TOPICS:
            raise InvalidRequest(
                f"topics: {name[:100]!r} is not a topic. The topics are {', '.join(_CHOICES)}.",
                param="topics",
                details={"choices": _CHOICES},
            )
    return frozenset(names)


class EventStream(LiveStream[Event]):
    """Sends a subscriber's events for as long as both sides are there."""

    media_type = EVENT_STREAM.decode()

    def __init__(self, bus: EventBus, topics: frozenset[str] | None, last_id: str | None) -> None:
        super().__init__(
            lambda: bus.subscribe(topics, last_id),
            _frame,
            EVENT_STREAM_HEADERS,
            first=RETRY,
            ping=PING,
        )


def _frame(event: Event) -> bytes:
    """Return the event as its lines; the data are on one of them."""
    head = f"id: {event.id}\nevent: {event.kind}\ndata: ".encode()
    return head + _ENCODE(event.data) + b"\n\n"
