"""Ollama behind the gateway: known without being configured, its memory shown and commanded."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import openai
import pytest

from tests.e2e.conftest import Serve
from tests.e2e.test_upstream import free_port, models, up
from tests.fakes.ollama import GIB, Ollama, ollama
from tests.fakes.processes import paused
from tests.fakes.web import web
from tests.server import MODEL, Server, deltas, error_of, models_dir, ok
from tests.waiting import wait_for

LLAMA = "ollama/llama3.2:latest"


@pytest.fixture(scope="module")
def there() -> Iterator[Ollama]:
    names = {"llama3.2:latest": 2 * GIB, "qwen2.5:7b": 5 * GIB, "user/tiny:latest": GIB}
    names["nomic-embed:latest"] = GIB
    with ollama(models=names, embedders=frozenset({"nomic-embed:latest"})) as fake:
        yield fake


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory, there: Ollama) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("ollama")
    address = there.url.removeprefix("http://") + "/v1/"  # as people write it
    with Server(models_dir(root / "models"), root / "data", ollama_base_url=address) as server:
        wait_for(lambda: LLAMA in models(server))
        yield server


@pytest.fixture(autouse=True)
def nothing_runs(there: Ollama) -> None:
    there.running.clear()


def test_its_models_are_listed(server: Server) -> None:
    listed = models(server)
    assert {name for name in listed if name != MODEL} == {
        LLAMA,
        "ollama/qwen2.5:7b",
        "ollama/user/tiny:latest",
        "ollama/nomic-embed:latest",
    }
    item = listed[LLAMA]
    assert item == item | {
        "owned_by": "ollama",
        "backend": "ollama",
        "size_bytes": 2 * GIB,
        "quantization": "Q4_K_M",
        "context_length": None,
        "created": 1759559643,
    }
    assert item["status"]["value"] == "unloaded"
    for spelling in ("llama3.2", "llama3.2:latest"):
        assert ok(server.get(f"/v1/models/ollama/{spelling}")) == item
    error_of(server.get("/v1/models/ollama/none"), 404, "model_not_found")
    health = ok(server.get("/health"))["engines"]["ollama"]
    assert (health["available"], health["reason"], health["version"]) == (True, None, "0.12.6")


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"model": "ollama/llama3.2"}, "llama3.2"),
        ({"model": "ollama/llama3.2", "backend": "ollama"}, "llama3.2"),
        ({"model": "llama3.2", "backend": "ollama"}, "llama3.2"),
        ({"model": "llama3.2:latest", "backend": "ollama"}, "llama3.2:latest"),
        ({"model": "user/tiny", "backend": "ollama"}, "user/tiny"),
    ],
)
def test_every_way_to_ask(
    server: Server, there: Ollama, fields: dict[str, str], asked: str
) -> None:
    answer = server.chat(max_tokens=2, ttl=5, n_ctx=512, **fields)
    assert ok(answer)["choices"][0]["message"]["content"] == "word0 word1 "
    assert answer.headers["x-xandrouting-engine"] == "ollama/remote#1"
    sent = there.web.posts()[-1]
    assert sent.path == "/v1/chat/completions"
    assert sent.json["model"] == asked
    assert not {"backend", "ttl", "n_ctx"} & sent.json.keys()


def test_stream_and_the_other_calls(server: Server) -> None:
    with server.stream(model=LLAMA, max_tokens=3) as stream:
        *events, done = stream.rest()
    assert (deltas(events), done) == ("word0 word1 word2 ", "[DONE]")
    body = {"model": LLAMA, "prompt": "Hi"}
    assert ok(server.post("/v1/completions", body))["choices"][0]["text"] == "word0 word1"
    body = {"model": LLAMA, "input": "Hi"}
    assert ok(server.post("/v1/embeddings", body))["data"][0]["embedding"] == [0.5, -0.5]


def test_openai_s_own_client(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert LLAMA in [model.id for model in client.models.list()]
    message: Any = {"role": "user", "content": "Hi"}
    answer = client.chat.completions.create(model=LLAMA, messages=[message], max_tokens=1)
    assert answer.choices[0].message.content == "word0 "
    with pytest.raises(openai.NotFoundError, match="model 'none' not found"):
        client.chat.completions.create(model="ollama/none", messages=[message])


def test_what_it_holds_is_loaded(server: Server) -> None:
    item = ok(server.post("/v1/models/load", {"model": "llama3.2", "backend": "ollama", "ttl": 60}))
    assert item == item | {
        "model": "llama3.2",
        "path": LLAMA,
        "backend": "ollama",
        "device": "remote",
        "node": "ollama",
        "state": "ready",
        "n_ctx": 4096,
        "pid": None,
        "ttl": None,
        "active_requests": None,
        "decision": None,
    }
    assert 50 < item["ttl_remaining"] <= 60
    expires_at = datetime.fromisoformat(item["expires_at"])
    assert timedelta(0) < expires_at - datetime.now(UTC) <= timedelta(seconds=60)
    assert item["memory"] == {
        "estimated_bytes": None,
        "charged_bytes": 0,
        "measured_bytes": 3 * GIB,
        "device_bytes": 2 * GIB,
        "host_bytes": GIB,
    }
    [shown] = server.loaded()
    assert shown["model"] == shown["path"] == LLAMA
    assert models(server)[LLAMA]["status"]["value"] == "loaded"
    assert server.stats()["loaded_count"] == 0  # of ours


def test_ttl_0_is_for_ever(server: Server, there: Ollama) -> None:
    item = server.load("ollama/llama3.2", ttl=0)
    assert there.web.posts()[-1].json["keep_alive"] == -1
    assert (item["ttl"], item["ttl_remaining"], item["expires_at"]) == (0, None, None)
    server.load("ollama/llama3.2")
    assert "keep_alive" not in there.web.posts()[-1].json


def test_load_of_a_model_for_embeddings(server: Server, there: Ollama) -> None:
    item = server.load("ollama/nomic-embed", ttl=60)
    assert (item["path"], item["state"]) == ("ollama/nomic-embed:latest", "ready")
    assert there.web.posts()[-1].json["keep_alive"] == 60
    assert ok(server.unload("ollama/nomic-embed"))["count"] == 1


def test_the_case_of_a_name_does_not_matter(server: Server) -> None:
    assert server.load("ollama/LLaMA3.2")["path"] == LLAMA
    assert ok(server.get("/v1/models/ollama/Llama3.2"))["id"] == LLAMA
    assert ok(server.unload("ollama/LLAMA3.2"))["count"] == 1


def test_load_that_cannot_be(server: Server) -> None:
    error = error_of(
        server.post("/v1/models/load", {"model": "ollama/none"}), 404, "model_not_found"
    )
    assert "model 'none' not found" in error["message"]
    body = {"model": LLAMA, "wait": False}
    error_of(server.post("/v1/models/load", body), 400, "invalid_request")


def test_load_that_takes_too_long(serve: Serve) -> None:
    with ollama(load_s=5.0) as slow:
        server = serve(ollama_base_url=slow.url, max_load_wait_s=0.3)
        answer = server.post("/v1/models/load", {"model": LLAMA})
        error_of(answer, 503, "loading_timeout")
        assert "retry-after" in answer.headers


@pytest.mark.parametrize("fields", [{"model": LLAMA}, {"model": "llama3.2", "backend": "ollama"}])
def test_unload(server: Server, there: Ollama, fields: dict[str, str]) -> None:
    server.load(LLAMA)
    answer = ok(server.post("/v1/models/unload", fields))
    assert (answer["status"], answer["count"]) == ("unloaded", 1)
    [result] = answer["results"]
    assert result == {
        "model": fields["model"],
        "model_path": fields["model"],
        "path": LLAMA,
        "cache_key": f"{LLAMA}|ollama|remote",
        "backend": "ollama",
        "device": "remote",
        "status": "unloaded",
    }
    assert there.running == {}
    assert there.web.posts()[-1].json == {
        "model": "llama3.2:latest",
        "stream": False,
        "keep_alive": 0,
    }
    assert server.loaded() == []


def test_unload_of_what_does_not_run(server: Server) -> None:
    assert ok(server.unload(LLAMA))["count"] == 0
    error_of(server.unload("llama3.2", backend="ollama"), 404, "model_not_loaded")


def test_unload_of_a_busy_one_waits_for_it(serve: Serve) -> None:
    with ollama(busy_s=0.7) as busy:
        server = serve(ollama_base_url=busy.url)
        server.load(LLAMA)
        began = time.monotonic()
        assert ok(server.unload(LLAMA))["results"][0]["status"] == "unloaded"
        assert time.monotonic() - began > 0.6


def test_unload_all_is_for_this_server_s_own(server: Server, there: Ollama) -> None:
    server.load(LLAMA)
    assert ok(server.post("/v1/models/unload-all"))["count"] == 0
    assert list(there.running) == ["llama3.2:latest"]


def test_what_a_chat_has_it_load_is_shown_at_once(server: Server, there: Ollama) -> None:
    began = time.monotonic()
    for model in (LLAMA, "ollama/qwen2.5:7b"):
        assert ok(server.chat(model=model))
        wait_for(lambda m=model: m in {item["path"] for item in server.loaded()})
    assert time.monotonic() - began < 8.0  # two looks that came by themselves are 10 s apart


def test_one_bad_entry_is_passed_over(serve: Serve) -> None:
    with ollama(models={"llama3.2:latest": 2 * GIB, "odd:1": -1}) as odd:
        server = serve(ollama_base_url=odd.url)
        wait_for(lambda: LLAMA in models(server))
        assert "ollama/odd:1" not in models(server)
        assert up(server) == {"ollama": 1}
        assert ok(server.chat(model=LLAMA))
        log = server.log()
    assert log.count("upstream entry passed over upstream=ollama entry=/api/tags 'odd:1'") == 1


def test_preload_and_pin_of_the_settings(serve: Serve) -> None:
    with ollama(models={"llama3.2:latest": 2 * GIB, "qwen2.5:7b": 5 * GIB}, load_s=0.5) as there:
        server = serve(
            ollama_base_url=there.url,
            upstreams=f"other={there.url}",
            preload="ollama/none,ollama/llama3.2,other/llama3.2",
            pinned="ollama/qwen2.5:7b",
        )
        wait_for(lambda: len(there.running) == 2)
        loads = [asked.json for asked in there.web.posts()]
        wait_for(lambda: "preloaded model=ollama/llama3.2" in server.log())
        assert server.system()["pinned"] == []
        assert {item["path"]: item["ttl"] for item in server.loaded()} == {
            "ollama/qwen2.5:7b": 0,
            LLAMA: None,
        }
        log = server.log()
    assert [(load["model"], load.get("keep_alive")) for load in loads] == [
        ("qwen2.5:7b", -1),
        ("none", None),
        ("llama3.2", None),
    ]
    assert "preload failed model=ollama/none code=model_not_found" in log
    assert "preload failed model=other/llama3.2 code=invalid_request" in log
    assert "preloaded model=ollama/qwen2.5:7b" in log


def test_preload_where_no_ollama_is(serve: Serve) -> None:
    server = serve(ollama_base_url=f"127.0.0.1:{free_port()}", preload="ollama/llama3.2")
    wait_for(lambda: "preload failed model=ollama/llama3.2" in server.log())
    assert "code=upstream_unreachable" in server.log()


def test_the_end_waits_for_no_preload(serve: Serve) -> None:
    with ollama(load_s=20.0) as slow:
        server = serve(ollama_base_url=slow.url, preload="ollama/llama3.2")
        wait_for(lambda: slow.web.posts())
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 10.0


def test_nothing_more_is_preloaded_once_the_server_stops(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    names = {"llama3.2:latest": GIB, "qwen2.5:7b": GIB}
    with ollama(models=names) as slow:
        load = slow._load

        def load_slowly(name: str, keep_alive_s: float | None = None) -> None:
            goes_on.wait(30)
            load(name, keep_alive_s)

        monkeypatch.setattr(slow, "_load", load_slowly)
        server = serve(ollama_base_url=slow.url, preload="ollama/llama3.2,ollama/qwen2.5:7b")
        wait_for(lambda: slow.web.posts())
        with server.stream("A story.", model=MODEL, max_tokens=200, ignore_eos=True) as stream:
            stream.first()
            [engine] = server.engines(MODEL)
            with paused(engine):
                server.signal()
                wait_for(lambda: "server stopping" in server.log())
                goes_on.set()
                wait_for(lambda: slow.running)
            assert stream.rest()[-1] == "[DONE]"
        assert server.wait(10) == 0
        assert [asked.json["model"] for asked in slow.web.posts()] == ["llama3.2"]


def test_pin_by_wish_is_answered_with_what_does_it(server: Server) -> None:
    error = error_of(server.post("/v1/models/pin", {"model": LLAMA}), 400, "invalid_request")
    assert "ttl" in error["message"]


def test_it_can_be_switched_off(serve: Serve) -> None:
    server = serve(ollama_base_url="none")
    assert ok(server.get("/health"))["engines"]["ollama"]["available"] is False
    assert up(server) == {}
    assert list(models(server)) == [MODEL]
    error_of(server.chat(model=LLAMA), 404, "model_not_found")


def test_down_then_up_then_down(serve: Serve) -> None:
    port = free_port()
    server = serve(ollama_base_url=f"127.0.0.1:{port}")
    error = error_of(server.chat(model=LLAMA), 502, "upstream_unreachable")
    assert "upstream ollama cannot be reached: connection refused" in error["message"]
    error_of(server.post("/v1/models/load", {"model": LLAMA}), 502, "upstream_unreachable")
    error_of(server.unload(LLAMA), 502, "upstream_unreachable")
    assert list(models(server)) == [MODEL]
    found = error_of(server.get(f"/v1/models/{LLAMA}"), 404, "model_not_found")
    assert "ollama is down: connection refused" in found["message"]
    with ollama(port):
        wait_for(lambda: LLAMA in models(server), 10)
        assert ok(server.chat(model=LLAMA))
        assert up(server) == {"ollama": 1}
    wait_for(lambda: up(server) == {"ollama": 0}, 15)
    assert list(models(server)) == [MODEL]
    assert server.loaded() == []
    health = ok(server.get("/health"))["engines"]["ollama"]
    assert (health["available"], health["reason"]) == (False, "connection refused")


def test_configured_one_goes_before_the_known_one(serve: Serve) -> None:
    with ollama() as mine, web(lambda call, _: call.say(500)) as other:
        server = serve(
            upstreams=f"ollama={mine.url}", upstream_keys="ollama=k", ollama_base_url=other.url
        )
        assert ok(server.chat(model="llama3.2", backend="ollama"))
        assert other.asked == []
        assert {asked.headers["authorization"] for asked in mine.web.asked} == {"Bearer k"}


def test_what_is_no_ollama_is_told(serve: Serve) -> None:
    with web(lambda call, _: call.say(404)) as other:
        server = serve(ollama_base_url=other.url)
        wait_for(lambda: "it has no /api/tags" in server.log())
