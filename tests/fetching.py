"""Downloads of a real server from a hub on loopback, as tests ask for them."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fakes.hub import Hub
from tests.server import Server, ok
from tests.waiting import wait_for

MIB = 1 << 20
ENDED = ("completed", "failed", "cancelled")
WEIGHTS = "model-Q4_0.gguf"  # the big file of repositories that are about bytes


def ask(server: Server, url: str, **fields: Any) -> dict[str, Any]:
    """Begin a download; return the job."""
    return ok(server.post("/v1/models/download", {"url": url, **fields}))


def job_of(server: Server, job_id: str) -> dict[str, Any]:
    return ok(server.get(f"/v1/models/download/{job_id}"))


def until(server: Server, job_id: str, *wanted: str, timeout_s: float = 30.0) -> dict[str, Any]:
    """Wait until the job's status is one of these; fail when it ends otherwise."""

    def reached() -> dict[str, Any] | None:
        job = job_of(server, job_id)
        if job["status"] in wanted:
            return job
        assert job["status"] not in ENDED, job
        return None

    found = wait_for(reached, timeout_s)
    assert found is not None
    return found


def until_bytes(server: Server, job_id: str, size: int, timeout_s: float = 30.0) -> dict[str, Any]:
    """Wait until so many bytes of the job are on the disk."""

    def reached() -> dict[str, Any] | None:
        job = job_of(server, job_id)
        assert job["status"] not in ENDED, job
        return job if job["downloaded_bytes"] >= size else None

    found = wait_for(reached, timeout_s)
    assert found is not None
    return found


def pause(server: Server, job_id: str) -> dict[str, Any]:
    return ok(server.post(f"/v1/models/download/{job_id}/pause"))


def resume(server: Server, job_id: str) -> dict[str, Any]:
    return ok(server.post(f"/v1/models/download/{job_id}/resume"))


def cancel(server: Server, job_id: str, **query: Any) -> dict[str, Any]:
    return ok(server.client.delete(f"/v1/models/download/{job_id}", params=query))


def inventory(server: Server) -> dict[str, dict[str, Any]]:
    """What lies in the models directory, by its loadable id."""
    return {item["path"]: item for item in ok(server.get("/v1/models/inventory"))["models"]}


def incoming(server: Server) -> list[Path]:
    """Every file of unfinished downloads that holds bytes."""
    files = (path for path in (server.models / ".incoming").rglob("*") if path.is_file())
    return [path for path in files if path.stat().st_size]


@contextmanager
def small_filesystem(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system of `size`, as mount(8) reads it, for as long as the block lasts."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    if made.returncode != 0:
        pytest.skip(f"no filesystem can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def check_published(server: Server, hub: Hub, repo_id: str, destination: str) -> None:
    """Check that a folder holds what its manifest says, and that it is what the hub has."""
    folder = server.models / destination
    manifest = json.loads((folder / ".xandrouting.json").read_text())
    assert manifest["repo_id"] == repo_id
    assert manifest["files"]
    for file in manifest["files"]:
        content = (folder / file["path"]).read_bytes()
        assert len(content) == file["size"]
        if file["sha256"] is not None:
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
        else:
            git = hashlib.sha1(b"blob %d\0" % len(content) + content)
            assert git.hexdigest() == file["blob_id"]
    wait_for(lambda: incoming(server) == [])


def movers(server: Server) -> list[psutil.Process]:
    """The processes that move bytes."""

    def is_mover(process: psutil.Process) -> bool:
        try:
            return any(argument.endswith("/mover.py") for argument in process.cmdline())
        except psutil.Error:
            return False

    return [process for process in server.everything() if is_mover(process)]


def add_big(hub: Hub, repo_id: str, size: int = 8 * MIB, **options: Any) -> None:
    """Add a repository of one file of random bytes."""
    seed = int.from_bytes(hashlib.sha256(repo_id.encode()).digest()[:4])
    hub.add_repo(repo_id, {WEIGHTS: ("random", size, seed)}, **options)


@contextmanager
def faulty(hub: Hub, repo_id: str, faults: Mapping[str, Any]) -> Iterator[None]:
    """Have a repository's big file be served with these faults, `times` each."""
    for times, fault in faults.items():
        hub.fault(f"{repo_id}/{WEIGHTS}", fault, times=None if times == "always" else int(times))
    try:
        yield
    finally:
        hub.heal(f"{repo_id}/{WEIGHTS}")
