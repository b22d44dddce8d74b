"""The values the rooms hand each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum, StrEnum
from typing import Final, NewType, Protocol

HOST: Final = "host"
"""The device that main memory is; the others are `cuda:0`, `cuda:1`, …"""

ENGINES: Final = "engines"
"""What `max_loaded` limits: a resource as bytes are, counted by the piece."""

Ticket = NewType("Ticket", int)
"""One request's claim on an engine, from asking to letting go."""

Placement = tuple[str, ...]
"""The accelerators an engine uses: `()` none, `("cuda:0",)`, or several that share it."""


class Backend(StrEnum):
    """Which program serves a model; the API's `backend`."""

    LLAMACPP = "llamacpp"
    VLLM = "vllm"
    TRANSFORMERS = "transformers"
    OLLAMA = "ollama"  # somebody else's server too, whose own calls the gateway knows
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

    @property
    def is_local(self) -> bool:
        """Whether it runs here and takes room; somebody else's server does not."""
        return self.backend not in (Backend.UPSTREAM, Backend.OLLAMA)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options that are fixed when an engine starts. None: not asked for, or no such option."""

    n_ctx: int | None = None  # tokens each request may use, not the engine's total
    n_gpu_layers: int | None = None  # -1: all of them; 0 is 0
    n_parallel: int | None = None  # slots
    gpu_memory_utilization: float | None = None  # share of the card, 0.1 to 1.0
    max_model_len: int | None = None  # tokens
    tensor_parallel_size: int | None = None  # cards that share it; asked for, not chosen
    embeddings: bool | None = None  # the engine answers /v1/embeddings; only ever asked as True
    cache_type_k: str | None = None  # what a key of the KV cache is stored as: `f16`, `q8_0`, …
    cache_type_v: str | None = None

    def __str__(self) -> str:
        """Return what is set, for a log line."""
        return " ".join(f"{name}={v}" for name, v in asdict(self).items() if v is not None)


@dataclass(frozen=True, slots=True)
class Terms:
    """What makes up an engine's memory on one kind of device; bytes."""

    weights: int = 0
    kv_cache: int = 0
    compute: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        """All terms together."""
        return self.weights + self.kv_cache + self.compute + self.overhead


@dataclass(frozen=True, slots=True)
class Figure:
    """What an engine was seen to take: the most it had, and the seconds of its load."""

    host_bytes: int
    device_bytes: int  # on all accelerators together
    load_s: float


@dataclass(frozen=True, slots=True)
class Footprint:
    """What an engine takes while it exists.

    `engines` counts towards `max_loaded`; 0 is an engine that takes nothing here (an
    upstream). The terms are estimated from the file. `seen` is what an engine of the same
    file, version and options took before: where it is known, it counts and not the terms.
    """

    engines: int = 1
    host: Terms = Terms()
    device: Terms = Terms()  # on all accelerators together
    seen: Figure | None = None
    start_s: float = 0.5  # until it begins to read its weights, guessed

    @property
    def host_bytes(self) -> int:
        """What it takes of main memory."""
        return self.host.total if self.seen is None else self.seen.host_bytes

    @property
    def device_bytes(self) -> int:
        """What it takes of the accelerators, all together."""
        return self.device.total if self.seen is None else self.seen.device_bytes

    def demands(self, placement: Placement) -> Iterator[tuple[str, int]]:
        """Yield each resource it would take, and how much: several devices share alike."""
        yield ENGINES, self.engines
        yield HOST, self.host_bytes
        for device in placement:
            yield device, -(-self.device_bytes // len(placement))


class Cost(Protocol):
    """What an engine of one model would take, for any options. A value: equal means the same."""

    @property
    def layers(self) -> int:
        """The most `n_gpu_layers` can be; 0 where layers cannot be chosen."""

    def footprint(self, options: LoadOptions, cards: int = 1) -> Footprint:
        """Estimate from the file alone, for so many cards; `options` are settled and filled."""


@dataclass(frozen=True, slots=True)
class FixedCost:
    """The same whatever the options: an upstream, which takes nothing, or a model nobody knows."""

    whole: Footprint = Footprint()
    layers: int = 0

    def footprint(self, options: LoadOptions, cards: int = 1) -> Footprint:  # noqa: ARG002
        """Return the whole."""
        return self.whole


class Level(IntEnum):
    """How an engine sleeps; of the last two the deeper keeps less and takes longer to wake."""

    REST = 0  # it keeps its process alone, and may wake with other options
    OFFLOADED = 1  # its weights are in main memory; it wakes as it was
    DROPPED = 2  # its weights must be read again; it wakes as it was


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """The engine a request wants.

    `wants` is what the request asks; `defaults` fills what nobody asked, and is the same
    for every request of one key. `source` is where the model lies: a file or folder on
    this machine, or an upstream's base URL. `placements` are where it may run, the best
    first. `revision` changes when the source does, so a failure of the old file is not held
    against the new one. `learned_as` names the file and the engine's version, for figures of
    earlier loads; empty: none are kept. `sleeper_bytes` is what the engine's process takes of
    main memory while it rests; None: it cannot rest. `sleep_levels` are the ways it can sleep
    otherwise, from light to deep.
    """

    key: ModelKey
    source: str
    wants: LoadOptions = LoadOptions()
    defaults: LoadOptions = LoadOptions()
    cost: Cost = FixedCost()
    placements: tuple[Placement, ...] = ((),)
    revision: str = ""
    learned_as: str = ""
    mmproj: str | None = None  # the projector file that gives the model eyes
    files: tuple[str, ...] = ()  # what a load reads, and may be read ahead
    flags: tuple[str, ...] = ()  # what the model itself asks for on the engine's command line
    sleeper_bytes: int | None = None
    sleep_levels: tuple[Level, ...] = ()
    siblings: tuple[tuple[str, Cost], ...] = ()  # the same model in other quantizations on disk
    chosen: str = ""  # why this backend, where the request left it open

    @property
    def levels(self) -> tuple[Level, ...]:
        """How an engine of it can sleep, from light to deep; none: it cannot."""
        return self.sleep_levels if self.sleeper_bytes is None else (Level.REST,)


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

    In `argv`, `env` and `order` the launcher replaces `{port}` with the port it chose on the
    engine's machine; in `env` and `order` `{cores}` with the cores it chose for the engine, as
    `0-3,6`: never all those of an engine beside it, if there are others; and in `env` `{key}`
    with a key it drew, which the engine asks of its clients, and `{scratch}` with a folder of
    the engine's own for temporary files, which goes when it is gone. `env` is added to the
    launcher's own. A line of output that begins with `ready_line` means the engine listens. An
    empty `health_path`: there is nothing to ask. `base_url` and `api_key` are set only for
    engines somebody else started.

    A program with an `order` does nothing until it is told that line on its stdin. Before, it
    is nobody's, and may have been started for another plan with the same `argv` and `env`. Told
    `rest_order`, it gives its memory back, prints a line that begins with `waiting_line`, and
    waits for the next order.
    """

    argv: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    api_key: str = ""
    health_path: str = "/health"
    ready_line: str | None = None
    order: str = ""
    rest_order: str = ""
    waiting_line: str = ""
    stop_grace_s: float = 1.0  # from SIGTERM to SIGKILL; the gateway has drained before
    health_every_s: float | None = None  # how often one that runs is asked; None: its exit tells
    drain_s: float = 0.0  # how long one that somebody else told to end may go on with its work
    base_url: str | None = None


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a process tree takes, measured; None: cannot be told here.

    `host_bytes` is PSS. `private_bytes` is the part of it that is not a file's pages, which
    the kernel could drop: what would be free again if the tree ended. `devices` holds the
    bytes on each accelerator it uses.
    """

    host_bytes: int | None = None
    private_bytes: int | None = None
    devices: tuple[tuple[str, int], ...] | None = None

    @property
    def device_bytes(self) -> int | None:
        """What it takes of all accelerators together."""
        return None if self.devices is None else sum(taken for _, taken in self.devices)


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One device's memory as the system tells it; bytes.

    `available_bytes` could be had now; what its engines' files keep in the page cache counts
    as available. `stale`: it could not be read this time, so this is the last figure.
    """

    device: str
    name: str  # what its maker calls it; `host` for main memory
    capacity_bytes: int
    available_bytes: int
    stale: bool = False


class StartFailure(StrEnum):
    """Why a start failed, as far as the engine's own words tell."""

    OUT_OF_MEMORY = "out_of_memory"
    BAD_FILE = "bad_file"
    UNKNOWN_ARCHITECTURE = "unknown_architecture"
    BAD_OPTION = "bad_option"  # an option it was started with
    MISSING_LIBRARY = "missing_library"
    PORT_IN_USE = "port_in_use"
    KILLED = "killed"
    STALLED = "stalled"
    EXITED = "exited"  # nothing more is known
