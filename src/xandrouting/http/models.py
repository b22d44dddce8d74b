"""The lists of models: what can be loaded, what is, what lies on disk."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI

from xandrouting.core.engine_state import EngineState
from xandrouting.core.errors import (
    AmbiguousModel,
    BackendUnavailable,
    DeviceUnavailable,
    EngineNotInstalled,
    ModelNotFound,
)
from xandrouting.http import lists, upstream_lists
from xandrouting.http.inventory_schemas import InventoryList
from xandrouting.http.model_path import named
from xandrouting.http.schemas import LoadedList, ModelItem, ModelList, Stats
from xandrouting.http.services import Services
from xandrouting.inventory.model_file import ModelFile, shown
from xandrouting.proxy.request import Routing

TOGETHER = 25  # models that are described before others have their turn


def add_model_lists(app: FastAPI, services: Services) -> None:
    """Add the calls that only look: nothing here loads, waits or resets a TTL."""
    pool, inventory, upstreams = services.pool, services.inventory, services.upstreams

    @app.get("/v1/models", tags=["models"])
    async def models() -> ModelList:
        """List every loadable model."""
        snapshot = await inventory.look()
        whole = (file for file in snapshot.models if file.problem is None)
        items = [lists.model_item(file, pool) for file in whole]
        return ModelList(data=[*items, *upstream_lists.model_items(upstreams)])

    @app.get("/v1/models/loaded", tags=["models"])
    async def loaded() -> LoadedList:
        """List every engine that is not gone."""
        now = asyncio.get_running_loop().time()
        items = [
            lists.loaded_item(view, engine, now=now)
            for view, engine in pool.views()
            if lists.is_local(view)
        ]
        items += upstream_lists.loaded_items(upstreams)
        return LoadedList(models=items, loaded_models=items, total_count=len(items))

    @app.get("/v1/models/inventory", tags=["models"])
    async def on_disk() -> InventoryList:
        """List what lies under the models directory, damaged files too."""
        snapshot = await inventory.look()
        backends = services.backends()
        items = []
        for number, file in enumerate(snapshot.models):
            if number % TOGETHER == 0:
                await asyncio.sleep(0)  # a thousand models take longer than a token may
            items.append(lists.inventory_item(file, pool, backends, fits=_fits(services, file)))
        total = sum(item.total_size_bytes for item in items)
        return InventoryList(
            models=items, total_models=len(items), total_size_gb=round(total / lists.GIB, 2)
        )

    @app.get("/v1/models/stats", tags=["models"])
    async def statistics() -> Stats:
        """Return the counters since the start."""
        return _stats(services)

    @app.get("/v1/models/{model_id:path}", tags=["models"])
    async def model(model_id: str) -> ModelItem:
        """Describe one model that can be loaded; its id may lack the leading slash."""
        item = upstream_lists.model_item(upstreams, model_id)
        if item is not None:
            return item
        await inventory.look()
        try:
            file = services.catalog.names().resolve(named(model_id))
        except ModelNotFound:
            await inventory.refresh()  # it may have come since the last look
            file = services.catalog.names().resolve(named(model_id))
        _check_whole(file)
        return lists.model_item(file, pool)


def _check_whole(file: ModelFile) -> None:
    if file.problem is not None:
        raise ModelNotFound(
            f"'{shown(file.id)}' cannot be loaded: {shown(file.problem)}. "
            "GET /v1/models/inventory lists it.",
            param="model",
        )


def _fits(services: Services, file: ModelFile) -> bool | None:
    """Whether a model can be loaded here as it is by default."""
    if file.problem is not None:
        return None
    try:
        route = services.catalog.route(Routing(model=file.id))
    except (AmbiguousModel, BackendUnavailable, DeviceUnavailable, EngineNotInstalled):
        return False
    return services.pool.fits(route.spec)


def _stats(services: Services) -> Stats:
    pool, stats = services.pool, services.stats
    views = [(view, engine) for view, engine in pool.views() if lists.is_local(view)]
    ready = sum(view.state in (EngineState.READY, EngineState.DRAINING) for view, _ in views)
    host = sum(engine.memory.host_bytes or 0 for _, engine in views)
    device = sum(engine.memory.device_bytes or 0 for _, engine in views)
    return Stats(
        total_models_loaded=ready,
        loaded_count=ready,
        available_count=sum(file.problem is None for file in services.inventory.snapshot.models),
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
