"""The calls of llama-server's router mode, over the same engines.

Built to tools/server/README.md of llama.cpp ("Using multiple models"), and where that is
silent to its server-models.cpp. docs/compatibility.md lists what differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Final

import msgspec
from fastapi import FastAPI, Query, Request
from msgspec import Raw

from xandrouting.core.engine import EngineView
from xandrouting.core.engine_state import EngineState
from xandrouting.core.errors import InvalidRequest, ModelNotFound, UnsupportedByEngine
from xandrouting.core.model import Backend, LoadOptions
from xandrouting.downloads.jobs import LIVE
from xandrouting.http import lists
from xandrouting.http.lifecycle import body_bytes, engines_of, local_engines
from xandrouting.http.openapi import request_body
from xandrouting.http.router_downloads import (
    RouterDownloads,
    add_router_downloads,
    cancel_downloads,
    downloading_models,
)
from xandrouting.http.router_request import RouterRequest
from xandrouting.http.schemas import (
    Architecture,
    RouterModel,
    RouterModels,
    RouterStatus,
    Status,
    Success,
)
from xandrouting.http.services import Services
from xandrouting.http.stream import PING, LiveStream
from xandrouting.inventory.model_file import ModelFile
from xandrouting.net.client import UpstreamError
from xandrouting.pool.engine import Engine, News
from xandrouting.proxy.headers import EVENT_STREAM, EVENT_STREAM_HEADERS
from xandrouting.proxy.request import BodyParser, LoadRequest, UnloadRequest
from xandrouting.telemetry.events import Event

STOP_TIMEOUT_S: Final = 10.0  # llama-server's own: what a busy engine has before it is ended
PROPS_WAIT_S: Final = 10.0  # an engine answers between two batches

_NO_LONGER: Final = (EngineState.DRAINING, EngineState.STOPPING)
_ANSWERS: Final = (EngineState.READY, EngineState.DRAINING)
_MODEL_EVENTS: Final = frozenset(("model", "download"))
_STATUS_OF: Final = {
    News.STARTING: "loading",
    News.PROGRESS: "loading",
    News.READY: "loaded",
    News.SLEEPING: "sleeping",
    News.GONE: "unloaded",
}

_ENCODE: Final = msgspec.json.Encoder().encode
_RAW_OBJECT: Final = msgspec.json.Decoder(dict[str, Raw])


def add_router_calls(app: FastAPI, services: Services) -> None:
    """Add the calls that clients of llama-server's router use."""
    add_router_downloads(app, services)
    parser = BodyParser(RouterRequest)

    @app.get("/models", tags=["llama-server"], response_model_exclude_none=True)
    async def models(
        reload: Annotated[
            str,
            Query(description="If it is not empty, engines whose files changed are unloaded too."),
        ] = "",
    ) -> RouterModels:
        """List every model, and what is downloaded, as llama-server's router does."""
        inventory = services.inventory
        snapshot = await (inventory.refresh() if reload else inventory.look())
        if reload:
            await _unload(services, _outdated(services, snapshot.models))
            services.bus.publish("model", "models_reload", {})
        whole = (file for file in snapshot.models if file.problem is None)
        here = [_router_model(services, file) for file in whole]
        return RouterModels(data=here + downloading_models(services.downloads.views()))

    @app.post("/models/load", tags=["llama-server"], openapi_extra=request_body(RouterRequest))
    async def load(request: Request) -> Success:
        """Begin to load a model, as llama-server's router does; `GET /models` tells how it goes."""
        wanted = parser.parse(await body_bytes(request))
        await services.inventory.refresh()
        try:
            model = services.catalog.model_meant(wanted.model).id
        except ModelNotFound as error:
            raise ModelNotFound(f"model is not found: {error.message}", param="model") from None
        runs = any(view.state not in _NO_LONGER for view, _ in _engines(services, model))
        if runs or services.loads.under_way(model):
            raise InvalidRequest(f"model is already running: {model}", param="model")
        await services.loads.start(LoadRequest(model=wanted.model))
        return Success()

    @app.post("/models/unload", tags=["llama-server"], openapi_extra=request_body(RouterRequest))
    async def unload(request: Request) -> Success:
        """Unload a model, as llama-server's router does; a load is ended at once."""
        wanted = parser.parse(await body_bytes(request))
        try:
            going = engines_of(services, UnloadRequest(model=wanted.model))
            names = {view.engine.key.model for view, _ in going}
            model = names.pop() if names else services.catalog.model_meant(wanted.model).id
        except ModelNotFound as error:
            if await cancel_downloads(services, wanted.model, LIVE):
                return Success()
            raise InvalidRequest(f"model is not found: {error.message}", param="model") from None
        # A load that waits for its turn has no engine yet.
        queued = [job for job in services.loads.under_way(model) if not going]
        if not going and not queued:
            raise InvalidRequest(f"model is not running: {model}", param="model")
        for job in queued:
            await services.loads.cancel(job.id)
        await _unload(services, going)
        return Success()

    @app.get("/models/sse", tags=["llama-server"], status_code=200, response_class=RouterStream)
    async def model_events() -> RouterStream:
        """Tell what happens to models as server-sent events, as llama-server's router does."""
        return RouterStream(services)

    @app.get("/props", tags=["llama-server"])
    async def props(
        model: Annotated[str, Query(description="A loaded model; without it: the server.")] = "",
        autoload: Annotated[  # noqa: ARG001 - taken, as llama-server takes it, and of no effect
            str, Query(description="Of no effect: what only looks loads nothing.")
        ] = "",
    ) -> dict[str, Any]:
        """Return an engine's own properties, or the server's."""
        if not model:
            return _server_props(services)
        return await _engine_props(services, model)


class RouterStream(LiveStream[Event]):
    """Sends what happens to models for as long as both sides are there."""

    media_type = EVENT_STREAM.decode()

    def __init__(self, services: Services) -> None:
        def is_left(model: str) -> bool:
            return bool(_engines(services, model))

        super().__init__(
            lambda: services.bus.subscribe(_MODEL_EVENTS, None),
            RouterNews(is_left),
            EVENT_STREAM_HEADERS,
            ping=PING,
        )


class RouterNews:
    """Puts one stream's events into the router's words.

    `is_left` tells whether a model has an engine; another one's end is not the model's.
    """

    def __init__(self, is_left: Callable[[str], bool]) -> None:
        self._is_left = is_left
        self._downloads = RouterDownloads()
        self._began = False

    def __call__(self, event: Event) -> bytes:
        """Return the event as its lines; b"": the router tells nothing of it."""
        told = self._told(event)
        return b"" if told is None else b"data: " + _ENCODE(told) + b"\n\n"

    def _told(self, event: Event) -> Mapping[str, Any] | None:
        first, self._began = not self._began, True
        if event.kind == "models_reload" or (event.kind == "snapshot" and not first):
            # A later snapshot stands for events that were lost.
            return {"model": "*", "event": "models_reload"}
        if event.kind == "model_remove":
            return {"model": event.data["id"], "event": "model_remove"}
        if event.kind == "download":
            return self._downloads.told(event.data)
        if event.kind != "model":
            return None
        news, model = event.data["event"], event.data["id"]
        status = _STATUS_OF.get(news)
        if status is None or (news == News.GONE and self._is_left(model)):
            return None
        data: dict[str, Any] = {"status": status}
        if news == News.PROGRESS:
            percent = event.data.get("progress", {}).get("percent")
            if percent is None:
                return None
            data["progress"] = {
                "stages": ["text_model"],
                "current": "text_model",
                "value": percent / 100,
            }
        exit_code = event.data.get("error", {}).get("details", {}).get("exit_code")
        if news == News.GONE and exit_code is not None:
            data["exit_code"] = exit_code
        return {"model": model, "event": "model_status", "data": data}


def arguments(view: EngineView) -> list[str]:
    """Return the command line that would start the same engine by hand."""
    options = view.options
    if view.engine.key.backend is not Backend.LLAMACPP:
        return _vllm_arguments(view.engine.key.model, options)
    slots = options.n_parallel or 1
    named = (
        ("--model", view.engine.key.model),
        ("--ctx-size", None if options.n_ctx is None else options.n_ctx * slots),
        ("--parallel", options.n_parallel),
        ("--n-gpu-layers", options.n_gpu_layers),
        ("--cache-type-k", options.cache_type_k),
        ("--cache-type-v", options.cache_type_v),
    )
    return ["llama-server", *_given(named)]


def _vllm_arguments(model: str, options: LoadOptions) -> list[str]:
    named = (
        ("--max-model-len", options.max_model_len),
        ("--max-num-seqs", options.n_parallel),
        ("--tensor-parallel-size", options.tensor_parallel_size),
        ("--gpu-memory-utilization", options.gpu_memory_utilization),
    )
    return ["vllm", "serve", model, *_given(named)]


def _given(named: Iterable[tuple[str, str | float | None]]) -> Iterator[str]:
    for name, value in named:
        if value is not None:
            yield from (name, str(value))


def _engines(services: Services, model: str) -> list[tuple[EngineView, Engine]]:
    return [pair for pair in local_engines(services) if pair[0].engine.key.model == model]


def _outdated(services: Services, files: tuple[ModelFile, ...]) -> list[tuple[EngineView, Engine]]:
    """Return the engines whose files were replaced or removed."""
    revisions = {file.id: file.revision for file in files}
    return [
        (view, engine)
        for view, engine in local_engines(services)
        if revisions.get(view.engine.key.model) != view.spec.revision
    ]


async def _unload(services: Services, going: list[tuple[EngineView, Engine]]) -> None:
    """End loads at once, let the busy end for `STOP_TIMEOUT_S`, and wait until all are gone."""
    loading = [engine.id for view, engine in going if view.state is EngineState.STARTING]
    others = [engine.id for view, engine in going if view.state is not EngineState.STARTING]
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await asyncio.gather(
                services.pool.unload(loading, force=True),
                services.pool.unload(others, force=False),
            )
    except TimeoutError:
        await services.pool.unload(others, force=True)


def _router_model(services: Services, file: ModelFile) -> RouterModel:
    item = lists.model_item(file, services.pool)
    views = [view for view, _ in _engines(services, file.id) if view.state not in _NO_LONGER]
    status = _router_status(item.status, queued=bool(services.loads.under_way(file.id)))
    status.args = arguments(views[0]) if views else None
    inputs = ["text", "image"] if file.traits.vision else ["text"]
    loaded = status.value in ("loaded", "sleeping") and views
    return RouterModel(
        **{**item.model_dump(), "owned_by": item.backend, "status": status},
        path=file.id,
        can_remove=not file.read_only,
        architecture=Architecture(input_modalities=inputs, output_modalities=["text"]),
        meta=_meta(file, views[0]) if loaded else None,
    )


def _router_status(status: Status, *, queued: bool) -> RouterStatus:
    value = status.value
    if value in ("failed", "unloaded"):
        value = "loading" if queued else "unloaded"
    if value != "unloaded":
        return RouterStatus(value=value, loading=status.loading)
    return RouterStatus(
        value=value, failed=status.failed, message=status.message, exit_code=status.exit_code
    )


def _meta(file: ModelFile, view: EngineView) -> dict[str, int]:
    traits = file.traits
    n_ctx = view.options.n_ctx or view.options.max_model_len
    known: dict[str, int | None] = {"n_ctx": n_ctx, "size": file.size_bytes}
    known |= {
        "n_vocab": traits.vocab_size,
        "n_ctx_train": traits.context_length,
        "n_embd": traits.embedding_length,
        "n_params": traits.parameters,
    }
    return {name: value for name, value in known.items() if value is not None}


def _server_props(services: Services) -> dict[str, Any]:
    return {
        "role": "router",
        "max_instances": services.max_loaded or 0,  # 0: no limit
        "models_autoload": services.inference.autoload,
        "model_alias": "llama-server",
        "model_path": "none",
        "default_generation_settings": {"params": {}, "n_ctx": 0},
        "ui_settings": {},
        "build_info": f"XandRouting {services.version}",
        "cors_proxy_enabled": False,
    }


async def _engine_props(services: Services, name: str) -> dict[str, Any]:
    """Return what the engine says of itself, without a lease: nobody's TTL begins anew.

    Raises:
        InvalidRequest: there is no such model, or no engine of it that answers.
        UnsupportedByEngine: its engine is another than llama.cpp, and has none.
    """
    try:
        model = services.catalog.model_meant(name).id
    except ModelNotFound as error:
        raise InvalidRequest(f"model '{name[:200]}' not found", param="model") from error
    for view, engine in _engines(services, model):
        if view.state not in _ANSWERS or engine.client is None:
            continue
        try:
            async with asyncio.timeout(PROPS_WAIT_S):
                status, body = await engine.client.get(b"/props")
        except (UpstreamError, TimeoutError):
            continue
        if status == 200:
            # Where it lies is named as everywhere else.
            props: dict[str, Any] = msgspec.json.decode(body)
            return props | {"model_path": model}
        if status == 404:
            raise UnsupportedByEngine(
                f"The engine of {model} tells none. GET /v1/models/loaded has its options.",
                param="model",
            )
    raise InvalidRequest(f"model is not loaded: {model}", param="model")
