"""How much of a device engines may take: as set, else what is free at the start less a reserve."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from xandrouting.core.model import DeviceReading
from xandrouting.core.sizes import in_words

RESERVE_SHARE: Final = 0.05
MIN_RESERVE_BYTES: Final = 256 << 20

_UNITS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE: Final = re.compile(
    r"(?P<number>\d+(\.\d+)?)\s*((?P<unit>[kmgt]?)(?P<binary>i?)b?|%)", re.IGNORECASE
)


class BudgetTooLarge(ValueError):
    """The budget is more than the machine has; the text says both."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit as somebody wrote it: so many bytes, or a share of the device."""

    size_bytes: int | None = None
    share: float | None = None  # over 0, at most 1

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `24GiB`, `8000MB`, `1073741824` or `80%`.

        Raises:
            ValueError: it is none of these, not over 0, or over 100 %.
        """
        match = _SIZE.fullmatch(text.strip())
        if match is None:
            raise ValueError("write a size over 0 as 24GiB, or a share as 80%")
        number = float(match["number"])
        if match["unit"] is None:
            if not 0 < number <= 100:
                raise ValueError("a share is over 0% and at most 100%")
            return cls(share=number / 100)
        base = 1024 if match["binary"] else 1000
        size_bytes = int(number * base ** _UNITS[match["unit"].lower()])
        if size_bytes <= 0:
            raise ValueError("a budget is over 0")
        return cls(size_bytes=size_bytes)


def budget_bytes(budget: Budget | None, reading: DeviceReading) -> int:
    """Return what engines may take of this device together.

    Raises:
        BudgetTooLarge: the device has less.
    """
    capacity = reading.capacity_bytes
    if budget is None:
        reserve = max(MIN_RESERVE_BYTES, int(capacity * RESERVE_SHARE))
        return max(0, reading.available_bytes - reserve)
    if budget.share is not None:
        return int(capacity * budget.share)
    assert budget.size_bytes is not None
    if budget.size_bytes > capacity:
        raise BudgetTooLarge(
            f"the budget of {in_words(budget.size_bytes)} is more than {reading.device} has: "
            f"{in_words(capacity)}"
        )
    return budget.size_bytes
