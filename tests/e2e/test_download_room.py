"""A model is deleted to make room for another: the trash gives way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.hub import Hub, Stall
from tests.fetching import (
    MIB,
    WEIGHTS,
    add_big,
    ask,
    check_published,
    inventory,
    job_of,
    resume,
    small_filesystem,
    until,
    until_bytes,
)
from tests.server import Server, error_of, ok
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        add_big(hub, "Org/Eight", 8 * MIB)
        add_big(hub, "Org/Thirteen", 13 * MIB)
        yield hub


@pytest.fixture
def server(tmp_path: Path, hub: Hub) -> Iterator[Server]:
    """A server with a models directory on a disk of 12 MiB."""
    with (
        small_filesystem(tmp_path / "models", "12m") as models,
        Server(models, tmp_path / "data", hf_endpoint=hub.url) as server,
    ):
        yield server
        assert "Traceback" not in server.log()


def add_model(server: Server, name: str, size: int) -> None:
    """Have an inventory list so many bytes by this name, be they a model or not."""
    (server.models / name).write_bytes(bytes(size))
    wait_for(lambda: f"/models/{name}" in inventory(server))


def delete(server: Server, name: str) -> None:
    ok(server.client.delete(f"/v1/models/{name}"))


def in_trash(server: Server) -> set[str]:
    return {file.name for file in (server.models / ".trash").rglob("*.gguf")}


def test_what_was_deleted_makes_room_at_once(server: Server, hub: Hub) -> None:
    add_model(server, "big.gguf", 6 * MIB)
    answer = server.post("/v1/models/download", {"url": "Org/Eight"})
    error_of(answer, 507, "insufficient_disk")
    delete(server, "big.gguf")
    assert in_trash(server) == {"big.gguf"}  # a slip is not the end, as long as there is room
    until(server, ask(server, "Org/Eight")["job_id"], "completed")
    check_published(server, hub, "Org/Eight", "eight")
    assert in_trash(server) == set()
    assert "trash gave way to a download models=1" in server.log()


def test_what_would_not_be_enough_stays_in_the_trash(server: Server) -> None:
    add_model(server, "big.gguf", 6 * MIB)
    delete(server, "big.gguf")
    answer = server.post("/v1/models/download", {"url": "Org/Thirteen"})
    error_of(answer, 507, "insufficient_disk")
    assert in_trash(server) == {"big.gguf"}


def test_a_download_that_met_a_full_disk_goes_on(server: Server, hub: Hub) -> None:
    hub.fault(f"Org/Eight/{WEIGHTS}", Stall(3 * MIB))
    job = ask(server, "Org/Eight")
    until_bytes(server, job["job_id"], 3 * MIB)
    add_model(server, "big.gguf", 6 * MIB)
    hub.heal()
    paused = until(server, job["job_id"], "paused")
    assert (paused["error_code"], paused["message"]) == ("disk_full", paused["error"])
    again = server.post(f"/v1/models/download/{job['job_id']}/resume")
    error_of(again, 507, "insufficient_disk")
    delete(server, "big.gguf")
    resume(server, job["job_id"])
    until(server, job["job_id"], "completed")
    assert job_of(server, job["job_id"])["error"] is None
    assert in_trash(server) == set()
