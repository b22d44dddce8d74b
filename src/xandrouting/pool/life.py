"""One engine's task, from its start to its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from xandrouting.core.errors import EngineStartFailed, GatewayError
from xandrouting.core.events import EngineExited, EngineLost, EngineReady, EngineSlept
from xandrouting.core.model import LaunchPlan, Level, StartFailure
from xandrouting.launch.base import Handle
from xandrouting.net.client import Client
from xandrouting.pool.beside import beside
from xandrouting.pool.engine import Engine, EngineNews, News
from xandrouting.pool.failures import start_error
from xandrouting.pool.kind import Kind
from xandrouting.pool.parking import SavedSlot
from xandrouting.pool.probe import Illness, StartError, until_ill, until_ready
from xandrouting.pool.shell import Shell
from xandrouting.pool.sleeping import CallFailed, Sleeper

_T = TypeVar("_T")

log = logging.getLogger(__name__)

# Not for other options, which a conversation would not fit, nor where nobody waits for it to end.
PARKED_WHEN: Final = frozenset(("idle", "evicted", "unload", "shutdown"))
REST_S: Final = 10.0  # an engine that has not begun to sleep by then hangs


class _StopAsked(Exception):
    """The engine was told to stop while something was under way."""


class _NeverBegan(Exception):
    """A spare became the engine and died before it had done anything for it."""


class Life:
    """Starts one engine, lends it out, lets it sleep and wakes it, and sees to its end."""

    def __init__(self, engine: Engine, kind: Kind, shell: Shell) -> None:
        self._engine = engine
        self._kind = kind
        self._shell = shell
        self._parking = shell.parking if kind.adapter.slots is not None else None
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Live, and tell of the end. Every way out leaves nothing of its process tree."""
        engine, shell = self._engine, self._shell
        failure: GatewayError | None = None
        try:
            failure = await self._live()
        except Exception:  # the edge of the engine's task
            log.exception("engine task failed engine=%s", engine.id)
            shell.counts.load_failures += engine.ready is None
            failure = EngineStartFailed(
                f"Starting {engine.spec.key.model} failed inside the server."
            )
        finally:
            log.info("engine gone engine=%s", engine.id)
            shell.on_news(EngineNews(News.GONE, engine, error=failure))
            shell.dispatch(EngineExited(engine.id, failure))

    async def _live(self) -> GatewayError | None:
        """Run the engine to its end; return why its last load failed, if it did."""
        try:
            return await self._live_in_a_process(may_be_replaced=True)
        except _NeverBegan as death:
            log.warning("spare ended as it was taken engine=%s status=%s", self._engine.id, death)
            return await self._live_in_a_process(may_be_replaced=False)

    async def _live_in_a_process(self, *, may_be_replaced: bool) -> GatewayError | None:
        """Run the engine to its end.

        Raises:
            _NeverBegan: a spare died as it was taken. Another process may do.
        """
        engine, kind = self._engine, self._kind
        plan = self._plan()
        try:
            handle = await _unless_stopped(engine, kind.launcher.start(engine.id, plan))
        except _StopAsked:
            return None
        except GatewayError as error:
            return self._failed(error)
        engine.handle = handle
        next_spare: Kind | None = kind
        try:
            await _unless_stopped(engine, self._load(handle, plan))
            self._became_ready()
            self._shell.tasks.keep(self._shell.preparing.replace_spare(engine, kind))
            while await _unless_stopped(engine, self._serves_until_sleep(handle, plan)):
                again = await _unless_stopped(engine, self._sleep(handle, plan))
                if again is None:
                    break
                plan = again
                await _unless_stopped(engine, self._load(handle, plan))
                self._became_ready()
            self._shell.dispatch(EngineLost(engine.id))
        except _StopAsked:
            pass
        except (StartError, CallFailed) as error:
            if isinstance(error, CallFailed) or engine.wakes_by_calls:
                log.warning("engine does not wake engine=%s %s", engine.id, error)
            elif may_be_replaced and self._was_a_dying_spare(handle):
                next_spare = None  # the next process is the engine's own
                raise _NeverBegan(handle.exit_status) from error
            else:
                return self._failed(self._start_error(handle, error))
        finally:
            await self._end(handle, plan, next_spare)
        return None

    def _was_a_dying_spare(self, handle: Handle) -> bool:
        """Whether it ended before it could take its order.

        One that wakes is no spare: for those who wait the scheduler has another engine begun.
        """
        return (
            handle.exit_status is not None and handle.never_began and not self._engine.start.wakes
        )

    async def _end(self, handle: Handle, plan: LaunchPlan, next_spare: Kind | None) -> None:
        """Park its conversations where they are wanted, and leave nothing of its process tree."""
        engine = self._engine
        try:
            if engine.stop_reason in PARKED_WHEN and handle.exit_status is None:
                await self._park()
        finally:  # whatever becomes of its conversations, it ends
            if engine.client is not None:
                engine.client.close()
            if next_spare is not None:
                self._shell.tasks.keep(self._shell.preparing.prepare_spare(next_spare))
            await handle.stop(grace_s=0.0 if engine.forced else plan.stop_grace_s)
            await self._shell.watch.until_freed(engine)

    def _plan(self) -> LaunchPlan:
        start = self._engine.start
        return self._kind.adapter.plan(
            start.spec,
            start.options,
            placement=start.placement,
            slot_folder="" if self._parking is None else self._parking.folder,
        )

    async def _load(self, handle: Handle, plan: LaunchPlan) -> None:
        """Wait until the engine takes requests, and give it back its conversations."""
        engine, shell, slots = self._engine, self._shell, self._kind.adapter.slots
        async with beside(self._fetch()) as fetching:
            engine.client = client = Client(handle.base_url, api_key=handle.api_key or None)
            await until_ready(handle, plan, client, stall_s=shell.load_stall_s, health=shell.health)
            parked = await fetching
        if parked and self._parking is not None and slots is not None:
            await self._parking.restore(engine.start, parked, client, slots)

    async def _fetch(self) -> tuple[SavedSlot, ...]:
        return () if self._parking is None else await self._parking.fetch(self._engine.start)

    async def _serves_until_sleep(self, handle: Handle, plan: LaunchPlan) -> bool:
        """Wait until the engine shall sleep; False: it has exited, or cannot serve any more."""
        engine = self._engine
        assert engine.client is not None  # it is ready
        asking, falling_ill = engine.sleep_asked.wait(), until_ill(engine.client, plan)
        async with (
            beside(handle.exited()) as exited,
            beside(asking) as asked,
            beside(falling_ill) as ill,
        ):
            await asyncio.wait({exited, asked, ill}, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                self._log_exit(handle)
            elif ill.done():
                await self._give_up(exited, ill.result(), plan)
            return not exited.done() and not ill.done()

    async def _give_up(self, exited: asyncio.Task[int], illness: Illness, plan: LaunchPlan) -> None:
        """Lend the engine to nobody any more; what it has begun may end, if it can."""
        engine = self._engine
        log.warning("engine is ill and ends engine=%s illness=%s", engine.id, illness.name.lower())
        self._shell.dispatch(EngineLost(engine.id))
        if illness is Illness.DEAF:
            await asyncio.wait({exited}, timeout=plan.drain_s)
        engine.forced = True

    async def _sleep(self, handle: Handle, plan: LaunchPlan) -> LaunchPlan | None:
        """Let the engine sleep; return how it goes on when it is woken. None: it shall end."""
        engine, shell, calls = self._engine, self._shell, self._kind.adapter.sleep
        if engine.level is Level.REST:
            return await self._rest(handle)
        assert calls is not None  # else its spec would have no such level
        if engine.client is not None:
            engine.client.close()
            engine.client = None
        sleeper = Sleeper(
            engine,
            handle,
            calls,
            post=shell.post,
            watch=shell.watch,
            dispatch=shell.dispatch,
            on_news=shell.on_news,
        )
        async with beside(handle.exited()) as exited, beside(sleeper.sleep()) as woken:
            await asyncio.wait({exited, woken}, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                self._log_exit(handle)
                return None
            if not woken.result():
                return None
        await sleeper.wake(stall_s=shell.load_stall_s)
        return plan

    async def _rest(self, handle: Handle) -> LaunchPlan | None:
        engine = self._engine
        await self._park()
        if engine.client is not None:
            engine.client.close()
            engine.client = None
        engine.woken.clear()
        async with beside(handle.exited()) as exited, beside(self._until_woken(handle)) as woken:
            await asyncio.wait({exited, woken}, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                self._log_exit(handle)
                return None
            try:
                woken.result()
            except TimeoutError:
                log.warning("engine does not rest engine=%s waited_s=%.0f", engine.id, REST_S)
                return None
        plan = self._plan()
        handle.wake(plan)
        return plan

    async def _until_woken(self, handle: Handle) -> None:
        engine, shell = self._engine, self._shell
        async with asyncio.timeout(REST_S):
            await handle.rest()
        log.info("engine sleeping engine=%s", engine.id)
        shell.dispatch(EngineSlept(engine.id))
        if not engine.woken.is_set():  # else somebody waited for it, and it sleeps no more
            shell.on_news(EngineNews(News.SLEEPING, engine))
        shell.watch.hurry()
        await engine.woken.wait()

    async def _park(self) -> None:
        engine, slots = self._engine, self._kind.adapter.slots
        ready = engine.ready is not None and engine.client is not None and not engine.forced
        if ready and self._parking is not None and slots is not None:
            assert engine.client is not None
            await self._parking.park(engine.start, engine.client, slots)

    def _became_ready(self) -> None:
        engine, shell = self._engine, self._shell
        engine.ready = self._loop.time()
        engine.loaded_at = engine.used_at = time.time()
        shell.counts.loads += engine.spec.key.is_local  # an upstream is there already
        log.info("engine ready engine=%s load_s=%.2f", engine.id, engine.load_seconds)
        shell.dispatch(EngineReady(engine.id))
        shell.on_news(EngineNews(News.READY, engine))
        shell.watch.hurry()

    def _start_error(self, handle: Handle, error: StartError) -> GatewayError:
        tail, adapter = handle.tail(), self._kind.adapter
        failure = error.failure or adapter.classify(tail, error.status)
        if failure is StartFailure.KILLED and handle.killed_for_memory:
            failure = StartFailure.OUT_OF_MEMORY
        return start_error(
            self._engine.spec.key.model,
            failure,
            tail,
            reason=adapter.reason(tail),
            stall_s=self._shell.load_stall_s,
            status=error.status,
        )

    def _failed(self, error: GatewayError) -> GatewayError:
        engine = self._engine
        self._shell.counts.load_failures += 1
        log.warning(
            "engine start failed engine=%s code=%s last_lines:\n%s",
            engine.id,
            error.code,
            error.detail,
        )
        self._shell.on_news(EngineNews(News.FAILED, engine, error=error))
        return error

    def _log_exit(self, handle: Handle) -> None:
        log.warning(
            "engine exited engine=%s status=%s last_lines:\n%s",
            self._engine.id,
            handle.exit_status,
            "\n".join(handle.tail()[-20:]),
        )


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
