"""Load, unload, pin and plan, by wish."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from xandrouting.core.engine import EngineView
from xandrouting.core.errors import ModelNotFound, ModelNotLoaded
from xandrouting.http import lists, upstream_lists
from xandrouting.http.body import read_body
from xandrouting.http.decisions import decision_item
from xandrouting.http.openapi import request_body
from xandrouting.http.schemas import (
    DecisionItem,
    LoadedItem,
    LoadJob,
    Pinned,
    Unloaded,
    UnloadResult,
)
from xandrouting.http.services import Services
from xandrouting.pool.engine import Engine
from xandrouting.proxy.request import (
    BodyParser,
    LoadRequest,
    PinRequest,
    PlanRequest,
    UnloadRequest,
)

MAX_BODY_BYTES = 1 << 20


def add_lifecycle_calls(app: FastAPI, services: Services) -> None:
    """Add the calls that load and unload."""
    load_parser, unload_parser = BodyParser(LoadRequest), BodyParser(UnloadRequest)
    plan_parser, pin_parser = BodyParser(PlanRequest), BodyParser(PinRequest)
    loads = services.loads

    @app.post(
        "/v1/models/load",
        tags=["models"],
        openapi_extra=request_body(LoadRequest),
        responses={202: {"model": LoadJob}},
    )
    async def load(request: Request) -> LoadedItem:
        """Load a model; with `wait: false` answer 202 at once."""
        wanted = load_parser.parse(await body_bytes(request))
        wait_s = services.inference.max_load_wait_s
        there = await upstream_lists.load(services.upstreams, wanted, wait_s=wait_s)
        if there is not None:
            return there
        if wanted.wait is False:
            job = loads.job_item(await loads.start(wanted))
            return JSONResponse(job.model_dump(), 202)  # type: ignore[return-value]
        return await loads.finish(await loads.begin(wanted, wait_s=wait_s))

    @app.get("/v1/models/load/{load_id}", tags=["models"])
    async def load_job(load_id: str) -> LoadJob:
        """Tell how far a load is that was begun with `wait: false`."""
        return loads.job_item(loads.job(load_id))

    @app.delete("/v1/models/load/{load_id}", tags=["models"])
    async def cancel_load(load_id: str) -> LoadJob:
        """Take a load back; it ends unless somebody else waits for the model."""
        return loads.job_item(await loads.cancel(load_id))

    @app.post("/v1/models/plan", tags=["models"], openapi_extra=request_body(PlanRequest))
    async def plan(request: Request) -> DecisionItem:
        """Tell what loading a model would take and who would leave for it; nothing is changed."""
        wanted = plan_parser.parse(await body_bytes(request))
        route = await services.inference.route(wanted, embeddings=wanted.embeddings is True)
        return decision_item(services.pool.plan(route.spec))

    @app.post("/v1/models/pin", tags=["models"], openapi_extra=request_body(PinRequest))
    async def pin(request: Request) -> Pinned:
        """Let a model be neither a victim nor unloaded by time, or take that back."""
        wanted = pin_parser.parse(await body_bytes(request))
        upstream_lists.check_pin(services.upstreams, wanted.model)
        await services.inventory.refresh()
        model = services.catalog.model_meant(wanted.model).id
        services.pool.pin(model, pinned=wanted.pinned)
        loaded = any(view.engine.key.model == model for view, _ in services.pool.views())
        return Pinned(model=wanted.model, path=model, pinned=wanted.pinned, loaded=loaded)

    @app.post("/v1/models/unload", tags=["models"], openapi_extra=request_body(UnloadRequest))
    async def unload(request: Request) -> Unloaded:
        """Unload a model's engines and answer when they are gone; busy ones end first."""
        wanted = unload_parser.parse(await body_bytes(request))
        there = await upstream_lists.unload(services.upstreams, wanted)
        if there is not None:
            return there
        going = engines_of(services, wanted)
        if not going and wanted.backend not in (None, "auto"):
            raise ModelNotLoaded(
                f"No engine of {wanted.model} runs on {wanted.backend}. "
                "GET /v1/models/loaded lists what is loaded.",
                param="model",
            )
        gone = await let_go(services, going, force=wanted.force is True)
        return gone.model_copy(update={"model": wanted.model, "model_path": wanted.model})

    @app.post("/v1/models/unload-all", tags=["models"])
    async def unload_all() -> Unloaded:
        """Unload every engine and answer when they are gone; busy ones end first.

        What an upstream holds in memory is its own and stays.
        """
        return await let_go(services, local_engines(services), force=False)


async def body_bytes(request: Request) -> bytes:
    """Return the whole body of a control call."""
    return await read_body(dict(request.scope["headers"]), request.receive, MAX_BODY_BYTES)


def local_engines(services: Services) -> list[tuple[EngineView, Engine]]:
    """Return the engines that are ours to unload."""
    return [pair for pair in services.pool.views() if lists.is_local(pair[0])]


def engines_of(services: Services, wanted: UnloadRequest) -> list[tuple[EngineView, Engine]]:
    """Return the engines an unload means.

    Raises:
        ModelNotFound: neither loaded nor on disk.
    """
    local = local_engines(services)
    try:
        models = services.catalog.models_meant(wanted.model, wanted.backend)
    except ModelNotFound:
        models = frozenset((wanted.model,))  # its file may be gone while it is loaded
        if not any(view.engine.key.model in models for view, _ in local):
            raise
    devices = services.catalog.devices_meant(wanted.device)
    return [
        (view, engine)
        for view, engine in local
        if view.engine.key.model in models
        and wanted.backend in (None, "auto", view.engine.key.backend)
        and (devices is None or view.engine.key.device in devices)
    ]


async def let_go(
    services: Services, going: list[tuple[EngineView, Engine]], *, force: bool
) -> Unloaded:
    """Unload these engines and tell of them when they are gone."""
    await services.pool.unload([engine.id for _, engine in going], force=force)
    results: list[UnloadResult] = [lists.unload_result(view, engine) for view, engine in going]
    return Unloaded(
        status="unloaded",
        message=f"{len(results)} engine(s) unloaded.",
        count=len(results),
        results=results,
    )
