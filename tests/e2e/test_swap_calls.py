"""llama-swap's calls, as its README and the handlers of its internal/server have them."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest

from tests.e2e.conftest import OTHER, Serve
from tests.fakes.processes import is_gone
from tests.server import (
    MODEL,
    STARTER,
    Server,
    chat_body,
    deltas,
    error_of,
    held_load,
    ok,
    story,
    text_of,
    together,
)
from tests.waiting import wait_for

SHORT = "smollm2-135m-instruct"
FOREIGN = {"origin": "http://attacker.example"}
LINK = {"sec-fetch-site": "cross-site"}


def plain(response: httpx2.Response, status: int = 200) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].partition(";")[0] == "text/plain"
    return response.text


# GET /running.


def test_running(server: Server) -> None:
    assert ok(server.get("/running")) == {"running": []}
    server.load(OTHER, ttl=77)
    server.load(MODEL, ttl=0)
    first, second = ok(server.get("/running"))["running"]
    assert (first["model"], second["model"]) == (OTHER, MODEL)  # by name
    assert first.keys() == {"model", "state", "cmd", "proxy", "ttl", "name", "description"}
    assert (first["state"], first["ttl"], second["ttl"]) == ("ready", 77, 0)
    assert first["cmd"].startswith(f"llama-server --model {OTHER} ")
    assert first["proxy"] == server.engine(OTHER).url


def test_running_shows_what_starts_and_what_stops(server: Server) -> None:
    with held_load(server):
        [found] = ok(server.get("/running"))["running"]
        assert (found["model"], found["state"]) == (MODEL, "starting")
    with story(server) as stream, together(1) as pool:
        unloading = pool.submit(server.unload)
        wait_for(
            lambda: [m["state"] for m in ok(server.get("/running"))["running"]] == ["stopping"]
        )
        stream.rest()
    ok(unloading.result(10))
    assert ok(server.get("/running"))["running"] == []


# Unloading.


def test_unload_all_at_once(server: Server) -> None:
    server.load(OTHER)
    with story(server, max_tokens=3000):
        engines = server.engines()
        assert len(engines) == 2
        assert plain(server.get("/unload")) == "OK"  # in the middle of an answer
        assert all(is_gone(engine) for engine in engines)
    assert plain(server.get("/unload")) == "OK"  # twice


def test_api_unload_all(server: Server) -> None:
    server.load()
    for _ in range(2):
        assert ok(server.post("/api/models/unload")) == {"msg": "ok"}
        assert server.engines() == []


@pytest.mark.parametrize("name", [MODEL, f"/{STARTER}", f"/{SHORT}"])
def test_api_unload_of_one(server: Server, name: str) -> None:
    server.load(MODEL)
    server.load(OTHER)
    for _ in range(2):
        assert plain(server.post(f"/api/models/unload{name}")) == "OK"
        assert [item["path"] for item in server.loaded()] == [OTHER]


def test_api_unload_of_what_is_not_there(server: Server) -> None:
    error = error_of(server.post("/api/models/unload/author/nosuch"), 404, "model_not_found")
    assert error["message"].startswith("model not found")


def test_unload_in_the_middle_of_a_load(server: Server) -> None:
    with held_load(server) as asked:
        assert plain(server.get("/unload")) == "OK"
        error_of(asked.result(10), 503, "engine_unloaded")
    assert server.engines() == []
    assert text_of(server.chat())


@pytest.mark.parametrize("headers", [FOREIGN, LINK, {"sec-fetch-site": "same-site"}])
def test_a_web_page_of_another_origin_unloads_nothing(
    server: Server, headers: dict[str, str]
) -> None:
    server.load()
    error_of(server.get("/unload", headers=headers), 403, "forbidden")
    error_of(server.get(f"/upstream{OTHER}/health", headers=headers), 403, "forbidden")
    assert [item["path"] for item in server.loaded()] == [MODEL]
    own = {"origin": server.url, "sec-fetch-site": "same-origin"}
    assert plain(server.get("/unload", headers=own)) == "OK"


# /upstream.


@pytest.mark.parametrize("name", [MODEL, f"/{MODEL}", f"/{STARTER}", f"/{SHORT}"])
def test_upstream_loads_the_model(server: Server, name: str) -> None:
    answer = server.get(f"/upstream{name}/health")
    assert ok(answer) == {"status": "ok"}
    assert answer.headers["x-xandrouting-load"].startswith("cold")
    assert [item["path"] for item in server.loaded()] == [MODEL]


def test_upstream_is_the_engine_itself(server: Server) -> None:
    server.load()
    own = server.engine().get("/props")
    assert ok(server.get(f"/upstream/{SHORT}/props")) == own
    assert ok(server.get(f"/upstream/{SHORT}/v1/models"))["data"][0]["id"] == MODEL
    answer = server.post(f"/upstream/{SHORT}/tokenize", {"content": "Hello", "with_pieces": True})
    assert [token["piece"] for token in ok(answer)["tokens"]] == ["Hello"]
    assert ok(server.post(f"/upstream/{SHORT}/v1/chat/completions", chat_body()))["choices"]


def test_upstream_passes_on_the_query_and_what_the_engine_refuses(server: Server) -> None:
    answer = server.get(f"/upstream/{SHORT}/slots?fail_on_no_slot=1")
    assert len(ok(answer)) == 2
    with story(server, max_tokens=400), story(server, max_tokens=400):
        answer = server.get(f"/upstream/{SHORT}/slots?fail_on_no_slot=1")
        assert answer.status_code == 503
    answer = server.get(f"/upstream/{SHORT}/nosuch")
    assert answer.status_code == 404
    assert "detail" not in answer.json()  # in the engine's words
    assert server.client.delete(f"/upstream/{SHORT}/health").status_code == 404
    assert server.client.head(f"/upstream/{SHORT}/health").text == ""


def test_upstream_streams_and_holds_the_engine(server: Server) -> None:
    body = chat_body("Tell me a story.", stream=True, max_tokens=200, ignore_eos=True)
    path = f"/upstream/{SHORT}/v1/chat/completions"
    with server.client.stream("POST", path, json=body) as response, together(1) as pool:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in response.iter_lines() if line not in ("", ":"))
        first = next(lines)
        assert server.loaded()[0]["active_requests"] == 1
        unloading = pool.submit(server.unload)
        wait_for(lambda: server.loaded()[0]["state"] == "draining")
        events = [line.removeprefix("data: ") for line in (first, *lines)]
        assert ok(unloading.result(10))["count"] == 1
    assert events[-1] == "[DONE]"
    assert deltas(events)


def test_upstream_ends_with_its_client(server: Server) -> None:
    server.load()
    body = chat_body("Tell me a story.", stream=True, max_tokens=3000, ignore_eos=True)
    path = f"/upstream/{SHORT}/v1/chat/completions"
    with server.client.stream("POST", path, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert server.engine().busy() == 1
    wait_for(lambda: server.engine().busy() == 0 and server.stats()["active_requests"] == 0)


def test_upstream_of_a_model_alone_leads_to_its_root(server: Server) -> None:
    answer = server.get(f"/upstream/{SHORT}?a=1")
    assert (answer.status_code, answer.headers["location"]) == (301, f"/upstream/{SHORT}/?a=1")
    answer = server.post(f"/upstream{MODEL}", {})
    assert (answer.status_code, answer.headers["location"]) == (308, f"/upstream{MODEL}/")
    assert server.engines() == []


@pytest.mark.parametrize("path", ["", "/", "nosuch/health", "models/nosuch/health", "models"])
def test_upstream_of_what_is_not_there(server: Server, path: str) -> None:
    error = error_of(server.get(f"/upstream/{path}"), 404, "model_not_found")
    assert error["message"].startswith("model not found")
    assert server.engines() == []


@pytest.mark.parametrize("path", ["%2e%2e/health", "a/%2E%2e/b", "a%2f..%2fb", "%252e%252e", "%2e"])
def test_upstream_does_not_climb(server: Server, path: str) -> None:
    error_of(server.get(f"/upstream/{SHORT}/{path}"), 400, "invalid_request")
    assert server.engines() == []


def test_upstream_does_not_climb_in_plain_sight(server: Server) -> None:
    """Where no client straightens the path first."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        request = f"GET /upstream/{SHORT}/../../v1/models HTTP/1.1\r\nhost: {host}\r\n\r\n"
        connection.sendall(request.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_upstream_asks_for_the_key_and_gives_the_engine_its_own(serve: Serve) -> None:
    server = serve(api_key="ours")
    path = f"/upstream/{SHORT}/slots"
    error_of(server.get(path), 401, "invalid_api_key")
    for headers in ({"authorization": "Bearer ours"}, {"x-api-key": "ours"}):
        assert len(ok(server.get(path, headers=headers))) == 2


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_upstream_survives_the_end_of_its_engine(server: Server) -> None:
    server.load()
    engine = server.engine()
    engine.process.kill()
    wait_for(lambda: not listens(engine.port))  # before, a connection is still taken
    assert ok(server.get(f"/upstream/{SHORT}/health")) == {"status": "ok"}


# The logs.


@contextmanager
def log_stream(server: Server, path: str = "/logs/stream") -> Iterator[Iterator[str]]:
    with server.client.stream("GET", path) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/plain")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-accel-buffering"] == "no"
        yield response.iter_lines()


def until(lines: Iterator[str], text: str) -> list[str]:
    seen = []
    for line in lines:
        seen.append(line)
        if text in line:
            return seen
    raise AssertionError(f"the stream ended: {seen}")


def test_logs(server: Server) -> None:
    server.load()
    text = plain(server.get("/logs"))
    assert "engine ready" in text
    assert "loading model" in text  # llama.cpp's words
    assert len(text.encode()) <= 10 * 1024
    assert text.endswith("\n")


def test_log_stream(server: Server) -> None:
    server.load(MODEL)
    with log_stream(server) as lines:
        until(lines, "engine ready")  # what was before
        server.load(OTHER)
        until(lines, f"engine ready engine={OTHER}")


def test_log_stream_without_history(server: Server) -> None:
    server.load(MODEL)
    with log_stream(server, "/logs/stream?no-history") as lines:
        server.load(OTHER)
        seen = until(lines, f"engine ready engine={OTHER}")
    assert not any(f"engine ready engine={MODEL}" in line for line in seen)


def test_log_streams_by_source(serve: Serve) -> None:
    server = serve()
    server.load()
    with log_stream(server, "/logs/stream/proxy") as lines:
        seen = until(lines, "engine ready")
        assert not any("loading model" in line for line in seen)
    with log_stream(server, "/logs/stream/upstream") as lines:
        seen = until(lines, "xandrouting-engine ready")
        assert any("loading model" in line for line in seen)
        assert not any("engine starting" in line for line in seen)


@pytest.mark.parametrize("name", [OTHER, OTHER.removeprefix("/models"), "/other"])
def test_log_stream_of_one_model(serve: Serve, name: str) -> None:
    server = serve(STARTER, OTHER.removeprefix("/models/"))
    server.load(MODEL)
    server.load(OTHER)
    with log_stream(server, f"/logs/stream{name}") as lines:
        seen = until(lines, "xandrouting-engine ready")
    assert any("other/other.gguf" in line for line in seen)
    assert not any("SmolLM2" in line for line in seen)


def test_log_stream_of_what_is_not_there(server: Server) -> None:
    error = error_of(server.get("/logs/stream/nosuch"), 400, "invalid_request")
    assert error["message"].startswith("invalid logger. Use 'proxy', 'upstream' or a model's ID")


def test_the_log_as_objects(server: Server) -> None:
    server.load()
    lines = ok(server.get(f"/v1/logs?model={MODEL}&source=engine"))["lines"]
    assert lines
    assert {(line["source"], line["model"]) for line in lines} == {("engine", MODEL)}
    assert lines[-1].keys() == {"at", "source", "text", "level", "model", "engine"}
    [last] = ok(server.get("/v1/logs?source=gateway&limit=1"))["lines"]
    assert (last["level"], last["at"][-1]) == ("INFO", "Z")
    assert "engine ready" in last["text"]
    error_of(server.get("/v1/logs?model=nosuch"), 404, "model_not_found")
    error_of(server.get("/v1/logs?source=nosuch"), 400, "invalid_request")
    error_of(server.get("/v1/logs?limit=0"), 400, "invalid_request")


def test_the_log_as_events(server: Server) -> None:
    with server.events(topics="log") as events:
        assert next(iter(events))[0] == "snapshot"
        server.load()
        line = events.until(lambda kind, data: kind == "log" and data["source"] == "engine")
        assert line["model"] == MODEL
        events.until(lambda _, data: "engine ready" in data["text"])


def test_the_log_holds_no_prompt_and_no_key(serve: Serve) -> None:
    server = serve(api_key="zebra-key", log_level="debug")
    server.client.headers["authorization"] = "Bearer zebra-key"
    said = text_of(server.chat("zebra-prompt"))
    text = json.dumps(ok(server.get("/v1/logs?limit=5000"))["lines"])
    assert "engine ready" in text
    for secret in ("zebra-key", "zebra-prompt", said, server.engine().key):
        assert secret not in text
    del server.client.headers["authorization"]
    for path in ("/logs", "/logs/stream", "/v1/logs", "/running", "/unload"):
        error_of(server.get(path), 401, "invalid_api_key")


def test_the_streams_end_with_the_server(serve: Serve) -> None:
    server = serve()
    with log_stream(server) as lines:
        server.signal()
        rest = list(lines)
    assert any("server stopping" in line for line in rest)
    assert server.wait() == 0
