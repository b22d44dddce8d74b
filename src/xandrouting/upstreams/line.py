"""One upstream, watched: asked for its models again and again, more seldom while it is down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Container, Coroutine, Mapping
from dataclasses import replace
from typing import Any, Final

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
MEMORY_EVERY_S: Final = 1.0  # at most so often for the sake of requests
ODD_SHOWN: Final = 5  # of the entries that cannot be read

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
        self._told_odd: Container[str] = ()
        self._due_at = 0.0  # the next look, by the loop's clock
        self._memory_at = 0.0  # the last one at its memory
        self._wanted = asyncio.Event()  # a look is, or one at its memory while it is up
        self._looking = asyncio.Lock()  # else an answer could be followed by an older one

    async def watch(self) -> None:
        """Look for ever; cancelling ends it."""
        look = self.look
        while True:
            self._wanted.clear()
            try:
                await look()
            except Exception:  # the edge of the task: else it would never be asked again
                log.exception("upstream look failed upstream=%s", self.name)
                self._down("its answer could not be read: the server's log has more")
            look = await self._next_look()

    async def _next_look(self) -> Callable[[], Coroutine[Any, Any, None]]:
        """Wait until there is something to look at; return what does it."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(self._due_at):
                await self._wanted.wait()
                if not self.state.available:
                    return self.look
                await asyncio.sleep(self._memory_at + MEMORY_EVERY_S - loop.time())
        except TimeoutError:
            return self.look
        return self._look_at_memory

    async def _look_at_memory(self) -> None:
        """Ask what it runs and nothing else; when it fails, the next look is due."""
        loop = asyncio.get_running_loop()
        async with self._looking:
            try:
                async with asyncio.timeout(ANSWER_S):
                    running = await ollama.running(self.client)
            except (TimeoutError, UpstreamError, Unusable):
                self._due_at = loop.time()
                return
            self._memory_at = loop.time()
            self.state = replace(self.state, listing=replace(self.state.listing, running=running))

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

    def used(self) -> None:
        """A request was answered: what it holds in memory may be something else now."""
        if self.state.available and self.state.backend is Backend.OLLAMA:
            self._wanted.set()

    def _up(self, listing: Listing) -> None:
        self._failures = 0
        self._is_reachable = True
        self._memory_at = asyncio.get_running_loop().time()
        self._due_at = self._memory_at + LOOK_EVERY_S
        self._tell_odd(listing.odd)
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

    def _tell_odd(self, odd: tuple[str, ...]) -> None:
        """Log entries that are passed over, each once for as long as it is there."""
        new = [entry for entry in odd if entry not in self._told_odd]
        self._told_odd = frozenset(odd)
        for entry in new[:ODD_SHOWN]:
            log.warning("upstream entry passed over upstream=%s entry=%s", self.name, entry)
        if len(new) > ODD_SHOWN:
            log.warning(
                "upstream entries passed over upstream=%s more=%d", self.name, len(new) - ODD_SHOWN
            )

    def _down(self, reason: str, *, is_reachable: bool = False) -> None:
        self._failures += 1
        self._due_at = asyncio.get_running_loop().time() + pause_s(self._failures)
        self._is_reachable = is_reachable
        before = self.state
        if not before.available and before.since is not None:
            self.state = replace(before, reason=reason)
            return
        self.state = replace(before, available=False, reason=reason, since=time.time())
        if self._expected or before.available:
            log.warning("upstream down upstream=%s reason=%r", self.name, reason)
