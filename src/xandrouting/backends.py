"""Which engines can serve on this machine, and their adapters. Read once, at the start."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xandrouting.core.model import HOST, Backend, DeviceReading
from xandrouting.engines.base import EngineAdapter
from xandrouting.engines.llamacpp import LlamaCpp
from xandrouting.engines.vllm import Vllm, VllmSetup
from xandrouting.http.schemas import EngineStatus
from xandrouting.provision.vllm import INSTALL, Missing, VllmInstall, environments, find_vllm
from xandrouting.routing.catalog import Devices, Lack

LLAMACPP_COMMAND = "pip install 'xandrouting[llamacpp]'"


@dataclass(frozen=True, slots=True)
class Backends:
    """The engines of this machine. `statuses` are by backend, as the API shows them.

    `setups` is what else a load's figures depend on, besides the version and the options.
    """

    adapters: Mapping[Backend, EngineAdapter]
    statuses: Mapping[Backend, EngineStatus]
    devices: Devices
    setups: Mapping[Backend, str]

    @property
    def lacks(self) -> Mapping[Backend, Lack]:
        """The backends that cannot serve here, and why."""
        return {
            backend: Lack(status.reason or "it is not available", status.command)
            for backend, status in self.statuses.items()
            if not status.available
        }

    @property
    def versions(self) -> Mapping[Backend, str]:
        """What the figures of earlier loads hold for."""
        return {
            backend: " ".join(filter(None, (status.version, self.setups.get(backend))))
            for backend, status in self.statuses.items()
        }


def look(
    readings: Sequence[DeviceReading],
    *,
    llamacpp_cards: int,
    cards: Sequence[str],
    data_dir: Path,
    drain_s: float,
    fast_start: bool | None,
    sleeps: bool,
    vllm_spare: bool,
) -> Backends:
    """Look for every engine.

    `llamacpp_cards`: how many cards llama.cpp can use. `cards` are their names for
    CUDA_VISIBLE_DEVICES; none: by number. See `VllmSetup` for the rest.
    """
    accelerators = [reading for reading in readings if reading.device != HOST]
    found = find_vllm(os.environ, beside=environments(Path.cwd(), data_dir))
    if isinstance(found, VllmInstall) and found.is_cpu is False and not accelerators:
        found = Missing("it is built for GPUs, and there is none", f"{INSTALL} --cpu --force")
    vllm_cards, on_cpu = 0, True
    if isinstance(found, Missing):
        program, vllm = "vllm", _status(reason=found.reason, command=found.command)
    else:
        vllm_cards = 0 if found.is_cpu else len(accelerators)
        on_cpu = found.is_cpu is not False
        program = str(found.executable)
        version = f"vllm {found.version or ''}".strip()
        vllm = _status(version=version, cards=vllm_cards, on_cpu=on_cpu)
    python = None
    if vllm_spare and isinstance(found, VllmInstall) and found.version is not None:
        python = found.python  # of somebody's own script it is not known to be vLLM's
    setup = VllmSetup(
        program,
        waiter=None if python is None else str(python),
        cache_folder=str(data_dir / "vllm"),
        drain_s=drain_s,
        fast_start=fast_start,
        sleeps=sleeps,
        card_bytes=min((card.capacity_bytes for card in accelerators), default=0),
        cards=tuple(cards),
    )
    return Backends(
        adapters={
            Backend.LLAMACPP: LlamaCpp(cards),
            Backend.VLLM: Vllm(setup),
            Backend.TRANSFORMERS: Vllm(setup, Backend.TRANSFORMERS),
        },
        statuses={
            Backend.LLAMACPP: _llamacpp(llamacpp_cards),
            Backend.VLLM: vllm,
            Backend.TRANSFORMERS: vllm,
        },
        devices=Devices(cuda=llamacpp_cards, vllm_cuda=vllm_cards, vllm_cpu=on_cpu),
        setups=dict.fromkeys(
            (Backend.VLLM, Backend.TRANSFORMERS),
            "" if fast_start is None else f"fast_start={fast_start}",
        ),
    )


def engine_libraries() -> list[Path]:
    """Return the files that hold llama.cpp; none where it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return [library for folder in folders for library in Path(folder).glob("*.so")]


def _llamacpp(cards: int) -> EngineStatus:
    if importlib.util.find_spec("xllamacpp") is None:
        return _status(reason="llama.cpp is not installed", command=LLAMACPP_COMMAND)
    return _status(version=f"xllamacpp {importlib.metadata.version('xllamacpp')}", cards=cards)


def _status(
    *,
    reason: str | None = None,
    command: str | None = None,
    version: str | None = None,
    cards: int = 0,
    on_cpu: bool = True,
) -> EngineStatus:
    available = reason is None
    return EngineStatus(
        status="available" if available else "unavailable",
        available=available,
        reason=reason,
        version=version,
        command=command,
        devices=[*(["cpu"] if on_cpu else []), *(f"cuda:{number}" for number in range(cards))],
    )
