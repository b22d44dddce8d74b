"""From what a request says to the engine it needs: a look-up, nothing waits here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xandrouting.core.errors import (
    AmbiguousModel,
    BackendUnavailable,
    DeviceUnavailable,
    EngineNotInstalled,
    InvalidRequest,
)
from xandrouting.core.model import (
    Backend,
    Cost,
    EngineSpec,
    FixedCost,
    Footprint,
    LoadOptions,
    ModelKey,
    Placement,
)
from xandrouting.engines.base import EngineAdapter, ModelFacts
from xandrouting.engines.upstream import backend_of
from xandrouting.inventory.folders import WEIGHTS
from xandrouting.inventory.model_file import (
    MAX_NAME_LENGTH,
    ModelFile,
    ModelFormat,
    Snapshot,
    shown,
)
from xandrouting.proxy.request import Routing
from xandrouting.routing.facts import facts_of
from xandrouting.routing.names import ModelNames
from xandrouting.upstreams.upstreams import split_name

REMOTE: Final = "remote"
MAX_ROUTES: Final = 1000  # remembered answers; clients repeat themselves

NAMES: Final = {
    Backend.LLAMACPP: "llama.cpp",
    Backend.VLLM: "vLLM",
    Backend.TRANSFORMERS: "vLLM",
    Backend.OLLAMA: "Ollama",
}
SERVED_BY: Final = {ModelFormat.GGUF: Backend.LLAMACPP, ModelFormat.SAFETENSORS: Backend.VLLM}
_SERVES: Final = {
    Backend.LLAMACPP: ModelFormat.GGUF,
    Backend.VLLM: ModelFormat.SAFETENSORS,
    Backend.TRANSFORMERS: ModelFormat.SAFETENSORS,
}
_FORMATS: Final = {
    ModelFormat.GGUF: "GGUF files",
    ModelFormat.SAFETENSORS: "folders of safetensors",
}


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes.

    `asked_model` is the name the engine knows the model by. `file` is None for an
    upstream. `device_fallback` is the device the client asked for and did not get. `chosen_by`
    is what the backend was chosen by for a client that asked for a choice, by `auto`.
    """

    spec: EngineSpec
    asked_model: str
    ttl_s: float | None
    file: ModelFile | None = None
    device_fallback: str | None = None
    chosen_by: str = ""


@dataclass(frozen=True, slots=True)
class Devices:
    """What engines can run on here, besides the processor: how many cards."""

    cuda: int = 0  # that llama.cpp can use
    vllm_cuda: int = 0  # that vLLM can
    vllm_cpu: bool = True  # whether vLLM can use the processor too

    def on_cpu(self, backend: Backend) -> bool:
        """Whether engines of this backend can do without a card."""
        return backend is Backend.LLAMACPP or self.vllm_cpu

    def cards(self, backend: Backend) -> int:
        """Return how many cards engines of this backend can use."""
        return self.cuda if backend is Backend.LLAMACPP else self.vllm_cuda


@dataclass(frozen=True, slots=True)
class Lack:
    """Why a backend cannot serve here, and the command that mends it, if one does."""

    reason: str
    command: str | None = None


class Catalog:
    """Settings, inventory and adapters, asked together.

    `snapshot` returns the last scan. `upstreams` are addresses by name. `unavailable` has
    each backend that cannot serve here. `versions` are the engines', which what
    is learned of a model holds for.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        adapters: Mapping[Backend, EngineAdapter],
        *,
        upstreams: Mapping[str, str],
        unavailable: Mapping[Backend, Lack],
        devices: Devices,
        device_fallback: bool,
        versions: Mapping[Backend, str] | None = None,
    ) -> None:
        self._snapshot = snapshot
        self._adapters = adapters
        self._upstreams = upstreams
        self._unavailable = unavailable
        self._devices = devices
        self._device_fallback = device_fallback
        self._versions = versions or {}
        self._named: Snapshot | None = None
        self._names = ModelNames(())
        self._routes: dict[tuple[object, ...], Route] = {}  # of the same snapshot

    def route(self, fields: Routing, *, embeddings: bool = False) -> Route:
        """Return the route of a request; `embeddings`: the call asks for vectors.

        Raises:
            GatewayError: the model, backend or device is not to be had; the error says why.
        """
        names = self.names()
        asked = (
            fields.model,
            fields.backend,
            fields.device,
            fields.gpu_memory_utilization,
            fields.max_model_len,
            fields.tensor_parallel_size,
            fields.n_gpu_layers,
            fields.n_ctx,
            fields.n_parallel,
            fields.cache_type_k,
            fields.cache_type_v,
            fields.ttl,
            embeddings,
        )
        route = self._routes.get(asked)
        if route is None:
            route = self._upstream_route(fields) or self._local_route(fields, names, embeddings)
            if len(self._routes) >= MAX_ROUTES:
                self._routes.clear()
            self._routes[asked] = route
        return route

    def _local_route(self, fields: Routing, names: ModelNames, embeddings: bool) -> Route:
        file, backend = self._choice(fields, names)
        device, fallback = self._device(fields.device or "auto", backend)
        if device == "cpu" and not self._devices.on_cpu(backend):
            raise DeviceUnavailable(
                f"The vLLM on this machine is built for GPUs and cannot run '{shown(file.id)}' on "
                f"the cpu: ask for the device cuda.{self._instead(file, names)}",
                param="device",
            )
        adapter = self._adapters[backend]
        facts = facts_of(file)
        asked = LoadOptions(
            n_ctx=fields.n_ctx,
            n_gpu_layers=fields.n_gpu_layers,
            n_parallel=fields.n_parallel,
            gpu_memory_utilization=fields.gpu_memory_utilization,
            max_model_len=fields.max_model_len,
            tensor_parallel_size=fields.tensor_parallel_size,
            embeddings=embeddings or None,
            cache_type_k=fields.cache_type_k,
            cache_type_v=fields.cache_type_v,
        )
        wants = adapter.settle(asked, facts, device)
        chosen = fields.backend in (None, "auto")
        spec = EngineSpec(
            ModelKey(file.id, backend, device),
            source=str(file.path),
            wants=wants,
            defaults=adapter.defaults(facts, device),
            cost=adapter.cost(facts, device),
            placements=self._placements(device, wants, facts, adapter),
            revision=file.revision,
            learned_as=self._learned_as(file, backend),
            mmproj=None if file.mmproj is None else str(file.mmproj),
            files=tuple(str(path) for path in _read_by_a_load(file)),
            flags=adapter.flags(facts),
            sleeper_bytes=adapter.sleeper_bytes,
            sleep_levels=() if adapter.sleep is None else adapter.sleep.levels_on(device),
            siblings=self._siblings(file, names, device),
            chosen=_why(file.format, backend) if chosen else "",
        )
        by = str(file.format) if fields.backend == "auto" else ""
        return Route(spec, file.id, fields.ttl, file, fallback, by)

    def _placements(
        self, device: str, wants: LoadOptions, facts: ModelFacts, adapter: EngineAdapter
    ) -> tuple[Placement, ...]:
        """Return the cards an engine may use: as few as will do, neighbours where several."""
        shared_by = wants.tensor_parallel_size
        if device == "cpu":
            return ((),)
        if device != "cuda":
            if shared_by not in (None, 1):
                raise InvalidRequest(
                    f"tensor_parallel_size {shared_by} needs as many cards: ask for the device "
                    f"cuda instead of {device}.",
                    param="tensor_parallel_size",
                )
            return ((device,),)
        count = self._devices.cards(adapter.backend)
        sizes = adapter.shares(facts, count)
        if shared_by is not None and shared_by not in sizes:
            raise InvalidRequest(
                f"tensor_parallel_size {shared_by} cannot be had for this model on {count} cards. "
                f"It may be {', '.join(map(str, sizes))}.",
                param="tensor_parallel_size",
            )
        cards = [f"cuda:{number}" for number in range(count)]
        return tuple(
            tuple(cards[first : first + size])
            for size in (sizes if shared_by is None else (shared_by,))
            for first in range(count - size + 1)
        )

    def _learned_as(self, file: ModelFile, backend: Backend) -> str:
        eyes = "" if file.mmproj is None else file.mmproj.name
        return "|".join((file.revision, eyes, backend, self._versions.get(backend, "")))

    def _siblings(
        self, file: ModelFile, names: ModelNames, device: str
    ) -> tuple[tuple[str, Cost], ...]:
        """Return smaller GGUF files of the same model, the largest first."""
        adapter = self._adapters[Backend.LLAMACPP]
        return tuple(
            (other.id, adapter.cost(facts_of(other), device))
            for other in _ggufs_of(file, names)
            if other.size_bytes < file.size_bytes
        )

    def model_meant(self, name: str) -> ModelFile:
        """Return the model that a request by `name` alone gets, whether or not it can be served.

        Raises:
            GatewayError: as for a request by that name.
        """
        return self._meant(name, None, self.names())

    def models_meant(self, name: str, backend: str | None) -> frozenset[str]:
        """Return the ids of the models that requests by `name` may have loaded.

        A folder that is a model and holds another is one of them, by who served it.

        Raises:
            GatewayError: as for a request by that name.
        """
        formats: Iterable[ModelFormat | None] = ModelFormat
        if backend not in (None, "auto"):
            formats = (_SERVES.get(Backend(backend)),)
        found, ambiguous = set(), None
        for wanted in formats:
            try:
                found.add(self.names().resolve(name, prefers=wanted).id)
            except AmbiguousModel as error:
                ambiguous = error
        if ambiguous is not None and not found:
            raise ambiguous
        return frozenset(found)

    def devices_meant(self, asked: str | None) -> frozenset[str] | None:
        """Return the devices an unload by `asked` means; None: any.

        A request for `cuda` that fell back runs on `cpu`; unloading it by `cuda` finds it.
        """
        if asked is None or asked == "auto":
            return None
        served = self._adapters.keys() - self._unavailable.keys()
        return frozenset((asked, *(self._device(asked, backend)[0] for backend in served)))

    def names(self) -> ModelNames:
        """Return the names of the last scan's models."""
        snapshot = self._snapshot()
        if snapshot is not self._named:
            self._named = snapshot
            self._routes.clear()
            self._names = ModelNames(snapshot.models, escaping=snapshot.escaping)
        return self._names

    def _upstream_route(self, fields: Routing) -> Route | None:
        split = split_name(fields.model, fields.backend, self._upstreams)
        if split is None:
            return None
        name, rest = split
        if len(rest) > MAX_NAME_LENGTH:  # it is remembered with its route
            raise InvalidRequest(
                f"A model's name has at most {MAX_NAME_LENGTH} characters.", param="model"
            )
        key = ModelKey(name, backend_of(name), REMOTE)
        cost = FixedCost(Footprint(engines=0))
        return Route(EngineSpec(key, self._upstreams[name], cost=cost), rest, ttl_s=0)

    def _meant(self, name: str, backend: str | None, names: ModelNames) -> ModelFile:
        if backend not in (None, "auto"):
            return names.resolve(name, prefers=_SERVES.get(Backend(backend)))
        here = Backend.VLLM not in self._unavailable
        prefers = ModelFormat.SAFETENSORS if here else ModelFormat.GGUF
        file = names.resolve(name, prefers=prefers)
        if file.problem is not None:  # a stray file makes no folder of GGUFs useless
            file = names.resolve(name, prefers=ModelFormat.GGUF)
        return file

    def _choice(self, fields: Routing, names: ModelNames) -> tuple[ModelFile, Backend]:
        """Return which model is meant, and who serves it."""
        file = self._meant(fields.model, fields.backend, names)
        if fields.backend in (None, "auto"):
            backend = SERVED_BY[file.format]
        else:
            backend = Backend(fields.backend)
            if file.format is not _SERVES.get(backend):
                raise self._wrong_format(file, backend, names)
        lack = self._unavailable.get(backend)
        if lack is not None and file.problem is None:  # a damaged one is told of as such
            command = f" Install it with `{lack.command}`." if lack.command else ""
            raise EngineNotInstalled(
                f"'{shown(file.id)}' needs {NAMES[backend]}, which cannot be used here: "
                f"{lack.reason}.{command}{self._instead(file, names)}",
                param="backend",
            )
        return file, backend

    def _wrong_format(
        self, file: ModelFile, backend: Backend, names: ModelNames
    ) -> BackendUnavailable:
        right = SERVED_BY[file.format]
        return BackendUnavailable(
            f"The backend {backend} does not serve {_FORMATS[file.format]} such as "
            f"'{shown(file.id)}': ask with the backend {right}, or leave `backend` out."
            + (self._instead(file, names) if backend is Backend.LLAMACPP else ""),
            param="backend",
        )

    def _instead(self, file: ModelFile, names: ModelNames) -> str:
        """Name a GGUF of the same model that could be asked for."""
        ggufs = _ggufs_of(file, names)
        if file.format is ModelFormat.GGUF or not ggufs:
            return ""
        return f" Or ask for '{shown(ggufs[0].id)}', a GGUF of the same model."

    def _device(self, asked: str, backend: Backend) -> tuple[str, str | None]:
        """Return the device to use, and the one asked for if that is another."""
        cards = self._devices.cards(backend)
        if asked == "auto":
            return ("cuda" if cards else "cpu"), None
        if asked == "cpu" or (asked == "cuda" and cards):
            return asked, None
        if asked.startswith("cuda:") and int(asked.removeprefix("cuda:")) < cards:
            return asked, None
        if self._device_fallback:
            return "cpu", asked
        have = f"it has cuda:0 to cuda:{cards - 1}" if cards else "no GPU is usable"
        raise DeviceUnavailable(
            f"There is no device {asked} on this machine: {have}. "
            'Ask for `"device": "cpu"`, or switch device_fallback on.',
            param="device",
        )


def _why(found: ModelFormat, backend: Backend) -> str:
    return f"backend {backend}: it serves {_FORMATS[found]}"


def why_served_by(found: ModelFormat) -> str:
    """Say who serves models of this format."""
    return f"{NAMES[SERVED_BY[found]]} serves {_FORMATS[found]}"


def _ggufs_of(file: ModelFile, names: ModelNames) -> list[ModelFile]:
    """Return the other whole GGUF files of a model, the largest first."""
    found = [
        other
        for other in names.quantizations(file)
        if other.format is ModelFormat.GGUF and other.problem is None
    ]
    return sorted(found, key=lambda other: -other.size_bytes)


def _read_by_a_load(file: ModelFile) -> Iterator[Path]:
    for part in file.files:
        if file.format is ModelFormat.GGUF or part.path.suffix == WEIGHTS:
            yield part.path
    if file.mmproj is not None:
        yield file.mmproj
