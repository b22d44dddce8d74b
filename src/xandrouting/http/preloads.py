"""The loads that the settings ask for at the start."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Container, Iterable, Sequence

from xandrouting.core.errors import GatewayError
from xandrouting.http import upstream_lists
from xandrouting.http.loads import Loads
from xandrouting.proxy.request import LoadRequest
from xandrouting.upstreams.upstreams import Upstreams

log = logging.getLogger(__name__)


class Preloads:
    """Begins them; what fails is logged and nothing else."""

    def __init__(self, loads: Loads, upstreams: Upstreams, *, wait_s: float) -> None:
        """`wait_s` is how long an Ollama may take for one model."""
        self._loads = loads
        self._upstreams = upstreams
        self._wait_s = wait_s
        self._elsewhere: asyncio.Task[None] | None = None

    async def begin(self, names: Iterable[str], *, pinned: Container[str]) -> None:
        """Begin them all: an Ollama gets its own one after the other, and keeps what is pinned."""
        every = tuple(dict.fromkeys(names))
        there = [
            LoadRequest(model=name, ttl=0 if name in pinned else None)
            for name in every
            if self._upstreams.named(name) is not None
        ]
        if there:  # it answers when it has loaded, which nobody waits for
            self._elsewhere = asyncio.create_task(self._load_elsewhere(there))
        for name in every:
            if self._upstreams.named(name) is None:
                try:
                    await self._loads.start(LoadRequest(model=name))
                except GatewayError as error:
                    _log_failed(name, error)

    async def aclose(self) -> None:
        """Wait for no Ollama any more; what it has begun to load it may load."""
        if self._elsewhere is not None:
            self._elsewhere.cancel()
            await asyncio.wait({self._elsewhere})

    async def _load_elsewhere(self, wanted: Sequence[LoadRequest]) -> None:
        for one in wanted:
            try:
                await upstream_lists.load(self._upstreams, one, wait_s=self._wait_s)
            except GatewayError as error:
                _log_failed(one.model, error)
            else:
                log.info("preloaded model=%s", one.model)


def _log_failed(name: str, error: GatewayError) -> None:
    log.warning("preload failed model=%s code=%s %s", name, error.code, error.message)
