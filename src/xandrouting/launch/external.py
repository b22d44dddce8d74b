"""Engines that somebody else runs: nothing to start, nothing to end, nothing to measure."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from xandrouting.core.model import EngineId, LaunchPlan, MemoryUse
from xandrouting.launch.base import Survey


class ExternalHandle:
    """An engine at an address. It counts as running until the gateway lets go of it."""

    pid: Final = None
    never_began: Final = False
    killed_for_memory: Final = False

    def __init__(self, base_url: str, api_key: str) -> None:
        self.base_url = base_url.rstrip("/")
        self.api_key = api_key
        self.exit_status: int | None = None
        self._let_go = asyncio.Event()

    def tail(self) -> Sequence[str]:
        """Return nothing: what it prints goes elsewhere."""
        return ()

    def activity(self) -> int:
        """Return 0, always: no output of it is seen."""
        return 0

    async def ready_line(self) -> None:
        """Return at once: whether it answers is the probe's to find out."""

    async def rest(self) -> None:
        """Never asked for: it is not ours to put to sleep.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("an external engine takes no orders")

    def wake(self, plan: LaunchPlan) -> None:
        """Never asked for, as it never rests.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"an external engine takes no orders: {plan.base_url}")

    async def exited(self) -> int:
        """Wait until the gateway lets go; its real process may go on or be gone long before."""
        await self._let_go.wait()
        return 0

    async def measure(self) -> MemoryUse:
        """Tell nothing: it may be on any machine."""
        return MemoryUse()

    async def stop(self, *, grace_s: float) -> None:  # noqa: ARG002 - the protocol's
        """Let go of it. The real process is not ours to end."""
        self.let_go()

    def let_go(self) -> None:
        """Count it as exited, with status 0."""
        self.exit_status = 0
        self._let_go.set()


class ExternalLauncher:
    """Hands out engines by their address."""

    def __init__(self) -> None:
        self._handles: set[ExternalHandle] = set()

    async def start(self, engine: EngineId, plan: LaunchPlan) -> ExternalHandle:  # noqa: ARG002
        """Return at once.

        Raises:
            ValueError: a plan without `base_url` is not for this launcher.
        """
        if plan.base_url is None:
            raise ValueError("an external engine's plan needs a base_url")
        self._handles = {handle for handle in self._handles if handle.exit_status is None}
        handle = ExternalHandle(plan.base_url, plan.api_key)
        self._handles.add(handle)
        return handle

    async def prepare(self, plan: LaunchPlan) -> None:
        """Do nothing: what is elsewhere needs no preparation."""

    async def give_up_spares(self) -> None:
        """Do nothing: there are none."""

    async def read_ahead(self, files: Sequence[str], *, limit_bytes: int) -> None:
        """Do nothing: its files are not here."""

    async def survey(self) -> Survey:
        """Tell nothing: they may be on any machine."""
        return Survey()

    async def aclose(self) -> None:
        """Let go of all of them."""
        for handle in self._handles:
            handle.let_go()
        self._handles.clear()
