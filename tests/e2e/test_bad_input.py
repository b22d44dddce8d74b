"""Bad input gets an answer: each case with its exact status and code."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.e2e.conftest import OTHER, Serve
from tests.server import (
    MODEL,
    STARTER,
    Server,
    chat_body,
    check_error,
    error_of,
    models_dir,
    ok,
    text_of,
)

CALLS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/v1/models/load",
    "/v1/models/unload",
)
CHAT = CALLS[0]
JSON = {"content-type": "application/json"}


# Bodies.


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "x",}',
        b"not json",
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b"[]",
        b'"text"',
        b"5",
        b"null",
        b"{}",
        b'{"model": 5}',
        b'{"model": null}',
        b'{"model": ""}',
        b'{"model": ["x"]}',
        b'{"model": {"a": 1}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "x"} trailing',
    ],
    ids=range(19),
)
def test_body_that_is_no_request(server: Server, path: str, body: bytes) -> None:
    error_of(server.client.post(path, content=body, headers=JSON), 400, "invalid_request")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("messages", [[], "Hi", {}, None, 5, ["Hi"], [{"content": "Hi"}], [{"role": 5}], [None]]),
        ("temperature", [3, -0.1, 2.01, "hot", [1], True, 1e400]),
        ("top_p", [1.1, -0.1, "x"]),
        ("presence_penalty", [2.1, -2.1, "x"]),
        ("frequency_penalty", [2.1, -2.1, {}]),
        ("max_tokens", [0, -1, 1.5, "5", 2**40]),
        ("max_completion_tokens", [0, -1]),
        ("stop", [5, [5], {"a": 1}, [["a"]]]),
        ("stream", ["yes", 1, []]),
        ("tools", [5, "x", {}]),
        ("backend", ["nosuch", "", 5, "LlamaCpp", ["llamacpp"]]),
        ("device", ["nosuch", "", 5, "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"]),
        ("n_ctx", [-1, 1.5, "x", 2**40]),
        ("n_gpu_layers", [-2, 0.5, "all"]),
        ("n_parallel", [0, -1, "x"]),
        ("ttl", [-1, 1.5, "x", 2**40]),
        ("gpu_memory_utilization", [0.05, 1.1, "x"]),
        ("max_model_len", [0, -1, "x"]),
    ],
)
def test_value_out_of_its_range(server: Server, field: str, values: list[Any]) -> None:
    for value in values:
        raw = json.dumps(chat_body(**{field: value})).replace("Infinity", "1e400")
        answer = server.client.post(CHAT, content=raw.encode(), headers=JSON)
        error = error_of(answer, 400, "invalid_request")
        assert error["type"] == "invalid_request_error", value
        assert error["param"].partition("[")[0] == field, value
        assert field in error["message"], value
    assert server.starts(MODEL) == 0


@pytest.mark.parametrize("field", ["ttl", "n_ctx", "device", "backend"])
def test_load_and_unload_check_their_fields_too(server: Server, field: str) -> None:
    body = {"model": MODEL, field: {}}
    assert error_of(server.post("/v1/models/load", body), 400, "invalid_request")["param"] == field
    if field in ("device", "backend"):
        answer = server.post("/v1/models/unload", body)
        assert error_of(answer, 400, "invalid_request")["param"] == field


def test_errors_come_before_the_headers_of_a_stream(server: Server) -> None:
    for fields, status, code in (
        ({"temperature": 3}, 400, "invalid_request"),
        ({"model": "nosuch"}, 404, "model_not_found"),
        ({"model": ".."}, 400, "invalid_model_path"),
    ):
        with server.stream(**fields) as stream:
            stream.response.read()
            error_of(stream.response, status, code)


# Large bodies.


@contextmanager
def connection(server: Server) -> Iterator[http.client.HTTPConnection]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    line = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        yield line
    finally:
        line.close()


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_200_megabytes_are_too_much(server: Server, chunked: bool) -> None:
    size = 200 << 20

    def body() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * (1 << 20)

    with connection(server) as line:
        headers = JSON if chunked else {**JSON, "content-length": str(size)}
        line.request("POST", CHAT, body=body(), headers=headers, encode_chunked=chunked)
        answer = line.getresponse()
        assert answer.status == 413
        check_error(json.loads(answer.read()), "body_too_large")
    assert server.process.memory_info().rss < 300 << 20
    assert ok(server.get("/health"))


def test_who_asks_before_sending_too_much_is_told_at_once(server: Server) -> None:
    answer = expect_answer(server, 200 << 20)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer


def test_who_asks_before_sending_enough_may(server: Server) -> None:
    body = json.dumps(chat_body(max_tokens=1)).encode()
    assert b"100 Continue" in expect_answer(server, len(body)).splitlines()[0]


def expect_answer(server: Server, length: int) -> bytes:
    """Announce a body of this length and return what comes while nothing of it is sent."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\nexpect: 100-continue\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(head.encode())
        return line.recv(65536)


def test_control_calls_take_no_large_body(server: Server) -> None:
    body = json.dumps({"model": "x" * (2 << 20)}).encode()
    answer = server.client.post("/v1/models/load", content=body, headers=JSON)
    error_of(answer, 413, "body_too_large")


def test_long_but_allowed_body_is_served(server: Server) -> None:
    """Unknown fields are the engine's business, however long they are."""
    assert ok(server.chat(max_tokens=1, metadata={"notes": "x" * (10 << 20)}))


def test_compressed_body_is_refused(server: Server) -> None:
    answer = server.client.post(CHAT, content=b"x", headers={**JSON, "content-encoding": "gzip"})
    error_of(answer, 400, "invalid_request")


# Backends, devices and models.


@pytest.mark.parametrize("backend", ["vllm", "transformers", "ollama"])
def test_backend_that_is_not_here(server: Server, backend: str) -> None:
    error = error_of(server.chat(backend=backend), 400, "backend_unavailable")
    assert error["param"] == "backend"
    assert backend in error["message"]


def test_card_that_is_not_here_falls_back(server: Server) -> None:
    answer = server.chat(device="cuda", n_gpu_layers=-1, backend="llamacpp")
    assert ok(answer)
    assert answer.headers["x-xandrouting-device-fallback"] == "cuda->cpu"
    assert [item["device"] for item in server.loaded()] == ["cpu"]
    assert "x-xandrouting-device-fallback" not in server.chat(device="cpu").headers
    numbered = server.chat(device="cuda:7")
    assert numbered.headers["x-xandrouting-device-fallback"] == "cuda:7->cpu"


def test_card_that_is_not_here_is_refused(serve: Serve) -> None:
    server = serve(device_fallback=False)
    for device in ("cuda", "cuda:0"):
        error = error_of(server.chat(device=device), 400, "device_unavailable")
        assert error["param"] == "device"
        assert "cpu" in error["message"]
    assert ok(server.chat(device="cpu"))
    assert ok(server.chat(device="auto"))


def test_unknown_model_names_three_that_are_near(serve: Serve) -> None:
    names = [f"qwen-coder-{size}b/qwen-coder-{size}b.gguf" for size in (1, 3, 7, 14, 32)]
    server = serve(*names, "llama/llama.gguf")
    error = error_of(server.chat(model="qwen-coder-8b"), 404, "model_not_found")
    near = [name for name in names if f"'/models/{name}'" in error["message"]]
    assert len(near) == 3
    assert "llama" not in error["message"]
    assert "/v1/models/inventory" in error["message"]
    assert error["param"] == "model"


def test_model_named_with_the_words_the_front_end_swallows(server: Server) -> None:
    error_of(server.chat(model="JSON Unexpected token"), 404, "model_not_found")


def test_folder_with_several_models_lists_the_choices(server: Server) -> None:
    names = ("several/a.gguf", "several/b.gguf")
    models_dir(server.models, *names)
    try:
        for spelling in ("several", "/models/several"):
            error = error_of(server.chat(model=spelling), 400, "ambiguous_model")
            choices = [f"/models/{name}" for name in names]
            assert error["details"]["choices"] == choices
            assert all(choice in error["message"] for choice in choices)
    finally:
        for name in names:
            (server.models / name).unlink()


def test_context_overflow_is_the_engines_own_error(server: Server) -> None:
    error = error_of(server.chat("word " * 5000), 400, "engine_rejected")
    assert error["type"] == "exceed_context_size_error"
    assert error["n_ctx"] == 4096
    assert error["n_prompt_tokens"] > 5000
    assert "context" in error["message"]


# Addresses and methods.


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/tokenize"])
def test_method_that_is_not_allowed(server: Server, method: str, path: str) -> None:
    error_of(server.client.request(method, path), 405, "method_not_allowed")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/health"),
        ("POST", "/v1/models"),
        ("PUT", "/v1/models/load"),
        ("POST", "/"),
        ("DELETE", "/v1/models/loaded"),
    ],
)
def test_control_method_that_is_not_allowed(server: Server, method: str, path: str) -> None:
    error_of(server.client.request(method, path), 405, "method_not_allowed")


@pytest.mark.parametrize(
    "path", ["/v1/nothing", "/v2/chat/completions", "/v1/chat/completions/", "/admin", "/v1"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_address_that_is_not_there(server: Server, method: str, path: str) -> None:
    error_of(server.client.request(method, path), 404, "not_found")


@pytest.mark.parametrize("line", ["GET / HTTP/9.9", "nonsense", "GET", "\x00\x01\x02"])
def test_what_is_not_http(server: Server, line: str) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(line.encode() + b"\r\n\r\n")
        raw.shutdown(socket.SHUT_WR)
        answer = raw.recv(65536)
    assert not answer or answer.startswith(b"HTTP/1.1 400 ")
    assert ok(server.get("/health"))


# The key.


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("locked")
    with Server(models_dir(root / "models"), root / "data", api_key="open-sesame") as server:
        yield server


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "open-sesame"},
        {"authorization": "Basic open-sesame"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer open-sesame2"},
        {"x-api-key": "wrong"},
    ],
    ids=["none", "wrong", "bare", "basic", "empty", "longer", "x-api-key"],
)
def test_key_is_asked_for(locked: Server, headers: dict[str, str]) -> None:
    for method, path in [("POST", path) for path in CALLS] + [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/loaded"),
        ("GET", "/metrics"),
        ("POST", "/v1/models/unload-all"),
        ("GET", "/nothing"),
    ]:
        answer = locked.client.request(method, path, headers=headers)
        error = error_of(answer, 401, "invalid_api_key")
        assert "open-sesame" not in error["message"]
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer open-sesame"},
        {"authorization": "bearer open-sesame"},
        {"x-api-key": "open-sesame"},
    ],
)
def test_key_opens(locked: Server, headers: dict[str, str]) -> None:
    answer = locked.client.post(CHAT, json=chat_body(max_tokens=1), headers=headers)
    assert text_of(answer)
    assert locked.client.get("/v1/models", headers=headers).status_code == 200


def test_some_pages_need_no_key(locked: Server) -> None:
    for path in ("/", "/health", "/docs", "/openapi.json"):
        assert locked.get(path).status_code == 200
    assert "open-sesame" not in locked.log()


# Web pages of others.


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8080", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("192.168.0.13:8080", 200),
        ("ui.localhost", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:8080", 403),
    ],
)
def test_host_must_be_ours(server: Server, host: str, status: int) -> None:
    for answer in (
        server.get("/v1/models", headers={"host": host}),
        server.post("/tokenize", {"model": MODEL, "content": "x"}, headers={"host": host}),
    ):
        if status == 200:
            assert ok(answer)
        else:
            error_of(answer, 403, "forbidden")


def test_host_that_was_allowed(serve: Serve) -> None:
    server = serve(allowed_hosts="llm.lan, other.lan")
    for host, status in (("llm.lan:8080", 200), ("OTHER.lan", 200), ("third.lan", 403)):
        assert server.get("/health", headers={"host": host}).status_code == status


def test_pages_of_other_origins_change_nothing(server: Server) -> None:
    evil = {"origin": "https://evil.example"}
    for path in (CHAT, "/v1/models/load", "/v1/models/unload-all"):
        error_of(server.post(path, chat_body(), headers=evil), 403, "forbidden")
        error_of(server.post(path, chat_body(), headers={"origin": "null"}), 403, "forbidden")
    assert server.get("/v1/models", headers=evil).status_code == 200
    own = {"origin": server.url}
    assert server.post("/v1/models/unload-all", headers=own).status_code == 200


def test_origin_that_was_allowed(serve: Serve) -> None:
    server = serve(cors_origins="http://app.lan:3000")
    allowed, denied = {"origin": "http://app.lan:3000"}, {"origin": "http://evil.lan"}
    answer = server.post("/v1/models/unload-all", headers=allowed)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "http://app.lan:3000"
    error_of(server.post("/v1/models/unload-all", headers=denied), 403, "forbidden")
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "x-a"}
    preflight = server.client.request("OPTIONS", CHAT, headers=allowed | ask)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "http://app.lan:3000"


def test_no_message_shows_where_the_models_lie(server: Server) -> None:
    """All errors of this file passed `check_error`; here are those that know the path."""
    path = server.models / "broken.gguf"
    path.write_bytes(b"GGUF")
    try:
        for answer in (
            server.chat(model="broken"),
            server.chat(model="/models/nosuch.gguf"),
            server.get("/v1/models/nosuch"),
            server.unload("nosuch"),
        ):
            assert str(server.models) not in answer.text
        listed = server.get("/v1/models/inventory").text + server.get("/v1/models/loaded").text
        assert str(server.models) not in listed
        assert "broken.gguf" in listed
    finally:
        path.unlink()
    assert {STARTER, OTHER.removeprefix("/models/")} == {
        str(p.relative_to(server.models)) for p in server.models.rglob("*.gguf")
    }
