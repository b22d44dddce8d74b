"""Is what an engine took of its accelerators free again? Told from two surveys.

Main memory is not asked about: a process that is reaped has given back its pages. A driver
takes its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from xandrouting.core.model import MemoryUse
from xandrouting.launch.base import Survey

MOST: Final = 0.5  # of what it took: the rest may be somebody else's by now


def others_bytes(survey: Survey) -> Mapping[str, int]:
    """Return what is taken on each device by no engine that the survey knows."""
    taken = {d.device: d.capacity_bytes - d.available_bytes for d in survey.devices}
    for use in survey.engines.values():
        for device, amount in use.devices or ():
            if device in taken:
                taken[device] -= amount
    return taken


def unmapped_bytes(survey: Survey) -> int:
    """Return how much of main memory is free, files that engines have mapped not counted as such.

    0 where nothing is known.
    """
    if not survey.devices:
        return 0
    mapped = sum(
        (use.host_bytes or 0) - (use.private_bytes or 0) for use in survey.engines.values()
    )
    return max(0, survey.devices[0].available_bytes - mapped)


def is_freed(use: MemoryUse, before: Mapping[str, int], now: Mapping[str, int]) -> bool:
    """Whether an engine's memory is free: `before` and `now` are others', with and without it."""
    return all(
        device not in before or device not in now or now[device] <= before[device] + amount * MOST
        for device, amount in use.devices or ()
    )
