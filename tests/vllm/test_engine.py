"""vLLM's process as the gateway runs it: how it loads, what it takes, who may ask it."""

from __future__ import annotations

import os
import re
from itertools import groupby

import httpx2
import pytest

from tests.e2e.test_leaving import client_of, nothing_left
from tests.server import EngineProcess, Server, ok
from tests.vllm.conftest import GGUF, LOAD_S, SMOL, TWIN, Load, chat
from tests.waiting import wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * LOAD_S)]

FREED_S = 1.0
LONG = {"max_tokens": 3000, "ignore_eos": True}
PHASES = ["starting", "loading_weights", "warming_up"]


@pytest.fixture
def engine(server: Server) -> EngineProcess:
    return server.engine(SMOL)


# The load.


def test_load_is_begun_at_once_and_shown_as_it_goes(first_load: Load) -> None:
    assert (first_load.began["path"], first_load.began["state"]) == (SMOL, "starting")
    events = [news["event"] for news in first_load.news]
    assert events[0] == "starting"
    assert [event for event, _ in groupby(events)] == ["starting", "progress", "ready"]
    phases = [news["progress"]["phase"] for news in first_load.news if "progress" in news]
    assert [phase for phase, _ in groupby(phases)] == PHASES


def test_load_is_seen_in_the_lists(first_load: Load) -> None:
    loading = [status for status in first_load.statuses if status["value"] == "loading"]
    phases = [status["loading"]["phase"] for status in loading]
    assert [phase for phase, _ in groupby(phases)] == PHASES
    assert first_load.statuses[-1]["value"] == "loaded"
    items = [item for item in first_load.items if item["state"] == "starting"]
    assert {(item["backend"], item["engine"]) for item in items} == {("vllm", "vllm/cpu#1")}
    percents = [item["loading"]["percent"] for item in items if item["loading"]]
    known = [percent for percent in percents if percent is not None]
    assert all(0 <= percent < 100 for percent in known)


def test_models_are_listed_by_their_formats(server: Server) -> None:
    listed = {model["id"]: model for model in ok(server.get("/v1/models"))["data"]}
    assert {name: model["backend"] for name, model in listed.items()} == {
        SMOL: "vllm",
        TWIN: "vllm",
        GGUF: "llamacpp",
    }
    assert listed[SMOL]["status"]["value"] == "loaded"
    assert listed[SMOL]["context_length"] == 8192
    assert {"completion", "chat"} <= set(listed[SMOL]["capabilities"])


def test_loaded_tells_of_the_engine(server: Server) -> None:
    assert ok(chat(server, model="smol", max_tokens=1))
    [item] = [item for item in server.loaded() if item["path"] == SMOL]
    assert (item["model"], item["backend"], item["device"]) == ("smol", "vllm", "cpu")
    assert (item["state"], item["max_model_len"], item["n_ctx"]) == ("ready", 8192, None)
    wait_for(lambda: server.loaded()[0]["memory"]["measured_bytes"], 10)
    memory = server.loaded()[0]["memory"]
    assert memory["measured_bytes"] == pytest.approx(memory["estimated_bytes"], rel=0.15)
    assert 0 < item["load_seconds"] < LOAD_S


def test_process_is_told_its_cores_and_no_secret_or_net(engine: EngineProcess) -> None:
    environment, argv = engine.process.environ(), engine.process.cmdline()
    cores = environment["VLLM_CPU_OMP_THREADS_BIND"]
    assert re.fullmatch(r"\d+([-,]\d+)*", cores)
    assert {int(core) for core in re.findall(r"\d+", cores)} <= os.sched_getaffinity(0)
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == "1"
    assert "--enforce-eager" in argv
    assert f"--served-model-name={SMOL}" in argv
    assert not any("sleep" in word or engine.key in word for word in argv)
    assert not any(name.startswith("XANDROUTING_") for name in environment)


# Who may ask it.


@pytest.mark.parametrize("key", [None, "another"])
@pytest.mark.parametrize("path", ["/metrics", "/tokenize", "/v1/models", "/version", "/nosuch"])
def test_engine_answers_its_gateway_only(engine: EngineProcess, path: str, key: str | None) -> None:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    for method in ("GET", "POST"):
        answer = httpx2.request(method, engine.url + path, headers=headers, trust_env=False)
        assert answer.status_code == 401, answer.text


def test_engines_health_is_no_secret(engine: EngineProcess) -> None:
    assert httpx2.get(f"{engine.url}/health", trust_env=False).status_code == 200
    assert engine.get("/v1/models")["data"][0]["id"] == SMOL


# A client that leaves.


def running(server: Server) -> float:
    """Return how many requests vLLM says it works for."""
    answer = server.get("/upstream/smol/metrics")
    assert answer.status_code == 200, answer.text
    found = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", answer.text, re.MULTILINE)
    assert found, answer.text[:2000]
    return sum(map(float, found))


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "plain"])
def test_request_of_a_client_that_left_is_freed(server: Server, streams: bool) -> None:
    wait_for(lambda: running(server) == 0)
    with client_of(server, model=SMOL, stream=streams, **LONG) as client:
        if streams:
            client.read_until(b'"content":"')
        wait_for(lambda: running(server) == 1, 20)
        client.leave()
        wait_for(lambda: running(server) == 0, FREED_S)
    wait_for(nothing_left(server))


def test_prompt_of_a_client_that_left_is_read_no_further(server: Server) -> None:
    """Only the batch under way is read to its end."""
    with client_of(server, "word " * 7000, model=SMOL, **LONG) as client:
        wait_for(lambda: running(server) == 1, 20)
        client.leave()
        wait_for(lambda: running(server) == 0, FREED_S)
        wait_for(nothing_left(server))


def test_others_go_on_when_a_client_leaves(server: Server) -> None:
    with server.stream("A story.", model=SMOL, max_tokens=40, ignore_eos=True) as stream:
        stream.first()
        with client_of(server, model=SMOL, **LONG) as client:
            wait_for(lambda: running(server) == 2, 20)
            client.leave()
        *_, done = stream.rest()
    assert done == "[DONE]"
    wait_for(lambda: running(server) == 0)
