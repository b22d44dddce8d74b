"""From what a request says to the engine it needs: a look-up, nothing waits here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xandrouting.core.errors import BackendUnavailable, DeviceUnavailable
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
from xandrouting.engines.base import EngineAdapter, ModelFacts, StateFacts
from xandrouting.inventory.gguf import GgufHeader
from xandrouting.inventory.model_file import ModelFile, Snapshot
from xandrouting.proxy.request import Routing
from xandrouting.routing.names import ModelNames

REMOTE: Final = "remote"
MAX_ROUTES: Final = 1000  # remembered answers; clients repeat themselves


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes.

    `asked_model` is the name the engine knows the model by. `file` is None for an
    upstream. `device_fallback` is the device the client asked for and did not get.
    """

    spec: EngineSpec
    asked_model: str
    ttl_s: float | None
    file: ModelFile | None = None
    device_fallback: str | None = None


@dataclass(frozen=True, slots=True)
class Devices:
    """What engines can run on here, besides the processor."""

    cuda: int = 0  # how many cards


class Catalog:
    """Settings, inventory and adapters, asked together.

    `snapshot` returns the last scan. `upstreams` are addresses by name. `unavailable` says
    for each backend that cannot serve here why not. `versions` are the engines', which what
    is learned of a model holds for.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        adapters: Mapping[Backend, EngineAdapter],
        *,
        upstreams: Mapping[str, str],
        unavailable: Mapping[Backend, str],
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
        file = names.resolve(fields.model)
        backend = self._backend(fields.backend or "auto", file)
        device, fallback = self._device(fields.device or "auto")
        adapter = self._adapters[backend]
        facts = facts_of(file)
        wants = LoadOptions(
            n_ctx=fields.n_ctx,
            n_gpu_layers=fields.n_gpu_layers,
            n_parallel=fields.n_parallel,
            gpu_memory_utilization=fields.gpu_memory_utilization,
            max_model_len=fields.max_model_len,
            embeddings=embeddings or None,
            cache_type_k=fields.cache_type_k,
            cache_type_v=fields.cache_type_v,
        )
        spec = EngineSpec(
            ModelKey(file.id, backend, device),
            source=str(file.path),
            wants=adapter.settle(wants, facts, device),
            defaults=adapter.defaults(facts, device),
            cost=adapter.cost(facts, device),
            placements=self._placements(device),
            revision=file.revision,
            learned_as=self._learned_as(file, backend),
            mmproj=None if file.mmproj is None else str(file.mmproj),
            files=tuple(str(path) for path in _read_by_a_load(file)),
            sleeper_bytes=adapter.sleeper_bytes,
            siblings=self._siblings(file, names, adapter, device),
        )
        return Route(spec, file.id, fields.ttl, file, fallback)

    def _placements(self, device: str) -> tuple[Placement, ...]:
        """Return the cards an engine may use: one alone, or where one is too small all of them."""
        if device == "cpu":
            return ((),)
        if device != "cuda":
            return ((device,),)
        cards = tuple(f"cuda:{number}" for number in range(self._devices.cuda))
        alone = tuple((card,) for card in cards)
        return (*alone, cards) if len(cards) > 1 else alone

    def _learned_as(self, file: ModelFile, backend: Backend) -> str:
        eyes = "" if file.mmproj is None else file.mmproj.name
        return "|".join((file.revision, eyes, backend, self._versions.get(backend, "")))

    def _siblings(
        self, file: ModelFile, names: ModelNames, adapter: EngineAdapter, device: str
    ) -> tuple[tuple[str, Cost], ...]:
        """Return the smaller quantizations of the same model, the largest first."""
        smaller = [
            other
            for other in names.quantizations(file)
            if other.problem is None and other.size_bytes < file.size_bytes
        ]
        smaller.sort(key=lambda other: -other.size_bytes)
        return tuple((other.id, adapter.cost(facts_of(other), device)) for other in smaller)

    def devices_meant(self, asked: str | None) -> frozenset[str] | None:
        """Return the devices an unload by `asked` means; None: any.

        A request for `cuda` that fell back runs on `cpu`; unloading it by `cuda` finds it.
        """
        if asked is None or asked == "auto":
            return None
        return frozenset((asked, self._device(asked)[0]))

    def names(self) -> ModelNames:
        """Return the names of the last scan's models."""
        snapshot = self._snapshot()
        if snapshot is not self._named:
            self._named = snapshot
            self._routes.clear()
            self._names = ModelNames(snapshot.models, escaping=snapshot.escaping)
        return self._names

    def _upstream_route(self, fields: Routing) -> Route | None:
        model = fields.model
        if fields.backend == "ollama" and not model.startswith("ollama/"):
            model = f"ollama/{model}"
        name, slash, rest = model.partition("/")
        url = self._upstreams.get(name)
        if url is None or not slash or not rest:
            return None
        key = ModelKey(name, Backend.UPSTREAM, REMOTE)
        return Route(EngineSpec(key, url, cost=FixedCost(Footprint(engines=0))), rest, ttl_s=0)

    def _backend(self, asked: str, file: ModelFile) -> Backend:
        backend = Backend.LLAMACPP if asked == "auto" else Backend(asked)
        reason = self._unavailable.get(backend)
        if reason is None and backend is not Backend.LLAMACPP:
            reason = "it does not serve GGUF files"
        if reason is not None:
            raise BackendUnavailable(
                f"The backend {backend} cannot serve {file.id}: {reason}. "
                "Leave `backend` out to let the server choose.",
                param="backend",
            )
        return backend

    def _device(self, asked: str) -> tuple[str, str | None]:
        """Return the device to use, and the one asked for if that is another."""
        cards = self._devices.cuda
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


def _read_by_a_load(file: ModelFile) -> Iterator[Path]:
    yield from (part.path for part in file.files)
    if file.mmproj is not None:
        yield file.mmproj


def facts_of(file: ModelFile) -> ModelFacts:
    """Return what an adapter may know of a model file."""
    header = file.header
    if header is None:
        return ModelFacts(file.size_bytes)
    return ModelFacts(
        file.size_bytes,
        context_length=header.context_length,
        layers=header.block_count,
        pooling=bool(header.pooling_type),
        architecture=header.architecture,
        embedding_length=header.embedding_length,
        feed_forward=_feed_forward(header),
        vocab_size=header.vocab_size,
        head_count=header.head_count,
        head_count_kv=header.head_count_kv,
        key_length=header.key_length,
        value_length=header.value_length,
        key_length_swa=header.key_length_swa,
        value_length_swa=header.value_length_swa,
        keys_only=header.key_length_mla is not None,
        sliding_window=header.sliding_window,
        sliding_pattern=header.sliding_window_pattern,
        state=_state(header),
        recurrent_pattern=header.recurrent_layers,
        uncached_layers=(header.shared_kv_layers or 0) + (header.nextn_predict_layers or 0),
        tensor_bytes=header.tensor_bytes,
        type_bytes=header.type_bytes,
        block_bytes=header.block_bytes,
        embedding_bytes=header.embedding_bytes,
        embedding_type=header.embedding_type,
        output_bytes=header.output_bytes,
        mmproj_bytes=file.mmproj_bytes,
    )


def _feed_forward(header: GgufHeader) -> int:
    """Return how wide the layers are that work on one token, the widest of all."""
    expert = _widest(header.expert_feed_forward_length) * _widest(header.expert_used_count)
    shared = header.expert_shared_feed_forward_length or 0
    return max(_widest(header.feed_forward_length), expert + shared)


def _widest(number: int | tuple[int, ...] | None) -> int:
    return max(number, default=0) if isinstance(number, tuple) else number or 0


def _state(header: GgufHeader) -> StateFacts | None:
    if not header.ssm_state_size or not header.ssm_inner_size:
        return None
    return StateFacts(
        conv_kernel=header.ssm_conv_kernel or 0,
        inner_size=header.ssm_inner_size,
        state_size=header.ssm_state_size,
        group_count=header.ssm_group_count or 0,
    )
