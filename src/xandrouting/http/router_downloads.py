"""Downloads as llama-server's router knows them: begun by `POST /models`, told at `/models/sse`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI, Request

from xandrouting.downloads.downloads import Wanted
from xandrouting.downloads.jobs import LIVE, JobState
from xandrouting.http.lifecycle import body_bytes
from xandrouting.http.openapi import request_body
from xandrouting.http.router_request import RouterRequest
from xandrouting.http.schemas import Success
from xandrouting.http.services import Services
from xandrouting.proxy.request import BodyParser

_MOVING: Final = frozenset((JobState.DOWNLOADING, JobState.VERIFYING))
_FAILED: Final = frozenset((JobState.FAILED, JobState.CANCELLED, JobState.PAUSED))


def add_router_downloads(app: FastAPI, services: Services) -> None:
    """Add the call that begins a download."""
    parser = BodyParser(RouterRequest)

    @app.post("/models", tags=["llama-server"], openapi_extra=request_body(RouterRequest))
    async def download(request: Request) -> Success:
        """Begin to download `org/name` or `org/name:QUANT`, as llama-server's router does."""
        wanted = parser.parse(await body_bytes(request))
        await services.downloads.submit(Wanted(wanted.model))
        return Success()


async def cancel_download(services: Services, name: str) -> bool:
    """Cancel the download that was asked for by this name, if one moves or waits."""
    for view in services.downloads.views():
        if view.job.order.url == name and view.job.state in LIVE:
            await services.downloads.cancel(view.job.id)
            return True
    return False


class RouterDownloads:
    """Puts one stream's news of downloads into the router's words."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}

    def told(self, data: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return what the router tells of a download's event; None: nothing."""
        job_id, state, url = data["job_id"], data["status"], data["url"]
        before = self._states.get(job_id)
        if state in _MOVING:
            self._states[job_id] = state
            done = {"done": data["downloaded_bytes"], "total": data["total_bytes"]}
            return {"model": url, "event": "download_progress", "data": {url: done}}
        self._states.pop(job_id, None)
        if before is None:
            return None  # it did not move as long as this stream listens
        if state == JobState.COMPLETED:
            return {"model": url, "event": "download_finished"}
        if state in _FAILED:
            return {"model": url, "event": "download_failed"}
        return None
