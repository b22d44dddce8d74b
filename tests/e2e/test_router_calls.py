"""llama-server's router mode, as its README says it ("Using multiple models").

What that leaves open (which error for what) is as in its server-models.cpp.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from tests.e2e.conftest import OTHER, Serve
from tests.server import (
    MODEL,
    STARTER,
    Server,
    chat_body,
    error_of,
    held,
    held_load,
    ok,
    story,
    text_of,
    together,
)
from tests.waiting import wait_for

NOSUCH = "ggml-org/nosuch-GGUF:Q4_K_M"


def entries(server: Server, query: str = "") -> dict[str, dict[str, Any]]:
    answer = ok(server.get(f"/models{query}"))
    assert answer["object"] == "list"
    return {model["id"]: model for model in answer["data"]}


def status(server: Server, model: str = MODEL) -> dict[str, Any]:
    found: dict[str, Any] = entries(server)[model]["status"]
    return found


def load(server: Server, model: str = MODEL) -> httpx2.Response:
    return server.post("/models/load", {"model": model})


def unload(server: Server, model: str = MODEL) -> httpx2.Response:
    return server.post("/models/unload", {"model": model})


def load_and_wait(server: Server, model: str = MODEL) -> None:
    assert ok(load(server, model)) == {"success": True}
    wait_for(lambda: status(server, model)["value"] == "loaded", 20)


@contextmanager
def sse(server: Server) -> Iterator[Iterator[dict[str, Any]]]:
    """Listen to /models/sse; yields what its events hold."""

    def events(response: httpx2.Response) -> Iterator[dict[str, Any]]:
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if name == "data":
                yield json.loads(value)
            else:
                assert name == "", line  # an empty line or a comment: data is all there is

    with server.client.stream("GET", "/models/sse") as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        yield events(response)


def statuses(events: Iterator[dict[str, Any]], last: str, model: str = MODEL) -> list[str]:
    """Return the statuses of a model up to `last`, each once."""
    found: list[str] = []
    deadline = time.monotonic() + 20.0
    for event in events:
        assert event.keys() <= {"model", "event", "data"}
        if event["model"] == model and event["event"] == "model_status":
            said = event["data"]["status"]
            if said not in found[-1:]:
                found.append(said)
            if said == last:
                break
        assert time.monotonic() < deadline
    return found


# GET /models.


def test_the_list(server: Server) -> None:
    found = entries(server)
    assert found.keys() == {MODEL, OTHER}
    model = found[MODEL]
    assert (model["object"], model["path"]) == ("model", MODEL)
    assert model["architecture"] == {"input_modalities": ["text"], "output_modalities": ["text"]}
    assert model["status"]["value"] == "unloaded"
    assert not model["status"]["failed"]
    assert "exit_code" not in model["status"]
    assert "meta" not in model
    assert "progress" not in model["status"]
    assert (model["source"], model["can_remove"]) == ("models_dir", True)
    assert isinstance(model["created"], int)


def test_what_is_loaded_tells_its_arguments(server: Server) -> None:
    server.load(MODEL, n_ctx=1024, n_parallel=2)
    model = entries(server)[MODEL]
    assert model["status"]["value"] == "loaded"
    program, *args = model["status"]["args"]
    options = dict(zip(args[::2], args[1::2], strict=True))
    assert program == "llama-server"
    assert (options["--model"], options["--ctx-size"], options["--parallel"]) == (
        MODEL,
        "2048",
        "2",
    )
    assert (model["meta"]["n_ctx"], model["meta"]["n_ctx_train"]) == (1024, 8192)


def test_reload_finds_what_came_and_unloads_what_changed(serve_own: Serve) -> None:
    server = serve_own("a", "b")
    a, b, c = (f"/models/{name}/{name}.gguf" for name in "abc")
    load_and_wait(server, a)
    load_and_wait(server, b)
    path = server.models / "b" / "b.gguf"
    new = server.models / "c" / "c.gguf"
    new.parent.mkdir()
    path.rename(new)
    with sse(server) as events:
        found = entries(server, "?reload=1")
        assert found.keys() == {a, c}
        assert found[a]["status"]["value"] == "loaded"
        assert found[c]["status"]["value"] == "unloaded"
        assert statuses(events, "unloaded", b) == ["unloaded"]
        assert next(events) == {"model": "*", "event": "models_reload"}
    assert [item["path"] for item in server.loaded()] == [a]


# POST /models/load.


def test_load(server: Server) -> None:
    load_and_wait(server)
    assert text_of(server.chat())
    assert server.starts(MODEL) >= 1


def test_load_of_a_short_name(server: Server) -> None:
    assert ok(load(server, "smollm2-135m-instruct")) == {"success": True}
    wait_for(lambda: status(server)["value"] == "loaded", 20)


def test_load_twice(server: Server) -> None:
    ok(load(server))
    for _ in range(2):
        error = error_of(load(server), 400, "invalid_request")
        assert error["message"].startswith("model is already running")
        assert error["type"] == "invalid_request_error"
        wait_for(lambda: status(server)["value"] == "loaded", 20)  # the second time it is loaded


def test_load_in_the_middle_of_a_load(server: Server) -> None:
    with held_load(server) as asked:
        wait_for(lambda: status(server)["value"] == "loading")
        assert "llama-server" in status(server)["args"]
        error = error_of(load(server), 400, "invalid_request")
        assert error["message"].startswith("model is already running")
    assert text_of(asked.result(30))


def test_load_of_what_is_not_there(server: Server) -> None:
    error = error_of(load(server, NOSUCH), 404, "model_not_found")
    assert error["message"].startswith("model is not found")
    error_of(server.post("/models/load", {}), 400, "invalid_request")
    error_of(server.post("/models/load", {"model": 1}), 400, "invalid_request")


def test_a_load_that_waits_for_room_shows_as_loading(serve: Serve) -> None:
    server = serve(STARTER, OTHER.removeprefix("/models/"), max_loaded=1)
    load_and_wait(server)
    with story(server, max_tokens=2000), together(1) as pool:
        asked = pool.submit(load, server, OTHER)
        assert ok(asked.result(10)) == {"success": True}
        assert status(server, OTHER)["value"] == "loading"
        assert error_of(load(server, OTHER), 400, "invalid_request")
        assert ok(unload(server, OTHER)) == {"success": True}  # it has not begun
        assert status(server, OTHER)["value"] == "unloaded"
        assert server.starts(OTHER) == 0


def test_a_load_that_fails_tells_so(serve: Serve) -> None:
    server = serve()
    with sse(server) as events:
        ok(load(server))
        with held(server) as process:
            process.kill()
        assert statuses(events, "unloaded") == ["loading", "unloaded"]
    found = status(server)
    assert (found["value"], found["failed"]) == ("unloaded", True)
    assert found["exit_code"] == -9
    again = ok(server.get("/v1/models"))["data"][0]["status"]
    assert (again["value"], again["exit_code"]) == ("failed", -9)


# POST /models/unload.


def test_unload(server: Server) -> None:
    load_and_wait(server)
    assert ok(unload(server)) == {"success": True}
    wait_for(lambda: status(server)["value"] == "unloaded")
    assert server.engines() == []


def test_unload_twice(server: Server) -> None:
    server.load()
    ok(unload(server))
    error = error_of(unload(server), 400, "invalid_request")
    assert error["message"].startswith("model is not running")
    assert error["type"] == "invalid_request_error"


def test_unload_of_what_is_not_there(server: Server) -> None:
    error = error_of(unload(server, NOSUCH), 400, "invalid_request")
    assert error["message"].startswith("model is not found")


def test_unload_in_the_middle_of_a_load(server: Server) -> None:
    """Unloading ends a load at once, and it counts as no failure."""
    with held_load(server) as asked:
        assert ok(unload(server)) == {"success": True}
        error_of(asked.result(10), 503, "engine_unloaded")
    wait_for(lambda: status(server)["value"] == "unloaded")
    assert not status(server)["failed"]
    load_and_wait(server)


def test_unload_lets_a_short_answer_end(server: Server) -> None:
    with story(server, max_tokens=60) as stream, together(1) as pool:
        asked = pool.submit(unload, server)
        assert stream.rest()[-1] == "[DONE]"
        assert ok(asked.result(15)) == {"success": True}
    assert status(server)["value"] == "unloaded"


# GET /models/sse.


def test_events_of_a_life(server: Server) -> None:
    with sse(server) as events:
        ok(load(server))
        assert statuses(events, "loaded") == ["loading", "loaded"]
        ok(unload(server))
        assert statuses(events, "unloaded") == ["unloaded"]


def test_progress_is_told(server: Server) -> None:
    with sse(server) as events:
        ok(load(server))
        with held(server):
            told = (event["data"].get("progress") for event in events)
            progress = next(found for found in told if found and found["value"] > 0)
        assert statuses(events, "loaded")[-1] == "loaded"
    assert progress["current"] in progress["stages"]
    assert progress["value"] < 1


def test_sleep_is_told(serve: Serve) -> None:
    server = serve(soft_idle_s=0.5)
    with sse(server) as events:
        ok(load(server))
        assert statuses(events, "sleeping") == ["loading", "loaded", "sleeping"]
    assert status(server)["value"] == "sleeping"
    error = error_of(load(server), 400, "invalid_request")  # llama-server calls it running
    assert error["message"].startswith("model is already running")
    asked = server.post("/v1/chat/completions?autoload=false", chat_body())
    assert text_of(asked)  # a sleeper is woken


# autoload.


def test_autoload_off_for_one_request(server: Server) -> None:
    for value in ("false", "0", "no"):
        answer = server.post(f"/v1/chat/completions?autoload={value}", chat_body())
        error = error_of(answer, 400, "invalid_request")
        assert error["message"].startswith("model is not loaded")
    assert server.engines() == []
    server.load()
    assert text_of(server.post("/v1/chat/completions?autoload=false", chat_body()))
    error_of(
        server.post("/v1/chat/completions?autoload=false", chat_body(model="nosuch")),
        404,
        "model_not_found",
    )


def test_autoload_off_waits_for_a_load_that_is_under_way(server: Server) -> None:
    with together(1) as pool, held_load(server):
        asked = pool.submit(server.post, "/v1/chat/completions?autoload=false", chat_body())
        wait_for(lambda: server.stats()["queued_requests"] == 2)  # with the one that loads it
        assert not asked.done()
    assert text_of(asked.result(20))


def test_autoload_off_as_a_setting(serve: Serve) -> None:
    server = serve(models_autoload="false")
    for path in ("/v1/chat/completions", "/v1/chat/completions?autoload="):
        error = error_of(server.post(path, chat_body()), 400, "invalid_request")
        assert error["message"].startswith("model is not loaded")
    error_of(server.get(f"/upstream{MODEL}/health"), 400, "invalid_request")
    assert server.engines() == []
    assert ok(server.get("/props"))["models_autoload"] is False
    for value in ("true", "1"):
        assert text_of(server.post(f"/v1/chat/completions?autoload={value}", chat_body()))
        ok(unload(server))
    load_and_wait(server)
    assert text_of(server.chat())


# GET /props.


def test_props_of_the_router(serve: Serve) -> None:
    props = ok(serve(max_loaded=3).get("/props"))
    assert (props["role"], props["max_instances"], props["models_autoload"]) == ("router", 3, True)
    assert props["default_generation_settings"] == {"params": {}, "n_ctx": 0}
    assert props["model_path"] == "none"


def test_props_of_a_model(server: Server) -> None:
    server.load(ttl=100)
    before = server.loaded()[0]
    props = ok(server.get("/props", params={"model": MODEL}))
    own = server.engine().get("/props")
    assert props.keys() == own.keys()
    assert props["default_generation_settings"]["n_ctx"] == 4096
    assert props["model_path"] == MODEL
    assert str(server.models) not in json.dumps(props)
    after = server.loaded()[0]
    assert after["last_used"] == before["last_used"]
    assert after["ttl_remaining"] < before["ttl_remaining"]


@pytest.mark.parametrize("autoload", ["", "&autoload=true", "&autoload=false"])
def test_props_load_nothing(server: Server, autoload: str) -> None:
    answer = server.get(f"/props?model={MODEL}{autoload}")
    error = error_of(answer, 400, "invalid_request")
    assert error["message"].startswith("model is not loaded")
    assert server.engines() == []


def test_props_of_what_is_not_there(server: Server) -> None:
    error = error_of(server.get("/props?model=nosuch"), 400, "invalid_request")
    assert error["message"] == "model 'nosuch' not found"


def test_all_of_it_asks_for_the_key(serve: Serve) -> None:
    server = serve(api_key="k")
    for path in ("/models", "/models/sse", "/props"):
        error_of(server.get(path), 401, "invalid_api_key")
    error_of(load(server), 401, "invalid_api_key")
    error_of(server.client.delete("/models", params={"model": MODEL}), 401, "invalid_api_key")
    headers = {"authorization": "Bearer k"}
    assert ok(server.get("/models", headers=headers))["data"]
