"""The gate inside vLLM's API server: who lacks the engine's key gets /health alone."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

import pytest

from xandrouting.engines.vllm import GATE, GATE_FOLDER

KEY = "k3y"


class Server:
    """The gate before a server that answers everything, as vLLM loads it."""

    def __init__(self) -> None:
        name, _, attribute = GATE.partition(".")
        spec = importlib.util.spec_from_file_location(name, GATE_FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.gate = getattr(module, attribute)(self._app)
        self.reached: list[str] = []

    async def _app(self, scope: Mapping[str, Any], receive: object, send: object) -> None:
        self.reached.append(scope.get("path", scope["type"]))

    async def asks(self, kind: str, path: str = "", *headers: tuple[bytes, bytes]) -> list[Any]:
        sent: list[Any] = []

        async def send(message: object) -> None:
            sent.append(message)

        async def receive() -> object:
            raise AssertionError("the gate reads nothing")

        scope = {"type": kind, "headers": list(headers)} | ({"path": path} if path else {})
        await self.gate(scope, receive, send)
        return sent


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    return Server()


WITH_KEY = (b"authorization", b"Bearer k3y")


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/sleep", "/tokenize", "/health/", "/"])
async def test_who_has_the_key_is_let_in(server: Server, path: str) -> None:
    assert await server.asks("http", path, (b"host", b"x"), WITH_KEY) == []
    assert server.reached == [path]


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ((b"authorization", b"Bearer k3"),),
        ((b"authorization", b"Bearer k3y "),),
        ((b"authorization", b"bearer k3y"),),
        ((b"authorization", b"k3y"),),
        ((b"authorization", b"\xff"),),
        ((b"x-api-key", b"k3y"),),
    ],
)
@pytest.mark.parametrize("path", ["/metrics", "/sleep", "/collective_rpc", "/health/x"])
async def test_who_has_not_is_refused(
    server: Server, path: str, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    start, body = await server.asks("http", path, *headers)
    assert (start["type"], start["status"]) == ("http.response.start", 401)
    assert dict(start["headers"]) == {b"content-type": b"application/json"}
    assert body["type"] == "http.response.body"
    assert not body.get("more_body")
    assert "gateway" in json.loads(body["body"])["error"]["message"]
    assert server.reached == []


async def test_health_is_for_everybody(server: Server) -> None:
    assert await server.asks("http", "/health") == []
    assert server.reached == ["/health"]


async def test_a_websocket_is_closed(server: Server) -> None:
    assert await server.asks("websocket", "/v1/realtime") == [
        {"type": "websocket.close", "code": 1008}
    ]
    assert await server.asks("websocket", "/v1/realtime", WITH_KEY) == []
    assert server.reached == ["/v1/realtime"]


async def test_the_lifespan_passes(server: Server) -> None:
    assert await server.asks("lifespan") == []
    assert server.reached == ["lifespan"]


async def test_of_several_keys_the_last_counts_and_no_two_are_tried(server: Server) -> None:
    other = (b"authorization", b"Bearer other")
    assert (await server.asks("http", "/metrics", WITH_KEY, other))[0]["status"] == 401


def test_without_a_key_there_is_no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(KeyError):
        Server()
