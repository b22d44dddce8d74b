"""How the server ends: by signals, in order; by kill -9, with nothing left behind."""

from __future__ import annotations

import json
import signal
import time

import httpx2
import psutil
import pytest

from tests.e2e.conftest import Serve, paused_spare
from tests.fakes.processes import all_gone, is_gone, paused
from tests.server import (
    MODEL,
    Server,
    check_error,
    error_of,
    ok,
    together,
)
from tests.waiting import wait_for

STORY = {"text": "Tell me a long story.", "ignore_eos": True}


def test_sigterm_when_idle(serve: Serve) -> None:
    server = serve()
    assert server.stop(5) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_with_an_idle_engine(serve: Serve, number: signal.Signals) -> None:
    server = serve()
    server.load()
    tree = server.everything()
    assert len(tree) >= 2  # a guard and its engine
    server.signal(number)
    assert server.wait(5) == 0
    assert all_gone(tree)()
    assert "Traceback" not in server.log()


def test_running_stream_ends_normally_and_new_work_is_refused(serve: Serve) -> None:
    server = serve()
    with server.stream(max_tokens=80, **STORY) as stream:
        stream.first()
        [engine] = server.engines()
        tree = server.everything()
        with paused(engine):  # it would be at its end before all is asked
            server.signal()
            wait_for(lambda: "server stopping" in server.log())
            refused = server.chat()
            error_of(refused, 503, "shutting_down")
            assert int(refused.headers["retry-after"]) > 0
            error_of(server.post("/v1/models/load", {"model": MODEL}), 503, "shutting_down")
            assert server.get("/health").status_code == 200
        *chunks, done = stream.rest()
    assert done == "[DONE]"
    assert not any("error" in json.loads(chunk) for chunk in chunks)
    assert server.wait(5) == 0
    assert all_gone(tree)()


def test_running_plain_answer_ends_normally(serve: Serve) -> None:
    server = serve()
    server.load()
    engine = server.engine()
    with together(1) as pool:
        asked = pool.submit(server.chat, max_tokens=200, **STORY)
        wait_for(engine.busy)
        server.signal()
        assert ok(asked.result(20))["usage"]["completion_tokens"] == 200
    assert server.wait(5) == 0


def test_stream_that_outlasts_the_grace_ends_with_an_error(serve: Serve) -> None:
    server = serve(shutdown_grace_s=0.5)
    with server.stream(max_tokens=4000, **STORY) as stream:
        stream.first()
        tree = server.everything()
        server.signal()
        *chunks, last = stream.rest()
    assert "[DONE]" not in chunks
    assert not any("error" in json.loads(chunk) for chunk in chunks)
    assert check_error(json.loads(last), "engine_error")
    assert server.wait(5) == 0
    assert all_gone(tree)()
    assert "Traceback" not in server.log()


def test_signal_while_a_model_loads(serve: Serve) -> None:
    server = serve()
    with together(1) as pool, paused_spare(server):
        asked = pool.submit(server.chat)
        wait_for(server.engines)
        tree = server.everything()
        server.signal()
        error_of(asked.result(5), 503, "shutting_down")
    assert server.wait(10) == 0
    assert all_gone(tree)()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_at_once(serve: Serve, number: signal.Signals) -> None:
    server = serve(shutdown_grace_s=60)
    with server.stream(max_tokens=4000, **STORY) as stream:
        stream.first()
        tree = server.everything()
        server.signal(number)
        wait_for(lambda: "server stopping" in server.log())
        asked = time.monotonic()
        server.signal(number)
        assert server.wait(2) == 128 + number
        assert time.monotonic() - asked < 1
        with pytest.raises(httpx2.RemoteProtocolError):
            stream.rest()
    wait_for(all_gone(tree), 2)


@pytest.mark.parametrize("when", ["idle", "busy", "loading"])
def test_kill_9_leaves_no_engine(serve: Serve, when: str) -> None:
    server = serve()
    if when == "loading":
        server.post("/v1/models/load", {"model": "smollm2-135m-instruct", "wait": False})
        wait_for(server.engines)
    else:
        server.load()
    if when == "busy":
        with server.stream(max_tokens=4000, **STORY) as stream:
            stream.first()
            die_by_kill_9(server)
            with pytest.raises(httpx2.HTTPError):
                stream.rest()
    else:
        die_by_kill_9(server)


def die_by_kill_9(server: Server) -> None:
    tree = server.everything()
    assert len(tree) >= 2
    server.kill9()
    wait_for(all_gone(tree), 2)


def test_restart_right_after_kill_9(serve: Serve) -> None:
    server = serve()
    server.load()
    port = server.url.rpartition(":")[2]
    tree = server.everything()
    server.kill9()
    again = serve(port=port)
    assert ok(again.chat())
    assert again.url == server.url
    assert all(is_gone(process) for process in tree)
    assert len(again.engines()) == 1


def test_killed_guard_does_not_leave_its_engine(serve: Serve) -> None:
    server = serve()
    server.load()
    [engine] = server.engines()
    guard = psutil.Process(engine.ppid())
    assert guard.pid != server.pid
    guard.kill()
    wait_for(lambda: is_gone(engine), 2)
    wait_for(lambda: server.loaded() == [])
    assert ok(server.chat())


def test_port_that_is_taken_is_said(serve: Serve) -> None:
    server = serve()
    other = Server(server.models, server.data.parent / "other", port=server.url.rpartition(":")[2])
    with pytest.raises(AssertionError, match=r"cannot listen on 127\.0\.0\.1"):
        other.start()
    assert other.wait() == 2
    assert ok(server.get("/health"))
