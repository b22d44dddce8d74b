"""Downloads through the API: what is asked, what is refused, and what is there in the end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Serve
from tests.fakes.gguf_writer import gguf_bytes
from tests.fakes.hub import Hub, Slow, Stall
from tests.fakes.safetensors_writer import CONFIG, weights_bytes
from tests.fetching import (
    MIB,
    WEIGHTS,
    add_big,
    ask,
    cancel,
    check_published,
    incoming,
    inventory,
    job_of,
    movers,
    pause,
    resume,
    until,
    until_bytes,
)
from tests.server import Server, error_of, models_dir, ok, starter
from tests.waiting import wait_for

TOKEN = "hf_secret_of_ours"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add_repo(
            "Org/Tiny-GGUF",
            {
                "README.md": b"# Tiny",
                "Tiny-Q4_K_M.gguf": gguf_bytes(),
                "Tiny-Q8_0-00001-of-00002.gguf": gguf_bytes(),
                "Tiny-Q8_0-00002-of-00002.gguf": gguf_bytes(),
                "Tiny-F16.gguf": gguf_bytes(),
            },
        )
        hub.add_repo(
            "Org/Tiny",
            {
                "README.md": b"# Tiny",
                "config.json": json.dumps(CONFIG).encode(),
                "tokenizer.json": b"{}",
                "model.safetensors": weights_bytes(),
                "pytorch_model.bin": ("random", 1000, 1),
                "original/consolidated.00.pth": ("random", 1000, 2),
            },
            license="mit",
        )
        hub.add_repo("Org/Gated", {WEIGHTS: gguf_bytes()}, gated="manual", token=TOKEN)
        hub.add_repo("Org/Private", {WEIGHTS: gguf_bytes()}, private=True, token="hf_other")
        hub.add_repo("Org/Pickled", {"pytorch_model.bin": ("random", 1000, 1)})
        hub.add_repo("Org/Broken", {"B-Q4_0-00001-of-00002.gguf": gguf_bytes()})
        hub.add_repo("Org/Evil", {"a.gguf": gguf_bytes(), "../../evil.gguf": gguf_bytes()})
        yield hub


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("downloads")
    models = models_dir(root / "models", "mine/mine.gguf")
    with Server(models, root / "data", hf_endpoint=hub.url, hf_token=TOKEN) as server:
        yield server
        assert "Traceback" not in server.log()
        assert TOKEN not in server.log()


def refused(server: Server, status: int, code: str, **fields: Any) -> dict[str, Any]:
    """Ask for a download that is refused; nothing may be left of it."""
    before = len(ok(server.get("/v1/models/download"))["downloads"])
    error = error_of(server.post("/v1/models/download", fields), status, code)
    assert len(ok(server.get("/v1/models/download"))["downloads"]) == before
    assert TOKEN not in error["message"]
    return error


def test_from_link_to_chat(serve: Serve, hub: Hub) -> None:
    hub.add_repo("Org/Starter-GGUF", {"Starter-Q4_1.gguf": starter().read_bytes()})
    server = serve("mine/mine.gguf", hf_endpoint=hub.url)
    url = "https://huggingface.co/Org/Starter-GGUF"
    job = ask(server, url, quantization="Q4_1", load={"n_ctx": 1024, "ttl": 60})
    assert job["status"] in ("pending", "downloading")
    assert job["destination"] == "/models/starter-gguf"
    done = until(server, job["job_id"], "completed")
    model = "/models/starter-gguf/Starter-Q4_1.gguf"
    assert done["model"] == model
    [loaded] = wait_for(lambda: [one for one in server.loaded() if one["state"] == "ready"], 20)
    assert (loaded["path"], loaded["n_ctx"], loaded["ttl"]) == (model, 1024, 60)
    assert ok(server.chat(model=model))["model"] == model
    assert ok(server.chat(model="starter-gguf"))
    check_published(server, hub, "Org/Starter-GGUF", "starter-gguf")


def test_a_job_tells_everything(server: Server, hub: Hub) -> None:
    url = f"{hub.url}/Org/Tiny/tree/main"
    job = ask(server, url, destination="tiny-folder")
    done = until(server, job["job_id"], "completed")
    assert done["jobId"] == done["job_id"]
    assert (done["url"], done["repo_id"]) == (url, "Org/Tiny")
    assert len(done["revision"]) == 40
    assert (done["quantization"], done["error"], done["error_code"]) == (None, None, None)
    assert done["destination"] == done["model"] == "/models/tiny-folder"
    names = {file["path"]: file for file in done["files"]}
    assert names.keys() == {"config.json", "tokenizer.json", "model.safetensors"}
    assert {file["status"] for file in names.values()} == {"completed"}
    assert done["files_downloaded"] == done["file_count"] == 3
    size = sum(file["size"] for file in names.values())
    assert size == sum(file["downloaded_bytes"] for file in names.values())
    for name in ("downloaded_bytes", "downloadedSize", "total_bytes", "totalSize"):
        assert done[name] == size
    assert (done["progress"], done["speed"], done["eta_seconds"]) == (1.0, None, None)
    assert done["completed_at"] == done["completedAt"] > done["created_at"]
    assert done["created_at"].endswith("Z")
    assert done["startedAt"] == done["started_at"]
    assert done["duration_seconds"] > 0
    check_published(server, hub, "Org/Tiny", "tiny-folder")
    assert inventory(server)["/models/tiny-folder"]["problem"] is None
    listed = ok(server.get("/v1/models/download"))
    assert listed["total"] == len(listed["downloads"]) >= 1
    assert done in listed["downloads"]


def test_the_same_again(server: Server, hub: Hub) -> None:
    first = ask(server, "Org/Tiny-GGUF", quantization="Q8_0")
    until(server, first["job_id"], "completed")
    before = hub.served_bytes()
    again = ask(server, f"{hub.url}/Org/Tiny-GGUF", quantization="q8_0")
    assert (again["job_id"], again["status"]) == (first["job_id"], "completed")
    assert hub.served_bytes() == before
    assert [file["path"] for file in again["files"]] == [
        "Tiny-Q8_0-00001-of-00002.gguf",
        "Tiny-Q8_0-00002-of-00002.gguf",
    ]
    more = ask(server, "Org/Tiny-GGUF:F16")
    until(server, more["job_id"], "completed")
    check_published(server, hub, "Org/Tiny-GGUF", "tiny-gguf")
    assert "/models/tiny-gguf/Tiny-F16.gguf" in inventory(server)


@pytest.mark.parametrize(
    "url",
    [
        *("http://evil/?huggingface.co/a/b", "https://example.com/Org/Tiny", "file:///etc/passwd"),
        *("https://user:pass@huggingface.co/Org/Tiny", "https://huggingface.co/datasets/a/b"),
        *("https://huggingface.co/spaces/a/b", "", "gpt2", "a--b/c", "../../etc", "a/b/c"),
    ],
)
def test_urls_that_are_refused(server: Server, hub: Hub, url: str) -> None:
    asked = len(hub.requests())
    error = refused(server, 400, "invalid_request", url=url)
    assert error["param"] == "url"
    assert "pass@" not in error["message"]
    error_of(server.post("/v1/models/verify-repo", {"url": url}), 400, "invalid_request")
    assert len(hub.requests()) == asked


@pytest.mark.parametrize(
    "destination", ["..", "../x", "/tmp/x", "a/b", ".hidden", "", "x" * 5000, "a\\b", "a\x00b", " "]
)
def test_destinations_that_are_refused(server: Server, destination: str) -> None:
    error = refused(server, 400, "invalid_destination", url="Org/Tiny", destination=destination)
    assert len(error["message"]) < 300


def test_a_symlink_that_leads_out(server: Server, tmp_path: Path) -> None:
    (server.models / "way-out").symlink_to(tmp_path)
    refused(server, 400, "invalid_destination", url="Org/Tiny", destination="way-out")
    assert list(tmp_path.iterdir()) == []
    (server.models / "way-out").unlink()


def test_a_folder_that_is_somebody_else_s(server: Server) -> None:
    done = ask(server, "Org/Tiny", destination="taken")
    until(server, done["job_id"], "completed")
    error = refused(server, 409, "destination_occupied", url="Org/Tiny-GGUF", destination="taken")
    assert "Org/Tiny" in error["message"]
    (server.models / "foreign").mkdir()
    (server.models / "foreign" / "config.json").write_text("mine")
    refused(server, 409, "destination_occupied", url="Org/Tiny", destination="foreign")
    assert (server.models / "foreign" / "config.json").read_text() == "mine"


def test_a_folder_that_another_download_has(server: Server, hub: Hub) -> None:
    add_big(hub, "Org/First")
    hub.fault(f"Org/First/{WEIGHTS}", Stall(1000))
    job = ask(server, "Org/First", destination="contested")
    error = refused(server, 409, "destination_occupied", url="Org/Tiny", destination="contested")
    assert error["details"] == {"job_id": job["job_id"]}
    cancel(server, job["job_id"], purge=True)


@pytest.mark.parametrize(
    ("fields", "status", "code", "says"),
    [
        ({"url": "Org/Missing"}, 404, "repo_not_found", "Org/Missing"),
        ({"url": "Org/Private"}, 404, "repo_not_found", "HF_TOKEN"),
        ({"url": "Org/Tiny", "revision": "v9"}, 404, "revision_not_found", "v9"),
        ({"url": "Org/Pickled"}, 400, "nothing_to_download", "no engine"),
        ({"url": "Org/Broken"}, 400, "nothing_to_download", "parts are missing"),
        ({"url": "Org/Evil"}, 400, "unsafe_repository", "lists a file"),
        ({"url": "Org/Tiny", "include": ["*.nothing"]}, 400, "nothing_to_download", "fits"),
        ({"url": "Org/Tiny", "exclude": ["*"]}, 400, "nothing_to_download", "fits"),
        ({"url": "Org/Tiny", "load": {"n_ctx": -1}}, 400, "invalid_request", "n_ctx"),
        ({"url": "Org/Tiny", "load": 5}, 400, "invalid_request", "load"),
        ({"url": 5}, 400, "invalid_request", "url"),
        ({}, 400, "invalid_request", "url"),
    ],
)
def test_what_cannot_be_had(
    server: Server, fields: dict[str, Any], status: int, code: str, says: str
) -> None:
    assert says in refused(server, status, code, **fields)["message"]
    assert not (server.models.parent / "evil.gguf").exists()


def test_an_unknown_quantization_lists_the_choices(server: Server) -> None:
    error = refused(server, 400, "no_such_quantization", url="Org/Tiny-GGUF", quantization="Q2_K")
    choices = {choice["name"]: choice for choice in error["details"]["choices"]}
    assert choices.keys() == {"Q4_K_M", "Q8_0", "F16"}
    assert len(choices["Q8_0"]["files"]) == 2
    assert choices["Q8_0"]["size_bytes"] == 2 * choices["F16"]["size_bytes"]
    assert "Q4_K_M (" in error["message"]


def test_a_gated_repository(serve: Serve, server: Server, hub: Hub) -> None:
    stranger = serve(hf_endpoint=hub.url)
    error = refused(stranger, 403, "repo_gated", url="Org/Gated")
    assert "accept its terms" in error["message"]
    assert "HF_TOKEN" in error["message"]
    error_of(stranger.post("/v1/models/verify-repo", {"url": "Org/Gated"}), 403, "repo_gated")
    job = ask(server, "Org/Gated")
    until(server, job["job_id"], "completed")
    assert f"Bearer {TOKEN}" in hub.authorizations("hub")
    assert hub.authorizations("cdn") == set()
    assert TOKEN not in json.dumps(job_of(server, job["job_id"]))


def test_a_hub_that_is_down(serve: Serve) -> None:
    with Hub() as away:
        away.down()
        server = serve(hf_endpoint=away.url)
        answer = server.post("/v1/models/download", {"url": "Org/Tiny"})
        error_of(answer, 503, "hub_unreachable")
        assert int(answer.headers["retry-after"]) > 0
        assert ok(server.chat())  # the rest works


def test_no_proxy_stands_before_a_hub_on_this_machine(serve: Serve, hub: Hub) -> None:
    nowhere = dict.fromkeys(("HTTP_PROXY", "ALL_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    server = serve(hf_endpoint=hub.url, environment=nowhere)
    until(server, ask(server, "Org/Tiny")["job_id"], "completed")


def test_verify_tells_what_there_is(server: Server) -> None:
    told = ok(server.post("/v1/models/verify-repo", {"url": "Org/Tiny-GGUF"}))
    assert told["status"] == "accessible"
    assert (told["repo_id"], told["repo_type"], told["gated"]) == ("Org/Tiny-GGUF", "model", False)
    assert told["license"] == "apache-2.0"
    assert (told["total_files"], told["matched_files"]) == (5, 1)
    assert told["sample_files"] == ["Tiny-Q4_K_M.gguf"]
    names = {one["name"]: one for one in told["quantizations"]}
    assert names.keys() == {"Q4_K_M", "Q8_0", "F16"}
    assert all(one["fits"] is True and one["complete"] for one in names.values())
    told = ok(server.post("/v1/models/verify-repo", {"url": "Org/Tiny"}))
    assert (told["license"], told["matched_files"], told["quantizations"]) == ("mit", 3, [])
    told = ok(server.post("/v1/models/verify-repo", {"url": "Org/Pickled"}))
    assert (told["matched_files"], told["fits"]) == (0, None)
    assert "no engine" in told["message"]


def test_unknown_downloads(server: Server) -> None:
    path = "/v1/models/download/dl_x"
    error_of(server.get(path), 404, "download_not_found")
    error_of(server.client.delete(path), 404, "download_not_found")
    error_of(server.post(f"{path}/pause"), 404, "download_not_found")
    error_of(server.post(f"{path}/resume"), 404, "download_not_found")


@pytest.mark.parametrize("how", ["flowing", "slow", "stalled"])
def test_pause_and_cancel_are_quick(server: Server, hub: Hub, how: str) -> None:
    repo_id = f"Org/Quick-{how}"
    add_big(hub, repo_id, 256 * MIB if how == "flowing" else 16 * MIB)
    faults = {"flowing": Slow(64 * MIB), "slow": Slow(4 * MIB), "stalled": Stall(MIB)}
    hub.fault(f"{repo_id}/{WEIGHTS}", faults[how], times=None)
    job = ask(server, repo_id)
    until_bytes(server, job["job_id"], MIB // 2)
    began = time.monotonic()
    paused = pause(server, job["job_id"])
    assert time.monotonic() - began < 2.0
    assert (paused["status"], paused["speed"]) == ("paused", None)
    assert movers(server) == []
    there = paused["downloaded_bytes"]
    assert sum(path.stat().st_size for path in incoming(server)) >= there > 0
    resumed = resume(server, job["job_id"])
    assert resumed["downloaded_bytes"] >= there
    wait_for(lambda: len(movers(server)) == 1)
    began = time.monotonic()
    cancelled = cancel(server, job["job_id"])
    assert time.monotonic() - began < 2.0
    assert cancelled["status"] == "cancelled"
    assert job_of(server, job["job_id"])["status"] == "cancelled"
    assert movers(server) == []
    error = error_of(
        server.client.delete(f"/v1/models/download/{job['job_id']}"), 400, "download_over"
    )
    assert repo_id in error["message"]
    assert inventory(server).keys() & {f"/models/{repo_id.lower()[4:]}/{WEIGHTS}"} == set()
    cancel(server, job["job_id"], purge=True)
    assert incoming(server) == []
    hub.heal()


def test_bytes_of_a_cancelled_download_are_not_fetched_twice(server: Server, hub: Hub) -> None:
    add_big(hub, "Org/Twice", 16 * MIB)
    hub.fault(f"Org/Twice/{WEIGHTS}", Slow(16 * MIB), times=None)
    job = ask(server, "Org/Twice")
    until_bytes(server, job["job_id"], 4 * MIB)
    cancel(server, job["job_id"])
    hub.heal()
    again = ask(server, "Org/Twice")
    assert again["job_id"] != job["job_id"]
    assert again["downloaded_bytes"] >= 4 * MIB
    until(server, again["job_id"], "completed")
    check_published(server, hub, "Org/Twice", "twice")
    assert hub.served_bytes(WEIGHTS, "Org/Twice") <= 16 * MIB * 1.02


def test_some_move_and_the_others_wait(serve: Serve, hub: Hub) -> None:
    server = serve(hf_endpoint=hub.url, max_downloads=1)
    for name in ("one", "two"):
        add_big(hub, f"Org/Wait-{name}")
    hub.fault(f"Org/Wait-one/{WEIGHTS}", Stall(1000), times=None)
    first, second = ask(server, "Org/Wait-one"), ask(server, "Org/Wait-two")
    wait_for(lambda: len(movers(server)) == 1)
    assert job_of(server, second["job_id"])["status"] == "pending"
    metrics = server.get("/metrics").text
    assert 'xandrouting_downloads{state="pending"} 1.0' in metrics
    hub.heal()
    until(server, second["job_id"], "completed")
    assert job_of(server, first["job_id"])["status"] == "completed"
    line = next(
        line
        for line in server.get("/metrics").text.splitlines()
        if line.startswith("xandrouting_download_bytes_total")
    )
    assert float(line.split()[1]) == 16 * MIB


def test_events_tell_of_progress(server: Server, hub: Hub) -> None:
    add_big(hub, "Org/Told")
    hub.fault(f"Org/Told/{WEIGHTS}", Slow(4 * MIB), times=None)
    seen: list[tuple[float, dict[str, Any]]] = []

    def told(kind: str, data: dict[str, Any]) -> bool:
        if kind == "download":
            seen.append((time.monotonic(), data))
        return kind == "notice" and data["kind"] == "download_completed"

    with server.events(topics="download,notice") as events:
        events.until(lambda kind, _: kind == "snapshot")
        job = ask(server, "Org/Told")
        notice = events.until(told)
    assert (notice["job_id"], notice["repo_id"]) == (job["job_id"], "Org/Told")
    assert all("files" not in data for _, data in seen)
    moving = [(at, data) for at, data in seen if data["status"] == "downloading"]
    sizes = [data["downloaded_bytes"] for _, data in moving]
    assert sizes == sorted(sizes)
    span_s = moving[-1][0] - moving[0][0]
    assert 1.5 <= (len(moving) - 1) / span_s <= 4.5, span_s
    assert any(data["speed"] and data["eta_seconds"] is not None for _, data in moving)
    with server.events(topics="download") as events:
        snapshot = events.until(lambda kind, _: kind == "snapshot")
    assert snapshot["downloads"][0]["job_id"] == job["job_id"]
    hub.heal()


def test_a_model_is_not_deleted_while_a_download_writes_beside_it(server: Server, hub: Hub) -> None:
    done = ask(server, "Org/Tiny-GGUF:Q4_K_M", destination="beside")
    until(server, done["job_id"], "completed")
    job = ask(server, "Org/Tiny-GGUF:F16", destination="beside")
    pause_or_done = server.post(f"/v1/models/download/{job['job_id']}/pause")
    if pause_or_done.status_code == 200:
        answer = server.client.delete("/v1/models/models/beside/Tiny-Q4_K_M.gguf")
        assert answer.status_code == 409
        cancel(server, job["job_id"], purge=True)


def test_the_models_directory_may_be_missing_or_a_file(
    serve: Serve, tmp_path: Path, hub: Hub
) -> None:
    server = serve(hf_endpoint=hub.url)
    for path in sorted(server.models.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    server.models.rmdir()
    until(server, ask(server, "Org/Tiny")["job_id"], "completed")
    assert "/models/tiny" in inventory(server)
    for path in sorted(server.models.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    server.models.rmdir()
    server.models.write_text("a file")
    answer = server.post("/v1/models/download", {"url": "Org/Tiny-GGUF"})
    error_of(answer, 503, "models_dir_unusable")
    assert ok(server.get("/health"))
    assert "downloads will be refused" not in server.log()
    server.stop()
    server.start()
    assert "downloads will be refused: Nothing can be downloaded into the" in server.log()
    assert ok(server.get("/v1/models"))["data"] == []


def test_the_router_s_own_form(server: Server, hub: Hub) -> None:
    add_big(hub, "Org/Routed")
    hub.fault(f"Org/Routed/{WEIGHTS}", Slow(8 * MIB), times=None)
    told = []
    with server.client.stream("GET", "/models/sse") as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        assert ok(server.post("/models", {"model": "Org/Routed:Q4_0"})) == {"success": True}
        for line in lines:
            event = json.loads(line.removeprefix("data: "))
            told.append(event)
            if event["event"].startswith("download_f"):
                break
    assert told[-1] == {"model": "Org/Routed:Q4_0", "event": "download_finished"}
    progress = [event for event in told if event["event"] == "download_progress"]
    assert progress[-1]["data"]["Org/Routed:Q4_0"]["total"] == 8 * MIB
    assert f"/models/routed/{WEIGHTS}" in inventory(server)
    error_of(server.post("/models", {"model": "Org/Missing"}), 404, "repo_not_found")
    hub.heal()


def test_the_router_s_unload_cancels(server: Server, hub: Hub) -> None:
    add_big(hub, "Org/Unrouted")
    hub.fault(f"Org/Unrouted/{WEIGHTS}", Stall(1000), times=None)
    ok(server.post("/models", {"model": "Org/Unrouted"}))
    ok(server.post("/models/unload", {"model": "Org/Unrouted"}))
    newest = ok(server.get("/v1/models/download"))["downloads"][0]
    assert (newest["repo_id"], newest["status"]) == ("Org/Unrouted", "cancelled")
    error_of(server.post("/models/unload", {"model": "Org/Unrouted"}), 400, "invalid_request")
    cancel(server, newest["job_id"], purge=True)
    hub.heal()
