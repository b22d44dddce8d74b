"""Waiting: loads that are watched, taken back or too slow, and the queue for a place."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import httpx2
import pytest

from tests.e2e.conftest import Serve
from tests.fakes.processes import is_gone, paused
from tests.server import (
    Server,
    chat_body,
    check_error,
    error_of,
    held,
    held_load,
    ok,
    results,
    story,
    together,
)
from tests.waiting import wait_for

A, B, C = (f"/models/{name}/{name}.gguf" for name in "abc")
SMALL: dict[str, Any] = {"n_ctx": 1024, "n_parallel": 1}
ONE_FITS = "300MiB"  # an engine with these takes some 180 MiB


def chat(server: Server, model: str, **fields: Any) -> Any:
    return server.chat(model=model, **{"max_tokens": 2, **SMALL, **fields})


def states(server: Server) -> dict[str, str]:
    return {item["path"]: item["state"] for item in server.loaded()}


def queued(server: Server) -> int:
    return int(server.stats()["queued_requests"])


def start_order(server: Server) -> list[str]:
    return re.findall(r"engine starting engine=(\S+)@", server.log())


# Loads that nobody waits for.


def begin(server: Server, model: str, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "wait": False, **SMALL, **fields}
    return ok(server.post("/v1/models/load", body), 202)


def job(server: Server, load_id: str) -> dict[str, Any]:
    return ok(server.get(f"/v1/models/load/{load_id}"))


def cancel(server: Server, load_id: str) -> httpx2.Response:
    return server.client.delete(f"/v1/models/load/{load_id}")


def test_load_in_the_background_is_watched_to_its_end(serve: Serve) -> None:
    server = serve("a/a.gguf")
    begun = begin(server, "a")
    load_id = begun["load_id"]
    assert load_id.startswith("load_")
    assert (begun["model"], begun["path"], begun["state"]) == ("a", A, "starting")
    with held(server, A):
        shown = wait_for(lambda: (j := job(server, load_id))["loading"]["percent"] and j)
        assert shown["state"] == "starting"
        assert shown["loading"]["phase"] in ("starting", "loading_weights", "warming_up")
        assert 0 < shown["loading"]["percent"] < 100
        assert shown["error"] is None
    wait_for(lambda: job(server, load_id)["state"] == "ready", 10)
    assert states(server) == {A: "ready"}
    assert job(server, load_id)["loading"] is None
    error_of(cancel(server, load_id), 400, "invalid_request")
    assert states(server) == {A: "ready"}


def test_cancelled_load_ends_its_engine(serve: Serve) -> None:
    server = serve("a/a.gguf")
    load_id = begin(server, A)["load_id"]
    with held(server, A) as process:
        assert ok(cancel(server, load_id))["state"] == "cancelled"
        wait_for(lambda: is_gone(process))
    wait_for(lambda: server.loaded() == [])
    assert server.tree() == []
    assert job(server, load_id)["state"] == "cancelled"
    error_of(cancel(server, load_id), 400, "invalid_request")
    assert ok(server.get(f"/v1/models{A}"))["status"] == {
        "value": "unloaded",
        "failed": False,
        "exit_code": None,
        "message": None,
        "loading": None,
    }
    assert ok(chat(server, A))  # nothing is held against the model


def test_cancelling_one_of_two_loads_leaves_the_other(serve: Serve) -> None:
    server = serve("a/a.gguf")
    first, second = (begin(server, A)["load_id"] for _ in range(2))
    with held(server, A) as process:
        assert ok(cancel(server, first))["state"] == "cancelled"
        assert job(server, second)["state"] == "starting"
        assert not is_gone(process)
    wait_for(lambda: job(server, second)["state"] == "ready", 10)
    assert job(server, first)["state"] == "cancelled"
    assert server.starts() == 1


def test_cancelled_load_goes_on_for_a_request_that_waits(serve: Serve) -> None:
    server = serve("a/a.gguf")
    load_id = begin(server, A)["load_id"]
    with together(1) as pool, held(server, A):
        asked = pool.submit(chat, server, A)
        wait_for(lambda: queued(server) == 2)
        assert ok(cancel(server, load_id))["state"] == "cancelled"
    assert ok(asked.result())
    assert server.starts() == 1


def test_cancelled_load_in_the_queue_lets_the_next_one_go(serve_own: Serve) -> None:
    server = serve_own("a", "b", "c", ram_budget=ONE_FITS, fair_wait_s=60)
    with story(server, A, **SMALL) as stream:
        with paused(server.engine(A).process):
            first, second = begin(server, B), begin(server, C)
            assert (first["state"], first["queue_position"]) == ("queued", 0)
            assert (second["state"], second["queue_position"]) == ("queued", 1)
            assert ok(cancel(server, first["load_id"]))["state"] == "cancelled"
            assert job(server, second["load_id"])["queue_position"] == 0
        assert stream.rest()[-1] == "[DONE]"
    wait_for(lambda: job(server, second["load_id"])["state"] == "ready", 20)
    assert start_order(server) == [A, C]


def test_background_load_that_fails_says_why(serve: Serve) -> None:
    server = serve("a/a.gguf")
    load_id = begin(server, A)["load_id"]
    with held(server, A) as process:
        process.kill()
    wait_for(lambda: job(server, load_id)["state"] == "failed")
    assert job(server, load_id)["error"]["code"] == "engine_start_failed"
    error_of(cancel(server, load_id), 400, "invalid_request")


def test_unknown_load(serve: Serve) -> None:
    server = serve("a/a.gguf")
    for load_id in ("load_0", "x", "%00"):
        error_of(server.get(f"/v1/models/load/{load_id}"), 404, "not_found")
        error_of(cancel(server, load_id), 404, "not_found")


def test_background_load_of_what_cannot_be_loaded_is_refused_at_once(serve: Serve) -> None:
    server = serve("a/a.gguf", ram_budget=ONE_FITS)
    body = {"model": "nosuch", "wait": False}
    error_of(server.post("/v1/models/load", body), 404, "model_not_found")
    body = {"model": A, "wait": False, "n_ctx": 8192, "n_parallel": 8}
    error_of(server.post("/v1/models/load", body), 503, "insufficient_memory")
    assert server.starts() == 0


# How far a load is.


def test_stream_is_told_how_far_the_load_is(serve: Serve) -> None:
    server = serve("a/a.gguf", keepalive_after_s=0.2)
    begin(server, A)
    with held(server, A) as process, server.stream(model=A, **SMALL) as stream:
        assert stream.response.status_code == 200
        lines = stream.response.iter_lines()
        told = next(line for line in lines if re.fullmatch(r": loading \d+%", line))
        assert 0 < int(told.removeprefix(": loading ").rstrip("%")) < 100
        process.resume()
        rest = [line for line in lines if line not in ("", ":")]
    assert all(line.startswith((": loading", "data: ")) for line in rest), rest
    assert rest[-1] == "data: [DONE]"
    assert server.starts() == 1


def test_stream_in_the_queue_is_told_so(serve_own: Serve) -> None:
    server = serve_own("a", "b", ram_budget=ONE_FITS, keepalive_after_s=0.2, fair_wait_s=60)
    server.load(A, **SMALL)
    with story(server, A, **SMALL) as busy, server.stream(model=B, **SMALL) as stream:
        lines = stream.response.iter_lines()
        assert next(line for line in lines if line) == ": queued behind 0"
        assert busy.rest()[-1] == "[DONE]"
        rest = [line for line in lines if line not in ("", ":")]
    assert all(line.startswith((": loading", ": queued", "data: ")) for line in rest), rest
    assert rest[-1] == "data: [DONE]"


def test_stream_whose_load_fails_ends_with_one_error(serve: Serve) -> None:
    server = serve("a/a.gguf", keepalive_after_s=0.2)
    begin(server, A)
    with held(server, A) as process, server.stream(model=A, **SMALL) as stream:
        lines = stream.response.iter_lines()
        assert next(line for line in lines if line).startswith(": loading")
        process.kill()
        data = [line for line in lines if line.startswith("data: ")]
    assert len(data) == 1
    error = check_error(json.loads(data[0].removeprefix("data: ")), "engine_start_failed")
    assert A in error["message"]


def test_plain_request_gives_up_and_the_load_goes_on(serve: Serve) -> None:
    server = serve("a/a.gguf", max_load_wait_s=1.5)
    with held_load(server, A, **SMALL) as asked:
        answer = asked.result(10)
        error = error_of(answer, 503, "loading_timeout")
        assert int(answer.headers["retry-after"]) > 0
        loading = error["details"]["loading"]
        assert loading["phase"] in ("starting", "loading_weights", "warming_up")
        assert 0 < loading["percent"] < 100  # by the memory it has by now
        assert loading["seconds_left"] >= 0
        load = server.post("/v1/models/load", {"model": A, **SMALL})
        error_of(load, 503, "loading_timeout")
        assert states(server) == {A: "starting"}
        shown = ok(server.get(f"/v1/models{A}"))["status"]
        assert (shown["value"], shown["loading"]["phase"]) == ("loading", loading["phase"])
        [listed] = ok(server.get("/v1/models"))["data"]
        assert listed["status"]["loading"]["percent"] > 0
        [item] = server.loaded()
        assert item["loading"]["percent"] > 0
    wait_for(lambda: states(server) == {A: "ready"}, 10)
    assert chat(server, A).headers["x-xandrouting-load"] == "hit"
    assert server.starts() == 1
    assert ok(server.get(f"/v1/models{A}"))["status"]["loading"] is None


def test_known_load_time_tells_the_seconds_left(serve: Serve) -> None:
    server = serve("a/a.gguf")
    server.load(A, **SMALL)
    wait_for(lambda: server.loaded()[0]["memory"]["measured_bytes"])
    expected_s = server.loaded()[0]["load_seconds"]
    server.unload(A)
    begin(server, A)
    with held(server, A):
        loading = server.loaded()[0]["loading"]
        assert 0 <= loading["seconds_left"] <= expected_s
        wait_for(lambda: server.loaded()[0]["loading"]["percent"] == 99, 10)  # it is late
        assert server.loaded()[0]["loading"]["seconds_left"] == 0
    wait_for(lambda: states(server) == {A: "ready"}, 10)


# The queue for a place.


def test_wait_for_a_place_is_bounded(serve_own: Serve) -> None:
    server = serve_own("a", "b", ram_budget=ONE_FITS, max_queue_wait_s=0.5, fair_wait_s=60)
    with story(server, A, max_tokens=150, **SMALL) as busy:
        with paused(server.engine(A).process):
            asked = time.monotonic()
            answer = chat(server, B)
            error = error_of(answer, 503, "queue_timeout")
            assert 0.5 <= time.monotonic() - asked < 2
            assert int(answer.headers["retry-after"]) > 0
            assert B in error["message"]
            with server.stream(model=B, **SMALL) as stream:
                assert stream.response.status_code == 503
            assert queued(server) == 0
        assert busy.rest()[-1] == "[DONE]"
    assert (server.starts(), states(server)) == (1, {A: "ready"})
    assert ok(chat(server, B))


def test_load_that_began_is_not_bounded_by_the_queue(serve: Serve) -> None:
    server = serve("a/a.gguf", max_queue_wait_s=0.5)
    with held_load(server, A, **SMALL) as asked:
        wait_for(lambda: server.loaded()[0]["loading"]["percent"])  # a second and more
        assert not asked.done()
    assert ok(asked.result(20))


def test_full_queue_refuses(serve_own: Serve) -> None:
    server = serve_own("a", "b", "c", ram_budget=ONE_FITS, max_queue=1, fair_wait_s=60)
    with story(server, A, **SMALL) as busy, together(1) as pool:
        waiting = pool.submit(chat, server, B)
        wait_for(lambda: queued(server) == 1)
        for model in (B, C):
            answer = chat(server, model)
            error_of(answer, 429, "queue_full")
            assert int(answer.headers["retry-after"]) > 0
        assert chat(server, A).headers["x-xandrouting-load"] == "hit"  # it need not queue
        assert busy.rest()[-1] == "[DONE]"
        assert ok(waiting.result(20))
    assert queued(server) == 0


def test_first_come_first_served_and_one_model_together(serve_own: Serve) -> None:
    server = serve_own("a", "b", "c", ram_budget=ONE_FITS, fair_wait_s=60, min_residency_s=0)
    with story(server, A, **SMALL) as busy, together(4) as pool:
        asked = []
        with paused(server.engine(A).process):
            for count, model in enumerate((C, B, C, B), 1):
                asked.append(pool.submit(chat, server, model))
                wait_for(lambda c=count: queued(server) == c)
        assert busy.rest()[-1] == "[DONE]"
        assert all(ok(answer) for answer in results(asked))
    assert start_order(server) == [A, C, B]


def test_smaller_one_behind_does_not_pass_the_first(serve_own: Serve) -> None:
    """B needs the whole budget, C would fit beside A; C came later."""
    server = serve_own("a", "b", "c", ram_budget="420MiB", fair_wait_s=60, min_residency_s=0)
    large = {"n_ctx": 4096, "n_parallel": 2}  # some 350 MiB
    with story(server, A, **SMALL) as busy, together(2) as pool:
        with paused(server.engine(A).process):
            first = pool.submit(chat, server, B, **large)
            wait_for(lambda: queued(server) == 1)
            second = pool.submit(chat, server, C)
            wait_for(lambda: queued(server) == 2)
            assert server.starts() == 1
        assert busy.rest()[-1] == "[DONE]"
        assert all(ok(answer) for answer in results([first, second]))
    assert start_order(server) == [A, B, C]


def test_waiting_client_that_leaves_is_out_of_the_queue(serve_own: Serve) -> None:
    server = serve_own("a", "b", "c", ram_budget=ONE_FITS, fair_wait_s=60)
    with story(server, A, **SMALL) as busy:
        with paused(server.engine(A).process):
            with pytest.raises(httpx2.ReadTimeout):
                server.post("/v1/chat/completions", chat_body(model=B, **SMALL), timeout=0.3)
            wait_for(lambda: queued(server) == 0)
        assert busy.rest()[-1] == "[DONE]"
    assert start_order(server) == [A]


def test_two_clients_on_one_place_do_not_take_turns_with_every_request(serve_own: Serve) -> None:
    server = serve_own("a", "b", ram_budget=ONE_FITS, min_residency_s=2)
    for model in (A, A, B, B):  # it is known of both that they are asked for again at once
        assert ok(chat(server, model))
    before = server.starts()
    began = time.monotonic()
    until = began + 10

    def loop(model: str) -> list[Any]:
        answers = []
        while time.monotonic() < until:
            answers.append(chat(server, model))
        return answers

    with together(2) as pool:
        of_a, of_b = results([pool.submit(loop, model) for model in (A, B)])
    lasted = time.monotonic() - began
    assert {answer.status_code for answer in (*of_a, *of_b)} == {200}
    assert 2 <= server.starts() - before <= lasted / 2 + 2
    for answers in (of_a, of_b):
        hits = sum(a.headers["x-xandrouting-load"] == "hit" for a in answers)
        assert hits > len(answers) / 2


def test_busy_engine_makes_room_in_time(serve_own: Serve) -> None:
    """Who keeps the only place busy without a pause does not keep it for ever."""
    server = serve_own("a", "b", ram_budget=ONE_FITS, fair_wait_s=1, min_residency_s=0)
    done = threading.Event()

    def loop() -> list[Any]:
        answers = []
        while not done.is_set():
            answers.append(chat(server, A, max_tokens=20, ignore_eos=True))
        return answers

    with together(3) as pool:
        loops = [pool.submit(loop) for _ in range(2)]
        wait_for(lambda: states(server) == {A: "ready"}, 10)
        try:
            assert ok(chat(server, B))
        finally:
            done.set()
        assert all(ok(answer) for answers in results(loops) for answer in answers)


# Deaths while others wait.


def test_killed_engine_makes_room_for_those_who_wait(serve_own: Serve) -> None:
    server = serve_own("a", "b", "c", ram_budget=ONE_FITS, fair_wait_s=60, min_residency_s=0)
    with story(server, A, max_tokens=2000, **SMALL) as busy, together(2) as pool:
        asked = []
        for count, model in enumerate((B, C), 1):
            asked.append(pool.submit(chat, server, model))
            wait_for(lambda c=count: queued(server) == c)
        server.engine(A).process.kill()
        *_, last = busy.rest()
        check_error(json.loads(last), "engine_error")
        assert all(ok(answer) for answer in results(asked))
    assert start_order(server) == [A, B, C]
    assert queued(server) == 0


def test_killed_load_fails_its_own_waiters_and_no_others(serve_own: Serve) -> None:
    server = serve_own("a", "b", ram_budget=ONE_FITS)
    begin(server, A)
    with held(server, A) as process, together(3) as pool:
        of_a = [pool.submit(chat, server, A) for _ in range(2)]
        wait_for(lambda: queued(server) == 3)
        of_b = pool.submit(chat, server, B)
        wait_for(lambda: queued(server) == 4)
        process.kill()
        for answer in results(of_a):
            error = error_of(answer, 503, "engine_start_failed")
            assert error["details"]["reason"] == "killed"
        assert ok(of_b.result(20))
    assert start_order(server) == [A, B]
