"""Other servers' models in the lists, and Ollama's memory by wish. A list waits for nobody."""

from __future__ import annotations

import time
from collections.abc import Iterator

from xandrouting.core.errors import InvalidRequest, ModelNotFound, ModelNotLoaded
from xandrouting.core.model import Backend
from xandrouting.http.lists import iso
from xandrouting.http.schemas import (
    LoadedItem,
    MemoryItem,
    ModelItem,
    Status,
    Unloaded,
    UnloadResult,
)
from xandrouting.proxy.request import LoadRequest, UnloadRequest
from xandrouting.routing.catalog import REMOTE
from xandrouting.upstreams.ollama import is_same
from xandrouting.upstreams.upstreams import Upstreams
from xandrouting.upstreams.values import RemoteModel, RunningModel, UpstreamState


def model_items(upstreams: Upstreams) -> Iterator[ModelItem]:
    """Describe the models of all upstreams, an Ollama's only while it answers."""
    for state in upstreams.states():
        if state.available or state.backend is not Backend.OLLAMA:
            running = {one.id for one in state.listing.running}
            yield from (_model_item(state, model, running) for model in state.listing.models)


def model_item(upstreams: Upstreams, name: str) -> ModelItem | None:
    """Describe one of their models; None: the name is of none of them.

    Raises:
        ModelNotFound: the upstream is known and the model is not.
    """
    found = upstreams.named(name)
    if found is None:
        return None
    state, asked = found
    is_ollama = state.backend is Backend.OLLAMA
    if state.available or not is_ollama:
        for model in state.listing.models:
            if is_same(model.id, asked) if is_ollama else model.id == asked:
                return _model_item(state, model, {one.id for one in state.listing.running})
    why = f"lists no model '{asked[:200]}'" if state.available else f"is down: {state.reason}"
    raise ModelNotFound(
        f"The upstream {state.name} {why}. GET /v1/models lists all.", param="model"
    )


def loaded_items(upstreams: Upstreams) -> list[LoadedItem]:
    """Describe what the Ollama that answers holds in memory."""
    return [
        loaded_item(state.name, running)
        for state in upstreams.states()
        if state.available
        for running in state.listing.running
    ]


def loaded_item(name: str, running: RunningModel, *, spelling: str | None = None) -> LoadedItem:
    """Describe one model in an Ollama's memory, by its own words alone."""
    model = f"{name}/{running.id}"
    remaining = None
    if running.expires_at is not None:
        remaining = round(max(0.0, running.expires_at - time.time()), 3)
    return LoadedItem(
        model=spelling or model,
        model_path=spelling or model,
        path=model,
        engine=None,
        cache_key=_cache_key(model),
        backend=Backend.OLLAMA,
        device=REMOTE,
        state="ready",
        ttl=0 if running.expires_at is None else None,
        ttl_remaining=remaining,
        ttlRemaining=remaining,
        loaded_at=None,
        loadedAt=None,
        last_used=None,
        expires_at=iso(running.expires_at),
        load_seconds=None,
        active_requests=None,
        pinned=False,
        n_ctx=running.context_length,
        n_gpu_layers=None,
        n_parallel=None,
        gpu_memory_utilization=None,
        max_model_len=None,
        tensor_parallel_size=None,
        cache_type_k=None,
        cache_type_v=None,
        memory=MemoryItem(
            estimated_bytes=None,
            charged_bytes=0,
            measured_bytes=running.size_bytes,
            device_bytes=running.device_bytes,
            host_bytes=running.size_bytes - running.device_bytes,
        ),
        pid=None,
        node=name,
        placement=[],
        sleep_level=None,
        loading=None,
        decision=None,
    )


async def load(upstreams: Upstreams, wanted: LoadRequest, *, wait_s: float) -> LoadedItem | None:
    """Have Ollama load a model; None: the request means no upstream.

    Raises:
        GatewayError: Ollama does not have it or refuses, or another upstream is meant.
    """
    found = upstreams.named(wanted.model, wanted.backend)
    if found is None:
        return None
    state, model = found
    _check_ollama(state, "loads")
    if wanted.wait is False:
        raise InvalidRequest(
            "The upstream ollama answers a load when it is done: leave `wait` out.", param="wait"
        )
    running = await upstreams.load(model, ttl_s=wanted.ttl, wait_s=wait_s)
    if running is None:
        raise ModelNotLoaded(f"{state.name}/{model} was unloaded again before this answer.")
    return loaded_item(state.name, running, spelling=wanted.model)


async def unload(upstreams: Upstreams, wanted: UnloadRequest) -> Unloaded | None:
    """Have Ollama unload a model; None: the request means no upstream.

    Raises:
        ModelNotLoaded: the backend was given, and it does not run.
        GatewayError: Ollama is not there or refuses, or another upstream is meant.
    """
    found = upstreams.named(wanted.model, wanted.backend)
    if found is None:
        return None
    state, model = found
    _check_ollama(state, "unloads")
    done = await upstreams.unload(model)
    if done is None and wanted.backend not in (None, "auto"):
        raise ModelNotLoaded(
            f"The upstream {state.name} does not run '{model}'. "
            "GET /v1/models/loaded lists what is loaded.",
            param="model",
        )
    results = [] if done is None else [_result(state.name, wanted.model, *done)]
    return Unloaded(
        status="unloaded",
        message=f"{len(results)} model(s) unloaded.",
        model=wanted.model,
        model_path=wanted.model,
        count=len(results),
        results=results,
    )


def check_pin(upstreams: Upstreams, name: str) -> None:
    """Pass a model that is no upstream's: what one keeps in memory is its own to choose.

    Raises:
        InvalidRequest: it is one; the message says how to have an Ollama keep it.
    """
    found = upstreams.named(name)
    if found is None:
        return
    state, _ = found
    remedy = ""
    if state.backend is Backend.OLLAMA:
        remedy = " POST /v1/models/load with `ttl` 0 has it keep one for ever."
    raise InvalidRequest(
        f"The upstream {state.name} holds its models by itself, so none is pinned here.{remedy}",
        param="model",
    )


def _check_ollama(state: UpstreamState, does: str) -> None:
    if state.backend is not Backend.OLLAMA:
        raise InvalidRequest(
            f"The upstream {state.name} {does} its models by itself.",
            param="model",
        )


def _result(name: str, spelling: str, running: RunningModel, gone: bool) -> UnloadResult:
    model = f"{name}/{running.id}"
    return UnloadResult(
        model=spelling,
        model_path=spelling,
        path=model,
        cache_key=_cache_key(model),
        backend=Backend.OLLAMA,
        device=REMOTE,
        status="unloaded" if gone else "draining",
    )


def _cache_key(model: str) -> str:
    return f"{model}|{Backend.OLLAMA}|{REMOTE}"


def _model_item(state: UpstreamState, model: RemoteModel, running: set[str]) -> ModelItem:
    return ModelItem(
        id=f"{state.name}/{model.id}",
        created=int(state.since or 0) if model.created is None else model.created,
        owned_by=state.name,
        status=_status(state, loaded=model.id in running),
        context_length=model.context_length,
        quantization=model.quantization,
        backend=state.backend,
        size_bytes=model.size_bytes,
        capabilities=[],
    )


def _status(state: UpstreamState, *, loaded: bool) -> Status:
    if not state.available:
        return Status(value="failed", failed=True, message=f"{state.name} is down: {state.reason}")
    return Status(value="loaded" if loaded or state.backend is Backend.UPSTREAM else "unloaded")
