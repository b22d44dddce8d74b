"""The jobs that move: their turn, their movers, and what becomes of them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from xandrouting.core.errors import DownloadOver, GatewayError
from xandrouting.downloads.courier import Ending
from xandrouting.downloads.jobs import ENDED, Failure, Job, JobState
from xandrouting.downloads.pace import Pace
from xandrouting.downloads.place import Place
from xandrouting.downloads.running import NEWS_S, Carrier, Running, View, order_of

log = logging.getLogger(__name__)

MAX_DEATHS: Final = 5  # of movers in a row that brought nothing
DEATH_WAIT_S: Final = 0.2  # longer after each of them
_LOST: Final = Failure("mover_lost", "What moves the bytes ended. Resume: every byte is kept.")
DISK_FULL: Final = "disk_full"  # the mover's word; the job waits for room


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a completed download is: a model's loadable id, or why there is none."""

    model: str | None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Wiring:
    """Whom downloads need and tell. All are called from the loop.

    `carrier` makes a mover for its order, `arrive` finds the model of a completed job, `load`
    begins to load it and returns what there is to say of that, `on_news` is told of every
    change and at most four times a second of a job that only moves, `on_moving` when a first
    one begins to move and when none does any more.
    """

    carrier: Callable[[Mapping[str, Any]], Carrier]
    arrive: Callable[[Job], Awaitable[Arrived]]
    load: Callable[[str, Mapping[str, Any]], Awaitable[str | None]]
    on_news: Callable[[View], None] = lambda _: None
    on_moving: Callable[[bool], None] = lambda _: None


class Movers:
    """Has at most `max_downloads` jobs moved at once, in the order of their coming.

    `save` is called whenever a job has become something else.
    """

    def __init__(
        self,
        place: Place,
        wiring: Wiring,
        save: Callable[[Job], Awaitable[None]],
        *,
        max_downloads: int,
    ) -> None:
        self._place = place
        self._wiring = wiring
        self._save = save
        self._max = max_downloads
        self._queue: deque[Running] = deque()
        self._moving: list[Running] = []
        self._closing = False
        self.fetched_bytes = 0  # over the wire, since the start

    def enqueue(self, running: Running) -> None:
        """Let a pending job move when it is its turn."""
        self._queue.append(running)
        self.tell(running)
        self._pump()

    async def end(self, running: Running, state: JobState) -> None:
        """Have a job become `state` and return when nothing of it moves any more.

        Raises:
            DownloadOver: it has ended otherwise.
        """
        task = running.task
        if task is not None:
            running.wish = state
            if running.carrier is not None:
                await running.carrier.stop()
            await asyncio.wait({task})
            running.wish = None
        elif running in self._queue:
            self._queue.remove(running)
        now = running.job.state
        if now in ENDED and (task is None or now is not state):
            raise DownloadOver(f"The download of {running.job.order.repo_id} is {now} already.")
        if now is not state:
            await self._become(running, state)

    async def complete(self, running: Running) -> None:
        """Tell of a job whose folder is published, and begin the load that was asked for."""
        arrived = await self._wiring.arrive(running.job)
        order = running.job.order
        done = {file.path: file.size for file in order.files}
        running.job = replace(running.job, done=done, model=arrived.model)
        await self._become(running, JobState.COMPLETED, note=arrived.note)
        await self.load(running, order.load)

    async def load(self, running: Running, options: Mapping[str, Any] | None) -> None:
        """Begin to load the model of a completed job, unless `options` is None."""
        if options is not None and running.job.model is not None:
            note = await self._wiring.load(running.job.model, options)
            running.job = replace(running.job, note=note)
            await self._save(running.job)
            self.tell(running)

    def tell(self, running: Running) -> None:
        """Tell whoever listens how a job is now."""
        running.told_at = asyncio.get_running_loop().time()
        self._wiring.on_news(running.view())

    async def aclose(self) -> None:
        """Stop the movers; their jobs stay what they are."""
        self._closing = True
        carriers = [one.carrier for one in self._moving if one.carrier is not None]
        tasks = [one.task for one in self._moving if one.task is not None]
        await asyncio.gather(*(carrier.stop() for carrier in carriers))
        if tasks:
            await asyncio.wait(tasks)

    def _pump(self) -> None:
        while self._queue and len(self._moving) < self._max and not self._closing:
            running = self._queue.popleft()
            self._moving.append(running)
            if len(self._moving) == 1:
                self._wiring.on_moving(True)
            running.task = asyncio.create_task(self._run(running))

    async def _run(self, running: Running) -> None:
        try:
            await self._move(running)
        except GatewayError as error:
            await self._fail(running, Failure(error.code, error.message))
        except OSError as error:
            log.warning("mover not started job=%s reason=%s", running.job.id, error)
            await self._fail(running, _LOST)
        except Exception:  # the edge of the task
            log.exception("download failed inside job=%s", running.job.id)
            await self._fail(running, Failure("internal_error", "The server failed inside."))
        finally:
            running.carrier, running.task = None, None
            self._moving.remove(running)
            if not self._moving:
                self._wiring.on_moving(False)
            self._pump()

    async def _move(self, running: Running) -> None:
        """Have movers carry the job to its end, or to where it is told to stop."""
        await self._become(running, JobState.DOWNLOADING)
        deaths = 0
        while not self._is_stopped(running):
            before = running.job.done_bytes
            carrier = await self._carrier(running)
            if self._is_stopped(running):
                break
            running.carrier = carrier
            outcome = await carrier.run(lambda event: self._hear(running, event))
            running.carrier = None
            if outcome.ending is Ending.DONE:
                await asyncio.to_thread(self._place.drop_job, running.job.id)
                await self.complete(running)
                return
            if self._is_stopped(running):
                break
            if outcome.ending is Ending.FAILED and outcome.failure is not None:
                await self._fail(running, outcome.failure)
                return
            deaths = 1 if running.job.done_bytes > before else deaths + 1
            log.warning("mover lost job=%s in_a_row=%d", running.job.id, deaths)
            if deaths >= MAX_DEATHS:
                await self._fail(running, outcome.failure or _LOST)
                return
            await asyncio.sleep(DEATH_WAIT_S * deaths)
        if self._closing:
            running.pauses_clock()
            await self._save(running.job)
        elif running.wish is not None:
            await self._become(running, running.wish)

    def _is_stopped(self, running: Running) -> bool:
        return self._closing or running.wish is not None

    async def _carrier(self, running: Running) -> Carrier:
        """Make a mover for what is not there yet.

        Raises:
            GatewayError: something else is at the destination meanwhile.
        """
        job = running.job
        found = await asyncio.to_thread(self._place.look, job.order, resuming=True)
        running.fetched, running.pace = 0, Pace(asyncio.get_running_loop().time())
        place = self._place.moving(job.id, job.order, found)
        return self._wiring.carrier(order_of(job.order, found.lacks(job.order), place))

    def _hear(self, running: Running, event: Mapping[str, Any]) -> None:
        now = asyncio.get_running_loop().time()
        before = running.job.state
        self.fetched_bytes += running.hears(event, now)
        if running.job.state is not before or now - running.told_at >= NEWS_S:
            self.tell(running)

    async def _fail(self, running: Running, failure: Failure) -> None:
        full = failure.code == DISK_FULL
        state = JobState.PAUSED if full else JobState.FAILED
        await self._become(running, state, failure)

    async def _become(
        self,
        running: Running,
        state: JobState,
        failure: Failure | None = None,
        note: str | None = None,
    ) -> None:
        running.become(state, failure, note)
        job = running.job
        say = log.warning if failure is not None else log.info
        say(
            "download %s job=%s repo=%s done_bytes=%d%s",
            state,
            job.id,
            job.order.repo_id,
            job.done_bytes,
            "" if failure is None else f" code={failure.code} {failure.message}",
        )
        await self._save(job)
        self.tell(running)
