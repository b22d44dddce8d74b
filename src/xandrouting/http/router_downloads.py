"""Downloads as llama-server's router knows them: begun by `POST /models`, told at `/models/sse`.

`GET /models` lists those that move or wait, `DELETE /models` cancels one, or deletes a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Annotated, Any, Final

from fastapi import FastAPI, Query, Request

from xandrouting.core.errors import DownloadOver, InvalidRequest, ModelNotFound
from xandrouting.downloads.downloads import Wanted
from xandrouting.downloads.jobs import ENDED, LIVE, JobState, Order
from xandrouting.downloads.running import View
from xandrouting.http.deletion import delete_model
from xandrouting.http.lifecycle import body_bytes
from xandrouting.http.openapi import request_body
from xandrouting.http.router_request import RouterRequest
from xandrouting.http.schemas import (
    Architecture,
    RouterModel,
    RouterProgress,
    RouterStatus,
    Success,
)
from xandrouting.http.services import Services
from xandrouting.inventory.model_file import VIRTUAL_ROOT, ModelFormat, is_gguf, shown
from xandrouting.proxy.request import BodyParser
from xandrouting.routing.catalog import SERVED_BY

_FAILED: Final = frozenset((JobState.FAILED, JobState.CANCELLED, JobState.PAUSED))
_NOT_ENDED: Final = frozenset(JobState) - ENDED
_DOWNLOADING: Final = "downloading"  # llama-server's word; what waits for its turn is it too


def add_router_downloads(app: FastAPI, services: Services) -> None:
    """Add the calls that begin a download, and that take it or a model away."""
    parser = BodyParser(RouterRequest)

    @app.post("/models", tags=["llama-server"], openapi_extra=request_body(RouterRequest))
    async def download(request: Request) -> Success:
        """Begin to download `org/name` or `org/name:QUANT`, as llama-server's router does."""
        wanted = parser.parse(await body_bytes(request))
        await services.downloads.submit(Wanted(wanted.model))
        return Success()

    @app.delete("/models", tags=["llama-server"])
    async def delete(
        model: Annotated[
            str, Query(description="A model's path, or what a download was asked for by.")
        ] = "",
        purge: Annotated[
            bool, Query(description="The files are gone at once, those of a download too.")
        ] = False,
    ) -> Success:
        """Delete a model, or cancel its download, as llama-server's router does.

        Its files are in the trash for a day. A model may not be in use.
        """
        if not model:
            raise InvalidRequest("model must be a non-empty string", param="model")
        if await cancel_downloads(services, model, _NOT_ENDED, purge=purge):
            services.bus.publish("model", "model_remove", {"id": model})
        else:
            try:
                await delete_model(services, model, purge=purge)
            except ModelNotFound as error:
                raise ModelNotFound(
                    f"model name={shown(model)} is not found: {error.message}", param="model"
                ) from None
        return Success()


async def cancel_downloads(
    services: Services, name: str, states: Collection[JobState], *, purge: bool = False
) -> bool:
    """Cancel what was asked for by this name and is in one of these states, if anything is.

    What ends by itself just then is none of it.
    """
    found = [
        view.job.id
        for view in services.downloads.views()
        if view.job.order.url == name.strip() and view.job.state in states
    ]
    cancelled = 0
    for job_id in found:
        with suppress(DownloadOver):
            await services.downloads.cancel(job_id, purge=purge)
            cancelled += 1
    return cancelled > 0


def downloading_models(views: Iterable[View]) -> list[RouterModel]:
    """Return what moves or waits as the router lists it, each name once."""
    found: dict[str, RouterModel] = {}
    for view in views:
        order = view.job.order
        if view.job.state not in LIVE:
            continue
        here = RouterProgress(done=view.job.done_bytes, total=order.total_bytes)
        known = found.get(order.url)
        if known is None:
            found[order.url] = _downloading_model(view, here)
        elif known.status.progress is not None:  # the same, to another folder
            before = known.status.progress[order.url]
            before.done += here.done
            before.total += here.total
    return list(found.values())


def _downloading_model(view: View, progress: RouterProgress) -> RouterModel:
    order = view.job.order
    backend = SERVED_BY[_format_of(order)]
    return RouterModel(
        id=order.url,
        created=int(view.job.created_at),
        owned_by=backend,
        path=f"{VIRTUAL_ROOT}/{order.destination}",
        status=RouterStatus(value=_DOWNLOADING, progress={order.url: progress}),
        can_remove=True,
        context_length=None,
        quantization=order.quantization,
        backend=backend,
        size_bytes=order.total_bytes,
        capabilities=[],  # nobody knows before it is here
        architecture=Architecture(input_modalities=["text"], output_modalities=["text"]),
    )


def _format_of(order: Order) -> ModelFormat:
    has_gguf = any(is_gguf(file.path) for file in order.files)
    return ModelFormat.GGUF if has_gguf else ModelFormat.SAFETENSORS


class RouterDownloads:
    """Puts one stream's news of downloads into the router's words."""

    def __init__(self) -> None:
        self._told: set[str] = set()  # jobs that were said to be on their way

    def told(self, data: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return what the router tells of a download's event; None: nothing."""
        job_id, state, url = data["job_id"], data["status"], data["url"]
        if state in LIVE:
            if job_id not in self._told:
                self._told.add(job_id)
                said = {"status": _DOWNLOADING}
                return {"model": url, "event": "model_status", "data": said}
            done = {"done": data["downloaded_bytes"], "total": data["total_bytes"]}
            return {"model": url, "event": "download_progress", "data": {url: done}}
        if job_id not in self._told:
            return None  # it was not on its way as long as this stream listens
        self._told.remove(job_id)
        event = "download_failed" if state in _FAILED else "download_finished"
        return {"model": url, "event": event}
