"""Is what an engine took free again? Told from two surveys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from xandrouting.core.model import HOST, MemoryUse
from xandrouting.launch.base import Survey

MOST: Final = 0.5  # of what it took: the rest may be somebody else's by now
LITTLE_BYTES: Final = 64 << 20  # less is lost in what the system does meanwhile


def others_bytes(survey: Survey) -> Mapping[str, int]:
    """Return what is taken on each device by no engine that the survey knows."""
    taken = {d.device: d.capacity_bytes - d.available_bytes for d in survey.devices}
    for use in survey.engines.values():
        for device, amount in private_of(use).items():
            if device in taken:
                taken[device] -= amount
    return taken


def is_freed(use: MemoryUse, before: Mapping[str, int], now: Mapping[str, int]) -> bool:
    """Whether an engine's memory is free: `before` and `now` are others', with and without it."""
    return all(
        amount < LITTLE_BYTES
        or device not in before
        or device not in now
        or now[device] <= before[device] + amount * MOST
        for device, amount in private_of(use).items()
    )


def private_of(use: MemoryUse) -> Mapping[str, int]:
    """Return what would be available again on each device if the engine were gone."""
    return {HOST: use.private_bytes or 0} | dict(use.devices or ())
