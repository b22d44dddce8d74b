"""What llama-server's router would say of our events."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from xandrouting.core.errors import DownloadOver
from xandrouting.downloads.jobs import LIVE, Job, JobState, Order, RemoteFile
from xandrouting.downloads.running import View
from xandrouting.http.router_calls import RouterNews
from xandrouting.http.router_downloads import (
    RouterDownloads,
    cancel_downloads,
    downloading_models,
)
from xandrouting.http.schemas import RouterProgress
from xandrouting.telemetry.events import Event

A = "/models/a.gguf"


def told(event: str, *, left: bool = False, **data: Any) -> dict[str, Any] | None:
    """Return the data of what the router's stream says of one event of a model."""
    line = RouterNews(lambda _: left)(
        Event("x-1", "model", "model", {"id": A, "event": event} | data)
    )
    if not line:
        return None
    assert line.startswith(b"data: ")
    assert line.endswith(b"\n\n")
    said = json.loads(line[6:])
    assert (said.pop("model"), said.pop("event"), said.keys()) == (A, "model_status", {"data"})
    found: dict[str, Any] = said["data"]
    return found


@pytest.mark.parametrize(
    ("event", "status"),
    [
        ("starting", "loading"),
        ("ready", "loaded"),
        ("sleeping", "sleeping"),
        ("gone", "unloaded"),
        ("failed", None),
        ("stopping", None),
    ],
)
def test_states(event: str, status: str | None) -> None:
    assert told(event) == (None if status is None else {"status": status})


def test_progress() -> None:
    assert told("progress", progress={"percent": None}) is None
    assert told("progress") is None
    assert told("progress", progress={"percent": 50}) == {
        "status": "loading",
        "progress": {"stages": ["text_model"], "current": "text_model", "value": 0.5},
    }


def test_a_failed_load_tells_the_exit_code() -> None:
    error = {"message": "…", "details": {"reason": "exited", "exit_code": 1}}
    assert told("gone", error=error) == {"status": "unloaded", "exit_code": 1}
    for unknown in ({"message": "…"}, {"details": {"exit_code": None}}):
        assert told("gone", error=unknown) == {"status": "unloaded"}


def test_one_engine_of_several_is_not_the_model() -> None:
    assert told("gone", left=True) is None
    assert told("ready", left=True) == {"status": "loaded"}


def test_the_whole_list() -> None:
    news = RouterNews(lambda _: False)
    reload = b'data: {"model":"*","event":"models_reload"}\n\n'
    assert news(Event("x-1", "snapshot", "snapshot", {})) == b""  # it has just asked
    assert news(Event("x-2", "model", "models_reload", {})) == reload
    assert news(Event("x-3", "snapshot", "snapshot", {})) == reload  # it lost some
    assert news(Event("x-3", "bye", "bye", {})) == b""


def test_what_was_removed() -> None:
    news = RouterNews(lambda _: False)
    line = news(Event("x-1", "model", "model_remove", {"id": A}))
    assert line == b'data: {"model":"/models/a.gguf","event":"model_remove"}\n\n'


# Downloads.


def told_of_downloads(*events: tuple[str, str], url: str = "o/n:Q4_0") -> list[Any]:
    """Return what one stream says of these jobs as they become these."""
    downloads = RouterDownloads()
    return [
        downloads.told(
            {
                "job_id": job,
                "status": status,
                "url": url,
                "downloaded_bytes": 5,
                "total_bytes": 10,
            }
        )
        for job, status in events
    ]


BEGUN = {"model": "o/n:Q4_0", "event": "model_status", "data": {"status": "downloading"}}
MOVES = {
    "model": "o/n:Q4_0",
    "event": "download_progress",
    "data": {"o/n:Q4_0": {"done": 5, "total": 10}},
}
FINISHED = {"model": "o/n:Q4_0", "event": "download_finished"}
FAILED = {"model": "o/n:Q4_0", "event": "download_failed"}


def test_a_download_from_its_wait_to_its_end() -> None:
    states = ("pending", "downloading", "downloading", "verifying", "completed")
    told = told_of_downloads(*(("dl_1", state) for state in states))
    assert told == [BEGUN, MOVES, MOVES, MOVES, FINISHED]


@pytest.mark.parametrize("end", ["failed", "cancelled", "paused"])
def test_a_download_that_stops_and_goes_on(end: str) -> None:
    states = ("downloading", end, "pending", "completed")
    told = told_of_downloads(*(("dl_1", state) for state in states))
    assert told == [BEGUN, FAILED, BEGUN, FINISHED]


def test_what_ended_before_is_not_told_again() -> None:
    """Its bytes were deleted, say, or another download got them."""
    told = told_of_downloads(("dl_2", "downloading"), ("dl_1", "cancelled"), ("dl_2", "completed"))
    assert told == [BEGUN, None, FINISHED]


def view(url: str, state: JobState, done: int = 0, *paths: str, folder: str = "n") -> View:
    files = tuple(RemoteFile(path, 10, sha256="0" * 64) for path in paths or ("a.gguf",))
    order = Order(url, "http://hub", "o/n", "c" * 40, folder, files, "Q4_0")
    job = Job("dl_1", order, state, created_at=7.5, done={files[0].path: done})
    return View(job, bytes_per_s=None, eta_s=None, spent_s=0.0, waiting=None)


@pytest.mark.parametrize("state", JobState)
def test_the_list_has_what_moves_or_waits(state: JobState) -> None:
    found = downloading_models([view("o/n:Q4_0", state, 5)])
    if state not in LIVE:
        assert found == []
        return
    [item] = found
    said = item.model_dump(exclude_none=True)
    assert (said["id"], said["object"], said["created"]) == ("o/n:Q4_0", "model", 7)
    assert (said["path"], said["size_bytes"], said["can_remove"]) == ("/models/n", 10, True)
    assert said["status"] == {
        "value": "downloading",
        "failed": False,
        "progress": {"o/n:Q4_0": {"done": 5, "total": 10}},
    }


def test_one_name_is_one_entry() -> None:
    found = downloading_models(
        [
            view("o/n", JobState.PENDING, 1),
            view("o/m", JobState.PENDING, 0, "model.safetensors", "config.json"),
            view("o/n", JobState.DOWNLOADING, 2, folder="again"),
        ]
    )
    assert [(item.id, item.backend) for item in found] == [("o/n", "llamacpp"), ("o/m", "vllm")]
    assert found[0].status.progress == {"o/n": RouterProgress(done=3, total=20)}


@pytest.mark.parametrize(("over", "cancelled"), [((False, True), True), ((True, True), False)])
async def test_a_download_that_ends_just_then_is_not_cancelled(
    over: tuple[bool, bool], cancelled: bool
) -> None:
    left = list(over)

    async def cancel(job_id: str, *, purge: bool) -> None:
        assert (job_id, purge) == ("dl_1", False)
        if left.pop():
            raise DownloadOver("It is completed already.")

    moving = [view("o/n", JobState.DOWNLOADING) for _ in over]
    downloads = SimpleNamespace(views=lambda: moving, cancel=cancel)
    services = cast("Any", SimpleNamespace(downloads=downloads))
    assert await cancel_downloads(services, "o/n", LIVE) is cancelled
    assert left == []
