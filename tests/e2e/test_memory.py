"""Bytes as clients see them: what fits, who leaves for whom, and what is said about it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import Serve
from tests.fakes.gguf_writer import write_gguf
from tests.server import (
    Server,
    error_of,
    held_load,
    models_dir,
    ok,
    results,
    starter,
    story,
    together,
)
from tests.waiting import wait_for

A, B, C = (f"/models/{name}/{name}.gguf" for name in "abc")
MIB = 1 << 20
# An engine with these takes some 180 MiB: two have room in this budget, three have not.
SMALL: dict[str, Any] = {"n_ctx": 1024, "n_parallel": 1}
TWO_FIT = "420MiB"
HUGE: dict[str, Any] = {"n_ctx": 8192, "n_parallel": 4}  # some 900 MiB


def small_chat(server: Server, model: str, **fields: Any) -> str:
    """Ask a small engine; return how its load went: `hit`, `cold` or `waited`."""
    answer = server.chat(model=model, max_tokens=2, **SMALL, **fields)
    ok(answer)
    return str(answer.headers["x-xandrouting-load"]).partition(";")[0]


def paths(server: Server) -> list[str]:
    return [item["path"] for item in server.loaded()]


def item_of(server: Server, model: str) -> dict[str, Any]:
    [item] = [item for item in server.loaded() if item["path"] == model]
    return item


def host_of(holder: dict[str, Any]) -> dict[str, Any]:
    """Return the line of main memory, of the system or of a decision."""
    [line] = [device for device in holder["devices"] if device["device"] == "host"]
    return line


def is_measured(server: Server, model: str) -> bool:
    return item_of(server, model)["memory"]["measured_bytes"] is not None


# Beside each other, and one too many.


def test_third_model_evicts_the_cheapest_of_two(serve_own: Serve) -> None:
    server = serve_own("a", "b", "c", ram_budget=TWO_FIT)
    assert small_chat(server, B) == "cold"
    assert [small_chat(server, A) for _ in range(4)] == ["cold", "hit", "hit", "hit"]
    assert sorted(paths(server)) == [A, B]
    wait_for(lambda: is_measured(server, A) and is_measured(server, B))
    charged = item_of(server, B)["memory"]["charged_bytes"]

    assert small_chat(server, C) == "cold"

    assert sorted(paths(server)) == [A, C]  # A was asked for more often
    assert (server.stats()["evictions"], server.starts()) == (1, 3)
    decision = item_of(server, C)["decision"]
    [victim] = decision["victims"] or pytest.fail(str(decision))
    assert (victim["model"], victim["engine"]) == (B, "llamacpp/cpu#1")
    assert victim["frees"]["host"] == pytest.approx(charged, rel=0.05)
    assert victim["score"] == pytest.approx(
        victim["reload_seconds"] * victim["uses"] / (victim["idle_seconds"] + 1), rel=0.01
    )


def test_decision_is_kept_with_the_load(serve_own: Serve) -> None:
    server = serve_own("a", ram_budget=TWO_FIT)
    loaded = server.load(A, **SMALL)
    decision = loaded["decision"]
    assert (decision["verdict"], decision["fits"], decision["model"]) == ("load", True, A)
    assert {name: decision["options"][name] for name in SMALL} == SMALL
    assert decision["victims"] == decision["alternatives"] == []
    terms = decision["estimate"]["host"]
    file_bytes = (server.models / "a/a.gguf").stat().st_size
    assert 0.95 * file_bytes < terms["weights_bytes"] <= file_bytes
    assert terms["kv_cache_bytes"] == 1024 * 30 * 2 * 3 * 64 * 2  # layers, K and V, heads, f16
    parts = ("weights_bytes", "kv_cache_bytes", "compute_bytes", "overhead_bytes")
    assert sum(terms[part] for part in parts) == terms["total_bytes"]
    assert decision["estimate"]["host_bytes"] == terms["total_bytes"]
    assert loaded["memory"]["estimated_bytes"] == terms["total_bytes"]
    assert (decision["estimate"]["source"], decision["estimate"]["device_bytes"]) == (
        "estimated",
        0,
    )
    assert 0 < decision["expected_seconds"] < 60
    host = host_of(decision)
    assert (host["used_bytes"], host["free_bytes"]) == (0, 420 * MIB)


def test_system_adds_up(serve_own: Serve) -> None:
    server = serve_own("a", "b", ram_budget=TWO_FIT)
    machine = psutil.virtual_memory().total
    empty = host_of(server.system())
    assert empty["budget_bytes"] == empty["free_bytes"] == 420 * MIB
    assert empty["budget_bytes"] < empty["capacity_bytes"] <= machine
    assert (empty["used_bytes"], empty["reserved_bytes"]) == (0, 0)
    assert empty["budget_gb"] == round(420 / 1024, 2)

    assert small_chat(server, A) == "cold"
    with held_load(server, B, **SMALL):
        wait_for(lambda: adds_up(server))
        starting = host_of(server.system())
        charged = item_of(server, B)["memory"]["charged_bytes"]
        assert starting["reserved_bytes"] == charged > 150 * MIB
        assert starting["used_bytes"] > 100 * MIB
    wait_for(lambda: is_measured(server, B))

    def as_measured() -> bool:
        """The most that was measured counts; until an engine has worked, what was promised."""
        both = host_of(server.system())
        assert both["reserved_bytes"] == 0
        taken = sum(item["memory"]["measured_bytes"] for item in server.loaded())
        return bool(taken <= both["used_bytes"] <= 1.05 * taken)

    wait_for(as_measured, 10)
    wait_for(lambda: adds_up(server))

    ok(server.post("/v1/models/unload-all"))
    gone = host_of(server.system())
    assert (gone["used_bytes"], gone["reserved_bytes"]) == (0, 0)
    assert gone["free_bytes"] == 420 * MIB


def adds_up(server: Server) -> bool:
    """Whether what is used and reserved is what the engines are charged, just now."""
    host = host_of(server.system())
    charged = sum(item["memory"]["charged_bytes"] for item in server.loaded())
    assert host["free_bytes"] == 420 * MIB - host["used_bytes"] - host["reserved_bytes"]
    return bool(host["used_bytes"] + host["reserved_bytes"] == charged)


def test_estimate_is_near_what_is_measured(serve_own: Serve) -> None:
    server = serve_own("a")
    ok(server.chat("word " * 300, model=A))
    wait_for(lambda: is_measured(server, A))
    memory = item_of(server, A)["memory"]
    assert memory["estimated_bytes"] == pytest.approx(memory["measured_bytes"], rel=0.15)


# Too large.


def test_too_large_is_refused_with_numbers_and_nobody_leaves(serve_own: Serve) -> None:
    server = serve_own("a", "b", ram_budget=TWO_FIT)
    assert small_chat(server, A) == "cold"
    for _ in range(2):
        answer = server.chat(model=B, **HUGE)
        error = error_of(answer, 503, "insufficient_memory")
        assert "retry-after" not in answer.headers  # waiting does not help
        details = error["details"]
        host = host_of(details)
        assert host["budget_bytes"] == 420 * MIB
        assert details["needed_bytes"] == host["needed_bytes"] > 800 * MIB
        assert details["lacking_bytes"] == {"host": host["needed_bytes"] - 420 * MIB}
        assert {a["change"] for a in details["alternatives"]} <= {
            "n_ctx",
            "n_parallel",
            "cache_type",
        }
        assert all(0 < a["host_bytes"] <= 420 * MIB for a in details["alternatives"])
        assert B in error["message"]
        assert "420.0 MiB" in error["message"]  # the budget
        with server.stream(model=B, **HUGE) as stream:
            assert stream.response.status_code == 503
        error_of(server.post("/v1/models/load", {"model": B, **HUGE}), 503, "insufficient_memory")
    assert paths(server) == [A]
    assert (server.starts(), server.stats()["evictions"]) == (1, 0)
    assert small_chat(server, B) == "cold"  # who asks for less is served


@pytest.mark.parametrize("change", ["n_ctx", "n_parallel", "cache_type"])
def test_alternative_really_loads(serve_own: Serve, change: str) -> None:
    server = serve_own("a", ram_budget="600MiB")
    error = error_of(server.chat(model=A, **HUGE), 503, "insufficient_memory")
    [offer] = [a for a in error["details"]["alternatives"] if a["change"] == change]
    changed = {name: value for name, value in offer.items() if name in HUGE or "cache" in name}
    asked = HUGE | changed
    planned = server.plan(A, **asked)
    assert (planned["verdict"], planned["estimate"]["host_bytes"]) == ("load", offer["host_bytes"])
    loaded = server.load(A, **asked)
    assert {name: loaded[name] for name in asked} == asked
    assert ok(server.chat(model=A, **asked))
    wait_for(lambda: is_measured(server, A))
    assert item_of(server, A)["memory"]["measured_bytes"] <= 600 * MIB


def test_smaller_quantization_is_an_alternative(serve: Serve) -> None:
    server = serve(ram_budget="400MiB")
    for name, size in (("Q8_0", 800 * MIB), ("Q4_1", 100 * MIB)):
        path = write_gguf(server.models / "big" / f"big-{name}.gguf")
        os.truncate(path, size)
    plan = server.plan("/models/big/big-Q8_0.gguf")
    assert plan["verdict"] == "never"
    assert "/models/big/big-Q4_1.gguf" in [a.get("model") for a in plan["alternatives"]]
    error = error_of(server.chat(model="big-Q8_0"), 503, "insufficient_memory")
    [offer] = [a for a in error["details"]["alternatives"] if a["change"] == "model"]
    assert offer["model"] == "/models/big/big-Q4_1.gguf"
    assert offer["model"] in error["message"]
    assert server.plan(offer["model"])["verdict"] == "load"
    assert server.starts() == 0


def test_inventory_says_what_fits(serve: Serve) -> None:
    server = serve("a/a.gguf", ram_budget="400MiB")
    os.truncate(write_gguf(server.models / "big" / "big.gguf"), 800 * MIB)
    items = ok(server.get("/v1/models/inventory"))["models"]
    assert {item["path"]: item["fits"] for item in items} == {
        A: True,
        "/models/big/big.gguf": False,
    }


# The dry run.


def test_plan_says_what_becomes_of_a_request_and_changes_nothing(serve_own: Serve) -> None:
    server = serve_own("a", "b", "c", ram_budget=TWO_FIT)

    def verdict(model: str, **fields: Any) -> dict[str, Any]:
        before = paths(server), server.starts(), server.stats()
        plan = server.plan(model, **fields)
        after = paths(server), server.starts(), server.stats()
        assert after[:2] == before[:2]
        same = ("hits", "misses", "loads", "evictions", "queued_requests")
        assert [after[2][name] for name in same] == [before[2][name] for name in same]
        assert plan["fits"] is (plan["verdict"] != "never")
        return plan

    assert verdict(A, **SMALL)["verdict"] == "load"
    assert small_chat(server, A) == "cold"
    assert verdict(A, **SMALL)["verdict"] == "hit"
    assert verdict(A)["verdict"] == "hit"  # says nothing about it
    reload = verdict(A, n_ctx=2048)
    assert (reload["verdict"], reload["options"]["n_ctx"]) == ("reload", 2048)
    assert verdict(B, **SMALL)["verdict"] == "load"
    assert small_chat(server, B) == "cold"
    assert small_chat(server, B) == "hit"
    evict = verdict(C, **SMALL)
    assert (evict["verdict"], [v["model"] for v in evict["victims"]]) == ("evict", [A])
    never = verdict(C, **HUGE)
    assert (never["verdict"], never["victims"]) == ("never", [])
    assert never["lacking_bytes"]["host"] > 0
    assert never["alternatives"]
    with ExitStack() as stack:
        streams = [stack.enter_context(story(server, m, **SMALL)) for m in (A, B)]
        wait = verdict(C, **SMALL)
        assert (wait["verdict"], wait["victims"]) == ("wait", [])
        assert verdict(A, **SMALL)["verdict"] == "hit"
        for stream in streams:
            assert stream.rest()[-1] == "[DONE]"
    assert small_chat(server, C) == "cold"
    assert paths(server)[-1] == C


def test_plan_of_what_is_not_there(serve: Serve) -> None:
    server = serve("a/a.gguf")
    error_of(server.post("/v1/models/plan", {"model": "nosuch"}), 404, "model_not_found")
    error_of(server.post("/v1/models/plan", {"model": A, "n_ctx": -1}), 400, "invalid_request")
    error_of(server.post("/v1/models/plan", {}), 400, "invalid_request")
    (server.models / "bad.gguf").write_bytes(b"GGUF")
    error_of(server.post("/v1/models/plan", {"model": "bad"}), 400, "invalid_model_file")


def test_plan_gives_slots_up_that_nobody_asked_for(serve_own: Serve) -> None:
    """With 2 slots of 4096 tokens it takes some 350 MiB, with one some 245."""
    server = serve_own("a", ram_budget="300MiB")
    plan = server.plan(A)
    assert (plan["verdict"], plan["options"]["n_parallel"]) == ("load", 1)
    assert any("n_parallel 1 instead of 2" in reason for reason in plan["reasons"])
    assert server.plan(A, n_parallel=2)["verdict"] == "never"
    assert ok(server.chat(model=A))
    assert item_of(server, A)["n_parallel"] == 1


# Two clients, two contexts.


@pytest.mark.parametrize("at_once", [False, True], ids=["in-turn", "at-once"])
def test_two_contexts_cause_one_reload(serve_own: Serve, at_once: bool) -> None:
    server = serve_own("a")
    asked = [{"n_ctx": 2048 if number % 2 == 0 else 4096} for number in range(20)]

    def ask(fields: dict[str, int]) -> Any:
        return server.chat(model=A, max_tokens=2, **fields)

    assert ok(ask(asked[0]))
    if at_once:
        with together(2) as pool:
            loops = [pool.submit(lambda n=n: [ask(f) for f in asked[n::2]]) for n in (0, 1)]
            answers = [answer for loop in results(loops) for answer in loop]
    else:
        answers = [ask(fields) for fields in asked]
    assert all(ok(answer) for answer in answers)
    assert server.starts() == 2
    assert server.stats()["loads"] == 2
    assert item_of(server, A)["n_ctx"] == 4096


def test_reload_serves_both_who_ask_for_more_of_different_things(serve_own: Serve) -> None:
    server = serve_own("a")
    for asked in [{"n_ctx": 4096, "n_parallel": 1}, {"n_ctx": 2048, "n_parallel": 2}] * 3:
        assert ok(server.chat(model=A, max_tokens=2, **asked))
    assert server.starts() == 2
    item = item_of(server, A)
    assert (item["n_ctx"], item["n_parallel"]) == (4096, 2)


# Pins.


def test_pinned_model_is_no_victim(serve_own: Serve) -> None:
    server = serve_own("a", "b", "c", ram_budget=TWO_FIT)
    pinned = server.pin("a")
    assert (pinned["model"], pinned["path"], pinned["pinned"], pinned["loaded"]) == (
        "a",
        A,
        True,
        False,
    )
    assert server.system()["pinned"] == [A]
    assert small_chat(server, A) == "cold"
    item = item_of(server, A)
    assert (item["pinned"], item["ttl_remaining"], item["expires_at"]) == (True, None, None)
    assert server.pin(A)["loaded"] is True
    for _ in range(3):
        small_chat(server, B)  # used more and later: without the pin A would go
    assert [v["model"] for v in server.plan(C, **SMALL)["victims"]] == [B]
    assert small_chat(server, C) == "cold"
    assert sorted(paths(server)) == [A, C]

    server.pin(C)
    before = server.starts(), server.stats()["evictions"]
    assert server.plan(B, **SMALL)["verdict"] == "never"
    answer = server.chat(model=B, **SMALL)
    error = error_of(answer, 503, "insufficient_memory")
    assert "unpin one" in error["message"]
    assert int(answer.headers["retry-after"]) > 0
    assert (server.starts(), server.stats()["evictions"]) == before
    assert sorted(paths(server)) == [A, C]

    assert server.pin(A, pinned=False)["pinned"] is False
    assert item_of(server, A)["ttl_remaining"] > 0
    assert small_chat(server, B) == "cold"
    assert sorted(paths(server)) == [B, C]


def test_pinned_model_outlives_its_ttl(serve_own: Serve) -> None:
    server = serve_own("a", "b")
    server.pin(A)
    assert small_chat(server, A, ttl=1) == "cold"
    assert small_chat(server, B, ttl=1) == "cold"
    wait_for(lambda: paths(server) == [A], 10)
    server.pin(A, pinned=False)
    wait_for(lambda: paths(server) == [], 5)


def test_pinned_model_is_unloaded_by_wish(serve_own: Serve) -> None:
    server = serve_own("a")
    server.pin(A)
    assert small_chat(server, A) == "cold"
    assert ok(server.unload(A))["count"] == 1
    assert server.system()["pinned"] == [A]
    assert small_chat(server, A) == "cold"
    assert item_of(server, A)["pinned"] is True


def test_pin_of_what_is_not_there(serve: Serve) -> None:
    server = serve("a/a.gguf")
    error_of(server.post("/v1/models/pin", {"model": "nosuch"}), 404, "model_not_found")
    error_of(server.post("/v1/models/pin", {"pinned": True}), 400, "invalid_request")
    assert server.system()["pinned"] == []


def test_place_held_by_a_pin_is_told(serve_own: Serve) -> None:
    server = serve_own("a", "b", max_loaded=1)
    server.pin(A)
    assert small_chat(server, A) == "cold"
    answer = server.chat(model=B, **SMALL)
    error = error_of(answer, 503, "insufficient_memory")
    assert int(answer.headers["retry-after"]) > 0
    assert "unpin one" in error["message"]
    assert paths(server) == [A]


def test_pins_and_preloads_of_the_settings(serve_own: Serve) -> None:
    server = serve_own("a", "b", "c", pinned="a,nosuch", preload="b,nosuch", ttl=300)
    wait_for(lambda: [item["state"] for item in server.loaded()] == ["ready"] * 2, 20)
    assert {item["path"]: item["pinned"] for item in server.loaded()} == {A: True, B: False}
    assert server.system()["pinned"] == [A]
    assert item_of(server, A)["ttl_remaining"] is None
    assert item_of(server, B)["ttl_remaining"] > 0
    assert server.chat(model=A).headers["x-xandrouting-load"] == "hit"


def test_pins_that_do_not_fit_together(tmp_path: Path) -> None:
    names = [f"{name}/{name}.gguf" for name in "abc"]
    models = models_dir(tmp_path / "models", *names)
    server = Server(models, tmp_path / "data", pinned="a,b,c", ram_budget=TWO_FIT)
    said = server.refuses_to_start()
    assert all(model in said for model in (A, B, C))
    assert "420.0 MiB" in said
    assert "Traceback" not in said
    assert server.starts() == 0


# Budgets.


@pytest.mark.parametrize("budget", ["-1GiB", "0", "0%", "150%", "lots", "100TiB", "1GiB,"])
def test_bad_budget_ends_the_start(tmp_path: Path, budget: str) -> None:
    server = Server(tmp_path / "models", tmp_path / "data", ram_budget=budget)
    said = server.refuses_to_start().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("xandrouting: ")
    assert "ram_budget" in said[0]


def test_budget_smaller_than_any_model(serve_own: Serve) -> None:
    server = serve_own("a", ram_budget="1MiB")
    assert host_of(server.system())["budget_bytes"] == MIB
    answer = server.chat(model=A)
    error = error_of(answer, 503, "insufficient_memory")
    assert "retry-after" not in answer.headers
    assert host_of(error["details"])["budget_bytes"] == MIB
    assert error["details"]["alternatives"] == []
    assert ok(server.get("/health"))["status"] == "healthy"
    assert server.starts() == 0


def test_budget_by_share(serve: Serve) -> None:
    server = serve(ram_budget="50%")
    host = host_of(server.system())
    assert host["budget_bytes"] == pytest.approx(host["capacity_bytes"] / 2, abs=1)


def test_budget_unset_leaves_a_reserve(serve: Serve) -> None:
    host = host_of(serve().system())
    free = host["capacity_bytes"] - host["others_bytes"]
    assert 0.8 * free < host["budget_bytes"] < free - 200 * MIB


# What earlier loads took.


def test_figures_of_an_earlier_load_outlive_the_server(serve_own: Serve) -> None:
    server = serve_own("a")
    assert server.plan(A)["estimate"]["source"] == "estimated"
    ok(server.chat("word " * 300, model=A))
    wait_for(lambda: is_measured(server, A))
    load_s = item_of(server, A)["load_seconds"]
    assert server.stop() == 0

    server.start()
    plan = server.plan(A)
    assert plan["estimate"]["source"] == "learned"
    assert plan["expected_seconds"] == pytest.approx(load_s, abs=0.01)
    ok(server.chat("word " * 300, model=A))
    wait_for(lambda: is_measured(server, A))
    memory = item_of(server, A)["memory"]
    assert plan["estimate"]["total_bytes"] == pytest.approx(memory["measured_bytes"], rel=0.05)
    assert memory["estimated_bytes"] == plan["estimate"]["total_bytes"]
    other = server.plan(A, n_ctx=512)  # the seconds are known, the bytes are not
    assert other["estimate"]["source"] == "estimated" or other["verdict"] == "hit"


def test_figures_of_a_replaced_file_are_not_used(serve_own: Serve) -> None:
    server = serve_own("a")
    ok(server.chat(model=A))
    wait_for(lambda: is_measured(server, A))
    server.unload(A)
    assert server.plan(A)["estimate"]["source"] == "learned"
    path = server.models / "a/a.gguf"
    path.unlink()
    path.write_bytes(starter().read_bytes())
    assert server.plan(A)["estimate"]["source"] == "estimated"


@pytest.mark.parametrize("kind", ["text", "cut", "folder"])
def test_damaged_figures_do_not_keep_it_from_starting(serve_own: Serve, kind: str) -> None:
    server = serve_own("a")
    ok(server.chat(model=A))
    wait_for(lambda: is_measured(server, A))
    assert server.stop() == 0
    path = server.data / "figures.db"
    whole = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"This is not a database.\n" * 100 if kind == "text" else whole[:5000])

    server.start()
    assert server.plan(A)["estimate"]["source"] == "estimated"
    assert "figures" in server.log()
    assert ok(server.chat(model=A))
    wait_for(lambda: is_measured(server, A))
    server.unload(A)
    assert server.plan(A)["estimate"]["source"] == "learned"
    assert "Traceback" not in server.log()


# Out of memory all the same.


def forbid_large_loads(server: Server) -> None:
    """Let later engines have a little more address space than the one that runs.

    Spares are there before.
    """
    [engine] = server.engines()
    most = engine.memory_info().vms + 300 * MIB
    server.process.rlimit(psutil.RLIMIT_AS, (most, most))


def fails_for_memory(server: Server, model: str) -> None:
    answer = server.chat(model=model, **HUGE)
    error = error_of(answer, 503, "insufficient_memory")
    assert error["details"]["reason"] == "out_of_memory"
    assert "n_ctx" in error["message"]
    assert int(answer.headers["retry-after"]) > 0


def test_load_out_of_memory_is_tried_again_without_the_idle(serve_own: Serve) -> None:
    server = serve_own("a", "b", spares="none")
    assert small_chat(server, A) == "cold"
    forbid_large_loads(server)
    assert server.plan(B, **HUGE)["verdict"] == "load"

    fails_for_memory(server, B)

    assert server.starts(B) == 2
    assert paths(server) == []
    assert server.stats()["evictions"] == 1
    assert server.stats()["load_failures"] == 2
    fails_for_memory(server, B)  # at once: it is not tried over and over
    assert server.starts(B) == 2
    assert small_chat(server, B) == "cold"  # who asks for less is served


def test_load_out_of_memory_with_nobody_idle_is_tried_once(serve_own: Serve) -> None:
    server = serve_own("a", "b", spares="none")
    with story(server, A, **SMALL, max_tokens=200) as stream:
        forbid_large_loads(server)
        fails_for_memory(server, B)
        assert server.starts(B) == 1
        assert paths(server) == [A]
        assert stream.rest()[-1] == "[DONE]"
    assert server.stats()["evictions"] == 0


def test_load_out_of_memory_leaves_pinned_ones_alone(serve_own: Serve) -> None:
    server = serve_own("a", "b", spares="none")
    server.pin(A)
    assert small_chat(server, A) == "cold"
    forbid_large_loads(server)
    fails_for_memory(server, B)
    assert (server.starts(B), paths(server)) == (1, [A])
