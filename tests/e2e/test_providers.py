"""Who can serve here, and what each can be asked for, of the real server."""

from __future__ import annotations

import time
from typing import Any

import jsonschema_rs

from tests.server import MODEL, Server, error_of, ok

CHAT = "/v1/chat/completions"
WITHIN_S = 0.05


def providers(server: Server) -> dict[str, dict[str, Any]]:
    found: list[dict[str, Any]] = ok(server.get("/v1/providers"))["providers"]
    return {item["id"]: item for item in found}


def test_every_backend_is_listed(server: Server) -> None:
    found = providers(server)
    assert {"llamacpp", "vllm", "transformers", "ollama"} <= found.keys()
    for item in found.values():
        assert item["available"] is (item["reason"] is None)
        jsonschema_rs.meta.validate(item["load_options"])
        jsonschema_rs.meta.validate(item["completion_options"])
    llamacpp = found["llamacpp"]
    assert llamacpp["available"]
    assert llamacpp["version"].startswith("xllamacpp ")
    memory = {d["device"]: d["capacity_bytes"] for d in server.system()["devices"]}
    assert llamacpp["devices"][0]["id"] == "cpu"
    assert llamacpp["devices"][0]["capacity_bytes"] == memory["host"]


def test_its_defaults_are_those_of_a_load(server: Server) -> None:
    said = providers(server)["llamacpp"]["load_options"]["properties"]
    loaded = server.load()
    for name in ("n_ctx", "n_parallel", "cache_type_k", "cache_type_v"):
        assert loaded[name] == said[name]["default"], name


def test_what_its_schemas_refuse_is_refused(server: Server) -> None:
    found = providers(server)["llamacpp"]
    for kind, path in (("load_options", "/v1/models/load"), ("completion_options", CHAT)):
        for name, described in found[kind]["properties"].items():
            ends = [described[end] for end in ("minimum", "maximum") if end in described]
            for value in (*(end - 1 for end in ends[:1]), *(end + 1 for end in ends[1:]), {}):
                body = {"model": MODEL, "messages": [{"role": "user"}], name: value}
                error = error_of(server.post(path, body), 400, "invalid_request")
                assert error["param"] == name
    assert server.loaded() == []


def test_it_waits_for_nobody(server: Server) -> None:
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        ok(server.get("/v1/providers"))
        times.append(time.perf_counter() - begin)
    assert sorted(times)[4] < WITHIN_S
