"""llama.cpp and vLLM side by side under one budget, and vLLM with the models' Transformers code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server import Server, ok, results, story, together
from tests.vllm.conftest import GGUF, LOAD_S, SMOL, chat, vllm_server
from tests.waiting import wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(4 * LOAD_S)]

# One vLLM with these takes some 2.2 GiB, llama.cpp 0.2: two have room, a second vLLM has not.
BUDGET = "3GiB"
IN_VLLM: dict[str, Any] = {"max_model_len": 1024, "n_parallel": 2}
IN_LLAMACPP: dict[str, Any] = {"n_ctx": 1024, "n_parallel": 1}


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("vllm-mixed")
    with vllm_server(root, default_ttl=0, ram_budget=BUDGET, min_residency_s=0) as server:
        yield server


@pytest.fixture
def server(module_server: Server) -> Iterator[Server]:
    before = len(module_server.log())
    yield module_server
    print(module_server.log()[before:], file=sys.stderr)


def backends(server: Server) -> list[tuple[str, str]]:
    return sorted((item["path"], item["backend"]) for item in server.loaded())


def host(server: Server) -> dict[str, Any]:
    [line] = [one for one in server.system()["devices"] if one["device"] == "host"]
    return line


def test_both_at_once_and_one_leaves_for_a_third(server: Server) -> None:
    server.load(GGUF, **IN_LLAMACPP)
    server.load(SMOL, **IN_VLLM)
    assert backends(server) == [(GGUF, "llamacpp"), (SMOL, "vllm")]

    with (
        story(server, GGUF, max_tokens=40) as one,
        story(server, SMOL, max_tokens=20) as other,
        together(2) as pool,
    ):
        rest = results([pool.submit(stream.rest) for stream in (one, other)])
    assert [events[-1] for events in rest] == ["[DONE]", "[DONE]"]
    wait_for(lambda: all(item["memory"]["measured_bytes"] for item in server.loaded()), 10)
    line, items = host(server), server.loaded()
    assert line["used_bytes"] == sum(item["memory"]["charged_bytes"] for item in items)
    assert line["used_bytes"] <= line["budget_bytes"] == 3 << 30

    third = server.load(SMOL, backend="transformers", **IN_VLLM)

    assert third["decision"]["verdict"] == "evict"
    assert [victim["model"] for victim in third["decision"]["victims"]] == [SMOL]
    assert backends(server) == [(GGUF, "llamacpp"), (SMOL, "transformers")]
    assert server.stats()["evictions"] == 1
    assert host(server)["used_bytes"] <= 3 << 30


def test_transformers_is_vllm_with_the_models_own_code(server: Server) -> None:
    answer = chat(server, "Name a colour.", backend="transformers", **IN_VLLM)
    body = ok(answer)
    assert body["model"] == SMOL
    assert body["choices"][0]["message"]["content"]
    assert answer.headers["x-xandrouting-engine"] == "transformers/cpu#1"
    [engine] = server.engines(SMOL)
    assert "--model-impl=transformers" in engine.cmdline()
    assert "serve" in engine.cmdline()
    assert GGUF in [item["path"] for item in server.loaded()]
