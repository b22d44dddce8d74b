"""Downloads that go wrong, through the API: nothing is lost, and half a model never shows."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Serve
from tests.fakes.hub import (
    Corrupt,
    Cut,
    Html,
    Hub,
    IgnoreRange,
    NeedsRange,
    Refuse,
    Slow,
    Stall,
    WrongLength,
)
from tests.fakes.processes import all_gone, freeze
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
    small_filesystem,
    until,
    until_bytes,
)
from tests.server import Server, error_of, ok
from tests.waiting import wait_for

SIZE = 8 * MIB
LARGE = 192 * MIB  # where a few socket buffers do not count
ONCE_AND_A_BIT = 1.02  # bytes that may come twice


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("faults")
    with Server(root / "models", root / "data", hf_endpoint=hub.url) as server:
        yield server
        assert "Traceback" not in server.log()


@pytest.fixture
def repo(request: pytest.FixtureRequest, hub: Hub) -> Iterator[str]:
    """A repository of this test's own, with one file of `SIZE`."""
    number = abs(hash(request.node.name)) % 10**9
    repo_id = f"Org/R{number}"
    add_big(hub, repo_id, SIZE)
    yield repo_id
    hub.heal()


def folder_of(repo_id: str) -> str:
    return repo_id.rpartition("/")[2].lower()


@pytest.mark.parametrize(
    ("fault", "times"),
    [
        (Cut(3 * MIB, reset=True), 2),
        (Cut(3 * MIB), 2),
        (IgnoreRange(), 1),
        (NeedsRange(), 3),
        (Refuse(429, retry_after_s=1), 2),
        (Refuse(500), 3),
        (Refuse(503, "cdn"), 2),
        (Refuse(403, "cdn"), 2),
        (Corrupt(5 * MIB), 1),
        (Html(), 1),
        (WrongLength(100), 1),
    ],
    ids=repr,
)
def test_faults_that_pass(server: Server, hub: Hub, repo: str, fault: Any, times: int) -> None:
    hub.fault(f"{repo}/{WEIGHTS}", fault, times=times)
    job = ask(server, repo)
    until(server, job["job_id"], "completed", timeout_s=60)
    check_published(server, hub, repo, folder_of(repo))
    if isinstance(fault, Cut):
        assert hub.served_bytes(WEIGHTS, repo) <= SIZE * ONCE_AND_A_BIT


def test_a_connection_that_stalls_is_given_up(server: Server, hub: Hub, repo: str) -> None:
    hub.fault(f"{repo}/{WEIGHTS}", Stall(3 * MIB))
    job = ask(server, repo)
    waiting = wait_for(lambda: "again" in job_of(server, job["job_id"])["message"], 40)
    assert waiting
    until(server, job["job_id"], "completed")
    assert hub.served_bytes(WEIGHTS, repo) <= SIZE * ONCE_AND_A_BIT
    check_published(server, hub, repo, folder_of(repo))


def test_a_corrupt_file_is_never_published(server: Server, hub: Hub, repo: str) -> None:
    hub.fault(f"{repo}/{WEIGHTS}", Corrupt(5 * MIB), times=None)
    job = ask(server, repo)
    failed = until(server, job["job_id"], "failed", timeout_s=60)
    assert (failed["error_code"], failed["model"]) == ("corrupt", None)
    assert WEIGHTS in failed["error"]
    assert not (server.models / folder_of(repo)).exists()
    assert not any(folder_of(repo) in path for path in inventory(server))
    assert hub.served_bytes(WEIGHTS, repo) <= 2 * SIZE * ONCE_AND_A_BIT
    hub.heal()
    resume(server, job["job_id"])
    until(server, job["job_id"], "completed")
    check_published(server, hub, repo, folder_of(repo))


def test_a_file_that_is_gone(server: Server, hub: Hub, repo: str) -> None:
    hub.fault(f"{repo}/{WEIGHTS}", Refuse(404, code="EntryNotFound"), times=None)
    job = ask(server, repo)
    failed = until(server, job["job_id"], "failed", timeout_s=60)
    assert failed["error_code"] == "gone"
    assert failed["completed_at"] is not None


def test_half_a_model_never_shows(server: Server, hub: Hub, repo: str) -> None:
    hub.fault(f"{repo}/{WEIGHTS}", Stall(5 * MIB), times=None)
    job = ask(server, repo)
    until_bytes(server, job["job_id"], 5 * MIB)
    assert not any(folder_of(repo) in path for path in inventory(server))
    assert not (server.models / folder_of(repo)).exists()
    model = f"/models/{folder_of(repo)}/{WEIGHTS}"
    error_of(server.chat(model=model), 404, "model_not_found")
    cancel(server, job["job_id"], purge=True)


def test_movers_that_are_killed_are_followed(server: Server, hub: Hub) -> None:
    rng = random.Random(7)
    add_big(hub, "Org/Movers-killed", LARGE)
    hub.fault(f"Org/Movers-killed/{WEIGHTS}", Slow(LARGE / 4), times=None)
    job = ask(server, "Org/Movers-killed")
    killed = [0]
    for kill in range(5):
        until_bytes(server, job["job_id"], int(LARGE * (kill + rng.random()) / 6))
        mover = wait_for(lambda: next((m for m in movers(server) if m.pid != killed[-1]), None), 10)
        killed.append(mover.pid)
        mover.kill()
    until(server, job["job_id"], "completed")
    check_published(server, hub, "Org/Movers-killed", "movers-killed")
    assert hub.served_bytes(WEIGHTS, "Org/Movers-killed") <= LARGE * ONCE_AND_A_BIT
    hub.heal()


def test_a_gateway_that_is_killed_goes_on(serve: Serve, hub: Hub) -> None:
    rng = random.Random(8)
    add_big(hub, "Org/Gateway-killed", LARGE)
    hub.fault(f"Org/Gateway-killed/{WEIGHTS}", Slow(LARGE / 4), times=None)
    server = serve(hf_endpoint=hub.url)
    job = ask(server, "Org/Gateway-killed")
    there = 0
    for kill in range(5):
        until_bytes(server, job["job_id"], int(LARGE * (kill + rng.random()) / 6))
        left = movers(server)
        server.kill9()
        wait_for(all_gone(left), 5)
        server.start()
        now = job_of(server, job["job_id"])
        assert now["status"] in ("pending", "downloading")
        assert now["downloaded_bytes"] >= there
        there = now["downloaded_bytes"]
    until(server, job["job_id"], "completed")
    check_published(server, hub, "Org/Gateway-killed", "gateway-killed")
    assert hub.served_bytes(WEIGHTS, "Org/Gateway-killed") <= LARGE * ONCE_AND_A_BIT
    hub.heal()


def test_sigterm_stops_at_once_and_the_next_start_goes_on(
    serve: Serve, hub: Hub, repo: str
) -> None:
    hub.fault(f"{repo}/{WEIGHTS}", Slow(4 * MIB), times=None)
    add_big(hub, "Org/Paused-over")
    hub.fault(f"Org/Paused-over/{WEIGHTS}", Stall(MIB), times=None)
    add_big(hub, "Org/Cancelled-over")
    server = serve(hf_endpoint=hub.url, max_downloads=3)
    moving, paused = ask(server, repo), ask(server, "Org/Paused-over")
    cancelled = ask(server, "Org/Cancelled-over", destination="cancelled-over")
    if cancelled["status"] != "completed":
        server.client.delete(f"/v1/models/download/{cancelled['job_id']}")
    until_bytes(server, moving["job_id"], 3 * MIB)
    pause(server, paused["job_id"])
    before = {one["job_id"]: one["status"] for one in _all(server)}
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 3.0
    server.start()
    after = {one["job_id"]: one["status"] for one in _all(server)}
    assert after[paused["job_id"]] == before[paused["job_id"]] == "paused"
    assert after[cancelled["job_id"]] == before[cancelled["job_id"]]
    assert job_of(server, moving["job_id"])["downloaded_bytes"] >= 3 * MIB
    hub.heal()
    until(server, moving["job_id"], "completed")
    check_published_beside(server, hub, repo)
    assert hub.served_bytes(WEIGHTS, repo) <= SIZE * ONCE_AND_A_BIT
    resume(server, paused["job_id"])
    until(server, paused["job_id"], "completed")


def test_new_work_is_refused_while_a_mover_ends(serve: Serve, hub: Hub, repo: str) -> None:
    hub.fault(f"{repo}/{WEIGHTS}", Slow(MIB), times=None)
    server = serve(hf_endpoint=hub.url)
    ask(server, repo)
    [mover] = wait_for(lambda: movers(server))
    freeze(mover)  # it is killed a second after it was told to end
    with server.stream(text="Tell me a long story.", ignore_eos=True, max_tokens=100) as stream:
        stream.first()
        server.signal()
        wait_for(lambda: "server stopping" in server.log())
        error_of(server.chat(), 503, "shutting_down")
        assert stream.rest()[-1] == "[DONE]"
    assert server.wait(5) == 0


def _all(server: Server) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = ok(server.get("/v1/models/download"))["downloads"]
    return jobs


def check_published_beside(server: Server, hub: Hub, repo_id: str) -> None:
    """As `check_published`, while other downloads have bytes."""
    folder = server.models / folder_of(repo_id)
    assert (folder / WEIGHTS).stat().st_size == SIZE
    assert (folder / ".xandrouting.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    with small_filesystem(tmp_path / "models", "12m") as folder:
        yield folder


def test_a_disk_that_is_too_small_or_fills_up(
    small_disk: Path, tmp_path: Path, hub: Hub, repo: str
) -> None:
    add_big(hub, "Org/Too-large", 13 * MIB)
    with Server(small_disk, tmp_path / "data", hf_endpoint=hub.url) as server:
        answer = server.post("/v1/models/download", {"url": "Org/Too-large"})
        error = error_of(answer, 507, "insufficient_disk")
        assert error["details"]["needed_bytes"] == 13 * MIB
        assert error["details"]["free_bytes"] <= 12 * MIB
        assert "needs 13.0 MiB" in error["message"]
        hub.fault(f"{repo}/{WEIGHTS}", Stall(3 * MIB))
        job = ask(server, repo)
        until_bytes(server, job["job_id"], 3 * MIB)
        error_of(
            server.post("/v1/models/download", {"url": repo, "destination": "again"}),
            507,
            "insufficient_disk",
        )  # what the first has still to write is reckoned with
        (small_disk / "filler").write_bytes(bytes(6 * MIB))
        hub.heal()
        paused = until(server, job["job_id"], "paused")
        assert paused["error_code"] == "disk_full"
        assert "disk is full" in paused["error"]
        refused = server.post(f"/v1/models/download/{job['job_id']}/resume")
        error_of(refused, 507, "insufficient_disk")
        assert job_of(server, job["job_id"])["status"] == "paused"
        (small_disk / "filler").unlink()
        resume(server, job["job_id"])
        until(server, job["job_id"], "completed")
        check_published(server, hub, repo, folder_of(repo))
        assert hub.served_bytes(WEIGHTS, repo) <= SIZE * 1.5  # what came as the disk was full
        assert incoming(server) == []


def test_a_models_directory_that_became_read_only(
    small_disk: Path, tmp_path: Path, hub: Hub, repo: str
) -> None:
    with Server(small_disk, tmp_path / "data", hf_endpoint=hub.url) as server:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        answer = server.post("/v1/models/download", {"url": repo})
        error = error_of(answer, 503, "models_dir_unusable")
        assert "Read-only" in error["message"]
        assert ok(server.get("/v1/models"))["object"] == "list"
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        until(server, ask(server, repo)["job_id"], "completed")
