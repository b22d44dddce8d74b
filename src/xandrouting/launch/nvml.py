"""NVIDIA's cards, as its management library (NVML) tells of them. The one seam to it."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Protocol

import pynvml

from xandrouting.core.model import DeviceReading

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuReading:
    """The cards at one moment.

    `processes` has, by pid, the bytes a process takes of each card. A process is missing
    where NVML does not say what it takes (WSL, containers under old drivers).
    """

    devices: tuple[DeviceReading, ...] = ()
    processes: Mapping[int, tuple[tuple[str, int], ...]] = field(default_factory=dict)


class Gpus(Protocol):
    """A machine's cards."""

    def read(self) -> GpuReading:
        """Read all of them; blocks for a few milliseconds. Never raises: see `stale`."""


class NoGpus:
    """A machine without any."""

    def read(self) -> GpuReading:
        """Tell of none."""
        return GpuReading()


@dataclass(frozen=True, slots=True)
class _Card:
    reading: DeviceReading
    processes: Mapping[int, int]  # bytes by pid


class Nvml:
    """The cards NVML knows, named `cuda:0` and so on by their place on the PCI bus.

    That is CUDA's order too if `CUDA_DEVICE_ORDER` is `PCI_BUS_ID`. A name stays with its
    card, even when another card falls off the bus. A card in MIG mode stands for its first
    instance, the only one CUDA gives to a process that asks for the card by number. A card
    that shares the processor's memory has none of its own and is not told of.

    What cannot be read is told as last seen, marked stale, and NVML is started anew at the
    next read: a driver that was replaced or a card that was reset is back then.
    """

    def __init__(
        self, library: ModuleType = pynvml, *, visible: Sequence[str] | None = None
    ) -> None:
        """`visible` are the cards to use, as CUDA_VISIBLE_DEVICES names them; None: all."""
        self._library = library
        self._visible = visible
        self._lock = threading.Lock()  # the survey and each engine's measuring are threads
        self._is_open = False
        self._is_failing = False
        self._buses: dict[str, str] = {}  # a card's name and its PCI bus id
        self._last: dict[str, _Card] = {}

    def open(self) -> None:
        """Start NVML and see which cards there are.

        Raises:
            NVMLError: there is no driver, or it does not work; the next read tries again.
        """
        self._library.nvmlInit()
        self._is_open = True
        if not self._buses:
            self._buses = {f"cuda:{number}": bus for number, bus in enumerate(self._usable())}

    def read(self) -> GpuReading:
        """Read every card, as far as it can be."""
        with self._lock:
            self._tell(self._look())
            cards = [self._last[name] for name in self._buses if name in self._last]
        processes: defaultdict[int, list[tuple[str, int]]] = defaultdict(list)
        for card in cards:
            for pid, taken in card.processes.items():
                processes[pid].append((card.reading.device, taken))
        return GpuReading(
            devices=tuple(card.reading for card in cards),
            processes={pid: tuple(taken) for pid, taken in processes.items()},
        )

    def _look(self) -> Exception | None:
        """Look at every card; return why not all could be read."""
        failure: Exception | None = None
        try:
            if not self._is_open:
                self.open()
        except self._library.NVMLError as error:
            failure = error
        for name, bus in self._buses.items():
            try:
                card = self._read_card(name, bus)  # NVMLError too if NVML did not start
            except self._library.NVMLError as error:
                failure = failure or error
                card = self._last.get(name)
                card = card and replace(card, reading=replace(card.reading, stale=True))
            if card is None:
                self._last.pop(name, None)
            else:
                self._last[name] = card
        return failure

    def _tell(self, failure: Exception | None) -> None:
        if failure is not None:
            self._close()
            if not self._is_failing:
                log.warning("gpu memory cannot be read error=%s", failure)
        elif self._is_failing:
            log.info("gpu memory can be read again")
        self._is_failing = failure is not None

    def _close(self) -> None:
        self._is_open = False
        try:
            self._library.nvmlShutdown()
        except self._library.NVMLError:
            pass  # it never started, or is past shutting down

    def _usable(self) -> list[str]:
        """Return the bus ids of the cards CUDA would number, in its order."""
        nvml = self._library
        buses, uuids = [], []
        for number in range(nvml.nvmlDeviceGetCount()):
            try:
                card = nvml.nvmlDeviceGetHandleByIndex(number)
                bus, uuid = nvml.nvmlDeviceGetPciInfo(card).busId, nvml.nvmlDeviceGetUUID(card)
            except (
                nvml.NVMLError_NoPermission,  # not this container's
                nvml.NVMLError_GpuIsLost,
                nvml.NVMLError_NotSupported,  # on no bus: it shares the processor's memory
            ):
                continue
            buses.append(bus)
            uuids.append(uuid)
        if self._visible is None:
            return buses
        chosen = []
        for name in self._visible:
            found = [
                bus
                for number, (bus, uuid) in enumerate(zip(buses, uuids, strict=True))
                if name == str(number) or (not name.isdigit() and uuid.startswith(name))
            ]
            if len(found) != 1:
                break  # CUDA stops at the first name that is none as well
            chosen += found
        return chosen

    def _read_card(self, name: str, bus: str) -> _Card | None:
        """Read one card; None for one that has no memory to tell of."""
        nvml = self._library
        card = self._instance(nvml.nvmlDeviceGetHandleByPciBusId(bus))
        if card is None:
            return None
        try:
            capacity, available = self._memory(card)
        except nvml.NVMLError_NotSupported:
            return None
        reading = DeviceReading(name, nvml.nvmlDeviceGetName(card), capacity, available)
        return _Card(reading, self._processes(card))

    def _instance(self, card: Any) -> Any:  # noqa: ANN401 - NVML's handle
        """Return the card itself, or in MIG mode its first instance; None while it has none."""
        nvml = self._library
        try:
            mode, _ = nvml.nvmlDeviceGetMigMode(card)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
            return card
        if mode != nvml.NVML_DEVICE_MIG_ENABLE:
            return card
        for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card)):
            try:
                return nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, number)
            except nvml.NVMLError_NotFound:
                continue  # a gap
        return None

    def _memory(self, card: Any) -> tuple[int, int]:  # noqa: ANN401 - NVML's handle
        """Return what there is for programs, as CUDA counts it, and what of it is free."""
        nvml = self._library
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(card, nvml.nvmlMemory_v2)
        except (nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NotSupported):
            memory = nvml.nvmlDeviceGetMemoryInfo(card)  # drivers before 510
            return memory.total, memory.free
        return memory.total - memory.reserved, memory.free

    def _processes(self, card: Any) -> dict[int, int]:  # noqa: ANN401 - NVML's handle
        """Return what each process takes of a card, as far as it is told."""
        nvml = self._library
        taken: dict[int, int] = {}
        for ask in (
            nvml.nvmlDeviceGetComputeRunningProcesses,
            nvml.nvmlDeviceGetGraphicsRunningProcesses,
        ):
            try:
                processes = ask(card)
            except (
                nvml.NVMLError_NotSupported,
                nvml.NVMLError_NoPermission,
                nvml.NVMLLibraryMismatchError,  # a driver before 510
            ):
                continue
            for process in processes:
                if process.usedGpuMemory is not None:
                    # One that computes and draws is in both lists, each with all it takes.
                    taken[process.pid] = max(process.usedGpuMemory, taken.get(process.pid, 0))
        return taken


def visible_cards(environment: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the cards this process was given, as CUDA_VISIBLE_DEVICES names them; None: all."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return None
    return tuple(name.strip() for name in given.split(",") if name.strip())


def open_gpus(library: ModuleType = pynvml, *, visible: Sequence[str] | None = None) -> Gpus:
    """Return this machine's cards, see `Nvml`; none where there is no NVIDIA driver."""
    gpus = Nvml(library, visible=visible)
    try:
        gpus.open()
    except (library.NVMLError_LibraryNotFound, library.NVMLError_DriverNotLoaded):
        return NoGpus()
    except library.NVMLError:
        pass  # the first read tries again, and tells
    return gpus
