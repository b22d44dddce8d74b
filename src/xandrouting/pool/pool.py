"""The shell around the scheduler: performs its effects, tells it what happened.

No argv and no HTTP answers here: the adapter says what to run, the launcher runs it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Container, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar, assert_never

from xandrouting.core.engine import EngineView
from xandrouting.core.errors import EngineStartFailed, GatewayError, LoadingTimeout
from xandrouting.core.events import (
    Acquire,
    Effect,
    EngineExited,
    EngineReady,
    EngineSlept,
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
from xandrouting.core.model import (
    HOST,
    Backend,
    EngineId,
    EngineSpec,
    LaunchPlan,
    MemoryUse,
    ModelKey,
    StartFailure,
    Ticket,
)
from xandrouting.core.planner import Decision
from xandrouting.core.scheduler import Scheduler
from xandrouting.engines.base import EngineAdapter
from xandrouting.launch.base import Handle, Launcher, Survey
from xandrouting.net.client import Client
from xandrouting.pool.beside import beside
from xandrouting.pool.engine import Engine, EngineNews, Loading, News, described, retry_after_s
from xandrouting.pool.failures import start_error
from xandrouting.pool.learning import Learning
from xandrouting.pool.memory import is_freed, others_bytes, unmapped_bytes
from xandrouting.pool.parking import Parking, SavedSlot
from xandrouting.pool.probe import Health, StartError, http_health, until_ready

_T = TypeVar("_T")

log = logging.getLogger(__name__)

SURVEY_EVERY_S: Final = 2.0  # how old the shown memory may be
SURVEY_LOADS_S: Final = 1.0  # the same while something loads
FREED_POLL_S: Final = 0.05
SPARE_WAIT_S: Final = 5.0  # a first answer that takes longer has its processor for long anyway
# Not for other options, which a conversation would not fit, nor where nobody waits for it to end.
PARKED_WHEN: Final = frozenset(("idle", "evicted", "unload", "shutdown"))
REST_S: Final = 10.0  # an engine that has not begun to sleep by then hangs
FREED_WAIT_S: Final = 3.0  # from an engine's end to its memory's being free again; then it is lost


class _StopAsked(Exception):
    """The engine was told to stop while something was under way."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How engines of one backend are made: who plans them and who runs them."""

    adapter: EngineAdapter
    launcher: Launcher


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
        self._learning = learning
        self._parking = parking
        self._spares = spares
        self._reading: dict[ModelKey, asyncio.Task[None]] = {}  # files of loads to come
        self._on_news = on_news
        self._on_survey = on_survey
        self._survey = Survey()
        self._freeing: dict[EngineId, MemoryUse] = {}  # of engines gone, whose memory may not be
        self._survey_wanted = asyncio.Event()
        self._load_stall_s = load_stall_s
        self._health = health
        self._engines: dict[EngineId, Engine] = {}
        self._claims: dict[Ticket, Claim] = {}
        self._spellings: dict[ModelKey, str] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._monitor: asyncio.Task[None] | None = None
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None
        self.loads = 0  # engines that became ready
        self.load_failures = 0
        self.evictions = 0

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._take(await self._node.survey())
        for kind in self._kinds.values():
            self._keep(self._prepare_spare(kind))
        self._monitor = self._loop.create_task(self._survey_on())
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
        self._spares = ()  # there will be no next load
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
        self._closing = True
        self._dispatch(Shutdown(force=True))
        for reading in self._reading.values():
            reading.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)
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
        return self._survey.spares

    @property
    def queued(self) -> int:
        """How many requests wait for an engine."""
        return self._scheduler.queued

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
                self._read_ahead(spec)
            case Sleep(engine_id):
                self._engines[engine_id].sleep_asked.set()
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
        self._read_ahead(start.spec)
        self._keep(self._run(engine, kind))
        self._on_news(EngineNews(News.STARTING, engine, decision=start.decision))
        self._survey_wanted.set()

    def _wake(self, start: Start) -> None:
        engine = self._engines[start.engine]
        assert start.decision is not None  # every start has one
        log.info("engine waking engine=%s %s", engine.id, start.options)
        engine.wake(start, start.decision, self._loop.time())
        self._read_ahead(start.spec)
        self._on_news(EngineNews(News.STARTING, engine, decision=start.decision))
        self._survey_wanted.set()

    def _stop(self, stop: Stop) -> None:
        engine = self._engines[stop.engine]
        log.info("engine stopping engine=%s reason=%s force=%s", engine.id, stop.reason, stop.force)
        self.evictions += stop.reason == "evicted"
        engine.forced = engine.forced or stop.force
        engine.stop_reason = engine.stop_reason or stop.reason
        if stop.force and engine.stop_asked.is_set() and engine.handle is not None:
            self._keep(engine.handle.stop(grace_s=0.0))  # hurry the stop that is under way
        engine.stop_asked.set()
        self._on_news(EngineNews(News.STOPPING, engine, stop.reason, stop.decision))

    async def _run(self, engine: Engine, kind: Kind) -> None:
        failure: GatewayError | None = None
        try:
            failure = await self._live(engine, kind)
        except Exception:  # the edge of the engine's task
            log.exception("engine task failed engine=%s", engine.id)
            self.load_failures += engine.ready is None
            failure = EngineStartFailed(
                f"Starting {engine.spec.key.model} failed inside the server."
            )
        finally:
            log.info("engine gone engine=%s", engine.id)
            self._on_news(EngineNews(News.GONE, engine, error=failure))
            self._dispatch(EngineExited(engine.id, failure))
            del self._engines[engine.id]
            engine.gone.set()

    async def _live(self, engine: Engine, kind: Kind) -> GatewayError | None:
        """Run the engine to its end; return why its last load failed, if it did."""
        plan = self._plan(engine, kind)
        try:
            handle = await _unless_stopped(engine, kind.launcher.start(engine.id, plan))
        except _StopAsked:
            return None
        except GatewayError as error:
            return self._failed(engine, error)
        engine.handle = handle
        try:
            await _unless_stopped(engine, self._load(engine, handle, plan, kind))
            self._became_ready(engine)
            self._keep(self._replace_spare(engine, kind))
            while await _unless_stopped(engine, self._serves_until_sleep(engine, handle)):
                again = await _unless_stopped(engine, self._rest(engine, handle, kind))
                if again is None:
                    break
                plan = again
                await _unless_stopped(engine, self._load(engine, handle, plan, kind))
                self._became_ready(engine)
        except _StopAsked:
            pass
        except StartError as error:
            failure = error.failure or kind.adapter.classify(handle.tail(), error.status)
            if failure is StartFailure.KILLED and handle.killed_for_memory:
                failure = StartFailure.OUT_OF_MEMORY
            model = engine.spec.key.model
            tail, stall_s = handle.tail(), self._load_stall_s
            return self._failed(
                engine, start_error(model, failure, tail, stall_s=stall_s, status=error.status)
            )
        finally:
            try:
                if engine.stop_reason in PARKED_WHEN and handle.exit_status is None:
                    await self._park(engine, kind)
            finally:  # whatever becomes of its conversations, it ends
                if engine.client is not None:
                    engine.client.close()
                self._keep(self._prepare_spare(kind))
                await handle.stop(grace_s=0.0 if engine.forced else plan.stop_grace_s)
                await self._until_freed(engine)
        return None

    def _plan(self, engine: Engine, kind: Kind) -> LaunchPlan:
        start, parking = engine.start, self._parking
        keeps = parking is not None and kind.adapter.slots is not None
        return kind.adapter.plan(
            start.spec,
            start.options,
            placement=start.placement,
            slot_folder=parking.folder if keeps and parking is not None else "",
        )

    async def _load(self, engine: Engine, handle: Handle, plan: LaunchPlan, kind: Kind) -> None:
        """Wait until the engine takes requests, and give it back its conversations."""
        async with beside(self._fetch(engine, kind)) as fetching:
            api_key = handle.api_key or None
            engine.client = client = Client(handle.base_url, api_key=api_key)
            await until_ready(handle, plan, client, stall_s=self._load_stall_s, health=self._health)
            parked = await fetching
        if parked and self._parking is not None and kind.adapter.slots is not None:
            await self._parking.restore(engine.start, parked, client, kind.adapter.slots)

    async def _fetch(self, engine: Engine, kind: Kind) -> tuple[SavedSlot, ...]:
        if self._parking is None or kind.adapter.slots is None:
            return ()
        return await self._parking.fetch(engine.start)

    async def _serves_until_sleep(self, engine: Engine, handle: Handle) -> bool:
        """Wait until the engine shall sleep; False: it has exited by itself."""
        async with beside(handle.exited()) as exited, beside(engine.sleep_asked.wait()) as asked:
            await asyncio.wait({exited, asked}, return_when=asyncio.FIRST_COMPLETED)
            if not exited.done():
                return True
        self._log_exit(engine, handle)
        return False

    async def _rest(self, engine: Engine, handle: Handle, kind: Kind) -> LaunchPlan | None:
        """Let the engine sleep; return how it goes on when it is woken. None: it shall end."""
        await self._park(engine, kind)
        if engine.client is not None:
            engine.client.close()
            engine.client = None
        engine.woken.clear()
        sleeping = self._until_woken(engine, handle)
        async with beside(handle.exited()) as exited, beside(sleeping) as woken:
            await asyncio.wait({exited, woken}, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                self._log_exit(engine, handle)
                return None
            try:
                woken.result()
            except TimeoutError:
                log.warning("engine does not rest engine=%s waited_s=%.0f", engine.id, REST_S)
                return None
        plan = self._plan(engine, kind)
        handle.wake(plan)
        return plan

    async def _until_woken(self, engine: Engine, handle: Handle) -> None:
        async with asyncio.timeout(REST_S):
            await handle.rest()
        log.info("engine sleeping engine=%s", engine.id)
        self._dispatch(EngineSlept(engine.id))
        if not engine.woken.is_set():  # else somebody waited for it, and it sleeps no more
            self._on_news(EngineNews(News.SLEEPING, engine))
        self._survey_wanted.set()
        await engine.woken.wait()

    async def _park(self, engine: Engine, kind: Kind) -> None:
        ready = engine.ready is not None and engine.client is not None and not engine.forced
        if ready and self._parking is not None and kind.adapter.slots is not None:
            assert engine.client is not None
            await self._parking.park(engine.start, engine.client, kind.adapter.slots)

    async def _replace_spare(self, engine: Engine, kind: Kind) -> None:
        """Prepare a spare after the one the engine took, and not beside its first answer."""
        if engine.granted:
            served, gone = beside(engine.served.wait()), beside(engine.gone.wait())
            async with served as done, gone as ended:
                both = {done, ended}
                await asyncio.wait(both, timeout=SPARE_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        await self._prepare_spare(kind)

    async def _prepare_spare(self, kind: Kind) -> None:
        """Have a process wait for the next load, if there is memory to spare for it."""
        plan = kind.adapter.spare() if kind.adapter.backend in self._spares else None
        if plan is None or self._closing or self._is_short(kind.adapter.sleeper_bytes or 0):
            return
        try:
            await kind.launcher.prepare(plan)
        except GatewayError as error:
            log.warning("spare not started backend=%s %s", kind.adapter.backend, error.detail)

    def _is_short(self, size_bytes: int) -> bool:
        """Whether so much main memory is more than the ledger has free."""
        return any(
            device.device == HOST and device.free_bytes < size_bytes
            for device in self._scheduler.devices()
        )

    def _read_ahead(self, spec: EngineSpec) -> None:
        """Have a model's files read while its engine waits for room, and while it starts."""
        key = spec.key
        limit_bytes = unmapped_bytes(self._survey)
        if not spec.files or key in self._reading or limit_bytes <= 0:
            return
        launcher = self._kinds[key.backend].launcher
        reading = self._keep(launcher.read_ahead(spec.files, limit_bytes=limit_bytes))
        self._reading[key] = reading
        reading.add_done_callback(lambda _: self._reading.pop(key, None))

    def _became_ready(self, engine: Engine) -> None:
        engine.ready = self._loop.time()
        engine.loaded_at = engine.used_at = time.time()
        self.loads += engine.spec.key.is_local  # an upstream is there already
        log.info("engine ready engine=%s load_s=%.2f", engine.id, engine.load_seconds)
        self._dispatch(EngineReady(engine.id))
        self._on_news(EngineNews(News.READY, engine))
        self._survey_wanted.set()

    def _failed(self, engine: Engine, error: GatewayError) -> GatewayError:
        self.load_failures += 1
        log.warning(
            "engine start failed engine=%s code=%s last_lines:\n%s",
            engine.id,
            error.code,
            error.detail,
        )
        self._on_news(EngineNews(News.FAILED, engine, error=error))
        return error

    def _log_exit(self, engine: Engine, handle: Handle) -> None:
        log.warning(
            "engine exited engine=%s status=%s last_lines:\n%s",
            engine.id,
            handle.exit_status,
            "\n".join(handle.tail()[-20:]),
        )

    # The node's memory.

    async def _survey_on(self) -> None:
        """Measure for as long as the pool lives; sooner when something began or became ready."""
        while True:
            loads = any(engine.ready is None for engine in self._engines.values())
            try:
                async with asyncio.timeout(SURVEY_LOADS_S if loads else SURVEY_EVERY_S):
                    await self._survey_wanted.wait()
            except TimeoutError:
                pass
            self._survey_wanted.clear()
            try:
                self._take(await self._node.survey())
                if self._parking is not None:
                    await self._parking.drop_old()
            except Exception:  # the edge of the task: without it the ledger would never learn again
                log.exception("survey failed")

    def _take(self, survey: Survey) -> None:
        self._survey = survey
        for engine_id, use in survey.engines.items():
            engine = self._engines.get(engine_id)
            if engine is not None:
                engine.memory = use
                if engine.serves:
                    self._learning.see(engine.start, use, engine.load_seconds, engine.learned)
                    engine.learned = True
        uses = self._freeing | dict(survey.engines)
        self._dispatch(Measured(survey.devices, uses, survey.spare_bytes))
        if survey.spares and self._is_short(survey.spare_bytes):
            self._keep(self._node.give_up_spares())
        for engine in self._engines.values():
            if engine.ready is None:
                self._on_news(EngineNews(News.PROGRESS, engine))
        self._on_survey()

    async def _until_freed(self, engine: Engine) -> None:
        """Wait until the devices have what the engine took, as far as that can be seen.

        A process that is gone is not yet memory that is free: a driver takes its time.
        """
        if not engine.memory.devices:  # main memory is free with the process
            self._survey_wanted.set()
            return
        before = others_bytes(self._survey)
        deadline = self._loop.time() + FREED_WAIT_S
        self._freeing[engine.id] = engine.memory
        try:
            survey = await self._node.survey()
            while not is_freed(engine.memory, before, others_bytes(survey)):
                if self._loop.time() >= deadline or self._closing:
                    log.warning("engine gone and its memory not free engine=%s", engine.id)
                    break
                self._take(survey)
                await asyncio.sleep(FREED_POLL_S)
                survey = await self._node.survey()
        finally:
            del self._freeing[engine.id]
        self._take(survey)

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _unless_stopped(engine: Engine, work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work` to its end, or cancel it and raise _StopAsked when the engine is told to stop."""
    doing = asyncio.ensure_future(work)
    stop = asyncio.ensure_future(engine.stop_asked.wait())
    try:
        await asyncio.wait({doing, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise _StopAsked
        return doing.result()
    finally:
        for task in (doing, stop):
            task.cancel()
        await asyncio.gather(doing, stop, return_exceptions=True)
