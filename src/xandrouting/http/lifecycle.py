"""Load and unload, by wish."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from xandrouting.core.errors import GatewayError, ModelNotFound, ModelNotLoaded
from xandrouting.core.scheduler import EngineView
from xandrouting.http import lists
from xandrouting.http.body import read_body
from xandrouting.http.openapi import request_body
from xandrouting.http.schemas import LoadedItem, LoadStarted, Unloaded, UnloadResult
from xandrouting.http.services import Services
from xandrouting.pool.pool import Claim, Engine
from xandrouting.proxy.request import BodyParser, LoadRequest, UnloadRequest

MAX_BODY_BYTES = 1 << 20


def add_lifecycle_calls(app: FastAPI, services: Services) -> None:
    """Add the calls that load and unload."""
    load_parser, unload_parser = BodyParser(LoadRequest), BodyParser(UnloadRequest)
    loads = _Loads(services)

    @app.post(
        "/v1/models/load",
        tags=["models"],
        openapi_extra=request_body(LoadRequest),
        responses={202: {"model": LoadStarted}},
    )
    async def load(request: Request) -> LoadedItem:
        """Load a model; with `wait: false` answer 202 at once."""
        wanted = load_parser.parse(await _body(request))
        claim = await loads.begin(wanted)
        if wanted.wait is False:
            started = loads.go_on(claim, wanted.model)
            return JSONResponse(started.model_dump(), 202)  # type: ignore[return-value]
        return await loads.finish(claim)

    @app.post("/v1/models/unload", tags=["models"], openapi_extra=request_body(UnloadRequest))
    async def unload(request: Request) -> Unloaded:
        """Unload a model's engines and answer when they are gone; busy ones end first."""
        wanted = unload_parser.parse(await _body(request))
        going = _engines_of(services, wanted)
        if not going and wanted.backend not in (None, "auto"):
            raise ModelNotLoaded(
                f"No engine of {wanted.model} runs on {wanted.backend}. "
                "GET /v1/models/loaded lists what is loaded.",
                param="model",
            )
        gone = await _let_go(services, going, force=wanted.force is True)
        return gone.model_copy(update={"model": wanted.model, "model_path": wanted.model})

    @app.post("/v1/models/unload-all", tags=["models"])
    async def unload_all() -> Unloaded:
        """Unload every engine and answer when they are gone; busy ones end first."""
        return await _let_go(services, _local_engines(services), force=False)


class _Loads:
    """Loads by wish, and those among them that nobody waits for."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._unwatched: set[asyncio.Task[None]] = set()

    async def begin(self, wanted: LoadRequest) -> Claim:
        inference = self._services.inference
        route = await inference.route(wanted, embeddings=wanted.embeddings is True)
        return self._services.pool.claim(
            route.spec,
            ttl_s=route.ttl_s,
            wait_s=inference.max_load_wait_s,
            spelling=wanted.model,
        )

    async def finish(self, claim: Claim) -> LoadedItem:
        """Wait for the engine, let it idle, and describe it."""
        try:
            engine = await claim.granted()
        finally:
            claim.release()
        found = self._services.pool.view(claim.key)
        if found is None or found[1] is not engine:
            raise ModelNotLoaded(f"{claim.key.model} was unloaded again before this answer.")
        return lists.loaded_item(*found, now=asyncio.get_running_loop().time())

    def go_on(self, claim: Claim, spelling: str) -> LoadStarted:
        """Let the load go on by itself, and tell how far it is."""
        task = asyncio.create_task(self._unseen(claim))
        self._unwatched.add(task)
        task.add_done_callback(self._unwatched.discard)
        found = self._services.pool.view(claim.key)
        state = "queued" if found is None else str(found[0].state)
        return LoadStarted(model=spelling, path=claim.key.model, state=state)

    async def _unseen(self, claim: Claim) -> None:
        try:
            await self.finish(claim)
        except GatewayError:
            pass  # the pool logged it, and the model's status tells


async def _body(request: Request) -> bytes:
    return await read_body(dict(request.scope["headers"]), request.receive, MAX_BODY_BYTES)


def _local_engines(services: Services) -> list[tuple[EngineView, Engine]]:
    return [pair for pair in services.pool.views() if lists.is_local(pair[0])]


def _engines_of(services: Services, wanted: UnloadRequest) -> list[tuple[EngineView, Engine]]:
    """Return the engines an unload means.

    Raises:
        ModelNotFound: neither loaded nor on disk.
    """
    local = _local_engines(services)
    try:
        model = services.catalog.names().resolve(wanted.model).id
    except ModelNotFound:
        model = wanted.model  # its file may be gone while it is loaded
        if not any(view.engine.key.model == model for view, _ in local):
            raise
    devices = services.catalog.devices_meant(wanted.device)
    return [
        (view, engine)
        for view, engine in local
        if view.engine.key.model == model
        and wanted.backend in (None, "auto", view.engine.key.backend)
        and (devices is None or view.engine.key.device in devices)
    ]


async def _let_go(
    services: Services, going: list[tuple[EngineView, Engine]], *, force: bool
) -> Unloaded:
    await services.pool.unload([engine.id for _, engine in going], force=force)
    results: list[UnloadResult] = [lists.unload_result(view, engine) for view, engine in going]
    return Unloaded(
        status="unloaded",
        message=f"{len(results)} engine(s) unloaded.",
        count=len(results),
        results=results,
    )
