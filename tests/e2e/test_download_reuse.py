"""What is on disk already is not fetched again: other jobs' bytes, and files put there by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Serve
from tests.fakes.gguf_writer import gguf_bytes
from tests.fakes.hub import Hub, Slow, Stall
from tests.fakes.processes import all_gone
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

SIZE = 16 * MIB
ONCE_AND_A_BIT = 1.02  # bytes that may come twice
SPLIT = "S-Q4_0-00001-of-00003.gguf"
PARTS = {
    f"S-Q4_0-0000{number}-of-00003.gguf": gguf_bytes(
        metadata={"split.count": 3, "split.no": number - 1}
    )
    for number in (1, 2, 3)
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add_repo("Org/Split", PARTS)
        yield hub


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("reuse")
    with Server(root / "models", root / "data", hf_endpoint=hub.url) as server:
        yield server
        assert "Traceback" not in server.log()


def by_hand(server: Server, folder: str, **changed: bytes) -> Path:
    """Put the split into a folder; `part3=b""` leaves one out, other bytes are written instead."""
    made = server.models / folder
    made.mkdir(parents=True)
    for number, (name, content) in enumerate(PARTS.items(), 1):
        content = changed.get(f"part{number}", content)
        if content:
            (made / name).write_bytes(content)
    return made


def half(server: Server, hub: Hub, repo_id: str) -> str:
    """Cancel a download of a repository of its own in the middle; return the job."""
    add_big(hub, repo_id, SIZE)
    hub.fault(f"{repo_id}/{WEIGHTS}", Slow(SIZE), times=None)
    job = ask(server, repo_id)
    until_bytes(server, job["job_id"], 4 * MIB)
    cancel(server, job["job_id"])
    hub.heal()
    return str(job["job_id"])


def fill(path: Path) -> None:
    """Write until the disk takes no more."""
    with path.open("wb", buffering=0) as file:
        while os.statvfs(path).f_bavail:
            file.write(bytes(4096))


def test_a_split_without_one_of_its_parts_is_made_whole(server: Server, hub: Hub) -> None:
    by_hand(server, "by-hand", part2=b"")
    found = wait_for(lambda: inventory(server).get(f"/models/by-hand/{SPLIT}"), 10)
    assert "1 of 3 parts missing: 2" in found["problem"]
    before = hub.served_bytes()
    done = until(server, ask(server, "Org/Split", destination="by-hand")["job_id"], "completed")
    assert hub.served_bytes() - before == len(PARTS["S-Q4_0-00002-of-00003.gguf"])
    assert done["model"] == f"/models/by-hand/{SPLIT}"
    check_published(server, hub, "Org/Split", "by-hand")
    assert inventory(server)[done["model"]]["problem"] is None


def test_a_folder_whose_manifest_is_gone(server: Server, hub: Hub) -> None:
    until(server, ask(server, "Org/Split", destination="bare")["job_id"], "completed")
    (server.models / "bare" / ".xandrouting.json").unlink()
    before = hub.served_bytes()
    until(server, ask(server, "Org/Split", destination="bare")["job_id"], "completed")
    assert hub.served_bytes() == before
    check_published(server, hub, "Org/Split", "bare")


def test_a_file_that_only_looks_right_is_left_alone(server: Server, hub: Hub) -> None:
    mine = PARTS[SPLIT][:-1] + b"!"
    folder = by_hand(server, "alike", part1=mine, part3=b"")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    job = ask(server, "Org/Split", destination="alike")
    failed = until(server, job["job_id"], "failed")
    assert failed["error_code"] == "destination_occupied"
    assert SPLIT in failed["error"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / SPLIT).unlink()
    resume(server, job["job_id"])
    until(server, job["job_id"], "completed")
    check_published(server, hub, "Org/Split", "alike")


def test_a_file_of_another_size_is_in_the_way(server: Server) -> None:
    by_hand(server, "other-size", part1=b"mine")
    answer = server.post("/v1/models/download", {"url": "Org/Split", "destination": "other-size"})
    assert SPLIT in error_of(answer, 409, "destination_occupied")["message"]


def test_another_commit_in_another_folder_goes_on_from_the_same_bytes(
    server: Server, hub: Hub
) -> None:
    first = half(server, hub, "Org/Moved")
    repo = hub.repos["Org/Moved"]
    same = os.pread(repo.revisions["main"].files[WEIGHTS].blob.fd, SIZE, 0)
    pushed = repo.push({WEIGHTS: same, "README.md": b"# New"})
    job = ask(server, "Org/Moved", destination="moved-elsewhere")
    assert job["revision"] == pushed.sha != job_of(server, first)["revision"]
    assert job["downloaded_bytes"] >= 4 * MIB
    assert job["job_id"] in job_of(server, first)["message"]
    until(server, job["job_id"], "completed")
    check_published(server, hub, "Org/Moved", "moved-elsewhere")
    assert hub.served_bytes(WEIGHTS, "Org/Moved") <= SIZE * ONCE_AND_A_BIT


def test_bytes_outlive_the_database(serve: Serve, hub: Hub) -> None:
    server = serve(hf_endpoint=hub.url)
    half(server, hub, "Org/Lost")
    server.kill9()
    for path in server.data.glob("downloads.db*"):
        path.unlink()
    server.start()
    assert ok(server.get("/v1/models/download"))["total"] == 0
    job = ask(server, "Org/Lost")
    assert job["downloaded_bytes"] >= 4 * MIB
    until(server, job["job_id"], "completed")
    check_published(server, hub, "Org/Lost", "lost")
    assert hub.served_bytes(WEIGHTS, "Org/Lost") <= SIZE * ONCE_AND_A_BIT


def test_bytes_of_a_paused_download_stay_its_own(server: Server, hub: Hub) -> None:
    add_big(hub, "Org/Kept", SIZE)
    hub.fault(f"Org/Kept/{WEIGHTS}", Slow(SIZE), times=None)
    first = ask(server, "Org/Kept")
    until_bytes(server, first["job_id"], 4 * MIB)
    there = pause(server, first["job_id"])["downloaded_bytes"]
    hub.heal()
    second = ask(server, "Org/Kept", destination="kept-too")
    assert second["downloaded_bytes"] == 0
    until(server, second["job_id"], "completed")
    assert job_of(server, first["job_id"])["downloaded_bytes"] == there
    resume(server, first["job_id"])
    until(server, first["job_id"], "completed")
    check_published(server, hub, "Org/Kept", "kept")


def test_a_destination_that_is_a_disk_of_its_own(server: Server) -> None:
    with small_filesystem(server.models / "mounted", "1M"):
        answer = server.post("/v1/models/download", {"url": "Org/Split", "destination": "mounted"})
        error = error_of(answer, 400, "invalid_destination")
    assert "disk of its own" in error["message"]
    assert error["param"] == "destination"


def test_two_gateways_of_one_data_directory(serve: Serve, tmp_path: Path, hub: Hub) -> None:
    add_big(hub, "Org/First", SIZE)
    hub.fault(f"Org/First/{WEIGHTS}", Stall(4 * MIB), times=None)
    first = serve(hf_endpoint=hub.url)
    job = ask(first, "Org/First")
    until_bytes(first, job["job_id"], 4 * MIB)
    folders = "--data-dir", str(first.data)
    with Server(first.models, tmp_path / "log", *folders, hf_endpoint=hub.url) as second:
        assert second.log().count("another gateway uses this data_dir") == 1
        assert ok(second.get("/v1/models/download"))["total"] == 0
        assert movers(second) == []
        answer = second.post("/v1/models/download", {"url": "Org/First"})
        assert "another gateway" in error_of(answer, 409, "destination_occupied")["message"]
        own = ask(second, "Org/Split", destination="second")
        until(second, own["job_id"], "completed")
        left = movers(first)
        first.kill9()
        wait_for(all_gone(left), 5)
        first.start()
        assert [one["job_id"] for one in ok(first.get("/v1/models/download"))["downloads"]] == [
            job["job_id"]
        ]
        wait_for(lambda: len(movers(first)) == 1)
        assert movers(second) == []
        hub.heal()
        until(first, job["job_id"], "completed")
    check_published(first, hub, "Org/First", "first")
    assert hub.served_bytes(WEIGHTS, "Org/First") <= SIZE * ONCE_AND_A_BIT


@pytest.mark.parametrize("wish", ["pause", "cancel"])
def test_a_wish_outlives_a_full_data_disk_and_kill_9(tmp_path: Path, hub: Hub, wish: str) -> None:
    add_big(hub, f"Org/Full-{wish}", SIZE)
    hub.fault(f"Org/Full-{wish}/{WEIGHTS}", Stall(4 * MIB), times=None)
    with (
        small_filesystem(tmp_path / "data", "16M") as data,
        Server(tmp_path / "models", data, hf_endpoint=hub.url) as server,
    ):
        job_id = ask(server, f"Org/Full-{wish}")["job_id"]
        until_bytes(server, job_id, 4 * MIB)
        fill(data / "filler")
        (pause if wish == "pause" else cancel)(server, job_id)
        wait_for(lambda: movers(server) == [])
        server.kill9()
        (data / "filler").unlink()
        server.start()
        after = job_of(server, job_id)
        assert after["status"] == {"pause": "paused", "cancel": "cancelled"}[wish]
        assert after["downloaded_bytes"] >= 4 * MIB
        hub.heal()
        if wish == "pause":
            resume(server, job_id)
        else:
            job_id = ask(server, f"Org/Full-{wish}")["job_id"]
        until(server, job_id, "completed")
        assert incoming(server) == []
        assert hub.served_bytes(WEIGHTS, f"Org/Full-{wish}") <= SIZE * ONCE_AND_A_BIT
