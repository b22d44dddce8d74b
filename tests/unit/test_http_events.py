"""`GET /v1/events`: the bytes, the headers, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, MutableMapping
from typing import Any, cast

import pytest
from fastapi import FastAPI

from tests.fakes.loop import virtual_time
from xandrouting.core.errors import InvalidRequest
from xandrouting.http.events import add_event_calls
from xandrouting.http.protocol import CONNECTION, Connection
from xandrouting.http.stream import PING_S
from xandrouting.telemetry.events import QUEUE_EVENTS, EventBus


class Transport:
    def __init__(self) -> None:
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing


class Client:
    """A client of the stream, and the server's side of its connection."""

    def __init__(self, app: FastAPI, query: str = "", **headers: str) -> None:
        self.app = app
        self.started: MutableMapping[str, Any] = {}
        self.pieces: list[bytes] = []
        self.ended = False
        self.reads = asyncio.Event()
        self.reads.set()
        self.transport = Transport()
        self.connection = Connection(cast("asyncio.Transport", self.transport))
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": "/v1/events",
            "raw_path": b"/v1/events",
            "query_string": query.encode(),
            "headers": [(n.replace("_", "-").encode(), v.encode()) for n, v in headers.items()],
            "extensions": {CONNECTION: self.connection},
        }

    async def ask(self) -> None:
        await self.app(self.scope, self._receive, self._send)

    def leave(self) -> None:
        self.transport.closing = True
        if self.connection.on_lost is not None:
            self.connection.on_lost()
        self.reads.set()  # uvicorn lets no one wait for who is gone

    @property
    def got(self) -> bytes:
        return b"".join(self.pieces)

    async def _receive(self) -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        await self.reads.wait()
        if message["type"] == "http.response.start":
            assert not self.started
            self.started = message
        else:
            assert not self.ended
            self.pieces.append(message["body"])
            self.ended = not message.get("more_body", False)


@contextlib.asynccontextmanager
async def listening(app: FastAPI, query: str = "", **headers: str) -> AsyncIterator[Client]:
    """Ask, and at the end of the block leave; by then nothing of it may be left."""
    client = Client(app, query, **headers)
    asked = asyncio.create_task(client.ask())
    await asyncio.sleep(0.1)
    try:
        yield client
    finally:
        client.leave()
        async with asyncio.timeout(0.1):
            await asked
        assert client.connection.on_lost is None


def serve(state: Mapping[str, Any] | None = None) -> tuple[FastAPI, EventBus]:
    bus = EventBus(lambda: state or {})
    app = FastAPI()
    add_event_calls(app, bus)
    return app, bus


@virtual_time
async def test_the_bytes() -> None:
    app, bus = serve({"now": 1.5, "loaded": []})
    bus.publish("gauge", "gauge", {"cpu": 1})
    async with listening(app) as client:
        bus.publish("model", "model", {"id": "é\n\r\n", "progress": float("nan"), "pinned": None})
        bus.publish("request", "request_done", {})
        await asyncio.sleep(0.1)
        bus.close()
        await asyncio.sleep(0.1)
        assert client.ended
    assert client.got.decode() == (
        "retry: 2000\n\n"
        f'id: {bus.epoch}-1\nevent: snapshot\ndata: {{"now":1.5,"loaded":[]}}\n\n'
        f"id: {bus.epoch}-2\nevent: model\n"
        'data: {"id":"é\\n\\r\\n","progress":null,"pinned":null}\n\n'
        f"id: {bus.epoch}-3\nevent: request_done\ndata: {{}}\n\n"
        f"id: {bus.epoch}-3\nevent: bye\ndata: {{}}\n\n"
    )
    assert client.started["status"] == 200
    assert client.started["headers"] == [
        (b"content-type", b"text/event-stream"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]


@virtual_time
async def test_an_event_is_one_piece_and_is_sent_at_once() -> None:
    app, bus = serve()
    async with listening(app) as client:
        before = len(client.pieces)
        bus.publish("model", "model", {"id": "a"})
        bus.publish("model", "model", {"id": "b"})
        for _ in range(3):
            await asyncio.sleep(0)
        new = client.pieces[before:]
    assert [piece.partition(b"data: ")[2] for piece in new] == [
        b'{"id":"a"}\n\n',
        b'{"id":"b"}\n\n',
    ]


@virtual_time
async def test_silence_is_broken_by_pings() -> None:
    app, bus = serve()
    async with listening(app) as client:
        client.pieces.clear()
        await asyncio.sleep(PING_S - 0.2)
        assert client.pieces == []
        bus.publish("notice", "notice", {})  # from here on it is silent
        await asyncio.sleep(PING_S - 0.1)
        assert len(client.pieces) == 1
        await asyncio.sleep(0.2)
        assert client.pieces[1:] == [b": ping\n\n"]
        await asyncio.sleep(3 * PING_S)
        assert client.pieces[1:] == [b": ping\n\n"] * 4


@pytest.mark.parametrize(
    ("query", "header", "missed"),
    [
        ("", None, None),
        ("", "1", [2, 3]),
        ("last_event_id=2", None, [3]),
        ("last_event_id=1", "2", [3]),  # the header is the newer one
        ("last_event_id=2", "", [3]),
        ("last_event_id=", None, None),
        ("topics=model&last_event_id=1", None, []),
        ("last_event_id=9", None, None),
    ],
)
@virtual_time
async def test_coming_back(query: str, header: str | None, missed: list[int] | None) -> None:
    app, bus = serve({"n": 0})
    for n in (1, 2, 3):
        bus.publish("notice", "notice", {"n": n})
    query = query.replace("event_id=", f"event_id={bus.epoch}-") if query[-1:] != "=" else query
    headers = {} if header is None else {"last_event_id": header and f"{bus.epoch}-{header}"}
    async with listening(app, query, **headers) as client:
        pass
    expected = b"retry: 2000\n\n"
    if missed is None:
        expected += f'id: {bus.epoch}-3\nevent: snapshot\ndata: {{"n":0}}\n\n'.encode()
    for n in missed or ():
        expected += f'id: {bus.epoch}-{n}\nevent: notice\ndata: {{"n":{n}}}\n\n'.encode()
    assert client.got == expected


@pytest.mark.parametrize(
    ("query", "heard"),
    [
        ("", ["model", "gauge"]),
        ("topics=log", ["log"]),
        ("topics=model,log", ["model", "log"]),
        ("topics=gauge%2C%20log", ["gauge", "log"]),
    ],
)
@virtual_time
async def test_topics(query: str, heard: list[str]) -> None:
    app, bus = serve()
    async with listening(app, query) as client:
        client.pieces.clear()
        for topic in ("model", "gauge", "log"):
            bus.publish(topic, topic, {})
        await asyncio.sleep(0.1)
        kinds = [piece.split(b"\n")[1].removeprefix(b"event: ") for piece in client.pieces]
    assert kinds == [topic.encode() for topic in heard]


@pytest.mark.parametrize("topics", ["", "models", "model,", "model,Gauge", "model;gauge", "*"])
@virtual_time
async def test_an_unknown_topic_is_refused_with_the_choices(topics: str) -> None:
    app, bus = serve()
    client = Client(app, f"topics={topics}")
    with pytest.raises(InvalidRequest, match="download, gauge, log, model, notice, request") as no:
        await client.ask()
    assert no.value.status == 400
    assert no.value.param == "topics"
    assert no.value.details is not None
    assert "gauge" in no.value.details["choices"]
    assert bus.subscribers == 0


# How it ends.


@virtual_time
async def test_leaving_in_silence_ends_it_at_once() -> None:
    app, bus = serve()
    async with listening(app) as client:
        assert bus.subscribers == 1
        await asyncio.sleep(1.0)
        client.leave()
        assert bus.subscribers == 0
    assert asyncio.get_running_loop().time() == pytest.approx(1.1)  # not at the next ping


@virtual_time
async def test_leaving_while_it_does_not_read() -> None:
    app, bus = serve()
    async with listening(app) as client:
        client.reads.clear()
        for n in range(3 * QUEUE_EVENTS):
            bus.publish("model", "model", {"n": n})
        await asyncio.sleep(100.0)
        sent = len(client.pieces)
        client.leave()
        assert bus.subscribers == 0
    assert len(client.pieces) <= sent + 2  # what was under way, and the end


@virtual_time
async def test_who_left_before_its_answer_began_is_not_kept() -> None:
    app, bus = serve()
    client = Client(app)
    client.leave()
    async with asyncio.timeout(1.0):
        await client.ask()
    assert bus.subscribers == 0
    assert client.ended


@virtual_time
async def test_a_cancelled_answer_is_not_kept() -> None:
    """uvicorn does so to what outlasts its grace."""
    app, bus = serve()
    client = Client(app)
    asked = asyncio.create_task(client.ask())
    await asyncio.sleep(0.1)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert bus.subscribers == 0
    assert client.connection.on_lost is None


@virtual_time
async def test_a_snapshot_that_fails_is_an_error_and_no_stream() -> None:
    def broken() -> Mapping[str, Any]:
        raise ZeroDivisionError

    bus = EventBus(broken)
    app = FastAPI()
    add_event_calls(app, bus)
    client = Client(app)
    with pytest.raises(ZeroDivisionError):
        await client.ask()
    assert client.started["status"] == 500
    assert (bus.subscribers, client.connection.on_lost) == (0, None)


@virtual_time
async def test_the_end_of_the_bus_ends_every_answer() -> None:
    app, bus = serve()
    async with listening(app) as one, listening(app, "topics=log") as other:
        bus.close()
        await asyncio.sleep(0.1)
        assert one.ended
        assert other.ended
        async with listening(app) as late:
            assert late.ended
    for client in (one, other, late):
        assert client.got.endswith(b"event: bye\ndata: {}\n\n")


def test_it_is_described() -> None:
    app, _ = serve()
    operation = app.openapi()["paths"]["/v1/events"]["get"]
    assert {(at["in"], at["name"]) for at in operation["parameters"]} == {
        ("query", "topics"),
        ("query", "last_event_id"),
        ("header", "Last-Event-ID"),
    }
    assert list(operation["responses"]["200"]["content"]) == ["text/event-stream"]
