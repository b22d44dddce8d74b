"""What the control calls answer. Times are UTC in ISO 8601; sizes are bytes; durations seconds."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


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


class LoadingItem(BaseModel):
    """How far a load is. Null: not known yet.

    `phase`: `starting`, `loading_weights` or `warming_up`.
    """

    phase: str
    percent: int | None
    seconds_left: float | None


class Status(BaseModel):
    """A model's state: `unloaded`, `loading`, `loaded`, `sleeping` or `failed`.

    `exit_code` is its last engine's, if that ended by itself before it was ready.
    """

    value: str
    failed: bool = False
    message: str | None = None  # why its last load failed
    exit_code: int | None = None
    loading: LoadingItem | None = None


class ModelItem(BaseModel):
    """One loadable model, as the OpenAI API lists it, and what else is known of it.

    `owned_by` is `local`, or the upstream that has it. `size_bytes`: null where that tells none.
    """

    id: str
    object: str = "model"
    created: int
    owned_by: str = "local"
    status: Status
    context_length: int | None
    quantization: str | None
    backend: str
    size_bytes: int | None
    capabilities: list[str]


class ModelList(BaseModel):
    """The OpenAI API's list."""

    object: str = "list"
    data: list[ModelItem]


class RouterProgress(BaseModel):
    """How many bytes of a download are here, and how many there are."""

    done: int
    total: int


class RouterStatus(Status):
    """A model's state as llama-server's router says it: `failed` stands beside `unloaded`.

    `args` is the command line that would start the same engine. What is `downloading` has
    `progress`, by the name that was asked for.
    """

    args: list[str] | None = None
    progress: dict[str, RouterProgress] | None = None


class Architecture(BaseModel):
    """What goes into a model and what comes out."""

    input_modalities: list[str]
    output_modalities: list[str]


class RouterModel(ModelItem):
    """One model as llama-server's router lists it, and what else is known of it.

    `meta` is there while it is loaded. `can_remove`: whether `DELETE /models` takes it.
    """

    owned_by: str = "llamacpp"
    path: str
    aliases: list[str] = []
    tags: list[str] = []
    status: RouterStatus
    source: str = "models_dir"
    can_remove: bool
    architecture: Architecture
    meta: dict[str, int] | None = None


class RouterModels(BaseModel):
    """The list of llama-server's router."""

    data: list[RouterModel]
    object: str = "list"


class Success(BaseModel):
    """llama-server's word for done, or for begun."""

    success: bool = True


class RunningItem(BaseModel):
    """One engine as llama-swap lists it.

    `state`: `starting`, `ready` or `stopping`. `ttl` is in seconds; 0: for ever. `cmd` is the
    command line that would start the same engine.
    """

    model: str
    state: str
    cmd: str
    proxy: str
    ttl: int
    name: str
    description: str


class Running(BaseModel):
    """llama-swap's list of engines."""

    running: list[RunningItem]


class SwapMessage(BaseModel):
    """llama-swap's word for done."""

    msg: str


class LogItem(BaseModel):
    """One line of the log. `source`: `gateway` or `engine`."""

    at: str
    source: str
    text: str
    level: str | None
    model: str | None
    engine: str | None


class LogLines(BaseModel):
    """The last lines of the log, oldest first."""

    lines: list[LogItem]


class MemoryItem(BaseModel):
    """What an engine takes. Measured: the PSS of its process tree; null: not measured (yet).

    `charged_bytes` is what the ledger holds for it on all devices together.
    """

    estimated_bytes: int | None
    charged_bytes: int
    measured_bytes: int | None
    device_bytes: int | None
    host_bytes: int | None


class DeviceItem(BaseModel):
    """One device's line of the ledger.

    `budget_bytes`: what engines may take together. `others_bytes`: what other programs take.
    `reserved_bytes`: promised to engines that start. `used_bytes`: charged for those that run.
    `free_bytes`: what could be promised now. `stale`: the system could not tell this time.
    """

    device: str
    name: str
    capacity_bytes: int
    capacity_gb: float
    budget_bytes: int
    budget_gb: float
    others_bytes: int
    others_gb: float
    reserved_bytes: int
    reserved_gb: float
    used_bytes: int
    used_gb: float
    free_bytes: int
    free_gb: float
    stale: bool


class TermsItem(BaseModel):
    """What makes up an engine's memory on one kind of device, estimated."""

    weights_bytes: int
    kv_cache_bytes: int
    compute_bytes: int
    overhead_bytes: int
    total_bytes: int


class FootprintItem(BaseModel):
    """What an engine takes: `learned` from an earlier load, or the sum of the estimated terms."""

    source: str
    host_bytes: int
    device_bytes: int
    total_bytes: int
    total_gb: float
    host: TermsItem
    device: TermsItem


class VictimItem(BaseModel):
    """An engine that leaves, and what its loss was weighed by: the lowest score goes first."""

    model: str
    engine: str
    frees: dict[str, int]
    idle_seconds: float
    uses: float
    reload_seconds: float
    score: float


class DecisionItem(BaseModel):
    """What is loaded where, what it takes, who leaves for it, and why.

    `verdict`: `hit` (a running engine serves it), `load` (it fits beside the others), `evict`
    (once the victims are gone), `wait` (once engines in use or on their way out are), `reload`
    (its engine is loaded anew with other options), `never`. `expected_seconds` is the load
    itself, as the last one took or guessed from the size.
    """

    verdict: str
    fits: bool
    model: str
    options: dict[str, Any]
    placement: list[str]
    estimate: FootprintItem
    expected_seconds: float
    devices: list[DeviceItem]
    victims: list[VictimItem]
    reasons: list[str]
    lacking_bytes: dict[str, int]
    alternatives: list[dict[str, Any]]


class SparesItem(BaseModel):
    """Processes that wait for the next load."""

    count: int
    memory_bytes: int


class ParkedItem(BaseModel):
    """Conversations of engines that were unloaded, on disk."""

    conversations: int
    size_bytes: int
    quota_bytes: int


class System(BaseModel):
    """This machine: its memory and what is held of it."""

    node: str
    version: str
    uptime_seconds: float
    devices: list[DeviceItem]
    pinned: list[str]
    queued_requests: int
    spares: SparesItem
    parked: ParkedItem


class LoadedItem(BaseModel):
    """One engine. `model` is the exact string the client last used, `path` the canonical id.

    `sleep_level`, while it sleeps: 0 its process alone is left, 1 its weights are in main memory,
    2 they must be read again. `tensor_parallel_size`: how many cards share it.

    Or a model in the memory of an Ollama, which is its `node`: null is what that does not tell.
    """

    model: str
    model_path: str
    path: str
    engine: str | None
    cache_key: str
    backend: str
    device: str
    state: str
    ttl: float | None
    ttl_remaining: float | None
    ttlRemaining: float | None  # noqa: N815 - the older server's name
    loaded_at: str | None
    loadedAt: str | None  # noqa: N815 - the older server's name
    last_used: str | None
    expires_at: str | None
    load_seconds: float | None
    active_requests: int | None
    pinned: bool
    n_ctx: int | None
    n_gpu_layers: int | None
    n_parallel: int | None
    gpu_memory_utilization: float | None
    max_model_len: int | None
    tensor_parallel_size: int | None
    cache_type_k: str | None
    cache_type_v: str | None
    memory: MemoryItem
    pid: int | None
    node: str
    placement: list[str]
    sleep_level: int | None
    loading: LoadingItem | None
    decision: DecisionItem | None


class LoadedList(BaseModel):
    """Every engine that is not gone."""

    models: list[LoadedItem]
    loaded_models: list[LoadedItem]
    total_count: int


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


class LoadJob(BaseModel):
    """A load that goes on in the background.

    `state`: `queued`, `starting`, `ready`, `failed` or `cancelled`; `error` says why it failed.
    """

    load_id: str
    model: str
    path: str
    state: str
    queue_position: int | None = None
    loading: LoadingItem | None = None
    error: ErrorInfo | None = None


class Pinned(BaseModel):
    """Whether a model is pinned: never a victim, and no TTL."""

    model: str
    path: str
    pinned: bool
    loaded: bool


class UnloadResult(BaseModel):
    """One engine that left. `status`: `unloaded`, or `draining` where an Ollama's is busy."""

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
    """Whether a backend can serve here.

    `command` is what installs it. `devices` are those of this machine that it can use, as
    `cpu`, `cuda:0`, …; null: not told apart from what the machine has.
    """

    status: str
    available: bool
    reason: str | None
    version: str | None
    command: str | None = None
    devices: list[str] | None = None


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
