"""The starter model: a download like any other, when there is no model at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.e2e.conftest import Serve
from tests.fakes.hub import Hub, Slow, Stall
from tests.fetching import (
    MIB,
    WEIGHTS,
    add_big,
    ask,
    inventory,
    movers,
    pause,
    until,
    until_bytes,
)
from tests.server import MODEL, STARTER, Server, clean_environment, ok, starter
from tests.waiting import wait_for
from xandrouting.downloads.packaged import STARTER as PACKAGED

FOLDER, FILE = STARTER.split("/")
REPO = PACKAGED.repo_id
NOWHERE = "http://127.0.0.1:1"
NO_PIP = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"{NOWHERE}/simple"}
NO_PIP |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        files = {FILE: starter().read_bytes()}
        hub.add_repo(REPO, {"README.md": b"# newer"}, revisions={PACKAGED.commit: files})
        yield hub


@pytest.fixture
def empty(tmp_path: Path) -> Mapping[str, Path]:
    """Folders for a server without a model."""
    return {"models": tmp_path / "models", "data": tmp_path / "data"}


def test_it_is_there_when_the_server_is_ready(empty: Mapping[str, Path], hub: Hub) -> None:
    with Server(**empty, starter=True, hf_endpoint=hub.url) as server:
        [job] = ok(server.get("/v1/models/download"))["downloads"]
        assert (job["status"], job["model"]) == ("completed", MODEL)
        assert (job["repo_id"], job["quantization"]) == (REPO, "Q4_1")
        assert f'"model": "{MODEL}"' in server.log()  # the request to try
        assert ok(server.chat(model=FOLDER))["model"] == MODEL
        assert server.stop() == 0
        server.start()
        assert len(ok(server.get("/v1/models/download"))["downloads"]) == 1


def test_it_may_be_pinned_before_it_is_there(empty: Mapping[str, Path], hub: Hub) -> None:
    with Server(**empty, starter=True, pinned=FOLDER, hf_endpoint=hub.url) as server:
        wait_for(lambda: [item["state"] for item in server.loaded()] == ["ready"], 10)
        assert [(item["path"], item["pinned"]) for item in server.loaded()] == [(MODEL, True)]


def test_where_there_is_a_model_none_is_fetched(serve: Serve, hub: Hub) -> None:
    server = serve("mine/mine.gguf", starter=True, hf_endpoint=hub.url)
    assert ok(server.get("/v1/models/download"))["total"] == 0


def test_it_is_not_fetched_while_another_comes(empty: Mapping[str, Path], hub: Hub) -> None:
    add_big(hub, "Org/Large")
    hub.fault(f"Org/Large/{WEIGHTS}", Stall(MIB), times=None)
    with Server(**empty, hf_endpoint=hub.url, max_downloads=1) as server:
        job = ask(server, "Org/Large")
        until_bytes(server, job["job_id"], MIB)
    with Server(**empty, starter=True, hf_endpoint=hub.url, max_downloads=1) as server:
        [there] = ok(server.get("/v1/models/download"))["downloads"]
        assert there["job_id"] == job["job_id"]
    hub.heal()


def test_it_stays_paused(empty: Mapping[str, Path], hub: Hub) -> None:
    hub.fault(f"{REPO}/{FILE}", Stall(MIB), times=None)
    with Server(**empty, hf_endpoint=hub.url) as server:
        url, revision = f"{REPO}:Q4_1", PACKAGED.commit
        job = ask(server, url, revision=revision, destination=FOLDER)
        pause(server, job["job_id"])
    hub.heal()
    with Server(**empty, starter=True, hf_endpoint=hub.url) as server:
        [there] = ok(server.get("/v1/models/download"))["downloads"]
        assert (there["job_id"], there["status"]) == (job["job_id"], "paused")


def test_the_server_is_ready_without_it(empty: Mapping[str, Path]) -> None:
    with Server(**empty, starter=True, hf_endpoint=NOWHERE, environment=NO_PIP) as server:
        assert "starter model not downloaded code=hub_unreachable" in server.log()
        assert "No model yet" in server.log()
        assert ok(server.get("/v1/models"))["data"] == []
        assert "Traceback" not in server.log()


def test_a_signal_while_it_comes_ends_the_server(
    empty: Mapping[str, Path], hub: Hub, tmp_path: Path
) -> None:
    hub.fault(f"{REPO}/{FILE}", Slow(4 * MIB), times=None)
    server = Server(**empty, starter=True, hf_endpoint=hub.url)
    ready = server.launch()
    try:
        wait_for(lambda: movers(server), 20)
        server.signal(signal.SIGINT)
        assert server.wait(5) == 0
        assert ready.read_text() == ""
        hub.heal()
        server.start()
        [job] = ok(server.get("/v1/models/download"))["downloads"]
        until(server, job["job_id"], "completed")
        assert list(inventory(server)) == [MODEL]
    finally:
        server.close()
    assert "Traceback" not in server.log()


def test_the_script_of_tests_and_benches(tmp_path: Path, hub: Hub) -> None:
    script = ["scripts/fetch_starter.py", str(tmp_path)]
    environment = {**clean_environment(), "HF_ENDPOINT": hub.url}
    subprocess.run([sys.executable, *script], check=True, env=environment, timeout=60)
    assert (tmp_path / STARTER).read_bytes() == starter().read_bytes()
    gone = {**clean_environment(), **NO_PIP, "HF_ENDPOINT": NOWHERE}
    again = subprocess.run([sys.executable, *script], env=gone, timeout=60)
    assert again.returncode == 0
    other = [sys.executable, script[0], str(tmp_path / "other")]
    assert subprocess.run(other, env=gone, timeout=60).returncode == 1
