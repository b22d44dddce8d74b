"""An engine's life as clients see it: loads, idle times, unloads, and what the lists say."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import OTHER, Serve, paused_spare
from tests.fakes.hub import Hub, Stall
from tests.fakes.processes import all_gone, is_gone
from tests.fetching import MIB, WEIGHTS, add_big, ask, cancel
from tests.server import (
    MODEL,
    STARTER,
    Server,
    check_error,
    error_of,
    held_load,
    models_dir,
    ok,
    results,
    starter,
    story,
    together,
    when,
)
from tests.waiting import wait_for


def items(server: Server, model: str = MODEL) -> list[dict[str, Any]]:
    return [item for item in server.loaded() if item["path"] == model]


def item_of(server: Server, model: str = MODEL) -> dict[str, Any]:
    [item] = items(server, model)
    return item


# Load and unload.


def test_load_and_unload(server: Server) -> None:
    loaded = server.load(MODEL, n_ctx=1024, ttl=77)
    assert loaded["state"] == "ready"
    assert (loaded["n_ctx"], loaded["ttl"], loaded["path"]) == (1024, 77, MODEL)
    shown = item_of(server)
    assert shown.keys() == loaded.keys()
    [process] = server.engines()
    assert shown["pid"] == process.pid
    answer = ok(server.unload(MODEL))
    assert (answer["status"], answer["count"], answer["model"]) == ("unloaded", 1, MODEL)
    [result] = answer["results"]
    assert (result["path"], result["backend"], result["device"]) == (MODEL, "llamacpp", "cpu")
    assert is_gone(process)
    assert server.tree() == []
    assert server.loaded() == []


def test_unload_all(server: Server) -> None:
    server.load(MODEL)
    server.load(OTHER)
    processes = server.tree()
    answer = ok(server.post("/v1/models/unload-all"))
    assert (answer["status"], answer["count"]) == ("unloaded", 2)
    assert {result["path"] for result in answer["results"]} == {MODEL, OTHER}
    assert all_gone(processes)()
    assert ok(server.post("/v1/models/unload-all"))["count"] == 0


def test_load_without_waiting(server: Server) -> None:
    answer = server.post("/v1/models/load", {"model": MODEL, "wait": False})
    job = ok(answer, 202)
    assert (job["model"], job["path"], job["state"]) == (MODEL, MODEL, "starting")
    assert job["loading"]["phase"] == "starting"
    wait_for(lambda: [item["state"] for item in server.loaded()] == ["ready"], 10)
    assert ok(server.get(f"/v1/models/load/{job['load_id']}"))["state"] == "ready"
    again = server.post("/v1/models/load", {"model": MODEL, "wait": False})
    assert ok(again, 202)["state"] == "ready"


def test_unload_of_what_is_not_loaded(server: Server) -> None:
    assert ok(server.unload(MODEL))["count"] == 0
    error_of(server.unload(MODEL, backend="llamacpp"), 404, "model_not_loaded")
    error_of(server.unload("nosuch"), 404, "model_not_found")
    server.load(MODEL)
    error_of(server.unload(OTHER, backend="llamacpp"), 404, "model_not_loaded")
    assert ok(server.unload(OTHER))["count"] == 0
    assert ok(server.unload(STARTER, backend="llamacpp", device="cpu"))["count"] == 1


def test_unload_by_the_device_that_was_asked_for(server: Server) -> None:
    """Without a card `cuda` falls back to the cpu; unloading it by `cuda` finds it there."""
    answer = server.chat(device="cuda", n_gpu_layers=-1)
    if "x-xandrouting-device-fallback" not in answer.headers:
        pytest.skip("this machine has a card")
    assert answer.headers["x-xandrouting-device-fallback"] == "cuda->cpu"
    item = item_of(server)
    assert (item["device"], item["n_gpu_layers"]) == ("cpu", 0)
    assert server.chat(device="cuda").headers["x-xandrouting-load"] == "hit"
    assert ok(server.unload(MODEL, backend="llamacpp", device="cuda"))["count"] == 1
    assert server.loaded() == []


def test_unload_waits_for_the_stream(server: Server) -> None:
    with story(server) as stream, together(1) as pool:
        unloading = pool.submit(server.unload)
        wait_for(lambda: item_of(server)["state"] == "draining")
        *_, done = stream.rest()
        assert ok(unloading.result(10))["count"] == 1
    assert done == "[DONE]"
    assert server.loaded() == []


def test_request_during_a_drain_gets_the_next_engine(server: Server) -> None:
    with story(server) as stream, together(2) as pool:
        first = stream.response.headers["x-xandrouting-engine"]
        unloading = pool.submit(server.unload)
        wait_for(lambda: item_of(server)["state"] == "draining")
        late = pool.submit(server.chat)
        *_, done = stream.rest()
        assert ok(unloading.result(10))["count"] == 1
        answer = late.result(10)
    assert done == "[DONE]"
    assert ok(answer)
    assert incarnation(answer.headers["x-xandrouting-engine"]) == incarnation(first) + 1


def incarnation(label: str) -> int:
    return int(label.partition("#")[2])


def test_force_ends_the_stream_with_one_error(server: Server) -> None:
    with story(server, max_tokens=2000) as stream:
        assert ok(server.unload(force=True))["count"] == 1
        *chunks, last = stream.rest()
    assert "[DONE]" not in [*chunks, last]
    check_error(json.loads(last), "engine_error")
    assert not any("error" in json.loads(chunk) for chunk in chunks)
    assert server.loaded() == []


def test_force_ends_a_load(server: Server) -> None:
    with held_load(server) as asked:
        assert ok(server.unload(force=True))["count"] == 1
        error_of(asked.result(10), 503, "engine_unloaded")
    assert server.tree() == []


# Time.


def test_idle_engine_leaves_after_its_ttl(server: Server) -> None:
    assert ok(server.chat(ttl=1))
    ended = time.monotonic()
    processes = server.tree()
    wait_for(lambda: not server.loaded(), 5)
    assert time.monotonic() - ended >= 0.95
    assert all_gone(processes)()
    assert "reason=idle" in server.log()


def test_ttl_counts_from_the_end_of_the_last_request(server: Server) -> None:
    with story(server, ttl=1) as stream:
        *_, done = stream.rest()  # takes more than a second
    assert done == "[DONE]"
    left = wait_for(lambda: item_of(server)["ttl_remaining"], 0.5)
    assert 0.5 < left <= 1


def test_remaining_time_counts_down(server: Server) -> None:
    server.load(ttl=100)
    first = item_of(server)
    later = wait_for(
        lambda: (i := item_of(server))["ttl_remaining"] <= first["ttl_remaining"] - 0.2 and i
    )
    assert 99 < later["ttl_remaining"] < first["ttl_remaining"] <= 100
    assert later["ttlRemaining"] == later["ttl_remaining"]
    assert when(later["expires_at"]) == pytest.approx(time.time() + later["ttl_remaining"], abs=0.5)
    assert when(later["expires_at"]) == pytest.approx(when(later["last_used"]) + 100, abs=0.5)
    assert when(later["loaded_at"]) <= when(later["last_used"])
    assert later["loadedAt"] == later["loaded_at"]


def test_remaining_time_is_null_while_busy_and_without_a_ttl(server: Server) -> None:
    with story(server, ttl=100) as stream:
        busy = item_of(server)
        stream.rest()
    assert (busy["ttl_remaining"], busy["expires_at"], busy["active_requests"]) == (None, None, 1)
    wait_for(lambda: item_of(server)["ttl_remaining"])
    assert ok(server.chat(ttl=0))
    never = item_of(server)
    assert (never["ttl"], never["ttl_remaining"], never["expires_at"]) == (0, None, None)


def test_newest_ttl_counts(server: Server) -> None:
    server.load(ttl=50)
    assert ok(server.chat(ttl=60))
    assert item_of(server)["ttl"] == 60
    assert ok(server.chat())  # says nothing about it
    assert item_of(server)["ttl"] == 60


def test_looking_does_not_reset_the_time(server: Server) -> None:
    server.load(ttl=2)
    deadline = time.monotonic() + 10
    while server.loaded():
        for path in ("/health", "/v1/models", "/v1/models/stats", "/metrics"):
            server.get(path)
        assert time.monotonic() < deadline


# How many.


def test_many_first_requests_are_one_load(server: Server) -> None:
    before = server.stats()
    starts = server.starts()
    with together(8) as pool:
        answers = results([pool.submit(server.chat, max_tokens=1) for _ in range(8)])
    assert all(ok(answer) for answer in answers)
    how = sorted(a.headers["x-xandrouting-load"].partition(";")[0] for a in answers)
    assert how == ["cold"] + ["waited"] * 7
    after = server.stats()
    assert after["loads"] == before["loads"] + 1
    assert after["misses"] == before["misses"] + 8
    assert server.starts() == starts + 1
    assert len(server.engines()) == 1


def test_two_models_side_by_side(server: Server) -> None:
    with story(server, MODEL) as one, story(server, OTHER) as other:
        states = {item["path"]: item["active_requests"] for item in server.loaded()}
        assert states == {MODEL: 1, OTHER: 1}
        assert one.rest()[-1] == other.rest()[-1] == "[DONE]"
    assert len(server.engines()) == 2


def test_spellings_of_one_file_are_one_engine(server: Server) -> None:
    link = server.models / "again" / "link.gguf"
    link.parent.mkdir()
    link.symlink_to(server.models / STARTER)
    try:
        names = [MODEL, STARTER, "SmolLM2-135M-Instruct", "/models/again/link.gguf", "link"]
        engines = {
            server.chat(model=n, max_tokens=1).headers["x-xandrouting-engine"] for n in names
        }
    finally:
        link.unlink()
    assert len(engines) == 1
    assert len(server.loaded()) == 1


def test_limit_evicts_the_idle(serve: Serve) -> None:
    server = serve("a/a.gguf", "b/b.gguf", max_loaded=1)
    assert ok(server.chat(model="a"))
    assert ok(server.chat(model="b"))
    assert [item["model"] for item in server.loaded()] == ["b"]
    stats = server.stats()
    assert (stats["evictions"], stats["loads"], stats["loaded_count"]) == (1, 2, 1)
    assert len(server.engines()) == 1

    with story(server, "b") as stream, together(1) as pool:
        waiting = pool.submit(server.chat, model="a")
        wait_for(lambda: server.stats()["queued_requests"] == 1)
        *_, done = stream.rest()
        answer = waiting.result(20)
    assert done == "[DONE]"  # who works is never a victim
    assert ok(answer)
    assert float(answer.headers["x-xandrouting-queue"].removeprefix("dur=")) > 0


# What the lists tell.


def test_model_is_shown_as_the_client_wrote_it(server: Server) -> None:
    for spelling in ("smollm2-135m-instruct", "/models/smollm2-135m-instruct/", STARTER):
        assert ok(server.chat(model=spelling, max_tokens=1))
        item = item_of(server)
        assert (item["model"], item["model_path"], item["path"]) == (spelling, spelling, MODEL)
    assert ok(server.unload("SmolLM2-135M-Instruct"))["results"][0]["model"] == STARTER


def test_lists_while_a_model_loads(server: Server) -> None:
    with held_load(server) as asked:
        item = item_of(server)
        assert (item["state"], item["loaded_at"], item["load_seconds"]) == ("starting", None, None)
        assert ok(server.get(f"/v1/models{MODEL}"))["status"]["value"] == "loading"
        assert ok(server.get("/health"))["loaded_models"] == 0
        stats = server.stats()
        assert (stats["loaded_count"], stats["queued_requests"], stats["active_requests"]) == (
            0,
            1,
            1,
        )
    assert ok(asked.result(20))
    assert ok(server.get(f"/v1/models{MODEL}"))["status"]["value"] == "loaded"
    server.unload()
    assert ok(server.get(f"/v1/models{MODEL}"))["status"]["value"] == "unloaded"


def test_models_are_listed(server: Server) -> None:
    listed = ok(server.get("/v1/models"))
    assert listed["object"] == "list"
    by_id = {model["id"]: model for model in listed["data"]}
    assert set(by_id) == {MODEL, OTHER}
    model = by_id[MODEL]
    assert model["object"] == "model"
    assert model["created"] == int((server.models / STARTER).stat().st_mtime)
    assert model["size_bytes"] == starter().stat().st_size
    assert (model["context_length"], model["quantization"], model["backend"]) == (
        8192,
        "Q4_1",
        "llamacpp",
    )
    assert "chat" in model["capabilities"]
    assert ok(server.get(f"/v1/models/{STARTER}")) == model


def test_inventory_is_listed(server: Server) -> None:
    server.load(OTHER)
    inventory = ok(server.get("/v1/models/inventory"))
    assert inventory["total_models"] == 2
    by_path = {item["path"]: item for item in inventory["models"]}
    item = by_path[MODEL]
    size = starter().stat().st_size
    assert item["model_path"] == MODEL.rpartition("/")[0]
    assert item["size"] == item["total_size_bytes"] == item["files"][0]["size_bytes"] == size
    assert item["sizeGB"] == f"{size / (1 << 30):.2f}"
    assert (item["type"], item["quantization"], item["problem"]) == ("gguf", "Q4_1", None)
    assert item["recommended_backends"] == ["llamacpp"]
    assert item["metadata"]["context_length"] == 8192
    assert item["metadata"]["layers"] == 30
    assert (item["is_loaded"], by_path[OTHER]["is_loaded"]) == (False, True)


def test_stats_add_up(server: Server) -> None:
    before = server.stats()
    assert ok(server.chat())  # a miss
    for _ in range(3):
        assert ok(server.chat())
    error_of(server.chat(model="nosuch"), 404, "model_not_found")
    after = server.stats()
    grown = {name: after[name] - before[name] for name in ("hits", "misses", "loads")}
    assert grown == {"hits": 3, "misses": 1, "loads": 1}
    assert after["cache_hits"] == after["hits"]
    assert after["cache_misses"] == after["misses"]
    assert after["hit_rate"] == pytest.approx(
        after["hits"] / (after["hits"] + after["misses"]), abs=1e-3
    )
    assert after["total_requests_served"] == before["total_requests_served"] + 4
    assert after["total_models_loaded"] == after["loaded_count"] == len(server.loaded()) == 1
    assert after["available_count"] == 2
    assert after["active_models"] == after["active_requests"] == 0
    assert after["cache_uptime_seconds"] > before["cache_uptime_seconds"]


def test_memory_is_what_the_tree_takes(serve: Serve) -> None:
    """PSS shares pages among those who have them: here the model's file is this engine's alone."""
    server = serve()
    own = server.models / STARTER
    own.unlink()
    own.write_bytes(starter().read_bytes())
    server.load()
    assert ok(server.chat("word " * 200))
    pid = item_of(server)["pid"]

    def as_measured() -> bool:
        shown = item_of(server)["memory"]["measured_bytes"]
        truth = pss_of_tree(pid)
        return shown is not None and abs(shown - truth) <= 0.1 * truth

    wait_for(as_measured, 10)
    item = item_of(server)["memory"]
    assert item["host_bytes"] == item["measured_bytes"]
    assert item["device_bytes"] == 0
    assert item["estimated_bytes"] >= own.stat().st_size


def pss_of_tree(pid: int) -> int:
    root = psutil.Process(pid)
    return sum(p.memory_full_info().pss for p in [root, *root.children(recursive=True)])


def test_front_page_health_docs_and_metrics(server: Server) -> None:
    root = ok(server.get("/"))
    assert (root["name"], root["status"]) == ("XandRouting", "running")
    health = ok(server.get("/health"))
    assert health["status"] == "healthy"
    assert health["engines"]["llamacpp"]["available"] is True
    assert "xllamacpp" in health["engines"]["llamacpp"]["version"]
    assert health["engines"]["vllm"]["available"] is False
    assert health["engines"]["vllm"]["reason"]
    assert server.get("/docs").status_code == 200
    assert "/v1/chat/completions" in ok(server.get("/openapi.json"))["paths"]
    server.load()
    metrics = server.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert MODEL in metrics.text


def test_long_wait_is_told_in_comments(serve: Serve) -> None:
    """A stream that waits gets its headers and comments; then its answer, or one error."""
    server = serve(keepalive_after_s=0.2)
    with paused_spare(server) as process, server.stream() as stream:
        assert stream.response.status_code == 200
        assert stream.response.headers["content-type"] == "text/event-stream"
        # llama.cpp writes an empty comment whenever a second brought no token.
        all_lines = (line for line in stream.response.iter_lines() if line not in ("", ":"))
        assert next(all_lines).startswith(": loading")
        process.resume()
        lines = list(all_lines)
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith((": ", "data: ")) for line in lines)


def test_stalled_load_is_ended(serve: Serve) -> None:
    server = serve(load_stall_s=1, keepalive_after_s=0.2)
    with together(1) as pool, paused_spare(server) as process:
        asked = pool.submit(stream_lines, server)
        lines = asked.result(20)
    errors = [line for line in lines if line.startswith("data: ")]
    assert len(errors) == 1
    error = check_error(json.loads(errors[0].removeprefix("data: ")), "loading_timeout")
    assert error["details"]["reason"] == "stalled"
    wait_for(lambda: is_gone(process))
    assert server.loaded() == []


def stream_lines(server: Server) -> list[str]:
    with server.stream() as stream:
        assert stream.response.status_code == 200
        return [line for line in stream.response.iter_lines() if line]


def test_models_need_not_be_there_at_the_start(serve: Serve) -> None:
    server = serve("later/later.gguf")
    (server.models / "later/later.gguf").unlink()
    assert ok(server.get("/v1/models"))["data"] == []
    error_of(server.chat(model="later"), 404, "model_not_found")
    models_dir(server.models, "later/later.gguf")
    assert ok(server.chat(model="later"))


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux only")
def test_the_gateway_puts_no_engine_off(server: Server) -> None:
    ok(server.chat(max_tokens=1))
    assert os.sched_getscheduler(server.pid) == os.SCHED_BATCH
    assert os.sched_getscheduler(item_of(server)["pid"]) == os.SCHED_OTHER


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux only")
def test_the_gateway_does_not_wait_for_a_mover(serve: Serve) -> None:
    with Hub() as hub:
        add_big(hub, "Org/Slow")
        hub.fault(f"Org/Slow/{WEIGHTS}", Stall(MIB), times=None)
        server = serve(hf_endpoint=hub.url)
        job = ask(server, "Org/Slow")
        wait_for(lambda: os.sched_getscheduler(server.pid) == os.SCHED_OTHER)
        cancel(server, job["job_id"])
        wait_for(lambda: os.sched_getscheduler(server.pid) == os.SCHED_BATCH)
