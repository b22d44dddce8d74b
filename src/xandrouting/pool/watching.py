"""The node's memory: measured for as long as the pool lives, and waited for to be free."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final

from xandrouting.core.events import Measured
from xandrouting.core.model import EngineId, MemoryUse
from xandrouting.launch.base import Launcher, Survey
from xandrouting.pool.engine import Engine, EngineNews, News
from xandrouting.pool.learning import Learning
from xandrouting.pool.memory import is_freed, others_bytes
from xandrouting.pool.parking import Parking

log = logging.getLogger(__name__)

SURVEY_EVERY_S: Final = 2.0  # how old the shown memory may be
SURVEY_LOADS_S: Final = 1.0  # the same while something loads
FREED_POLL_S: Final = 0.05
FREED_WAIT_S: Final = 3.0  # from an engine's end to its memory's being free again; then it is lost


class Watch:
    """Asks `node` for its memory and tells who wants to know; `on_survey` after each answer.

    `on_measured` is told first: the ledger is up to date when `on_news` and `on_survey` are.
    """

    def __init__(
        self,
        node: Launcher,
        engines: Mapping[EngineId, Engine],
        *,
        learning: Learning,
        parking: Parking | None,
        on_measured: Callable[[Measured, Survey], None],
        on_news: Callable[[EngineNews], None],
        on_survey: Callable[[], None],
    ) -> None:
        self._node = node
        self._engines = engines
        self._learning = learning
        self._parking = parking
        self._on_measured = on_measured
        self._on_news = on_news
        self._on_survey = on_survey
        self._freeing: dict[EngineId, MemoryUse] = {}  # of engines gone, whose memory may not be
        self._wanted = asyncio.Event()
        self._closing = False
        self.survey = Survey()

    def hurry(self) -> None:
        """Measure soon: something began or became ready."""
        self._wanted.set()

    def end(self) -> None:
        """Wait for no memory any more: nothing will be loaded into it."""
        self._closing = True

    async def look(self) -> Survey:
        """Measure now, tell it, and return it."""
        survey = await self._node.survey()
        self._take(survey)
        return survey

    async def run(self) -> None:
        """Measure again and again."""
        while True:
            loads = any(engine.ready is None for engine in self._engines.values())
            try:
                async with asyncio.timeout(SURVEY_LOADS_S if loads else SURVEY_EVERY_S):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            self._wanted.clear()
            try:
                await self.look()
                if self._parking is not None:
                    await self._parking.drop_old()
            except Exception:  # the edge of the task: without it the ledger would never learn again
                log.exception("survey failed")

    def _take(self, survey: Survey) -> None:
        self.survey = survey
        for engine_id, use in survey.engines.items():
            engine = self._engines.get(engine_id)
            if engine is not None:
                engine.memory = use
                if engine.serves:
                    self._learning.see(engine.start, use, engine.load_seconds, engine.learned)
                    engine.learned = True
        uses = self._freeing | dict(survey.engines)
        self._on_measured(Measured(survey.devices, uses, survey.spare_bytes), survey)
        for engine in self._engines.values():
            if engine.ready is None:
                self._on_news(EngineNews(News.PROGRESS, engine))
        self._on_survey()

    async def until_freed(self, engine: Engine) -> None:
        """Wait until the devices have what an engine took that is gone, as far as can be seen.

        A process that is gone is not yet memory that is free: a driver takes its time.
        """
        if not engine.memory.devices:  # main memory is free with the process
            self._wanted.set()
            return
        before = others_bytes(self.survey)
        deadline = asyncio.get_running_loop().time() + FREED_WAIT_S
        self._freeing[engine.id] = engine.memory
        try:
            survey = await self._node.survey()
            while not is_freed(engine.memory, before, others_bytes(survey)):
                if asyncio.get_running_loop().time() >= deadline or self._closing:
                    log.warning("engine gone and its memory not free engine=%s", engine.id)
                    break
                self._take(survey)
                await asyncio.sleep(FREED_POLL_S)
                survey = await self._node.survey()
        finally:
            del self._freeing[engine.id]
        self._take(survey)
