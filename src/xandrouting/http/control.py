"""The control calls: models, health, metrics. FastAPI serves these; nothing hot is here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from xandrouting.core.engine_state import EngineState
from xandrouting.core.errors import (
    GatewayError,
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    ModelNotLoaded,
    NotFound,
)
from xandrouting.core.model import EngineId
from xandrouting.core.scheduler import EngineView
from xandrouting.http import lists
from xandrouting.http.body import read_body
from xandrouting.http.errors import headers_of, to_bytes
from xandrouting.http.inference import HOT_PATHS, InferenceApi
from xandrouting.http.openapi import describe, request_body
from xandrouting.http.schemas import (
    EngineStatus,
    ErrorAnswer,
    Health,
    InventoryList,
    LoadedItem,
    LoadedList,
    LoadStarted,
    ModelItem,
    ModelList,
    Root,
    Stats,
    Unloaded,
    UnloadResult,
)
from xandrouting.inventory.inventory import Inventory
from xandrouting.inventory.model_file import VIRTUAL_ROOT
from xandrouting.pool.pool import Claim, Engine, EnginePool
from xandrouting.proxy.request import BodyParser, LoadRequest, UnloadRequest
from xandrouting.routing.catalog import Catalog
from xandrouting.telemetry.metrics import Metrics
from xandrouting.telemetry.requests import RequestStats

MAX_CONTROL_BYTES = 1 << 20

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 403, 404, 405, 413, 429, 500, 502, 503)
}


@dataclass(frozen=True, slots=True)
class Services:
    """What the control calls ask and command."""

    version: str
    inference: InferenceApi
    pool: EnginePool
    catalog: Catalog
    inventory: Inventory
    stats: RequestStats
    metrics: Metrics
    backends: Callable[[], Mapping[str, EngineStatus]]


def build_control(services: Services) -> FastAPI:
    """Return the FastAPI application of every control call."""
    app = FastAPI(
        title="XandRouting",
        version=services.version,
        summary="One OpenAI-compatible server in front of many models and several engines.",
        redoc_url=None,
        responses=ERRORS,
    )
    _add_error_handlers(app)
    _add_status_calls(app, services)
    _add_model_calls(app, services)
    _add_model_lists(app, services)  # last: a model's id may be any path
    describe(app, HOT_PATHS, (LoadRequest, UnloadRequest))
    return app


def _add_error_handlers(app: FastAPI) -> None:
    def answer(error: GatewayError) -> Response:
        headers = {name.decode(): value.decode() for name, value in headers_of(error)}
        return Response(to_bytes(error), error.status, headers)

    @app.exception_handler(GatewayError)
    async def gateway_error(_: Request, error: GatewayError) -> Response:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 405:
            allow = (error.headers or {}).get("Allow", "")
            message = f"{request.method} is not a method of this address."
            return answer(MethodNotAllowed(message, allow=allow))
        if error.status_code == 404:
            return answer(NotFound(f"There is nothing at {path[:200]!r}. GET /docs lists all."))
        return answer(InvalidRequest(str(error.detail)))

    @app.exception_handler(Exception)
    async def bug(_: Request, __: Exception) -> Response:
        return answer(GatewayError("The server failed inside. Its log says where."))


def _add_status_calls(app: FastAPI, services: Services) -> None:
    pool, stats = services.pool, services.stats

    @app.get("/", tags=["status"])
    async def root() -> Root:
        """Tell what this is."""
        return Root(
            name="XandRouting",
            status="running",
            version=services.version,
            docs="/docs",
            endpoints=sorted({*HOT_PATHS, "/v1/models", "/v1/models/loaded", "/health"}),
        )

    @app.get("/health", tags=["status"])
    async def health() -> Health:
        """Answer 200 for as long as the gateway serves, whatever the engines do."""
        backends = dict(services.backends())
        able = any(backend.available for backend in backends.values())
        return Health(
            status="healthy" if able else "degraded",
            version=services.version,
            uptime_seconds=round(stats.uptime_s, 3),
            loaded_models=sum(
                lists.is_local(view) and view.state is EngineState.READY for view, _ in pool.views()
            ),
            engines=backends,
        )

    @app.get("/metrics", tags=["status"], response_class=Response)
    async def metrics() -> Response:
        """Return counters for Prometheus."""
        return Response(
            services.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _add_model_lists(app: FastAPI, services: Services) -> None:
    pool, inventory, stats = services.pool, services.inventory, services.stats

    @app.get("/v1/models", tags=["models"])
    async def models() -> ModelList:
        """List every loadable model."""
        snapshot = await inventory.refresh()
        whole = (file for file in snapshot.models if file.problem is None)
        return ModelList(data=[lists.model_item(file, pool) for file in whole])

    @app.get("/v1/models/loaded", tags=["models"])
    async def loaded() -> LoadedList:
        """List every engine that is not gone."""
        now = asyncio.get_running_loop().time()
        items = [
            lists.loaded_item(view, engine, now=now)
            for view, engine in pool.views()
            if lists.is_local(view)
        ]
        return LoadedList(models=items, loaded_models=items, total_count=len(items))

    @app.get("/v1/models/inventory", tags=["models"])
    async def on_disk() -> InventoryList:
        """List what lies under the models directory, damaged files too."""
        snapshot = await inventory.refresh()
        items = [lists.inventory_item(file, pool) for file in snapshot.models]
        total = sum(item.total_size_bytes for item in items)
        return InventoryList(
            models=items, total_models=len(items), total_size_gb=round(total / lists.GIB, 2)
        )

    @app.get("/v1/models/stats", tags=["models"])
    async def statistics() -> Stats:
        """Return the counters since the start."""
        views = [(view, engine) for view, engine in pool.views() if lists.is_local(view)]
        ready = sum(view.state in (EngineState.READY, EngineState.DRAINING) for view, _ in views)
        host = sum(engine.memory.host_bytes or 0 for _, engine in views)
        device = sum(engine.memory.device_bytes or 0 for _, engine in views)
        return Stats(
            total_models_loaded=ready,
            loaded_count=ready,
            available_count=sum(file.problem is None for file in inventory.snapshot.models),
            active_models=sum(view.active > 0 for view, _ in views),
            active_requests=stats.active,
            queued_requests=pool.queued,
            total_requests_served=stats.served,
            cache_hits=stats.hits,
            hits=stats.hits,
            cache_misses=stats.misses,
            misses=stats.misses,
            hit_rate=round(stats.hit_rate, 4),
            loads=pool.loads,
            load_failures=pool.load_failures,
            evictions=pool.evictions,
            estimated_gpu_memory_mb=round(device / lists.MIB, 1),
            estimated_cpu_memory_mb=round(host / lists.MIB, 1),
            cache_uptime_seconds=round(stats.uptime_s, 3),
        )

    @app.get("/v1/models/{model_id:path}", tags=["models"])
    async def model(model_id: str) -> ModelItem:
        """Describe one model; its id may be given with or without the leading slash."""
        await inventory.refresh()
        names = services.catalog.names()
        rooted = f"/{model_id}" if model_id.startswith(f"{VIRTUAL_ROOT[1:]}/") else model_id
        return lists.model_item(names.resolve(rooted), pool)


def _add_model_calls(app: FastAPI, services: Services) -> None:
    pool = services.pool
    load_parser, unload_parser = BodyParser(LoadRequest), BodyParser(UnloadRequest)
    background: set[asyncio.Task[None]] = set()

    async def finish(claim: Claim) -> Engine:
        try:
            return await claim.granted()
        finally:
            claim.release()

    async def finish_unseen(claim: Claim) -> None:
        try:
            await finish(claim)
        except GatewayError:
            pass  # the pool logged it, and the model's status tells

    @app.post(
        "/v1/models/load",
        tags=["models"],
        openapi_extra=request_body(LoadRequest),
        responses={202: {"model": LoadStarted}},
    )
    async def load(request: Request) -> LoadedItem:
        """Load a model; with `wait: false` answer 202 at once."""
        body = await read_body(dict(request.scope["headers"]), request.receive, MAX_CONTROL_BYTES)
        wanted = load_parser.parse(body)
        route = await services.inference.route(wanted, embeddings=wanted.embeddings is True)
        claim = pool.claim(route.spec, ttl_s=route.ttl_s, spelling=wanted.model)
        if wanted.wait is False:
            task = asyncio.create_task(finish_unseen(claim))
            background.add(task)
            task.add_done_callback(background.discard)
            found = pool.view(route.spec.key)
            state = "queued" if found is None else str(found[0].state)
            started = LoadStarted(model=wanted.model, path=route.spec.key.model, state=state)
            return JSONResponse(started.model_dump(), 202)  # type: ignore[return-value]
        engine = await finish(claim)
        found = pool.view(engine.id.key)
        if found is None or found[1] is not engine:
            raise ModelNotLoaded(f"{engine.id.key.model} was unloaded again before this answer.")
        return lists.loaded_item(*found, now=asyncio.get_running_loop().time())

    @app.post("/v1/models/unload", tags=["models"], openapi_extra=request_body(UnloadRequest))
    async def unload(request: Request) -> Unloaded:
        """Unload a model's engines and answer when they are gone; busy ones end first."""
        body = await read_body(dict(request.scope["headers"]), request.receive, MAX_CONTROL_BYTES)
        wanted = unload_parser.parse(body)
        going = _engines_of(services, wanted)
        if not going and wanted.backend not in (None, "auto"):
            raise ModelNotLoaded(
                f"No engine of {wanted.model} runs on {wanted.backend}. "
                "GET /v1/models/loaded lists what is loaded.",
                param="model",
            )
        results = await _let_go(pool, going, force=wanted.force is True)
        path = results[0].path if results else wanted.model
        return Unloaded(
            status="unloaded",
            message=f"{len(results)} engine(s) of {path} unloaded.",
            model=wanted.model,
            model_path=wanted.model,
            count=len(results),
            results=results,
        )

    @app.post("/v1/models/unload-all", tags=["models"])
    async def unload_all() -> Unloaded:
        """Unload every engine and answer when they are gone; busy ones end first."""
        going = [(view, engine) for view, engine in pool.views() if lists.is_local(view)]
        results = await _let_go(pool, going, force=False)
        return Unloaded(
            status="unloaded",
            message=f"{len(results)} engine(s) unloaded.",
            count=len(results),
            results=results,
        )


def _engines_of(services: Services, wanted: UnloadRequest) -> list[tuple[EngineView, Engine]]:
    """Return the engines an unload means.

    Raises:
        ModelNotFound: neither loaded nor on disk.
    """
    local = [pair for pair in services.pool.views() if lists.is_local(pair[0])]
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
    pool: EnginePool, going: list[tuple[EngineView, Engine]], *, force: bool
) -> list[UnloadResult]:
    engines: list[EngineId] = [engine.id for _, engine in going]
    await pool.unload(engines, force=force)
    return [lists.unload_result(view, engine) for view, engine in going]
