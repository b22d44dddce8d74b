"""A machine's cards as `pynvml` tells of them, and every way in which it may fail.

Only what `Nvml` calls is here. A handle is the card or the instance itself. The errors are the
real library's own.
"""

# ruff: noqa: N802, N803 - the library's names

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml

GIB = 1 << 30


@dataclass(eq=False)
class FakeCard:
    """One card, or one MIG instance. All may be changed between two reads."""

    name: str = "NVIDIA L4"
    total: int = 24 * GIB
    free: int = 20 * GIB
    reserved: int = GIB
    computing: list[tuple[int, int | None]] = field(default_factory=list)  # pid, bytes
    drawing: list[tuple[int, int | None]] = field(default_factory=list)
    bus: str = ""  # set by the library
    uuid: str = ""  # the same
    instances: list[FakeCard | None] | None = None  # not None: in MIG mode; None: a gap
    errors: dict[str, type[Exception]] = field(default_factory=dict)  # by a function's name


class FakeNvml(ModuleType):
    """Stands for the module `pynvml`."""

    def __init__(self, *cards: FakeCard) -> None:
        super().__init__("pynvml")
        self.cards = list(cards)
        for number, card in enumerate(cards):
            card.bus = f"00000000:{number + 1:02X}:00.0"
            card.uuid = card.uuid or f"GPU-{number}0c0ffee-1234-5678-9abc-def012345678"
        self.errors: dict[str, type[Exception]] = {}  # by a function's name
        self.calls: Counter[str] = Counter()
        self._opened = 0

    def __getattr__(self, name: str) -> Any:
        """What is not faked is the real library's: its errors and its constants."""
        if name.startswith(("NVML", "nvmlMemory_v2")):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def _call(self, name: str, card: FakeCard | None = None) -> None:
        self.calls[name] += 1
        if name in self.errors:
            raise self.errors[name]
        if name != "nvmlInit" and not self._opened:
            raise pynvml.NVMLError_Uninitialized
        if card is not None and name in card.errors:
            raise card.errors[name]

    def nvmlInit(self) -> None:
        self._call("nvmlInit")
        self._opened += 1

    def nvmlShutdown(self) -> None:
        self._call("nvmlShutdown")
        self._opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        self._call("nvmlDeviceGetCount")
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        self._call("nvmlDeviceGetHandleByIndex", self.cards[index])
        return self.cards[index]

    def nvmlDeviceGetHandleByPciBusId(self, pciBusId: str) -> FakeCard:
        card = next((card for card in self.cards if card.bus == pciBusId), None)
        self._call("nvmlDeviceGetHandleByPciBusId", card)
        if card is None:
            raise pynvml.NVMLError_NotFound
        return card

    def nvmlDeviceGetPciInfo(self, handle: FakeCard) -> SimpleNamespace:
        self._call("nvmlDeviceGetPciInfo", handle)
        return SimpleNamespace(busId=handle.bus)

    def nvmlDeviceGetUUID(self, handle: FakeCard) -> str:
        self._call("nvmlDeviceGetUUID", handle)
        return handle.uuid

    def nvmlDeviceGetName(self, handle: FakeCard) -> str:
        self._call("nvmlDeviceGetName", handle)
        return handle.name

    def nvmlDeviceGetMigMode(self, device: FakeCard) -> list[int]:
        self._call("nvmlDeviceGetMigMode", device)
        return [int(device.instances is not None)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, device: FakeCard) -> int:
        self._call("nvmlDeviceGetMaxMigDeviceCount", device)
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: FakeCard, index: int) -> FakeCard:
        self._call("nvmlDeviceGetMigDeviceHandleByIndex", device)
        instance = dict(enumerate(device.instances or ())).get(index)
        if instance is None:
            raise pynvml.NVMLError_NotFound
        return instance

    def nvmlDeviceGetMemoryInfo(
        self, handle: FakeCard, version: int | None = None
    ) -> SimpleNamespace:
        self._call("nvmlDeviceGetMemoryInfo" + ("_v2" if version else ""), handle)
        memory = SimpleNamespace(total=handle.total, free=handle.free)
        if version:
            memory.reserved = handle.reserved
        return memory

    def nvmlDeviceGetComputeRunningProcesses(self, handle: FakeCard) -> list[SimpleNamespace]:
        self._call("nvmlDeviceGetComputeRunningProcesses", handle)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in handle.computing]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: FakeCard) -> list[SimpleNamespace]:
        self._call("nvmlDeviceGetGraphicsRunningProcesses", handle)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in handle.drawing]
