"""The calls about downloads: begin, watch, pause, cancel, and look before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from fastapi import FastAPI, Query, Request
from msgspec import Raw

from xandrouting.core.errors import InvalidRequest
from xandrouting.core.model import HOST
from xandrouting.core.sizes import in_words
from xandrouting.downloads.downloads import Verified, Wanted
from xandrouting.http.decisions import gib
from xandrouting.http.download_items import item_of
from xandrouting.http.download_schemas import (
    DownloadCancelled,
    DownloadItem,
    DownloadList,
    DownloadRequest,
    QuantizationItem,
    RepoItem,
    RepoRequest,
)
from xandrouting.http.lifecycle import body_bytes
from xandrouting.http.openapi import request_body
from xandrouting.http.services import Services
from xandrouting.proxy.request import BodyParser, LoadRequest

DOWNLOAD_BODIES: Final = (DownloadRequest, RepoRequest)
SAMPLE_FILES: Final = 20

_ENCODE: Final = msgspec.json.Encoder().encode
_LOAD_PARSER: Final = BodyParser(LoadRequest)


def add_download_calls(app: FastAPI, services: Services) -> None:
    """Add the calls about downloads."""
    downloads = services.downloads
    parser, repo_parser = BodyParser(DownloadRequest), BodyParser(RepoRequest)

    @app.post(
        "/v1/models/download", tags=["downloads"], openapi_extra=request_body(DownloadRequest)
    )
    async def download(request: Request) -> DownloadItem:
        """Begin to download a model, and answer at once; `GET` tells how it goes."""
        asked = parser.parse(await body_bytes(request))
        wanted = wanted_of(asked, destination=asked.destination, load=load_options(asked.load))
        return item_of(await downloads.submit(wanted))

    @app.get("/v1/models/download", tags=["downloads"])
    async def all_downloads() -> DownloadList:
        """List every download that is known, the newest first."""
        items = [item_of(view) for view in downloads.views()]
        return DownloadList(downloads=items, total=len(items))

    @app.get("/v1/models/download/{job_id}", tags=["downloads"])
    async def one_download(job_id: str) -> DownloadItem:
        """Tell how far a download is."""
        return item_of(downloads.view(job_id))

    @app.delete("/v1/models/download/{job_id}", tags=["downloads"])
    async def cancel(
        job_id: str,
        purge: Annotated[
            bool, Query(description="Delete what is there of it, too; else it is kept for a week.")
        ] = False,
    ) -> DownloadCancelled:
        """Cancel a download, and answer when it has stopped."""
        view = await downloads.cancel(job_id, purge=purge)
        kept = f"{in_words(view.job.done_bytes)} are kept: ask for it again to go on."
        return DownloadCancelled(
            status=view.job.state,
            job_id=job_id,
            message="Its bytes are deleted." if purge else kept,
        )

    @app.post("/v1/models/download/{job_id}/pause", tags=["downloads"])
    async def pause(job_id: str) -> DownloadItem:
        """Stop a download until it is resumed; it stays so across restarts."""
        return item_of(await downloads.pause(job_id))

    @app.post("/v1/models/download/{job_id}/resume", tags=["downloads"])
    async def resume(job_id: str) -> DownloadItem:
        """Go on with a download that is paused or has failed, from the bytes on disk."""
        return item_of(await downloads.resume(job_id))

    @app.post("/v1/models/verify-repo", tags=["downloads"], openapi_extra=request_body(RepoRequest))
    async def verify(request: Request) -> RepoItem:
        """Tell whether a repository can be had, and what there is to choose; nothing is fetched."""
        asked = repo_parser.parse(await body_bytes(request))
        return _repo_item(services, await downloads.verify(wanted_of(asked)))


def wanted_of(
    asked: RepoRequest,
    *,
    destination: str | None = None,
    load: Mapping[str, Any] | None = None,
) -> Wanted:
    """Return what a request asks for."""
    return Wanted(
        url=asked.url,
        destination=destination,
        quantization=asked.quantization,
        include=tuple(asked.include or ()),
        exclude=tuple(asked.exclude or ()),
        revision=asked.revision,
        load=load,
    )


def load_options(asked: bool | Mapping[str, Raw] | None) -> Mapping[str, Any] | None:
    """Return the options of the load that shall follow; None: none shall.

    Raises:
        InvalidRequest: one of them is out of its range.
    """
    if asked is None or asked is False:
        return None
    fields = {} if asked is True else dict(asked)
    try:
        parsed = _LOAD_PARSER.parse(_ENCODE({**fields, "model": "model"}))
    except InvalidRequest as error:
        raise InvalidRequest(f"load: {error.message}", param="load") from None
    options: dict[str, Any] = msgspec.to_builtins(parsed)
    return {
        name: value
        for name, value in options.items()
        if value is not None and name not in ("model", "wait")
    }


def _repo_item(services: Services, verified: Verified) -> RepoItem:
    repository, chosen = verified.repository, verified.chosen
    files = () if chosen is None else chosen.files
    size = sum(file.size for file in files)
    shown = files or repository.files
    refusal = verified.refusal
    return RepoItem(
        repo_id=repository.repo_id,
        revision=repository.commit,
        gated=repository.gated,
        private=repository.private,
        license=repository.license,
        total_files=len(repository.files),
        matched_files=len(files),
        size_bytes=size,
        size_gb=gib(size),
        fits=weights_fit(services, size) if files else None,
        quantization=None if chosen is None else chosen.quantization,
        sample_files=[file.path for file in shown[:SAMPLE_FILES]],
        quantizations=[
            QuantizationItem(
                name=variant.name,
                files=[file.path for file in variant.files],
                size_bytes=variant.size_bytes,
                size_gb=gib(variant.size_bytes),
                complete=not variant.lacks,
                fits=weights_fit(services, variant.size_bytes),
            )
            for variant in verified.variants
        ],
        message=(
            f"{repository.repo_id} can be downloaded: {len(files)} file(s), {in_words(size)}."
            if refusal is None
            else refusal.message
        ),
    )


def weights_fit(services: Services, size_bytes: int) -> bool | None:
    """Whether weights of this size fit what engines may take, all devices together.

    What they need besides depends on options nobody has said yet. None: nothing was measured.
    """
    devices = services.pool.devices()
    if not any(device.device == HOST for device in devices):
        return None
    return size_bytes <= sum(device.budget_bytes for device in devices)
