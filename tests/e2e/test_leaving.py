"""A client that leaves: at once the engine works for it no more, and nothing of it is left.

The same client leaves the bare engine too: llama.cpp looks for a client only now and then, and
the gateway may add next to nothing to that. The witness is what the engine logs, because asking
it disturbs it: llama.cpp looks after a second without any result, and `/slots` is a result.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import Serve, paused_spare
from tests.server import (
    MODEL,
    EngineProcess,
    Server,
    chat_body,
    models_dir,
    ok,
    together,
)
from tests.waiting import wait_for

ADDED_S = 0.5
LONG = {"max_tokens": 3000, "ignore_eos": True, "cache_prompt": False}
PROMPT = "word " * 1500  # some seconds of reading


class Leaver:
    """A client that sends a request and closes its connection when it likes."""

    def __init__(self, url: str, body: object, headers: Mapping[str, str]) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        payload = json.dumps(body).encode()
        fields = {"host": host, "content-type": "application/json", **headers}
        lines = [f"{name}: {value}" for name, value in fields.items()]
        head = ["POST /v1/chat/completions HTTP/1.1", *lines, f"content-length: {len(payload)}"]
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        self._socket.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + payload)

    def read_until(self, mark: bytes) -> None:
        data = b""
        while mark not in data:
            more = self._socket.recv(65536)
            assert more, data
            data += more

    def leave(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def client_of(
    target: Server | EngineProcess, text: str = "Tell me a story.", **fields: Any
) -> Iterator[Leaver]:
    headers = target.headers if isinstance(target, EngineProcess) else {}
    leaver = Leaver(target.url, chat_body(text, **fields), headers)
    try:
        yield leaver
    finally:
        leaver.leave()


def released(server: Server) -> int:
    """Return how many times an engine said that it works for somebody no more."""
    return server.log().count("| stop processing: ")


def nothing_left(server: Server) -> Callable[[], bool]:
    """Return a check: no request and no lease is there."""

    def clean() -> bool:
        stats = server.stats()
        busy = [item["active_requests"] for item in server.loaded()]
        return stats["active_requests"] == stats["queued_requests"] == 0 and not any(busy)

    return clean


def client_connections(server: Server) -> int:
    port = int(server.url.rpartition(":")[2])
    connections = psutil.Process(server.pid).net_connections()
    ours = [c for c in connections if c.laddr and c.laddr.port == port and c.raddr]
    return sum(c.status == psutil.CONN_ESTABLISHED for c in ours)


def engine_connections(server: Server, engine: EngineProcess) -> int:
    connections = psutil.Process(server.pid).net_connections()
    return sum(bool(c.raddr) and c.raddr.port == engine.port for c in connections)


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("leaving")
    with Server(models_dir(root / "models"), root / "data", log_level="debug") as server:
        yield server


@pytest.fixture
def engine(server: Server) -> EngineProcess:
    server.load(MODEL)
    return server.engine(MODEL)


def time_to_free(
    server: Server, engine: EngineProcess, target: Server | EngineProcess, how: str
) -> float:
    """Leave in the way of `how` and measure until the engine lets go of it."""
    wait_for(lambda: engine.busy() == 0)
    before = released(server)
    text = PROMPT if how == "prefill" else "Tell me a story."
    with client_of(target, text, stream=how != "plain", **LONG) as client:
        if how == "stream":
            client.read_until(b'"content":"')
        else:
            wait_for(engine.busy)
        if how == "plain":
            wait_for(lambda: decoded(engine) > 3)
        left = time.monotonic()
        client.leave()
        wait_for(lambda: released(server) > before, 30)
        took = time.monotonic() - left
    assert engine.busy() == 0
    return took


def decoded(engine: EngineProcess) -> int:
    """Return how many tokens the busy slots have made."""
    made = 0
    for slot in engine.slots():
        if slot["is_processing"]:
            made += sum(token["n_decoded"] for token in slot.get("next_token", []))
    return made


@pytest.mark.parametrize("how", ["stream", "plain", "prefill"])
def test_slot_is_free_as_soon_as_on_the_bare_engine(
    server: Server, engine: EngineProcess, how: str
) -> None:
    bare, through = [], []
    for _ in range(2 if how == "prefill" else 3):
        bare.append(time_to_free(server, engine, engine, how))
        through.append(time_to_free(server, engine, server, how))
    shown = [", ".join(f"{took:.3f}" for took in sorted(all_)) for all_ in (bare, through)]
    print(f"slot free after s, {how}: bare {shown[0]}; through the gateway {shown[1]}")
    assert min(through) <= min(bare) + ADDED_S
    wait_for(nothing_left(server))
    wait_for(lambda: client_connections(server) == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_connection_to_the_engine_is_cut_at_once(
    server: Server, engine: EngineProcess, stream: bool
) -> None:
    """Long before llama.cpp looks, the gateway has let go of the engine and of the lease."""
    freed = released(server)
    with client_of(server, stream=stream, **LONG) as client:
        wait_for(engine.busy)
        before = server.stats()["total_requests_served"]
        assert server.loaded()[0]["active_requests"] == 1
        client.leave()
        wait_for(nothing_left(server), 0.5)
        assert engine_connections(server, engine) == 0
    assert server.stats()["total_requests_served"] == before
    wait_for(lambda: released(server) > freed, 10)
    assert engine.busy() == 0
    assert ok(server.chat())


def test_many_clients_leave(server: Server, engine: EngineProcess) -> None:
    """Two generate, the others wait for a slot inside the engine; all leave, none lingers."""
    freed = released(server)
    with contextlib.ExitStack() as stack:
        for number in range(12):
            stack.enter_context(client_of(server, stream=number % 2 == 0, **LONG))
        wait_for(lambda: server.loaded()[0]["active_requests"] == 12)
    wait_for(nothing_left(server), 0.5)
    assert engine_connections(server, engine) == 0
    wait_for(lambda: client_connections(server) == 0)
    wait_for(lambda: released(server) >= freed + 2, 20)
    assert ok(server.chat(max_tokens=2))


def test_sockets_and_threads_come_back_to_what_they_were(
    server: Server, engine: EngineProcess
) -> None:
    def leave_once(stream: bool) -> None:
        with client_of(server, stream=stream, **LONG) as client:
            wait_for(lambda: server.loaded()[0]["active_requests"] == 1)
            client.leave()
            wait_for(nothing_left(server))

    leave_once(stream=True)
    wait_for(lambda: client_connections(server) == 0)
    before = descriptors(server)
    for number in range(10):
        leave_once(stream=number % 2 == 0)
    wait_for(lambda: descriptors(server) <= before, 10)


def descriptors(server: Server) -> int:
    return psutil.Process(server.pid).num_fds()


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_the_model_loads(server: Server, stream: bool) -> None:
    """The lease is given up; the load goes on, and serves the next."""
    with paused_spare(server), client_of(server, stream=stream) as client:
        wait_for(server.engines)
        wait_for(lambda: server.stats()["queued_requests"] == 1)
        client.leave()
        wait_for(nothing_left(server), 0.5)
    wait_for(lambda: [item["state"] for item in server.loaded()] == ["ready"], 10)
    wait_for(lambda: client_connections(server) == 0)
    assert server.chat().headers["x-xandrouting-load"] == "hit"


def test_leaving_the_queue(serve: Serve) -> None:
    """Who waits for a place that is taken leaves the queue, and its engine is never started."""
    server = serve("a/a.gguf", "b/b.gguf", max_loaded=1, fair_wait_s=60)
    with server.stream("A story.", model="a", **LONG) as stream, together(1) as pool:
        stream.first()
        with client_of(server, model="b", stream=True) as client:
            wait_for(lambda: server.stats()["queued_requests"] == 1)
            client.leave()
            wait_for(lambda: server.stats()["queued_requests"] == 0, 0.5)
        rest = pool.submit(stream.first)
        assert rest.result(5)  # the stream it waited for goes on
        assert server.stats()["active_requests"] == 1
    wait_for(nothing_left(server))
    assert server.starts("/models/b/b.gguf") == 0
    wait_for(lambda: client_connections(server) == 0)


def test_leaving_before_the_body_is_whole(server: Server, engine: EngineProcess) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{"
    with socket.create_connection((host, int(port))) as half:
        half.sendall(head.encode())
        wait_for(lambda: server.stats()["active_requests"] == 1)
    wait_for(nothing_left(server), 0.5)
    wait_for(lambda: client_connections(server) == 0)
    assert engine.busy() == 0
