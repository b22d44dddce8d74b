"""llama-server's way to download a model, to watch it come, and to take it away again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.e2e.conftest import Serve
from tests.fakes.gguf_writer import gguf_bytes, write_gguf
from tests.fakes.hub import Hub, Stall
from tests.fetching import MIB, WEIGHTS, add_big, ask, incoming, job_of, pause, until_bytes
from tests.server import MODEL, Server, error_of, models_dir, ok
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("router")
    models = models_dir(root / "models")
    with Server(models, root / "data", hf_endpoint=hub.url) as server:
        yield server
        assert "Traceback" not in server.log()


@pytest.fixture
def stalled(hub: Hub, request: pytest.FixtureRequest) -> Iterator[str]:
    """A repository of this test's own whose file stops coming after 3 of 8 MiB."""
    repo = f"Org/{request.node.originalname.replace('_', '-')}-{len(hub.repos)}"
    add_big(hub, repo)
    hub.fault(f"{repo}/{WEIGHTS}", Stall(3 * MIB), times=None)
    yield repo
    hub.heal()


def begin(server: Server, name: str) -> dict[str, Any]:
    """Begin a download as llama-server's clients do; return our job."""
    assert ok(server.post("/models", {"model": name})) == {"success": True}
    newest: dict[str, Any] = ok(server.get("/v1/models/download"))["downloads"][0]
    assert newest["url"] == name
    return newest


def entries(server: Server) -> dict[str, dict[str, Any]]:
    return {model["id"]: model for model in ok(server.get("/models"))["data"]}


def remove(server: Server, **query: Any) -> httpx2.Response:
    return server.client.delete("/models", params=query)


@contextmanager
def sse(server: Server) -> Iterator[Iterator[dict[str, Any]]]:
    """Listen to /models/sse; yields what its events hold, for 60 s."""

    def events(response: httpx2.Response) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + 60.0
        for line in response.iter_lines():
            assert time.monotonic() < deadline  # a comment comes every 15 s
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))

    with server.client.stream("GET", "/models/sse") as response:
        yield events(response)


def told(events: Iterator[dict[str, Any]], model: str, last: str) -> list[str]:
    """Return what happened to a model up to `last`, each once in a row."""
    found: list[str] = []
    for event in events:
        if event["model"] == model:
            said = event["data"]["status"] if event["event"] == "model_status" else event["event"]
            if said not in found[-1:]:
                found.append(said)
            if said == last:
                break
    return found


def test_a_download_is_listed_while_it_comes(server: Server, hub: Hub, stalled: str) -> None:
    name = f"{stalled}:Q4_0"
    with sse(server) as events:
        job = begin(server, name)
        until_bytes(server, job["job_id"], 3 * MIB)
        entry = entries(server)[name]
        assert entry["status"] == {
            "value": "downloading",
            "failed": False,
            "progress": {name: {"done": 3 * MIB, "total": 8 * MIB}},
        }
        assert (entry["object"], entry["path"]) == ("model", job["destination"])
        assert (entry["can_remove"], entry["quantization"]) == (True, "Q4_0")
        assert entry["architecture"]["output_modalities"] == ["text"]
        assert MODEL in entries(server)  # beside the models
        hub.heal()
        assert told(events, name, "download_finished") == [
            *("downloading", "download_progress", "download_finished")
        ]
    assert job_of(server, job["job_id"])["status"] == "completed"
    assert name not in entries(server)


def test_what_waits_is_listed_and_what_is_paused_is_not(
    serve: Serve, hub: Hub, stalled: str
) -> None:
    server = serve(hf_endpoint=hub.url, max_downloads=1)
    add_big(hub, "Org/Waits")
    first, second = begin(server, stalled), begin(server, "Org/Waits")
    assert job_of(server, second["job_id"])["status"] == "pending"
    assert {stalled, "Org/Waits"} <= entries(server).keys()
    assert entries(server)["Org/Waits"]["status"]["progress"]["Org/Waits"]["done"] == 0
    pause(server, second["job_id"])
    assert "Org/Waits" not in entries(server)
    assert ok(remove(server, model="Org/Waits")) == {"success": True}  # it can be cancelled
    assert ok(remove(server, model=stalled)) == {"success": True}
    for job in (first, second):
        assert job_of(server, job["job_id"])["status"] == "cancelled"


@pytest.mark.parametrize("purge", [False, True])
def test_delete_cancels_a_download(server: Server, stalled: str, purge: bool) -> None:
    with sse(server) as events:
        job = begin(server, stalled)
        until_bytes(server, job["job_id"], MIB)
        asked = {"purge": "true"} if purge else {}
        assert ok(remove(server, model=stalled, **asked)) == {"success": True}
        said = told(events, stalled, "model_remove")
    assert said[-2:] == ["download_failed", "model_remove"]
    over = job_of(server, job["job_id"])
    assert over["status"] == "cancelled"
    assert (over["downloaded_bytes"] == 0) is purge
    assert any(job["job_id"] in str(path) for path in incoming(server)) is not purge
    assert stalled not in entries(server)
    error_of(remove(server, model=stalled), 404, "model_not_found")


def test_a_name_with_two_downloads(server: Server, stalled: str) -> None:
    jobs = [ask(server, stalled), ask(server, stalled, destination="twice")]
    [progress] = entries(server)[stalled]["status"]["progress"].values()
    assert progress["total"] == 16 * MIB
    ok(remove(server, model=stalled))
    assert {job_of(server, job["job_id"])["status"] for job in jobs} == {"cancelled"}


def test_delete_of_a_model(server: Server) -> None:
    file = write_gguf(server.models / "gone" / "gone.gguf")
    name = "/models/gone/gone.gguf"
    wait_for(lambda: name in entries(server))
    with sse(server) as events:
        assert ok(remove(server, model="gone/gone.gguf")) == {"success": True}
        assert told(events, name, "model_remove")[-1] == "model_remove"
    assert not file.parent.exists()
    assert list((server.models / ".trash").glob("*/gone/gone.gguf"))
    assert name not in entries(server)
    error = error_of(remove(server, model=name), 404, "model_not_found")
    assert error["message"].startswith(f"model name={name} is not found: ")


def test_purge_of_a_model(server: Server) -> None:
    write_gguf(server.models / "purged.gguf")
    assert ok(remove(server, model="purged.gguf", purge="true")) == {"success": True}
    assert not list(server.models.rglob("purged.gguf"))


def test_a_model_in_use_is_not_deleted(server: Server) -> None:
    server.load()
    assert (
        "POST /v1/models/unload"
        in error_of(remove(server, model=MODEL), 409, "model_in_use")["message"]
    )
    ok(server.post("/v1/models/unload-all"))
    assert MODEL in entries(server)


def test_a_model_beside_which_a_download_writes(server: Server, stalled: str) -> None:
    ask(server, stalled, destination="shared")
    write_gguf(server.models / "shared" / "other.gguf")
    error_of(remove(server, model="shared/other.gguf"), 409, "model_in_use")
    ok(remove(server, model=stalled))
    ok(remove(server, model="shared/other.gguf"))


@pytest.mark.parametrize("name", ["", "../secret.gguf", "/etc/passwd", "a\\b", "x" * 5000])
def test_names_that_name_nothing(server: Server, name: str) -> None:
    code = "invalid_request" if not name else "invalid_model_path"
    error = error_of(remove(server, model=name), 400, code)
    if not name:
        assert error["message"] == "model must be a non-empty string"
        error_of(server.client.delete("/models"), 400, code)


@pytest.mark.parametrize("name", ["gone", "Org/never:Q4_0"])
def test_names_of_nothing(server: Server, name: str) -> None:
    error_of(remove(server, model=name), 404, "model_not_found")


def test_a_further_root_cannot_be_removed_from(serve: Serve, tmp_path: Path) -> None:
    write_gguf(tmp_path / "further" / "a.gguf")
    server = serve(model_roots=f"more={tmp_path / 'further'}")
    name = "/models/more/a.gguf"
    assert entries(server)[name]["can_remove"] is False
    error_of(remove(server, model=name), 403, "model_read_only")
    assert entries(server).keys() == {MODEL, name}


def test_a_model_that_came_is_removed_by_its_id(server: Server, hub: Hub) -> None:
    hub.add_repo("Org/Small", {"S-Q4_0.gguf": gguf_bytes()})
    with sse(server) as events:
        begin(server, "Org/Small")
        told(events, "Org/Small", "download_finished")
    model = "/models/small/S-Q4_0.gguf"
    assert entries(server)[model]["status"]["value"] == "unloaded"
    ok(remove(server, model=model))
    assert not (server.models / "small").exists()
