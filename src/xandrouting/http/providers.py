"""Who can serve here, why not, and what each can be asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fastapi import FastAPI

from xandrouting.core.ledger import DeviceState
from xandrouting.core.model import HOST, Backend
from xandrouting.http.decisions import gib
from xandrouting.http.lists import iso
from xandrouting.http.options import completion_options, load_options
from xandrouting.http.provider_schemas import ProviderDevice, ProviderItem, ProviderList
from xandrouting.http.schemas import EngineStatus
from xandrouting.http.services import Services
from xandrouting.upstreams.values import UpstreamState


@dataclass(frozen=True, slots=True)
class About:
    """What a backend is, whatever machine it is on."""

    name: str
    description: str
    formats: tuple[str, ...] = ()
    default: bool = False


ENGINES: Final[Mapping[Backend, About]] = {
    Backend.LLAMACPP: About(
        "llama.cpp",
        "Runs GGUF files on a GPU, the CPU, or partly on each.",
        formats=("gguf",),
        default=True,
    ),
    Backend.VLLM: About(
        "vLLM",
        "Runs safetensors folders, with many requests at once.",
        formats=("safetensors",),
        default=True,
    ),
    Backend.TRANSFORMERS: About(
        "Transformers",
        "vLLM with --model-impl transformers: runs safetensors folders by the model code of "
        "the Transformers library.",
        formats=("safetensors",),
    ),
}


def add_provider_calls(app: FastAPI, services: Services, *, default_ttl_s: float | None) -> None:
    """Add the call; what it tells is known already, so it waits for nothing.

    `default_ttl_s` is how long a model idles whose requests do not say; None: not told.
    """

    @app.get("/v1/providers", tags=["status"])
    async def providers() -> ProviderList:
        """List who can serve here, why not, and what each can be asked for."""
        statuses, devices = services.backends(), list(services.pool.devices())
        return ProviderList(
            providers=[
                *engine_items(statuses, devices, default_ttl_s),
                *upstream_items(services.upstreams.states()),
            ]
        )


def engine_items(
    statuses: Mapping[str, EngineStatus],
    devices: Sequence[DeviceState],
    default_ttl_s: float | None,
) -> Iterator[ProviderItem]:
    """Describe the backends whose engines run here."""
    for backend, about in ENGINES.items():
        status = statuses[backend]
        usable = [device for device in map(_device, devices) if _can_use(status, device.id)]
        yield ProviderItem(
            id=backend,
            name=about.name,
            backend=backend,
            description=about.description,
            kind="engine",
            available=status.available,
            reason=status.reason,
            command=status.command,
            since=None,
            version=status.version,
            devices=usable,
            formats=list(about.formats),
            default=about.default,
            load_options=load_options(backend, [device.id for device in usable], default_ttl_s),
            completion_options=completion_options(backend),
        )


def upstream_items(states: Iterable[UpstreamState]) -> Iterator[ProviderItem]:
    """Describe the servers that somebody else runs, as they were last seen."""
    for state in states:
        is_ollama = state.backend is Backend.OLLAMA
        kind = "An Ollama" if is_ollama else "An OpenAI-compatible server"
        yield ProviderItem(
            id=state.name,
            name="Ollama" if is_ollama else state.name,
            backend=state.backend,
            description=f"{kind}: its models are {state.name}/MODEL.",
            kind="upstream",
            available=state.available,
            reason=None if state.available else state.reason or "it has not answered yet",
            command=None,
            since=None if state.available else iso(state.since),
            version=state.version,
            devices=[],
            formats=[],
            default=False,
            load_options=load_options(state.backend, [], None),
            completion_options=completion_options(state.backend),
        )


def _can_use(status: EngineStatus, device: str) -> bool:
    return status.devices is None or device in status.devices


def _device(state: DeviceState) -> ProviderDevice:
    on_host = state.device == HOST
    return ProviderDevice(
        id="cpu" if on_host else state.device,
        name="CPU" if on_host else state.name,
        capacity_bytes=state.capacity_bytes,
        capacity_gb=gib(state.capacity_bytes),
    )
