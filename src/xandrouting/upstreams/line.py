"""One upstream, watched: asked for its models again and again, more seldom while it is down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Final

from xandrouting.core.model import Backend
from xandrouting.engines.upstream import backend_of, root_of
from xandrouting.net.client import Client, UpstreamError
from xandrouting.upstreams import ollama, openai
from xandrouting.upstreams.circuit import Circuit, pause_s
from xandrouting.upstreams.openai import Unusable
from xandrouting.upstreams.values import Address, Listing, UpstreamState

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 10.0
ANSWER_S: Final = 5.0  # for all that is asked of it at once

Look = Callable[[Client], Awaitable[Listing]]
_LOOKS: Final[Mapping[Backend, Look]] = {
    Backend.OLLAMA: ollama.look,
    Backend.UPSTREAM: openai.look,
}


class Line:
    """The gateway's line to one upstream. `watch` keeps its state; everybody else reads it."""

    def __init__(self, name: str, address: Address) -> None:
        backend = backend_of(name)
        self.name = name
        self.circuit = Circuit()
        self.state = UpstreamState(name, backend, False, "it was not asked yet", since=None)
        self.client = Client(root_of(address.url), api_key=address.api_key or None)
        self._look = _LOOKS[backend]
        self._expected = address.expected
        self._failures = 0
        self._is_reachable = False  # its last answer was one, though it may have been of no use
        self._wanted = asyncio.Event()
        self._looking = asyncio.Lock()  # else an answer could be followed by an older one

    async def watch(self) -> None:
        """Look for ever; cancelling ends it."""
        while True:
            try:
                await self.look()
            except Exception:  # the edge of the task: else it would never be asked again
                log.exception("upstream look failed upstream=%s", self.name)
                self._down("its answer could not be read: the server's log has more")
            wait_s = pause_s(self._failures) if self._failures else LOOK_EVERY_S
            self._wanted.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._wanted.wait()
            except TimeoutError:
                pass

    async def look(self) -> None:
        """Ask once, and know the answer."""
        async with self._looking:
            await self._look_once()

    async def _look_once(self) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                listing = await self._look(self.client)
        except TimeoutError:
            self._down(f"it does not answer within {ANSWER_S:g} s")
        except UpstreamError as error:
            self._down(str(error))
        except Unusable as error:
            self._down(str(error), is_reachable=True)
        else:
            self._up(listing)
            self.circuit.reached()

    def reached(self) -> None:
        """A request got through: if that is news, look at once."""
        self.circuit.reached()
        if not self.state.available and not self._is_reachable:
            self._wanted.set()

    def _up(self, listing: Listing) -> None:
        self._failures = 0
        self._is_reachable = True
        if self.state.available:
            self.state = replace(self.state, listing=listing)
            return
        self.state = replace(
            self.state, available=True, reason=None, since=time.time(), listing=listing
        )
        log.info(
            "upstream up upstream=%s models=%d version=%s",
            self.name,
            len(listing.models),
            listing.version or "unknown",
        )

    def _down(self, reason: str, *, is_reachable: bool = False) -> None:
        self._failures += 1
        self._is_reachable = is_reachable
        before = self.state
        if not before.available and before.since is not None:
            self.state = replace(before, reason=reason)
            return
        self.state = replace(before, available=False, reason=reason, since=time.time())
        if self._expected or before.available:
            log.warning("upstream down upstream=%s reason=%r", self.name, reason)
