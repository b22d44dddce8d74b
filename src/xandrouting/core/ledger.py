"""What there is, what is promised, what is left: of engines and of each device's bytes.

An engine is charged from its start until it is gone: with its footprint first, with what it
was measured to take once it has worked. Nobody is promised more than a limit leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from xandrouting.core.model import ENGINES, DeviceReading, EngineId

Amounts = Mapping[str, int]
"""How much of each resource: bytes of a device, or engines by the piece."""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One device's line of the ledger; bytes.

    `budget_bytes` is what engines may take at most; `others_bytes` is what other programs
    take; `reserved_bytes` is promised to engines that start, `used_bytes` is charged for those
    that run; `free_bytes` is what could be promised now, negative where more is taken than may
    be. `stale`: the system could not tell this time, so the figures are older.
    """

    device: str
    name: str
    capacity_bytes: int
    budget_bytes: int
    others_bytes: int
    reserved_bytes: int
    used_bytes: int
    free_bytes: int
    stale: bool


class Ledger:
    """Limits and charges of one node.

    `max_engines` None: as many as fit. A device without a budget may be used whole; one that
    was never read has no limit but its budget.
    """

    def __init__(
        self, *, max_engines: int | None = None, budgets: Mapping[str, int] | None = None
    ) -> None:
        self._budgets = dict(budgets or {})
        self._readings: dict[str, DeviceReading] = {}
        self._others: dict[str, int] = {}
        self._charges: dict[EngineId, Amounts] = {}
        self._charged: Counter[str] = Counter()
        self._limits: dict[str, int] = dict(self._budgets)
        if max_engines is not None:
            self._limits[ENGINES] = max_engines

    def read(
        self,
        readings: Iterable[DeviceReading],
        ours: Amounts,
        perhaps_ours: Amounts | None = None,
    ) -> None:
        """Take in what the system tells of its devices.

        `ours` is what would be available again on each if all engines were gone: the rest of
        what is taken is somebody else's. Of that, as much as `perhaps_ours` may be an engine's
        that loads, where the system does not tell: others are taken for unchanged then.
        """
        for reading in readings:
            device = reading.device
            most = reading.capacity_bytes - reading.available_bytes - ours.get(device, 0)
            least = most - (perhaps_ours or {}).get(device, 0)
            self._readings[device] = reading
            before = self._others.get(device)
            if before is None or not reading.stale:  # else it is as old as what we have
                self._others[device] = max(0, min(most, max(before or 0, least)))
            self._limits[device] = min(
                self._budgets.get(device, reading.capacity_bytes),
                reading.capacity_bytes - self._others[device],
            )

    def charge(self, engine: EngineId, amounts: Amounts) -> None:
        """Charge an engine, in place of what it was charged before."""
        self.release(engine)
        self._charges[engine] = amounts
        self._charged.update(amounts)

    def release(self, engine: EngineId) -> None:
        """Charge an engine no more: it is gone and its memory is free."""
        self._charged.subtract(self._charges.pop(engine, {}))

    def charge_of(self, engine: EngineId) -> Amounts:
        """Return what an engine is charged."""
        return self._charges[engine]

    def lacks(self, wanted: Amounts, *, freed: Amounts | None = None) -> dict[str, int]:
        """Return how much of what `wanted` lacks, once `freed` is given back; empty: it fits."""
        lacking = {}
        for resource, amount in wanted.items():
            if amount > 0 and resource in self._limits:
                lack = self._charged[resource] + amount - self._limits[resource]
                if freed is not None:
                    lack -= freed.get(resource, 0)
                if lack > 0:
                    lacking[resource] = lack
        return lacking

    def lacks_alone(self, wanted: Amounts, *, beside: Amounts) -> dict[str, int]:
        """Return how much of what `wanted` lacks though all are gone but `beside`."""
        return {
            resource: lack
            for resource, amount in wanted.items()
            if amount > 0
            and resource in self._limits
            and (lack := amount + beside.get(resource, 0) - self._limits[resource]) > 0
        }

    def free(self, resource: str) -> int | None:
        """Return how much could be promised now; None: there is no limit."""
        limit = self._limits.get(resource)
        return None if limit is None else limit - self._charged[resource]

    def limit(self, resource: str) -> int | None:
        """Return what engines may take together; None: there is no limit."""
        return self._limits.get(resource)

    def unburdened(self) -> Ledger:
        """Return a ledger of the same budgets, of which nobody has anything."""
        capacities = {device: r.capacity_bytes for device, r in self._readings.items()}
        return Ledger(max_engines=self._limits.get(ENGINES), budgets=capacities | self._budgets)

    def states(self, starting: Iterable[EngineId] = ()) -> tuple[DeviceState, ...]:
        """Return each device's line, main memory first; `starting` are not measured yet."""
        reserved: Counter[str] = Counter()
        for engine in starting:
            reserved.update(self._charges[engine])
        return tuple(self._state(reading, reserved) for reading in self._readings.values())

    def _state(self, reading: DeviceReading, reserved: Amounts) -> DeviceState:
        device = reading.device
        return DeviceState(
            device=device,
            name=reading.name,
            capacity_bytes=reading.capacity_bytes,
            budget_bytes=self._budgets.get(device, reading.capacity_bytes),
            others_bytes=self._others[device],
            reserved_bytes=reserved.get(device, 0),
            used_bytes=self._charged[device] - reserved.get(device, 0),
            free_bytes=self._limits[device] - self._charged[device],
            stale=reading.stale,
        )
