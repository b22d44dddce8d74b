"""The shell around the scheduler: performs its effects, tells it what happened.

No argv and no HTTP answers here: the adapter says what to run, the launcher runs it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Container, Mapping
from typing import Self, assert_never

from xandrouting.core.engine import EngineView
from xandrouting.core.errors import GatewayError, LoadingTimeout
from xandrouting.core.events import (
    Acquire,
    Effect,
    Event,
    Grant,
    Measured,
    Pin,
    Prepare,
    Refuse,
    Release,
    Shutdown,
    Sleep,
    Start,
    Stop,
    Tick,
    Unload,
)
from xandrouting.core.ledger import DeviceState
from xandrouting.core.model import Backend, EngineId, EngineSpec, MemoryUse, ModelKey, Ticket
from xandrouting.core.planner import Decision
from xandrouting.core.scheduler import Scheduler
from xandrouting.launch.base import Launcher, Survey
from xandrouting.pool.engine import Engine, EngineNews, Loading, News, described, retry_after_s
from xandrouting.pool.kind import Kind
from xandrouting.pool.learning import Learning
from xandrouting.pool.life import Life
from xandrouting.pool.memory import unmapped_bytes
from xandrouting.pool.parking import Parking
from xandrouting.pool.preparing import Preparing
from xandrouting.pool.probe import Health, http_health
from xandrouting.pool.shell import Shell
from xandrouting.pool.sleeping import Post, http_post
from xandrouting.pool.tasks import Tasks
from xandrouting.pool.watching import Watch

__all__ = ["Claim", "EnginePool", "Kind"]

log = logging.getLogger(__name__)


class Claim:
    """One ticket: a request's way to an engine. End it with `release()`, whatever it became."""

    __slots__ = ("_future", "_pool", "asked", "engine", "error", "first", "hit", "key", "ticket")

    def __init__(self, pool: EnginePool, ticket: Ticket, key: ModelKey, asked: float) -> None:
        self._pool = pool
        self._future: asyncio.Future[None] | None = None
        self.ticket = ticket
        self.key = key
        self.asked = asked
        self.engine: Engine | None = None
        self.error: GatewayError | None = None
        self.hit = False  # granted at once
        self.first = False  # the first lease on its engine: what the load was for

    async def granted(self) -> Engine:
        """Wait for the engine.

        Cancelling leaves the claim as it is: it may be waited for again.

        Raises:
            GatewayError: refused; the error is the reason.
        """
        while self.engine is None:
            if self.error is not None:
                raise self.error
            self._future = asyncio.get_running_loop().create_future()
            await self._future
        return self.engine

    def settle(self) -> None:
        """Wake who waits: `engine` or `error` was set."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def release(self, *, cancel: bool = False) -> None:
        """End the ticket: the lease goes back, or the place in the queue is given up.

        A load that was begun for it goes on, unless `cancel` takes it back and nobody else
        waits for it.
        """
        self._pool.release(self, cancel=cancel)


class EnginePool:
    """Every engine of this node. Use as an async context; leaving it ends all engines."""

    def __init__(
        self,
        scheduler: Scheduler,
        kinds: Mapping[Backend, Kind],
        *,
        node: Launcher,
        learning: Learning,
        load_stall_s: float,
        parking: Parking | None = None,
        spares: Container[Backend] = (),
        health: Health = http_health,
        post: Post = http_post,
        on_news: Callable[[EngineNews], None] = lambda _: None,
        on_survey: Callable[[], None] = lambda: None,
    ) -> None:
        """`node` is asked for this machine's memory; `on_survey` is called after each answer.

        `parking` None: conversations end with their engines. `spares` are the backends that
        keep a process waiting for the next load.
        """
        self._scheduler = scheduler
        self._kinds = kinds
        self._node = node
        self._on_news = on_news
        self._engines: dict[EngineId, Engine] = {}
        self._claims: dict[Ticket, Claim] = {}
        self._spellings: dict[ModelKey, str] = {}
        self._numbers = itertools.count(1)
        self._tasks = Tasks()
        self._monitor: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watch = Watch(
            node,
            self._engines,
            learning=learning,
            parking=parking,
            on_measured=self._on_measured,
            on_news=on_news,
            on_survey=on_survey,
        )
        self._preparing = Preparing(
            kinds,
            self._tasks,
            spares=spares,
            devices=scheduler.devices,
            unmapped_bytes=lambda: unmapped_bytes(self._watch.survey),
        )
        self._shell = Shell(
            dispatch=self._dispatch,
            on_news=on_news,
            watch=self._watch,
            preparing=self._preparing,
            tasks=self._tasks,
            parking=parking,
            health=health,
            post=post,
            load_stall_s=load_stall_s,
        )

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await self._watch.look()
        self._preparing.begin()
        self._monitor = self._loop.create_task(self._watch.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # Requests.

    def claim(
        self,
        spec: EngineSpec,
        *,
        ttl_s: float | None = None,
        wait_s: float | None = None,
        queue_wait_s: float | None = None,
        spelling: str | None = None,
        works: bool = True,
    ) -> Claim:
        """Ask for an engine; the claim may be granted already when this returns.

        `spelling` is the model's name as the client wrote it, for the lists. After `wait_s`
        of waiting the claim is refused, and after `queue_wait_s` if its engine does not load.
        `works` False: the engine will not be asked for anything, it shall only be there.
        """
        now = self._loop.time()
        claim = Claim(self, Ticket(next(self._numbers)), spec.key, now)
        self._claims[claim.ticket] = claim
        if spelling is not None:
            self._spellings[spec.key] = spelling
        deadline = None if wait_s is None else now + wait_s
        queue_deadline = None if queue_wait_s is None else now + queue_wait_s
        self._dispatch(Acquire(claim.ticket, spec, ttl_s, deadline, queue_deadline, works))
        claim.hit = claim.engine is not None
        return claim

    def release(self, claim: Claim, *, cancel: bool = False) -> None:
        """End a claim; a second call does nothing. See `Claim.release`."""
        if self._claims.pop(claim.ticket, None) is None:
            return
        if claim.engine is not None:
            claim.engine.used_at = time.time()
            claim.engine.served.set()
        self._dispatch(Release(claim.ticket, cancel))

    def progress(self, claim: Claim) -> str:
        """Say what a claim waits for: `loading 43%`, `loading`, or `queued behind 2`."""
        loading = self.loading(claim.key)
        if loading is None:
            return f"queued behind {self._scheduler.queue_position(claim.ticket) or 0}"
        return "loading" if loading.fraction is None else f"loading {loading.fraction:.0%}"

    def loading(self, key: ModelKey) -> Loading | None:
        """How far the load of this key's engine is; None: it does not load."""
        found = self.view(key)
        return None if found is None else found[1].loading(self._loop.time())

    def queue_position(self, claim: Claim) -> int | None:
        """How many wait before this claim; None: it does not wait."""
        return self._scheduler.queue_position(claim.ticket)

    def plan(self, spec: EngineSpec) -> Decision:
        """Return what would become of a request for `spec`, and change nothing."""
        return self._scheduler.plan(spec, now=self._loop.time())

    # Wishes.

    async def unload(self, engines: list[EngineId], *, force: bool) -> None:
        """Let these engines go and wait until they are gone; busy ones drain unless forced.

        Cancelling the wait does not take the wish back.
        """
        waiting = [self._engines[e].gone for e in engines if e in self._engines]
        for engine in engines:
            self._dispatch(Unload(engine, force))
        for gone in waiting:
            await gone.wait()

    def fits(self, spec: EngineSpec) -> bool:
        """Whether a request for `spec` would be served at all, if not at once."""
        return self._scheduler.fits(spec, now=self._loop.time())

    def pin(self, model: str, *, pinned: bool) -> None:
        """Let a model be neither a victim nor unloaded by time, or take that back."""
        self._dispatch(Pin(model, pinned))

    async def until_gone(self, key: ModelKey, *, timeout_s: float) -> None:
        """Wait until the engine that this key has now is gone, at most `timeout_s`."""
        found = self.view(key)
        if found is not None:
            try:
                async with asyncio.timeout(timeout_s):
                    await found[1].gone.wait()
            except TimeoutError:
                log.warning("engine refuses connections and lives engine=%s", found[1].id)

    async def drain(self, grace_s: float) -> None:
        """Refuse new work, let running requests end for at most `grace_s`, end every engine."""
        self._preparing.end_spares()
        self._dispatch(Shutdown())
        waiting = [engine.gone.wait() for engine in self._engines.values()]
        try:
            async with asyncio.timeout(grace_s):
                await asyncio.gather(*waiting)
        except TimeoutError:
            self._dispatch(Shutdown(force=True))
        for engine in list(self._engines.values()):
            await engine.gone.wait()

    async def aclose(self) -> None:
        """End every engine now."""
        self._watch.end()
        self._dispatch(Shutdown(force=True))
        self._preparing.end()
        await self._tasks.until_done()
        if self._monitor is not None:
            self._monitor.cancel()
            await asyncio.wait({self._monitor})
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Lists.

    def views(self) -> list[tuple[EngineView, Engine]]:
        """Every engine that is not gone: what the scheduler knows and what was measured."""
        return [(view, self._engines[view.engine]) for view in self._scheduler.views()]

    def holds(self, key: ModelKey) -> bool:
        """Whether an engine of this key is there or on its way, and does not sleep."""
        return self._scheduler.holds(key)

    def view(self, key: ModelKey) -> tuple[EngineView, Engine] | None:
        """Return the engine of this key that is not gone."""
        view = self._scheduler.view(key)
        return None if view is None else (view, self._engines[view.engine])

    def failure(self, model: str, revision: str) -> GatewayError | None:
        """Return why the last start of this file failed; None: it did not, or it was mended."""
        return self._scheduler.failure(model, revision)

    def devices(self) -> tuple[DeviceState, ...]:
        """Return the ledger's lines, main memory first."""
        return self._scheduler.devices()

    @property
    def pinned(self) -> frozenset[str]:
        """The models that are pinned, loaded or not."""
        return self._scheduler.pinned

    @property
    def spares(self) -> tuple[MemoryUse, ...]:
        """What the processes take that wait for the next load, when last measured."""
        return self._watch.survey.spares

    @property
    def queued(self) -> int:
        """How many requests wait for an engine."""
        return self._scheduler.queued

    @property
    def loads(self) -> int:
        """How many engines became ready, those that were woken included."""
        return self._shell.counts.loads

    @property
    def load_failures(self) -> int:
        """How many never did."""
        return self._shell.counts.load_failures

    @property
    def evictions(self) -> int:
        """How many left to make room."""
        return self._shell.counts.evictions

    # The scheduler's side.

    def _dispatch(self, event: Event) -> None:
        # Not a coroutine on purpose: with no await, no other task can see the scheduler
        # between a decision and its bookkeeping. This is the pool's only lock.
        now = self._loop.time()
        for effect in self._scheduler.handle(event, now=now):
            self._perform(effect)
        if type(event) is not Acquire or self._scheduler.queued:
            self._set_timer(now)  # a request that was granted at once brings no new deadline

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Grant(ticket, engine_id):
                claim = self._claims[ticket]
                claim.engine = engine = self._engines[engine_id]
                claim.first = not engine.granted
                engine.granted = True
                engine.spelling = self._spellings.get(engine_id.key, engine.spelling)
                claim.settle()
            case Refuse(ticket, error):
                claim = self._claims[ticket]
                claim.error = error
                loading = self.loading(claim.key)
                if isinstance(error, LoadingTimeout) and loading is not None:
                    error.details = {"loading": described(loading)}
                    error.retry_after_s = retry_after_s(loading)
                claim.settle()
            case Start(wakes=True):
                self._wake(effect)
            case Start():
                self._start(effect)
            case Prepare(spec):
                self._preparing.read_ahead(spec)
            case Sleep():
                self._sleep(effect)
            case Stop():
                self._stop(effect)
            case _:
                assert_never(effect)

    def _set_timer(self, now: float) -> None:
        wakeup = self._scheduler.next_wakeup(now=now)
        if wakeup is None or (self._timer is not None and self._timer.when() <= wakeup):
            return  # a timer that fires too early finds nothing to do and sets the next
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(wakeup, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._dispatch(Tick())

    # One task per engine, from its start to its end.

    def _start(self, start: Start) -> None:
        kind = self._kinds[start.spec.key.backend]
        assert start.decision is not None  # every start has one
        engine = Engine(
            start,
            start.decision,
            kind.adapter,
            started=self._loop.time(),
            spelling=self._spellings.get(start.spec.key, start.spec.key.model),
            label=start.engine.label.encode(),
        )
        self._engines[start.engine] = engine
        log.info(
            "engine starting engine=%s %s placement=%s",
            start.engine,
            start.options,
            ",".join(start.placement),
        )
        self._preparing.read_ahead(start.spec)
        self._tasks.keep(self._run(engine, kind))
        self._on_news(EngineNews(News.STARTING, engine, decision=start.decision))
        self._watch.hurry()

    def _wake(self, start: Start) -> None:
        engine = self._engines[start.engine]
        assert start.decision is not None  # every start has one
        log.info("engine waking engine=%s %s", engine.id, start.options)
        engine.wake(start, start.decision, self._loop.time())
        self._preparing.read_ahead(start.spec)
        self._on_news(EngineNews(News.STARTING, engine, decision=start.decision))
        self._watch.hurry()

    def _sleep(self, sleep: Sleep) -> None:
        if sleep.rung is not None:
            log.info(
                "engine falls asleep engine=%s level=%d wake_s=%.2f measured=%s",
                sleep.engine,
                sleep.level,
                sleep.rung.wake_s,
                sleep.rung.measured,
            )
        self._engines[sleep.engine].sleep(sleep.level)

    def _stop(self, stop: Stop) -> None:
        engine = self._engines[stop.engine]
        log.info("engine stopping engine=%s reason=%s force=%s", engine.id, stop.reason, stop.force)
        self._shell.counts.evictions += stop.reason == "evicted"
        engine.forced = engine.forced or stop.force
        engine.stop_reason = engine.stop_reason or stop.reason
        if stop.force and engine.stop_asked.is_set() and engine.handle is not None:
            self._tasks.keep(engine.handle.stop(grace_s=0.0))  # hurry the stop that is under way
        engine.stop_asked.set()
        self._on_news(EngineNews(News.STOPPING, engine, stop.reason, stop.decision))

    async def _run(self, engine: Engine, kind: Kind) -> None:
        await Life(engine, kind, self._shell).run()
        del self._engines[engine.id]
        engine.gone.set()

    def _on_measured(self, measured: Measured, survey: Survey) -> None:
        self._dispatch(measured)
        if survey.spares and self._preparing.is_short(survey.spare_bytes):
            self._tasks.keep(self._node.give_up_spares())
