"""The stream of events, as a client of the running server sees it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.e2e.conftest import Serve
from tests.server import Events, Server, error_of, held, ok, story, together, when
from tests.waiting import wait_for

A, B, C = (f"/models/{name}/{name}.gguf" for name in "abc")
SMALL: dict[str, Any] = {"n_ctx": 1024, "n_parallel": 1}
ONE_FITS = "300MiB"


def begin(server: Server, model: str) -> None:
    ok(server.post("/v1/models/load", {"model": model, "wait": False, **SMALL}), 202)


def model_event(events: Events, model: str, event: str) -> dict[str, Any]:
    return events.until(
        lambda kind, data: kind == "model" and (data["id"], data["event"]) == (model, event)
    )


def number(event_id: str) -> int:
    return int(event_id.rpartition("-")[2])


def test_snapshot_comes_first(serve_own: Serve) -> None:
    server = serve_own("a", ram_budget=ONE_FITS)
    with server.events() as events:
        kind, data = next(iter(events))
        assert (kind, data["loaded"]) == ("snapshot", [])
        [host] = data["system"]["devices"]
        assert (host["device"], host["budget_bytes"]) == ("host", 300 << 20)
        assert when(data["now"]) == pytest.approx(time.time(), abs=5)
    server.load(A, **SMALL)
    with server.events() as events:
        kind, data = next(iter(events))
        assert kind == "snapshot"
        [item] = data["loaded"]
        assert (item["path"], item["state"]) == (A, "ready")
        assert item.keys() == server.loaded()[0].keys()
        assert item["decision"]["verdict"] == "load"


def test_load_is_told_from_its_start_to_its_end(serve_own: Serve) -> None:
    server = serve_own("a", ram_budget=ONE_FITS)
    with server.events() as events:
        begin(server, A)
        starting = model_event(events, A, "starting")
        assert (starting["engine"], starting["state"]) == ("llamacpp/cpu#1", "starting")
        assert starting["decision"]["verdict"] == "load"
        assert starting["decision"]["estimate"]["host"]["kv_cache_bytes"] > 0
        with held(server, A):
            progress = events.until(
                lambda kind, data: (
                    kind == "model"
                    and data["event"] == "progress"
                    and data["progress"]["percent"] is not None
                )
            )
            assert 0 < progress["progress"]["percent"] < 100
            assert progress["progress"]["seconds_left"] >= 0
            gauge = events.until(lambda kind, _: kind == "gauge")
            assert gauge["devices"][0]["reserved_bytes"] > 100 << 20
        ready = model_event(events, A, "ready")
        assert (ready["state"], ready["load_seconds"] > 0) == ("ready", True)
        times = [starting["at"], gauge["at"], ready["at"]]
        assert sorted(times, key=when) == times
        assert "progress" not in ready
        ok(server.unload(A))
        stopping = model_event(events, A, "stopping")
        assert (stopping["reason"], stopping["state"]) == ("unload", "stopping")
        assert model_event(events, A, "gone")["state"] == "gone"


def test_eviction_is_told_with_its_reason(serve_own: Serve) -> None:
    server = serve_own("a", "b", ram_budget=ONE_FITS)
    server.load(A, **SMALL)
    with server.events() as events:
        begin(server, B)
        stopping = model_event(events, A, "stopping")
        assert stopping["reason"] == "evicted"
        decision = stopping["decision"]
        assert (decision["verdict"], decision["model"]) == ("evict", B)
        [victim] = decision["victims"]
        assert (victim["model"], victim["engine"]) == (A, stopping["engine"])
        assert victim["frees"]["host"] > 100 << 20
        notice = events.until(lambda kind, _: kind == "notice")
        assert (notice["kind"], notice["model"], notice["for"]) == ("evicted", A, B)
        told = {}
        for kind, data in events:
            if kind == "model":
                told[data["id"], data["event"]] = data
                if (data["id"], data["event"]) == (B, "ready"):
                    break
    assert (A, "gone") in told
    assert told[B, "starting"]["decision"]["model"] == B


def test_failure_and_idle_end_are_noticed(serve_own: Serve) -> None:
    server = serve_own("a", "b")
    with server.events(topics="notice,model") as events:
        begin(server, A)
        with held(server, A) as process:
            process.kill()
        assert model_event(events, A, "failed")["error"]["code"] == "engine_start_failed"
        notice = events.until(lambda kind, _: kind == "notice")
        assert (notice["kind"], notice["model"]) == ("load_failed", A)
        assert notice["error"]["code"] == "engine_start_failed"
        server.load(B, ttl=1, **SMALL)
        notice = events.until(lambda kind, _: kind == "notice")
        assert (notice["kind"], notice["model"]) == ("ttl_unload", B)


def test_killed_engine_is_told(serve_own: Serve) -> None:
    server = serve_own("a")
    server.load(A, **SMALL)
    with server.events(topics="model") as events:
        server.engine(A).process.kill()
        assert model_event(events, A, "gone")["engine"] == "llamacpp/cpu#1"


def test_who_comes_back_misses_nothing(serve_own: Serve) -> None:
    server = serve_own("a")
    with server.events() as events:
        next(iter(events))
        begin(server, A)
        model_event(events, A, "starting")
        last_id = events.last_id
    wait_for(lambda: [item["state"] for item in server.loaded()] == ["ready"], 10)
    ok(server.unload(A))
    seen: list[tuple[str, Any]] = []
    expected = number(last_id)
    with server.events(last_id) as events:
        for kind, data in events:
            expected += 1
            assert number(events.last_id) == expected  # each of them, once, in order
            seen.append((kind, data.get("event")))
            if seen[-1] == ("model", "gone"):
                break
    told = [event for kind, event in seen if kind == "model" and event != "progress"]
    assert told == ["ready", "stopping", "gone"]
    with server.events(last_event_id=last_id) as events:  # for who cannot send headers
        assert next(iter(events))[0] != "snapshot"


@pytest.mark.parametrize("last_id", ["", "x", "0-0", "-1", "9" * 300])
def test_unknown_last_event_gets_a_snapshot(serve: Serve, last_id: str) -> None:
    server = serve("a/a.gguf")
    with server.events(last_id) as events:
        assert next(iter(events))[0] == "snapshot"


def test_last_event_of_an_earlier_server_gets_a_snapshot(serve: Serve) -> None:
    server = serve("a/a.gguf")
    with server.events() as events:
        events.until(lambda kind, _: kind == "gauge")
        last_id = events.last_id
    server.stop()
    server.start()
    with server.events(last_id) as events:
        assert next(iter(events))[0] == "snapshot"


def test_topics_are_chosen(serve: Serve) -> None:
    server = serve("a/a.gguf")
    with server.events(topics="model") as events:
        assert next(iter(events))[0] == "snapshot"
        begin(server, A)
        kinds = set()
        for kind, data in events:
            kinds.add(kind)
            if data["event"] == "ready":
                break
    assert kinds == {"model"}


@pytest.mark.parametrize("topics", ["nosuch", "model,nosuch", "", ",", "Model"])
def test_unknown_topic_is_refused(serve: Serve, topics: str) -> None:
    server = serve("a/a.gguf")
    answer = server.get("/v1/events", params={"topics": topics})
    error = error_of(answer, 400, "invalid_request")
    assert error["param"] == "topics"
    assert "model" in error["details"]["choices"]


def test_stream_ends_with_the_server(serve: Serve) -> None:
    server = serve("a/a.gguf")
    server.load(A, **SMALL)
    with server.events() as events:
        next(iter(events))
        asked = time.monotonic()
        server.signal()
        kinds = [(kind, data.get("event")) for kind, data in events]
        assert time.monotonic() - asked < 2
    assert kinds[-1] == ("bye", None)
    assert ("model", "stopping") in kinds
    assert ("model", "gone") in kinds
    assert server.wait(5) == 0
    assert "Traceback" not in server.log()


def test_stream_goes_on_while_requests_end(serve: Serve) -> None:
    """Whoever watches a shutdown sees it to its end."""
    server = serve("a/a.gguf")
    with story(server, A, **SMALL) as stream, server.events() as events, together(1) as pool:
        next(iter(events))
        rest = pool.submit(stream.rest)
        server.signal()
        kinds = [kind for kind, _ in events]
        assert rest.result(20)[-1] == "[DONE]"
    assert kinds[-1] == "bye"
    assert server.wait(5) == 0


def test_clients_that_leave_are_forgotten(serve: Serve) -> None:
    server = serve("a/a.gguf")
    with server.events() as kept:
        next(iter(kept))
        files = server.process.num_fds()
        for _ in range(100):
            with server.events() as events:
                next(iter(events))
        wait_for(lambda: server.process.num_fds() <= files)
        begin(server, A)
        model_event(kept, A, "ready")
        asked = time.monotonic()
        server.signal()
        assert [kind for kind, _ in kept][-1] == "bye"
    assert server.wait(5) == 0  # nobody's task is left to wait for
    assert time.monotonic() - asked < 3


def test_many_listen_at_once(serve: Serve) -> None:
    server = serve("a/a.gguf")

    heard: list[str] = []  # a snapshot each, until the load begins

    def listen() -> list[str]:
        told = []
        with server.events(topics="model") as events:
            for kind, data in events:
                told.append(data["event"] if kind == "model" else kind)
                heard.append(kind)
                if told[-1] == "ready":
                    return told
        raise AssertionError(told)

    with together(50) as pool:
        listening = [pool.submit(listen) for _ in range(50)]
        wait_for(lambda: len(heard) == 50, 20)
        begin(server, A)
        for one in listening:
            told = one.result(20)
            assert told[0] == "snapshot"
            assert told[-1] == "ready"
