"""Sleep by an engine's own calls: believed only when its memory is seen to be free."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from xandrouting.core.events import EngineSlept, Event, SleepFailed
from xandrouting.core.model import MemoryUse
from xandrouting.engines.base import Call, SleepCalls
from xandrouting.launch.base import Handle, Survey
from xandrouting.net.client import Client, UpstreamError
from xandrouting.pool.beside import beside
from xandrouting.pool.engine import Engine, EngineNews, News
from xandrouting.pool.memory import MOST
from xandrouting.pool.probe import MEASURE_EVERY_S, StallWatch, StartError
from xandrouting.pool.watching import FREED_POLL_S, FREED_WAIT_S, Watch

log = logging.getLogger(__name__)

CALL_S: Final = 10.0  # an engine that takes longer, beside moving its weights, hangs
MOVES_BYTES_PER_S: Final = 1e9  # slower than the slowest that was published: 1.5e9, to pinned pages

_JSON: Final = b"content-type: application/json\r\n"


class CallFailed(Exception):
    """An engine did not do what it was called for."""


class Post(Protocol):
    """Makes one call of an engine."""

    async def __call__(self, client: Client, call: Call) -> None:
        """Return when it is done.

        Raises:
            CallFailed: it was refused, or answered with something else than it should.
        """


async def http_post(client: Client, call: Call) -> None:
    """Make a call over HTTP; it may take as long as it does."""
    try:
        response = await client.request(b"POST", call.path, call.body, _JSON if call.body else b"")
        try:
            answer = await response.read(1 << 20)
        finally:
            response.close()
    except UpstreamError as error:
        raise CallFailed(f"{call.path.decode()}: {error}") from error
    if response.status != 200 or not _holds(answer, call.answer):
        raise CallFailed(f"{call.path.decode()}: status {response.status} {answer[:200]!r}")


def _holds(answer: bytes, expected: Mapping[str, object]) -> bool:
    if not expected:
        return True
    try:
        said = msgspec.json.decode(answer)
    except msgspec.DecodeError:
        return False
    return isinstance(said, dict) and expected.items() <= said.items()


class Sleeper:
    """One engine, from being told to sleep until it is woken."""

    def __init__(
        self,
        engine: Engine,
        handle: Handle,
        calls: SleepCalls,
        *,
        post: Post,
        watch: Watch,
        dispatch: Callable[[Event], None],
        on_news: Callable[[EngineNews], None],
    ) -> None:
        self._engine = engine
        self._handle = handle
        self._calls = calls
        self._post = post
        self._watch = watch
        self._dispatch = dispatch
        self._on_news = on_news

    async def sleep(self) -> bool:
        """Sleep, deeper when told to, until woken; False: it shall stop.

        When it cannot the scheduler is told, which has it try another level or stop.
        """
        engine, current = self._engine, None
        engine.woken.clear()
        awake = _Memory.of(engine, await self._watch.look())
        while not engine.woken.is_set():
            engine.deeper.clear()
            level = engine.level
            assert level is not None
            try:
                await self._call(self._calls.suspend(level, current))
            except (CallFailed, TimeoutError) as error:
                reason = str(error) or "it did not answer in time"
                log.warning("engine not asleep engine=%s level=%d %s", engine.id, level, reason)
                self._dispatch(SleepFailed(engine.id, hopeless=True))
                await engine.stop_asked.wait()
                return False
            current = level
            kept = await self._until_free(awake)
            if kept is None:
                log.warning("engine asleep, memory not free engine=%s level=%d", engine.id, level)
                self._dispatch(SleepFailed(engine.id))
                await self._first_of(engine.deeper, engine.stop_asked)
                if engine.stop_asked.is_set():
                    return False
                continue
            self._slept(kept)
            await self._first_of(engine.woken, engine.deeper)
            awake = awake.again(kept, self._watch.survey)
        return True

    def _slept(self, kept: MemoryUse) -> None:
        engine = self._engine
        log.info(
            "engine sleeping engine=%s level=%d host_bytes=%s device_bytes=%s",
            engine.id,
            engine.level,
            kept.host_bytes,
            kept.device_bytes,
        )
        self._dispatch(EngineSlept(engine.id, kept))
        if not engine.woken.is_set():  # else somebody waited for it, and it sleeps no more
            self._on_news(EngineNews(News.SLEEPING, engine))

    async def wake(self, *, stall_s: float) -> None:
        """Bring it back to where it takes requests.

        Raises:
            CallFailed: it does not wake.
            StartError: it exited, or nothing moved for `stall_s`; then it still runs.
        """
        level = self._engine.level
        assert level is not None
        client = self._client()
        stalls = StallWatch(self._handle, stall_s)
        waking = self._make(client, self._calls.resume(level))
        try:
            async with beside(self._handle.exited()) as exited, beside(waking) as woken:
                while not woken.done():
                    await asyncio.wait(
                        {exited, woken},
                        timeout=MEASURE_EVERY_S,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    if exited.done():
                        raise StartError(None, exited.result())
                    await stalls.look()
                woken.result()
        finally:
            client.close()

    async def _call(self, calls: Sequence[Call]) -> None:
        weights_bytes = self._engine.decision.footprint.device.weights
        client = self._client()
        try:
            async with asyncio.timeout(len(calls) * (CALL_S + weights_bytes / MOVES_BYTES_PER_S)):
                await self._make(client, calls)
        finally:
            client.close()

    async def _make(self, client: Client, calls: Sequence[Call]) -> None:
        for call in calls:
            await self._post(client, call)

    def _client(self) -> Client:
        return Client(self._handle.base_url, api_key=self._handle.api_key or None)

    async def _until_free(self, awake: _Memory) -> MemoryUse | None:
        """Wait until its devices have their memory back; return what it keeps. None: they have not.

        What matters is the most of its weights and its cache: it keeps its context.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + FREED_WAIT_S
        terms = self._engine.decision.footprint.device
        wanted = MOST * min(awake.taken_bytes, terms.weights + terms.kv_cache or awake.taken_bytes)
        while True:
            survey = await self._watch.look()
            kept = awake.kept(survey)
            if kept is not None and awake.taken_bytes - (kept.device_bytes or 0) >= wanted:
                return kept
            if loop.time() >= deadline:
                return None
            await asyncio.sleep(FREED_POLL_S)

    async def _first_of(self, *events: asyncio.Event) -> None:
        tasks = {asyncio.ensure_future(event.wait()) for event in events}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


class _Memory:
    """What an engine had of its accelerators while it was awake, and what they had to give."""

    def __init__(
        self, engine: Engine, taken: Mapping[str, int], available: Mapping[str, int]
    ) -> None:
        self._engine = engine
        self._taken = taken
        self._available = available

    @classmethod
    def of(cls, engine: Engine, survey: Survey) -> _Memory:
        """Return it as last measured, or as planned where nobody tells whose the memory is."""
        demands = dict(engine.decision.footprint.demands(engine.start.placement))
        told = engine.memory.devices
        taken = {d: demands[d] for d in engine.start.placement} if told is None else dict(told)
        return cls(engine, taken, _available(survey))

    @property
    def taken_bytes(self) -> int:
        """All of it."""
        return sum(self._taken.values())

    def again(self, kept: MemoryUse, survey: Survey) -> _Memory:
        """Return the same by a later survey, while it keeps so much: others come and go."""
        keeps, now = dict(kept.devices or ()), _available(survey)
        freed = {device: taken - keeps.get(device, 0) for device, taken in self._taken.items()}
        available = {device: free - freed.get(device, 0) for device, free in now.items()}
        return _Memory(self._engine, self._taken, available)

    def kept(self, survey: Survey) -> MemoryUse | None:
        """Return what it still has by this survey; None: that cannot be told."""
        use = survey.engines.get(self._engine.id, MemoryUse())
        if use.devices is not None:
            return use
        now = _available(survey)
        if not self._taken.keys() <= now.keys() & self._available.keys():
            return None
        devices = tuple(
            (device, max(0, taken - max(0, now[device] - self._available[device])))
            for device, taken in self._taken.items()
        )
        return MemoryUse(use.host_bytes, use.private_bytes, devices)


def _available(survey: Survey) -> dict[str, int]:
    return {d.device: d.available_bytes for d in survey.devices if not d.stale}
