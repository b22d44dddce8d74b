"""Is it ready? Watches a starting engine until it is, dies, or stops moving."""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from typing import Final, Protocol

from xandrouting.core.model import LaunchPlan, StartFailure
from xandrouting.launch.base import Handle
from xandrouting.net.client import Client, UpstreamError
from xandrouting.pool.beside import beside

POLL_FIRST_S: Final = 0.01
POLL_MAX_S: Final = 0.25
ANSWER_S: Final = 5.0  # an engine that takes longer to say how it is, is not ready
REFUSALS: Final = 2  # in a row: one may be its end, which is told otherwise
MEASURE_EVERY_S: Final = 1.0
MOVED_BYTES: Final = 1 << 20  # memory that grew by less has not moved


class StartError(Exception):
    """The engine never became ready. `status` is its exit status if it ended by itself."""

    def __init__(self, failure: StartFailure | None, status: int | None) -> None:
        super().__init__(failure, status)
        self.failure = failure  # None: ask the adapter, by the engine's last lines
        self.status = status


class Health(Protocol):
    """Asks an engine once how it is."""

    async def __call__(self, client: Client, plan: LaunchPlan) -> bool:
        """Whether it is ready. False also when nobody listens yet."""


async def http_health(client: Client, plan: LaunchPlan) -> bool:
    """Ask the plan's health address: 200 is ready. Without one it is taken for ready."""
    if not plan.health_path:
        return True
    try:
        async with asyncio.timeout(ANSWER_S):  # else one that hangs would never count as stalled
            status, _ = await client.get(plan.health_path.encode())
    except (UpstreamError, TimeoutError):
        return False
    return status == 200


class Illness(Enum):
    """Why a running engine can take no more requests."""

    SICK = auto()  # it says so: nothing it has begun will come to an end
    DEAF = auto()  # nobody listens there, though it lives: somebody has told it to end


async def until_ill(client: Client, plan: LaunchPlan) -> Illness:
    """Return once a running engine cannot take requests any more.

    One that is slow to answer is only busy. Without `health_every_s` it never returns.
    """
    if plan.health_every_s is None:
        never: asyncio.Future[Illness] = asyncio.get_running_loop().create_future()
        return await never
    refusals = 0
    while refusals < REFUSALS:
        await asyncio.sleep(plan.health_every_s)
        try:
            async with asyncio.timeout(ANSWER_S):
                status, _ = await client.get(plan.health_path.encode())
        except (UpstreamError, TimeoutError) as error:
            refused = isinstance(error.__cause__, ConnectionRefusedError)
            refusals = refusals + 1 if refused else 0
            continue
        refusals = 0
        if status >= 500:
            return Illness.SICK
    return Illness.DEAF


async def until_ready(
    handle: Handle,
    plan: LaunchPlan,
    client: Client,
    *,
    stall_s: float,
    health: Health,
) -> None:
    """Return once the engine takes requests.

    A plan with a ready line is asked as soon as the line is there, others are polled. There
    is no limit on the whole: a load fails when neither output nor memory moved for `stall_s`.

    Raises:
        StartError: it exited, or it stalled; in the second case it still runs.
    """
    async with beside(handle.exited()) as exited, beside(handle.ready_line()) as line:
        watch = StallWatch(handle, stall_s)
        while not line.done():
            await asyncio.wait(
                {line, exited}, timeout=MEASURE_EVERY_S, return_when=asyncio.FIRST_COMPLETED
            )
            if exited.done():
                raise StartError(None, exited.result())
            await watch.look()
        pause_s = POLL_FIRST_S
        while not await health(client, plan):
            await asyncio.wait({exited}, timeout=pause_s)
            if exited.done():
                raise StartError(None, exited.result())
            await watch.look()
            pause_s = min(pause_s * 1.5, POLL_MAX_S)


class StallWatch:
    """Raises StartError when nothing moved for too long. Looks at memory once a second at most."""

    def __init__(self, handle: Handle, stall_s: float) -> None:
        self._handle = handle
        self._stall_s = stall_s
        self._printed = handle.activity()
        self._loop = asyncio.get_running_loop()
        self._moved_at = self._measured_at = self._loop.time()
        self._seen_bytes = 0

    async def look(self) -> None:
        """See whether something moved since the last look."""
        printed = self._handle.activity()
        if printed != self._printed:
            self._printed, self._moved_at = printed, self._loop.time()
        if self._loop.time() - self._measured_at >= MEASURE_EVERY_S:
            self._measured_at = self._loop.time()
            host_bytes = (await self._handle.measure()).host_bytes
            # Growth alone counts: the PSS of mapped pages also moves when others map them.
            if host_bytes is not None and host_bytes >= self._seen_bytes + MOVED_BYTES:
                self._seen_bytes, self._moved_at = host_bytes, self._loop.time()
        if self._loop.time() - self._moved_at >= self._stall_s:
            raise StartError(StartFailure.STALLED, None)
