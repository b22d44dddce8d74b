"""The values the rooms hand each other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

Ticket = NewType("Ticket", int)
"""One request's claim on an engine, from asking to letting go."""


class Backend(StrEnum):
    """Which program serves a model; the API's `backend`."""

    LLAMACPP = "llamacpp"
    VLLM = "vllm"
    TRANSFORMERS = "transformers"
    OLLAMA = "ollama"
    UPSTREAM = "upstream"  # somebody else's server, configured by name; never asked for by clients


@dataclass(frozen=True, slots=True)
class ModelKey:
    """What makes two requests share an engine.

    `model` is the canonical id (`/models/…`), or an upstream's name. `device` is resolved:
    `cpu`, `cuda`, `cuda:N`, or `remote` for an upstream, never `auto`.
    """

    model: str
    backend: Backend
    device: str


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options that are fixed when an engine starts. None: not asked for, or no such option."""

    n_ctx: int | None = None  # tokens each request may use, not the engine's total
    n_gpu_layers: int | None = None  # -1: all of them; 0 is 0
    n_parallel: int | None = None  # slots
    gpu_memory_utilization: float | None = None  # share of the card, 0.1 to 1.0
    max_model_len: int | None = None  # tokens
    embeddings: bool | None = None  # the engine answers /v1/embeddings; only ever asked as True


@dataclass(frozen=True, slots=True)
class Footprint:
    """What an engine takes while it exists.

    `engines` counts towards `max_loaded`; 0 is an engine that takes nothing here (an
    upstream). The bytes are estimates from the file; the ledger will weigh them.
    """

    engines: int = 1
    host_bytes: int = 0
    device_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """The engine a request wants.

    `wants` is what the request asks; `defaults` fills what nobody asked, and is the same
    for every request of one key. `source` is where the model lies: a file or folder on
    this machine, or an upstream's base URL. `revision` changes when the source does, so a
    failure of the old file is not held against the new one.
    """

    key: ModelKey
    source: str
    wants: LoadOptions = LoadOptions()
    defaults: LoadOptions = LoadOptions()
    footprint: Footprint = Footprint()
    revision: str = ""
    mmproj: str | None = None  # the projector file that gives the model eyes


@dataclass(frozen=True, slots=True)
class EngineId:
    """One life of one engine: late news of an earlier life never matches."""

    key: ModelKey
    incarnation: int

    @property
    def label(self) -> str:
        """`llamacpp/cpu#3`, as the `x-xandrouting-engine` header shows it."""
        return f"{self.key.backend}/{self.key.device}#{self.incarnation}"

    def __str__(self) -> str:
        return f"{self.key.model}@{self.label}"


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What to run, as an engine's adapter says it; a launcher obeys.

    `argv` and `env` may hold `{port}`, which the launcher replaces with the port it chose
    on the engine's machine. `env` is added to the launcher's own. `api_key` is what the
    engine will ask of its clients. A line of output that begins with `ready_line` means
    the engine listens. An empty `health_path`: there is nothing to ask. `base_url` is set
    only for engines somebody else started.
    """

    argv: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    api_key: str = ""
    health_path: str = "/health"
    ready_line: str | None = None
    stop_grace_s: float = 1.0  # from SIGTERM to SIGKILL; the gateway has drained before
    base_url: str | None = None


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a process tree takes, measured. `host_bytes` is PSS; None: cannot be told here."""

    host_bytes: int | None = None
    device_bytes: int | None = None


class StartFailure(StrEnum):
    """Why a start failed, as far as the engine's own words tell."""

    OUT_OF_MEMORY = "out_of_memory"
    BAD_FILE = "bad_file"
    UNKNOWN_ARCHITECTURE = "unknown_architecture"
    MISSING_LIBRARY = "missing_library"
    PORT_IN_USE = "port_in_use"
    KILLED = "killed"
    STALLED = "stalled"
    EXITED = "exited"  # nothing more is known
