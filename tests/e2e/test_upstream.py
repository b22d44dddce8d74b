"""A server of somebody else's by name: `fake/anything` goes there over the same path."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import psutil
import pytest

from tests.e2e.conftest import Serve
from tests.fakes.processes import fake_argv
from tests.server import Server, clean_environment, deltas, error_of, models_dir, ok
from tests.waiting import wait_for

KEY = "upstream-key"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def upstream(port: int, *options: str) -> Iterator[str]:
    argv = fake_argv(*options, port=str(port))
    env = clean_environment() | {"UPSTREAM_KEY": KEY}
    process = psutil.Popen(argv, env=env, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(url))
        yield url
    finally:
        process.kill()
        process.wait(5)


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="module")
def fake() -> Iterator[str]:
    with upstream(free_port(), "--api-key-env", "UPSTREAM_KEY", "--token-ms", "5") as url:
        yield url


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory, fake: str) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("upstream")
    models = models_dir(root / "models")
    settings = {
        "upstreams": f"fake={fake}, open={fake}/, gone=http://127.0.0.1:{free_port()}",
        "upstream_keys": f"fake={KEY}",
    }
    with Server(models, root / "data", **settings) as server:
        yield server


def seen(fake: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = ok(httpx2.get(f"{fake}/seen", trust_env=False))
    return events


def test_plain_answer(server: Server) -> None:
    answer = server.chat(model="fake/some-model", max_tokens=3)
    body = ok(answer)
    assert body["choices"][0]["message"]["content"] == "word0 word1 word2 "
    assert body["model"] == body["echo"]["model"] == "some-model"
    assert answer.headers["x-xandrouting-engine"].startswith("upstream/remote#")


def test_model_may_hold_slashes(server: Server) -> None:
    assert ok(server.chat(model="fake/org/some-model"))["echo"]["model"] == "org/some-model"


def test_stream(server: Server) -> None:
    with server.stream(model="fake/some-model", max_tokens=5) as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        *events, done = stream.rest()
    assert deltas(events) == "word0 word1 word2 word3 word4 "
    assert done == "[DONE]"
    assert {json.loads(event)["model"] for event in events} == {"some-model"}


def test_routing_fields_are_cut_and_the_rest_is_sent_on(server: Server) -> None:
    """Every other value goes on as it came: what the gateway does not know, it does not touch."""
    own = (
        '"backend": "auto", "device": "cpu", "n_ctx": 512, "n_gpu_layers": 0, "n_parallel": 1,'
        '"ttl": 5, "gpu_memory_utilization": 0.5, "max_model_len": 99'
    )
    others = {
        "messages": [{"role": "user", "content": "Grüße \\u00e9 \u2028", "extra": [1, None]}],
        "temperature": 0.70,
        "seed": 12345678901234567890,
        "stop": ["END", "\n\n"],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "response_format": {"type": "json_object"},
        "logprobs": True,
        "top_logprobs": 2,
        "brand_new": {"deep": [{"a": 1e-7}]},
        "max_tokens": 1,
    }
    raw = f'{{"model": "fake/m", {own}, {json.dumps(others)[1:]}'
    headers = {"content-type": "application/json"}
    answer = server.client.post("/v1/chat/completions", content=raw.encode(), headers=headers)
    assert ok(answer)["echo"] == {"model": "m", **others}


def test_key_of_the_upstream_is_sent_and_the_clients_is_not(server: Server) -> None:
    mine = {"authorization": f"Bearer {KEY}"}
    body = {"model": "open/m", "messages": [{"role": "user", "content": "Hi"}]}
    error_of(server.post("/v1/chat/completions", body, headers=mine), 401, "engine_rejected")
    assert ok(server.chat(model="fake/m"))


def test_upstreams_error_passes_through(server: Server) -> None:
    answer = server.post("/v1/completions", {"model": "fake/m", "prompt": "Hi"})
    assert "File Not Found" in error_of(answer, 404, "engine_rejected")["message"]


def test_upstream_that_is_down_is_named(server: Server) -> None:
    for fields in ({}, {"stream": True}):
        error = error_of(server.chat(model="gone/m", **fields), 502, "upstream_unreachable")
        assert "gone" in error["message"]
    assert ok(server.chat(model="fake/m"))


def test_upstream_is_not_loaded_and_not_unloaded(server: Server) -> None:
    before = server.stats()
    assert ok(server.chat(model="fake/m"))
    assert server.loaded() == []
    assert ok(server.get("/health"))["loaded_models"] == 0
    assert server.tree() == []
    assert server.stats()["loaded_count"] == before["loaded_count"] == 0
    assert ok(server.post("/v1/models/unload-all"))["count"] == 0
    assert ok(server.chat(model="fake/m"))


def test_upstream_takes_no_place(serve: Serve, fake: str) -> None:
    server = serve(max_loaded=1, upstreams=f"fake={fake}", upstream_keys=f"fake={KEY}")
    server.load()
    with server.stream(max_tokens=60, ignore_eos=True) as stream:
        stream.first()
        assert ok(server.chat(model="fake/m"))
        assert stream.rest()[-1] == "[DONE]"
    assert server.stats()["evictions"] == 0


def test_upstream_that_comes_back_is_used_again(serve: Serve) -> None:
    port = free_port()
    server = serve(upstreams=f"late=http://127.0.0.1:{port}")
    error_of(server.chat(model="late/m"), 502, "upstream_unreachable")
    with upstream(port):
        assert ok(server.chat(model="late/m"))
    error_of(server.chat(model="late/m"), 502, "upstream_unreachable")
    with upstream(port):
        assert ok(server.chat(model="late/m"))


def test_upstream_that_dies_in_a_stream(serve: Serve) -> None:
    port = free_port()
    server = serve(upstreams=f"weak=http://127.0.0.1:{port}")
    with upstream(port, "--die-after", "3"), server.stream(model="weak/m") as stream:
        *chunks, last = stream.rest()
    assert deltas(chunks) == "word0 word1 word2 "
    error = json.loads(last)["error"]
    assert error["code"] == "engine_error"
    assert "weak" in error["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_upstream_is_told_that_the_client_left(server: Server, fake: str, stream: bool) -> None:
    body = {"model": "fake/m", "stream": stream, "fake_delay_s": 30, "max_tokens": 1}
    body["messages"] = [{"role": "user", "content": "Hi"}]
    before = len(seen(fake))
    with pytest.raises(httpx2.ReadTimeout):
        server.post("/v1/chat/completions", body, timeout=0.5)
    wait_for(lambda: [event["event"] for event in seen(fake)[before:]] == ["started", "left"], 1)
    assert server.stats()["active_requests"] == 0


def test_name_that_is_no_upstream_is_a_model(server: Server) -> None:
    error_of(server.chat(model="nosuch/m"), 404, "model_not_found")
    error_of(server.chat(model="fake"), 404, "model_not_found")
    error_of(server.chat(model="fake/"), 404, "model_not_found")


@pytest.mark.parametrize("value", ["fake", "fake=", "=http://x", "fake=ftp://x", "a/b=http://x"])
def test_setting_that_is_wrong_ends_the_start(serve: Serve, value: str) -> None:
    with pytest.raises(AssertionError, match="xandrouting: "):
        serve(upstreams=value)


def test_python_runs_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xandrouting", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("xandrouting ")
