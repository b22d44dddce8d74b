"""A server of somebody else's by name: `fake/anything` goes there over the same path."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import psutil
import pytest

from tests.e2e.conftest import Serve
from tests.fakes.processes import fake_argv
from tests.fakes.web import Asked, Call, Web, web
from tests.server import (
    MODEL,
    STARTER,
    Server,
    clean_environment,
    deltas,
    error_of,
    models_dir,
    ok,
    text_of,
)
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


def up(server: Server) -> dict[str, float]:
    """Return what the metrics say of each upstream."""
    found = {}
    for line in server.get("/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("xandrouting_upstream_up{"):
            found[name.split('"')[1]] = float(value)
    return found


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
    error_of(server.post("/v1/chat/completions", body, headers=mine), 502, "upstream_refuses_key")
    assert ok(server.chat(model="fake/m"))


def test_upstreams_error_passes_through(server: Server) -> None:
    answer = server.post("/v1/completions", {"model": "fake/m", "prompt": "Hi"})
    assert "File Not Found" in error_of(answer, 404, "engine_rejected")["message"]


def test_upstream_that_is_down_is_named(server: Server) -> None:
    for fields in ({}, {"stream": True}):
        answer = server.chat(model="gone/m", **fields)
        error = error_of(answer, 502, "upstream_unreachable")
        assert "upstream gone cannot be reached: connection refused" in error["message"]
        assert 1 <= int(answer.headers["retry-after"]) <= 5
    assert ok(server.chat(model="fake/m"))


def test_upstream_that_is_down_costs_its_askers_no_time(serve: Serve) -> None:
    """The second one hears at once what the first one waited for."""
    with socket.socket() as deaf:  # it listens, takes nobody, and its queue is full
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for other in waiting:
            other.setblocking(False)
            other.connect_ex(deaf.getsockname())
        server = serve(upstreams=f"deaf=http://127.0.0.1:{deaf.getsockname()[1]}")
        error = error_of(server.chat(model="deaf/m"), 502, "upstream_unreachable")
        assert "no connection within 5 s" in error["message"]
        began = time.monotonic()
        error_of(server.chat(model="deaf/m"), 502, "upstream_unreachable")
        assert time.monotonic() - began < 0.5
        for other in waiting:
            other.close()


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
    for _ in range(2):
        error_of(server.chat(model="late/m"), 502, "upstream_unreachable")
        with upstream(port):
            wait_for(lambda: server.chat(model="late/m").status_code == 200, 10)
            assert up(server)["late"] == 1


def test_upstream_that_dies_in_a_stream(serve: Serve) -> None:
    port = free_port()
    server = serve(upstreams=f"weak=http://127.0.0.1:{port}")
    with upstream(port, "--die-after", "3"), server.stream(model="weak/m") as stream:
        *chunks, last = stream.rest()
    assert deltas(chunks) == "word0 word1 word2 "
    error = json.loads(last)["error"]
    assert error["code"] == "engine_error"
    assert "weak" in error["message"]


# Answers that are none.


@contextmanager
def serving(serve: Serve, answer: Callable[[Call, Asked], None], **settings: Any) -> Iterator[Site]:
    """Start a server whose upstream `odd` answers chat requests so, and lists one model."""

    def either(call: Call, asked: Asked) -> None:
        if asked.method == "POST":
            answer(call, asked)
        else:
            call.json({"object": "list", "data": [{"id": "m", "object": "model"}]})

    with web(either) as odd:
        yield Site(serve(upstreams=f"odd={odd.url}/v1", upstream_keys="odd=k", **settings), odd)


@dataclass
class Site:
    server: Server
    odd: Web


def test_web_page_is_no_answer(serve: Serve) -> None:
    page = b"<!doctype html><title>Log in</title>"
    with serving(serve, lambda call, _: call.say(200, page, "text/html; charset=utf-8")) as site:
        for fields in ({}, {"stream": True}):
            answer = site.server.chat(model="odd/m", **fields)
            error = error_of(answer, 502, "upstream_not_an_api")
            assert "odd answers with 'text/html'" in error["message"]
            assert "Log in" not in answer.text


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirect_is_not_followed(serve: Serve, status: int) -> None:
    def elsewhere(call: Call, _: Asked) -> None:
        call.say(status, location=f"{other.url}/v1/chat/completions?token=secret")

    with web(lambda call, _: call.json({})) as other, serving(serve, elsewhere) as site:
        answer = site.server.chat(model="odd/m")
        error = error_of(answer, 502, "upstream_redirects")
        assert "odd" in error["message"]
        assert "location" not in answer.headers
        assert other.asked == []
        log = site.server.log()
    assert "upstream redirects upstream=odd location='127.0.0.1'" in log
    assert "secret" not in log


def test_answer_that_ends_early(serve: Serve) -> None:
    with serving(serve, lambda call, _: call.cut()) as site:
        for fields in ({}, {"stream": True}):
            error = error_of(site.server.chat(model="odd/m", **fields), 502, "engine_error")
            assert "The upstream odd broke off" in error["message"]
        assert len(site.odd.posts()) == 2  # it may have acted on them: nothing is asked again


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_answer_of_nothing_is_none(serve: Serve, kind: str) -> None:
    with serving(serve, lambda call, _: call.say(200, b"", kind)) as site:
        for fields in ({}, {"stream": True}):
            error = error_of(site.server.chat(model="odd/m", **fields), 502, "upstream_error")
            assert "The upstream odd answered with nothing" in error["message"]


def test_stream_that_ends_without_a_word_ends_with_an_error(serve: Serve) -> None:
    arrived = threading.Event()

    def nothing(call: Call, _: Asked) -> None:
        call.begin_events()
        assert arrived.wait(10)
        call.wfile.write(b"0\r\n\r\n")

    with serving(serve, nothing) as site, site.server.stream(model="odd/m") as stream:
        arrived.set()  # its headers have
        [only] = stream.rest()
    assert json.loads(only)["error"]["code"] == "upstream_error"


def test_plain_answer_that_is_cut_short_closes_the_connection(serve: Serve) -> None:
    def half(call: Call, _: Asked) -> None:
        call.send_response(200)
        call.send_header("content-type", "application/json")
        call.send_header("content-length", "100")
        call.end_headers()
        call.wfile.write(b'{"choices": [')
        call.cut()

    with serving(serve, half) as site, pytest.raises(httpx2.RemoteProtocolError):
        site.server.chat(model="odd/m")


def test_upstream_that_says_nothing_is_given_up(serve: Serve) -> None:
    with serving(serve, lambda call, _: call.until_left(), upstream_timeout_s=0.5) as site:
        for fields in ({}, {"stream": True}):
            error = error_of(site.server.chat(model="odd/m", **fields), 504, "upstream_timeout")
            assert "The upstream odd was given up: nothing came for 0.5 s" in error["message"]
        wait_for(lambda: len(site.odd.left) == 2)


def test_upstream_that_falls_silent_in_a_stream_is_given_up(serve: Serve) -> None:
    def stall(call: Call, _: Asked) -> None:
        call.begin_events()
        for word in ("one ", "two "):
            call.event({"choices": [{"index": 0, "delta": {"content": word}}]})
            time.sleep(0.8)  # its pace: one is shorter than the wait, both longer
        call.until_left()

    with serving(serve, stall, upstream_timeout_s=1.5) as site:
        with site.server.stream(model="odd/m") as stream:
            *chunks, last = stream.rest()
        assert deltas(chunks) == "one two "
        assert json.loads(last)["error"]["code"] == "upstream_timeout"
        wait_for(lambda: site.odd.left)


def test_keys_and_headers_of_the_client_stay_here(serve: Serve) -> None:
    """Its key is the upstream's own one, and another upstream's is never sent."""
    with (
        web(lambda call, _: call.json({"data": []})) as plain,
        web(lambda call, _: call.json({"data": []})) as keyed,
    ):
        server = serve(
            upstreams=f"plain={plain.url},keyed={keyed.url}",
            upstream_keys="keyed=theirs",
            api_key="mine",
        )
        headers = {"authorization": "Bearer mine", "cookie": "a=b", "x-api-key": "mine"}
        for name in ("plain", "keyed"):
            body = {"model": f"{name}/m", "messages": [{"role": "user", "content": "Hi"}]}
            ok(server.post("/v1/chat/completions", body, headers=headers))
        for there, key in ((plain, None), (keyed, "Bearer theirs")):
            assert there.posts()
            for asked in there.asked:
                assert asked.headers.get("authorization") == key
                assert not {"cookie", "x-api-key"} & asked.headers.keys()
                assert "mine" not in str(asked)


# Lists.


def models(server: Server) -> dict[str, dict[str, Any]]:
    return {item["id"]: item for item in ok(server.get("/v1/models"))["data"]}


def test_models_are_listed_and_kept_while_it_is_down(serve: Serve) -> None:
    def answer(call: Call, _: Asked) -> None:
        one = {"id": "org/one", "object": "model", "created": 1_700_000_000, "max_model_len": 4096}
        call.json({"object": "list", "data": [one, {"id": "two"}]})

    port = free_port()
    with web(answer, port):
        server = serve(upstreams=f"big=http://127.0.0.1:{port}")
        wait_for(lambda: "big/org/one" in models(server))
        item = models(server)["big/org/one"]
        assert item == item | {
            "created": 1_700_000_000,
            "owned_by": "big",
            "backend": "upstream",
            "context_length": 4096,
            "size_bytes": None,
        }
        assert item["status"]["value"] == "loaded"
        assert ok(server.get("/v1/models/big/org/one")) == item
        error_of(server.get("/v1/models/big/three"), 404, "model_not_found")
        assert up(server)["big"] == 1
    assert server.loaded() == []
    error_of(server.chat(model="big/two"), 502, "upstream_unreachable")
    wait_for(lambda: up(server)["big"] == 0, 15)
    status = models(server)["big/two"]["status"]
    assert status["value"] == "failed"
    assert "connection refused" in status["message"]
    log = server.log()
    assert log.count("upstream up upstream=big models=2") == 1
    assert log.count("upstream down upstream=big reason='connection refused'") == 1


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, b"<html>", "what it lists are no models"),
        (200, b'{"data": [{"id": 7}]}', "what it lists are no models"),
        (200, b'{"data": [' + b" " * (5 << 20) + b"]}", "larger than 4 MiB"),
        (401, b"", "refuses the key, or the want of one, with status 401"),
        (302, b"", "it redirects to another address"),
        (500, b"", "with status 500"),
    ],
)
def test_list_that_is_none_is_a_reason(serve: Serve, status: int, body: bytes, reason: str) -> None:
    with web(lambda call, _: call.say(status, body)) as odd:
        server = serve(upstreams=f"odd={odd.url}")
        wait_for(lambda: "upstream down upstream=odd" in server.log())
        assert reason in server.log()
        assert up(server)["odd"] == 0
        assert models(server) == {MODEL: models(server)[MODEL]}


def test_upstream_without_a_list_serves_all_the_same(serve: Serve) -> None:
    def answer(call: Call, asked: Asked) -> None:
        call.json({"choices": []} if asked.method == "POST" else {"detail": "Not Found"}, 200)

    with web(lambda call, a: call.say(404) if a.method == "GET" else answer(call, a)) as odd:
        server = serve(upstreams=f"odd={odd.url}")
        wait_for(lambda: up(server)["odd"] == 1)
        assert ok(server.chat(model="odd/m")) == {"choices": []}


def test_lists_wait_for_no_upstream(serve: Serve) -> None:
    with web(lambda call, _: call.until_left()) as slow:
        server = serve(upstreams=f"slow={slow.url}", ollama_base_url=slow.url)
        wait_for(lambda: len(slow.asked) == 2)
        began = time.monotonic()
        for path in ("/v1/models", "/v1/models/loaded", "/health", "/metrics"):
            assert server.get(path).status_code == 200
        assert time.monotonic() - began < 1.0
        wait_for(lambda: server.log().count("reason='it does not answer within 5 s'") == 2, 10)


def test_gateway_behind_a_gateway(serve: Serve, server: Server) -> None:
    """The models directory of the other one is no folder of ours."""
    inner = serve(STARTER, api_key="theirs")
    with Server(server.models, server.data.parent / "outer", **behind(inner)) as outer:
        name = f"inner/{MODEL}"
        wait_for(lambda: name in models(outer))
        assert ok(outer.get(f"/v1/models/{name}"))["owned_by"] == "inner"
        plain = text_of(outer.chat(model=name, max_tokens=8))
        with outer.stream(model=name, max_tokens=8) as stream:
            *events, done = stream.rest()
        assert (deltas(events), done) == (plain, "[DONE]")
        error_of(outer.chat(model="inner/none"), 404, "model_not_found")
        assert outer.loaded() == []


def behind(inner: Server) -> dict[str, str]:
    return {"upstreams": f"inner={inner.url}/v1", "upstream_keys": "inner=theirs"}


def test_models_of_other_servers_are_loaded_by_themselves(server: Server) -> None:
    error_of(server.post("/v1/models/load", {"model": "fake/m"}), 400, "invalid_request")
    error_of(server.unload("fake/m"), 400, "invalid_request")


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
