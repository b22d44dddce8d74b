"""What the control calls answer. Times are UTC in ISO 8601; sizes are bytes; durations seconds."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ErrorInfo(BaseModel):
    """What went wrong, for people (`message`) and programs (`code`)."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    code: str | None
    param: str | None
    details: dict[str, Any] | None = None


class ErrorAnswer(BaseModel):
    """Every error's body. `detail` repeats the message for older clients."""

    error: ErrorInfo
    detail: str


class Status(BaseModel):
    """A model's state: `unloaded`, `loading`, `loaded` or `failed`."""

    value: str
    failed: bool = False
    message: str | None = None  # why its last load failed


class ModelItem(BaseModel):
    """One loadable model, as the OpenAI API lists it, and what else is known of it."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "local"
    status: Status
    context_length: int | None
    quantization: str | None
    backend: str
    size_bytes: int
    capabilities: list[str]


class ModelList(BaseModel):
    """The OpenAI API's list."""

    object: str = "list"
    data: list[ModelItem]


class MemoryItem(BaseModel):
    """What an engine takes. Measured: the PSS of its process tree; null: not measured (yet)."""

    estimated_bytes: int | None
    measured_bytes: int | None
    device_bytes: int | None
    host_bytes: int | None


class LoadedItem(BaseModel):
    """One engine. `model` is the exact string the client last used, `path` the canonical id."""

    model: str
    model_path: str
    path: str
    engine: str
    cache_key: str
    backend: str
    device: str
    state: str
    ttl: float
    ttl_remaining: float | None
    ttlRemaining: float | None  # noqa: N815 - the older server's name
    loaded_at: str | None
    loadedAt: str | None  # noqa: N815 - the older server's name
    last_used: str | None
    expires_at: str | None
    load_seconds: float | None
    active_requests: int
    pinned: bool
    n_ctx: int | None
    n_gpu_layers: int | None
    n_parallel: int | None
    gpu_memory_utilization: float | None
    max_model_len: int | None
    memory: MemoryItem
    pid: int | None
    node: str


class LoadedList(BaseModel):
    """Every engine that is not gone."""

    models: list[LoadedItem]
    loaded_models: list[LoadedItem]
    total_count: int


class InventoryFile(BaseModel):
    """One file of a model."""

    path: str
    filename: str
    name: str
    size_bytes: int
    size_mb: float
    size_gb: float
    file_type: str
    type: str
    quantization: str | None


class InventoryItem(BaseModel):
    """One loadable thing on disk, or one that would be loadable without its `problem`."""

    name: str
    model_name: str
    path: str
    model_path: str
    type: str
    model_type: str
    size: int
    total_size_bytes: int
    size_gb: float
    total_size_gb: float
    sizeGB: str  # noqa: N815 - the older server's name
    file_count: int
    files: list[InventoryFile]
    quantization: str | None
    recommended_backend: str
    recommended_backends: list[str]
    recommendedBackend: list[str]  # noqa: N815 - the older server's name
    is_loaded: bool
    has_config: bool
    config_metadata: dict[str, Any]
    metadata: dict[str, Any]
    fits: None = Field(default=None, description="Not known yet: null.")
    problem: str | None


class InventoryList(BaseModel):
    """What lies under the models directory."""

    models: list[InventoryItem]
    total_models: int
    total_size_gb: float


class Stats(BaseModel):
    """Counters since the server's start, and what is loaded now."""

    total_models_loaded: int
    loaded_count: int
    available_count: int
    active_models: int
    active_requests: int
    queued_requests: int
    total_requests_served: int
    cache_hits: int
    hits: int
    cache_misses: int
    misses: int
    hit_rate: float
    loads: int
    load_failures: int
    evictions: int
    estimated_gpu_memory_mb: float
    estimated_cpu_memory_mb: float
    cache_uptime_seconds: float


class LoadStarted(BaseModel):
    """A load that goes on in the background."""

    model: str
    path: str
    state: str


class UnloadResult(BaseModel):
    """One engine that left."""

    model: str
    model_path: str
    path: str
    cache_key: str
    backend: str
    device: str
    status: str


class Unloaded(BaseModel):
    """What an unload did. It answers when the engines are gone."""

    status: str
    message: str
    model: str | None = None
    model_path: str | None = None
    count: int
    results: list[UnloadResult]


class EngineStatus(BaseModel):
    """Whether a backend can serve here."""

    status: str
    available: bool
    reason: str | None
    version: str | None


class Health(BaseModel):
    """The server's health; `degraded`: it serves, but no backend can load a model."""

    status: str
    version: str
    uptime_seconds: float
    loaded_models: int
    engines: dict[str, EngineStatus]


class Root(BaseModel):
    """What this server is and where to look next."""

    name: str
    status: str
    version: str
    docs: str
    endpoints: list[str]
