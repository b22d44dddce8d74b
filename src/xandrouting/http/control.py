"""The control calls: models, health, metrics. FastAPI serves these; nothing hot is here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from xandrouting.core.engine_state import EngineState
from xandrouting.core.errors import GatewayError, InvalidRequest, MethodNotAllowed, NotFound
from xandrouting.http import lists
from xandrouting.http.body import ClientLeft
from xandrouting.http.decisions import device_items
from xandrouting.http.deletion import add_deletion
from xandrouting.http.downloads import DOWNLOAD_BODIES, add_download_calls
from xandrouting.http.errors import headers_of, to_bytes
from xandrouting.http.events import add_event_calls
from xandrouting.http.inference import HOT_PATHS
from xandrouting.http.lifecycle import add_lifecycle_calls
from xandrouting.http.logs import add_log_calls
from xandrouting.http.models import add_model_lists
from xandrouting.http.openapi import describe
from xandrouting.http.providers import add_provider_calls
from xandrouting.http.router_calls import add_router_calls
from xandrouting.http.router_request import RouterRequest
from xandrouting.http.schemas import ErrorAnswer, Health, ParkedItem, Root, SparesItem, System
from xandrouting.http.services import Services
from xandrouting.http.swap_calls import add_swap_calls
from xandrouting.proxy.request import LoadRequest, PinRequest, PlanRequest, UnloadRequest

SHOWN_PATHS = ("/v1/models", "/v1/models/loaded", "/v1/events", "/v1/system", "/health")
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer}
    for status in (400, 401, 403, 404, 405, 409, 413, 429, 500, 502, 503, 504, 507)
}


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
    add_provider_calls(app, services, default_ttl_s=services.default_ttl_s)
    add_event_calls(app, services.bus)
    add_lifecycle_calls(app, services)
    add_router_calls(app, services)
    add_swap_calls(app, services)
    add_log_calls(app, services)
    add_download_calls(app, services)
    add_model_lists(app, services)  # last: a model's id may be any path
    add_deletion(app, services)
    bodies = (LoadRequest, PinRequest, PlanRequest, RouterRequest, UnloadRequest, *DOWNLOAD_BODIES)
    describe(app, HOT_PATHS, bodies)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    def answer(error: GatewayError) -> Response:
        headers = {name.decode(): value.decode() for name, value in headers_of(error)}
        return Response(to_bytes(error), error.status, headers)

    @app.exception_handler(GatewayError)
    async def gateway_error(_: Request, error: GatewayError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        message = f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}."
        return answer(InvalidRequest(message, param=name))

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

    @app.exception_handler(ClientLeft)
    async def client_left(_: Request, __: Exception) -> Response:
        return Response(status_code=400)  # to nobody

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
            endpoints=sorted(
                {*HOT_PATHS, "/v1/models", "/v1/models/loaded", "/v1/system", "/health"}
            ),
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

    @app.get("/v1/system", tags=["status"])
    async def system() -> System:
        """Show this machine's memory: what there is, what is held for whom, what is free."""
        return System(
            node="local",
            version=services.version,
            uptime_seconds=round(stats.uptime_s, 3),
            devices=device_items(pool.devices()),
            pinned=sorted(pool.pinned),
            queued_requests=pool.queued,
            spares=SparesItem(
                count=len(pool.spares),
                memory_bytes=sum(use.host_bytes or 0 for use in pool.spares),
            ),
            parked=ParkedItem(
                conversations=services.parking.count,
                size_bytes=services.parking.size_bytes,
                quota_bytes=services.parking.quota_bytes,
            ),
        )

    @app.get("/metrics", tags=["status"], response_class=Response)
    async def metrics() -> Response:
        """Return counters for Prometheus."""
        return Response(
            services.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )
