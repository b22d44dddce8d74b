"""What the lists show, from the values of the other rooms. Nothing here waits or measures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime

from xandrouting.core.engine import EngineView
from xandrouting.core.engine_state import EngineState
from xandrouting.core.model import ENGINES, MemoryUse
from xandrouting.http.decisions import decision_item, loading_item
from xandrouting.http.inventory_schemas import InventoryFile, InventoryItem
from xandrouting.http.schemas import (
    EngineStatus,
    LoadedItem,
    MemoryItem,
    ModelItem,
    Status,
    UnloadResult,
)
from xandrouting.inventory.model_file import VIRTUAL_ROOT, ModelFile, Traits
from xandrouting.pool.engine import Engine
from xandrouting.pool.pool import EnginePool
from xandrouting.routing.catalog import SERVED_BY, why_served_by

GIB = 1 << 30
MIB = 1 << 20
_TRAITS = tuple(field.name for field in fields(Traits))

_SHOWN_STATE = {
    EngineState.STARTING: "loading",
    EngineState.READY: "loaded",
    EngineState.DRAINING: "loaded",
    EngineState.SUSPENDING: "sleeping",
    EngineState.SLEEPING: "sleeping",
    EngineState.STOPPING: "unloaded",
}


def iso(seconds: float | None) -> str | None:
    """Return wall time as UTC in ISO 8601 with a Z."""
    if seconds is None:
        return None
    moment = datetime.fromtimestamp(seconds, tz=UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def cache_key(view: EngineView) -> str:
    """Return the older server's name for what makes two requests share an engine."""
    key = view.engine.key
    return f"{key.model}|{key.backend}|{key.device}"


def is_local(view: EngineView) -> bool:
    """Whether the engine is one of ours and not somebody else's server."""
    return view.engine.key.is_local


def loaded_item(view: EngineView, engine: Engine, *, now: float) -> LoadedItem:
    """Describe one engine; `now` is the loop's clock."""
    deadline = view.idle_deadline()
    remaining = None if deadline is None else round(max(0.0, deadline - now), 3)
    loaded_at = iso(engine.loaded_at)
    key, options = view.engine.key, view.options
    memory, footprint = engine.memory, view.decision.footprint
    return LoadedItem(
        model=engine.spelling,
        model_path=engine.spelling,
        path=key.model,
        engine=engine.id.label,
        cache_key=cache_key(view),
        backend=key.backend,
        device=key.device,
        state=view.state,
        ttl=view.ttl_s,
        ttl_remaining=remaining,
        ttlRemaining=remaining,
        loaded_at=loaded_at,
        loadedAt=loaded_at,
        last_used=iso(engine.used_at),
        expires_at=None if remaining is None else iso(time.time() + remaining),
        load_seconds=None if engine.load_seconds is None else round(engine.load_seconds, 3),
        active_requests=view.active,
        pinned=view.pinned,
        n_ctx=options.n_ctx,
        n_gpu_layers=options.n_gpu_layers,
        n_parallel=options.n_parallel,
        gpu_memory_utilization=options.gpu_memory_utilization,
        max_model_len=options.max_model_len,
        tensor_parallel_size=len(view.placement) or None,
        cache_type_k=options.cache_type_k,
        cache_type_v=options.cache_type_v,
        memory=MemoryItem(
            estimated_bytes=footprint.host_bytes + footprint.device_bytes,
            charged_bytes=sum(n for name, n in view.charged.items() if name != ENGINES),
            measured_bytes=_together(memory),
            device_bytes=memory.device_bytes,
            host_bytes=memory.host_bytes,
        ),
        pid=None if engine.handle is None else engine.handle.pid,
        node="local",
        placement=list(view.placement),
        sleep_level=view.level,
        loading=loading_item(engine.loading(now)),
        decision=decision_item(view.decision),
    )


def _together(memory: MemoryUse) -> int | None:
    if memory.host_bytes is None:
        return None
    return memory.host_bytes + (memory.device_bytes or 0)


def unload_result(view: EngineView, engine: Engine) -> UnloadResult:
    """Describe an engine that has left."""
    key = view.engine.key
    return UnloadResult(
        model=engine.spelling,
        model_path=engine.spelling,
        path=key.model,
        cache_key=cache_key(view),
        backend=key.backend,
        device=key.device,
        status="unloaded",
    )


def status_of(file: ModelFile, pool: EnginePool) -> Status:
    """Return the state of a model: the best of its engines', else how its last load went."""
    loading = None
    sleeps = False
    for view, engine in pool.views():
        if view.engine.key.model == file.id:
            value = _SHOWN_STATE[view.state]
            if value == "loaded":
                return Status(value=value)
            if value == "loading":
                loading = engine.loading(asyncio.get_running_loop().time())
            sleeps = sleeps or value == "sleeping"
    if loading is not None:
        return Status(value="loading", loading=loading_item(loading))
    if sleeps:
        return Status(value="sleeping")
    failure = pool.failure(file.id, file.revision)
    if failure is not None:
        exit_code = (failure.details or {}).get("exit_code")
        return Status(value="failed", failed=True, message=failure.message, exit_code=exit_code)
    return Status(value="unloaded")


def model_item(file: ModelFile, pool: EnginePool) -> ModelItem:
    """Describe a model as the OpenAI API does, and then some."""
    traits = file.traits
    return ModelItem(
        id=file.id,
        created=int(file.modified),
        status=status_of(file, pool),
        context_length=traits.context_length,
        quantization=file.quantization,
        backend=SERVED_BY[file.format],
        size_bytes=file.size_bytes,
        capabilities=capabilities_of(traits),
    )


def capabilities_of(traits: Traits) -> list[str]:
    """Return what a model can be asked for, as far as its files say."""
    if traits.pooling:
        return ["rerank"] if traits.ranking else ["embedding"]
    found = ["completion"]
    if traits.chat_template:
        found.append("chat")
    if traits.chat_template and traits.tools:
        found.append("tools")
    if traits.vision:
        found.append("vision")
    return found


def inventory_item(
    file: ModelFile,
    pool: EnginePool,
    backends: Mapping[str, EngineStatus],
    *,
    fits: bool | None,
) -> InventoryItem:
    """Describe what lies on disk; `backends` tells what can serve here."""
    traits = file.traits
    unread = file.header is None and file.safetensors is None
    metadata = {} if unread else {name: getattr(traits, name) for name in _TRAITS}
    names = [str(SERVED_BY[file.format])]
    size_gb = round(file.size_bytes / GIB, 2)
    folder = f"{VIRTUAL_ROOT}/{file.folder}".rstrip("/")
    return InventoryItem(
        name=file.stem,
        model_name=file.stem,
        path=file.id,
        model_path=folder,
        type=file.format,
        model_type=file.format,
        size=file.size_bytes,
        total_size_bytes=file.size_bytes,
        size_gb=size_gb,
        total_size_gb=size_gb,
        sizeGB=f"{size_gb:.2f}",
        file_count=len(file.files),
        files=[_file(part.relative, part.size_bytes, file.quantization) for part in file.files],
        quantization=file.quantization,
        recommended_backend=names[0],
        recommended_backends=names,
        recommendedBackend=names,
        recommended_reason=_why(file, backends.get(names[0])),
        is_loaded=status_of(file, pool).value == "loaded",
        has_config=file.safetensors is not None,
        config_metadata=metadata,
        metadata=metadata,
        capabilities=[] if unread else capabilities_of(traits),
        read_only=file.read_only,
        fits=fits,
        problem=file.problem,
    )


def _why(file: ModelFile, status: EngineStatus | None) -> str:
    """Return why a backend is recommended, and what it lacks here."""
    reason = why_served_by(file.format)
    if status is None or status.available or status.reason is None:
        return reason
    command = f" Install it with `{status.command}`." if status.command else ""
    return f"{reason}. It cannot be used here: {status.reason}.{command}"


def _file(relative: str, size_bytes: int, quantization: str | None) -> InventoryFile:
    name = relative.rpartition("/")[2]
    stem, _, suffix = name.rpartition(".")
    kind = suffix.lower() if stem else ""
    return InventoryFile(
        path=f"{VIRTUAL_ROOT}/{relative}",
        filename=name,
        name=name,
        size_bytes=size_bytes,
        size_mb=round(size_bytes / MIB, 2),
        size_gb=round(size_bytes / GIB, 2),
        file_type=kind,
        type=kind,
        quantization=quantization,
    )
