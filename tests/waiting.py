"""Waiting for facts, never for an amount of time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_POLL_S = 0.01


def wait_for(predicate: Callable[[], T], timeout_s: float = 5.0) -> T:
    """Return the predicate's first true value; fail when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"not true within {timeout_s} s: {predicate}"
        time.sleep(_POLL_S)
    return value


async def async_wait_for(predicate: Callable[[], T], timeout_s: float = 5.0) -> T:
    """As `wait_for`, while the loop goes on."""
    deadline = time.monotonic() + timeout_s
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"not true within {timeout_s} s: {predicate}"
        await asyncio.sleep(_POLL_S)
    return value
