"""What a launcher promises: it owns the engine's process and knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from xandrouting.core.model import DeviceReading, EngineId, LaunchPlan, MemoryUse


@dataclass(frozen=True, slots=True)
class Survey:
    """A node's memory at one moment: its devices, and what each of its engines takes."""

    devices: tuple[DeviceReading, ...] = ()  # main memory first; none: nothing is known
    engines: Mapping[EngineId, MemoryUse] = field(default_factory=dict)
    spares: tuple[MemoryUse, ...] = ()  # processes that wait to become an engine

    @property
    def spare_bytes(self) -> int:
        """What the spares take of main memory."""
        return sum(use.private_bytes or 0 for use in self.spares)


class Handle(Protocol):
    """A started engine."""

    @property
    def base_url(self) -> str:
        """Where the gateway reaches the engine: `http://host:port`, no slash at the end."""

    @property
    def api_key(self) -> str:
        """What the engine asks of its clients; empty: nothing."""

    @property
    def pid(self) -> int | None:
        """The engine's process on its own machine; None where there is none."""

    @property
    def exit_status(self) -> int | None:
        """None while it runs; then the exit status, negative for a signal as in subprocess."""

    @property
    def never_began(self) -> bool:
        """Whether it was there before its order, and has printed nothing since it was given."""

    @property
    def killed_for_memory(self) -> bool:
        """Whether the system ended it for want of memory, as far as can be told."""

    def tail(self) -> Sequence[str]:
        """Return the last lines of output, oldest first: at most 200, cut at 2,000 characters."""

    def activity(self) -> int:
        """Return a number that grows while the engine prints."""

    async def ready_line(self) -> None:
        """Wait for the plan's ready line since its last order; at once for a plan without one.

        Never returns if the engine exits before: wait for `exited` beside it.
        """

    async def rest(self) -> None:
        """Have the engine give back its memory and wait; return when it waits.

        For an engine whose plan has a `rest_order`. Never returns if it exits before: wait for
        `exited` beside it.
        """

    def wake(self, plan: LaunchPlan) -> None:
        """Give a resting engine its next order; its `base_url` may be another from now on."""

    async def exited(self) -> int:
        """Wait until the whole process tree is gone and reaped; return the exit status."""

    async def measure(self) -> MemoryUse:
        """Measure the process tree without blocking the loop."""

    async def stop(self, *, grace_s: float) -> None:
        """End the whole process tree: SIGTERM, `grace_s` seconds, SIGKILL; return when it is gone.

        May be called twice: a later call with a shorter grace hurries the first. Cancelling
        the wait does not cancel the stop.
        """


class Launcher(Protocol):
    """Starts what a plan says, where it is told."""

    async def start(self, engine: EngineId, plan: LaunchPlan) -> Handle:
        """Start the engine's process and return once it exists; it need not answer yet.

        Cancelling leaves nothing behind: a process already started is killed and reaped
        before the cancellation goes on.

        Raises:
            EngineStartFailed: no such executable, or no process could be made.
        """

    async def prepare(self, plan: LaunchPlan) -> None:
        """Start a program that waits for an order, for the next engine with its argv and env.

        It does nothing if one waits already. The plan's own order is not given to it.

        Raises:
            EngineStartFailed: as `start` would.
        """

    async def give_up_spares(self) -> None:
        """End the programs that wait for an order, for the memory they take."""

    async def read_ahead(self, files: Sequence[str], *, limit_bytes: int) -> None:
        """Have files read into memory that the kernel can take back, at most so many bytes.

        Cancelling ends it.
        """

    async def survey(self) -> Survey:
        """Read the node's memory without blocking the loop, all of it in one moment.

        What cannot be read this time is told as last seen, marked stale.
        """

    async def aclose(self) -> None:
        """End every engine this launcher started and that still runs."""
