"""What is done for loads to come: processes that wait for a model, files that are read ahead."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Mapping
from typing import Final

from xandrouting.core.errors import GatewayError
from xandrouting.core.ledger import DeviceState
from xandrouting.core.model import HOST, Backend, EngineSpec, ModelKey
from xandrouting.pool.beside import beside
from xandrouting.pool.engine import Engine
from xandrouting.pool.kind import Kind
from xandrouting.pool.tasks import Tasks

log = logging.getLogger(__name__)

SPARE_WAIT_S: Final = 5.0  # a first answer that takes longer has its processor for long anyway


class Preparing:
    """Keeps spares, and reads files ahead, as far as main memory is not short.

    `spares` are the backends that keep a process waiting for the next load; `unmapped_bytes`
    tells how much of main memory files may take.
    """

    def __init__(
        self,
        kinds: Mapping[Backend, Kind],
        tasks: Tasks,
        *,
        spares: Container[Backend],
        devices: Callable[[], tuple[DeviceState, ...]],
        unmapped_bytes: Callable[[], int],
    ) -> None:
        self._kinds = kinds
        self._tasks = tasks
        self._spares = spares
        self._devices = devices
        self._unmapped_bytes = unmapped_bytes
        self._reading: dict[ModelKey, asyncio.Task[None]] = {}  # files of loads to come

    def begin(self) -> None:
        """Have a first spare of every kind started."""
        for kind in self._kinds.values():
            self._tasks.keep(self.prepare_spare(kind))

    def end_spares(self) -> None:
        """Start no spare any more: there will be no next load."""
        self._spares = ()

    def end(self) -> None:
        """Prepare nothing any more, and break off what is being read."""
        self._spares = ()
        for reading in self._reading.values():
            reading.cancel()

    async def replace_spare(self, engine: Engine, kind: Kind) -> None:
        """Prepare a spare after the one the engine took, and not beside its first answer."""
        if engine.granted:
            served, gone = beside(engine.served.wait()), beside(engine.gone.wait())
            async with served as done, gone as ended:
                both = {done, ended}
                await asyncio.wait(both, timeout=SPARE_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        await self.prepare_spare(kind)

    async def prepare_spare(self, kind: Kind) -> None:
        """Have a process wait for the next load, if there is memory to spare for it."""
        plan = kind.adapter.spare() if kind.adapter.backend in self._spares else None
        if plan is None or self.is_short(kind.adapter.spare_bytes):
            return
        try:
            await kind.launcher.prepare(plan)
        except GatewayError as error:
            log.warning("spare not started backend=%s %s", kind.adapter.backend, error.detail)

    def is_short(self, size_bytes: int) -> bool:
        """Whether so much main memory is more than the ledger has free."""
        return any(
            device.device == HOST and device.free_bytes < size_bytes for device in self._devices()
        )

    def read_ahead(self, spec: EngineSpec) -> None:
        """Have a model's files read while its engine waits for room, and while it starts."""
        key = spec.key
        limit_bytes = self._unmapped_bytes()
        if not spec.files or key in self._reading or limit_bytes <= 0:
            return
        launcher = self._kinds[key.backend].launcher
        reading = self._tasks.keep(launcher.read_ahead(spec.files, limit_bytes=limit_bytes))
        self._reading[key] = reading
        reading.add_done_callback(lambda _: self._reading.pop(key, None))
