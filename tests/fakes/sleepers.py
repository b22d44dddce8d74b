"""Engines that sleep as vLLM does, on a card that is only a number: for tests in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from tests.fakes.launcher import FakeHandle, FakeLauncher
from xandrouting.core.model import DeviceReading
from xandrouting.engines.base import Call
from xandrouting.net.client import Client
from xandrouting.pool.sleeping import CallFailed

CARD: Final = "cuda:0"
WEIGHTS, CACHE = "weights", "kv_cache"
FIRST_PORT: Final = 20_000


@dataclass
class _Mind:
    """One engine's memory: which of it sleeps, and whether what is there may be believed."""

    handle: FakeHandle
    asleep: set[str] = field(default_factory=set)
    offloaded: bool = False
    garbage: bool = False  # its weights' memory is there and empty
    stale: bool = False  # it believes to have what its cache lost
    taken: int = 0  # bytes of the card


class FakeSleep:
    """A launcher's engines, called to sleep and to wake; it is the pool's `post`.

    Each takes `weights`, `cache` and `context` bytes of the card. What goes wrong is set by
    path: `refuses`, `hangs`; and by level: `leaks`.
    """

    def __init__(
        self,
        launcher: FakeLauncher,
        *,
        weights: int,
        cache: int,
        context: int = 0,
        capacity: int,
        tells: bool = True,
    ) -> None:
        self.weights, self.cache, self.context = weights, cache, context
        self.capacity = capacity
        self.tells = tells  # whose the card's memory is
        self.others = 0
        self.takes_s: dict[str, float] = {}
        self.refuses: set[str] = set()
        self.hangs: set[str] = set()
        self.leaks: set[int] = set()
        self.frees_after_s = 0.0
        self._launcher = launcher
        self._minds: dict[int, _Mind] = {}
        launcher.cards = self._cards
        launcher.on_start = self._started

    async def __call__(self, client: Client, call: Call) -> None:
        mind = self._minds[client._port]
        path, _, query = call.path.decode().removeprefix("/").partition("?")
        name = f"{path} {query.removesuffix('&mode=abort')}".strip()
        self._launcher.journal.append(f"{name} {mind.handle.name}")
        if path in self.hangs:
            await asyncio.Event().wait()
        await asyncio.sleep(self.takes_s.get(path, 0.0))
        if path in self.refuses:
            raise CallFailed(f"/{path}: status 500")
        if mind.handle.exit_status is not None:
            raise CallFailed(f"/{path}: nobody there")
        match path:
            case "sleep":
                self._sleep(mind, int(query[len("level=")]))
            case "wake_up":
                self._wake(mind, {query.removeprefix("tags=")} if query else {WEIGHTS, CACHE})
            case "collective_rpc":
                assert call.body == b'{"method": "reload_weights"}'
                assert WEIGHTS not in mind.asleep, "read into memory that is not there"
                mind.garbage = False
            case "reset_prefix_cache":
                mind.stale = False
            case _:
                raise AssertionError(path)

    def is_sound(self, port: int = FIRST_PORT) -> bool:
        """Whether an engine is awake, and answers with its model's words."""
        mind = self._minds[port]
        return not (mind.asleep or mind.garbage or mind.stale)

    def _started(self, handle: FakeHandle) -> None:
        port = FIRST_PORT + len(self._minds)
        handle.base_url = f"http://127.0.0.1:{port}"
        self._minds[port] = mind = _Mind(handle)
        self._base = handle._memory
        self._settle(mind)

    def _sleep(self, mind: _Mind, level: int) -> None:
        if mind.asleep:
            return  # it answers, and does nothing
        mind.stale = True
        mind.asleep = {WEIGHTS, CACHE}
        mind.offloaded = level == 1
        mind.garbage = level == 2
        if level not in self.leaks:
            asyncio.get_running_loop().call_later(self.frees_after_s, self._settle, mind)

    def _wake(self, mind: _Mind, tags: set[str]) -> None:
        assert tags <= mind.asleep, "vLLM would do nothing"
        mind.asleep -= tags
        mind.offloaded = mind.offloaded and WEIGHTS in mind.asleep
        self._settle(mind)

    def _settle(self, mind: _Mind) -> None:
        base, extra = self._base, self.weights if mind.offloaded else 0
        mind.handle.take(lambda age_s: (base(age_s) or 0) + extra)
        mind.taken = self.context
        mind.taken += 0 if WEIGHTS in mind.asleep else self.weights
        mind.taken += 0 if CACHE in mind.asleep else self.cache
        mind.handle.devices = ((CARD, mind.taken),) if self.tells else None

    def _cards(self) -> tuple[DeviceReading, ...]:
        alive = [mind for mind in self._minds.values() if mind.handle.exit_status is None]
        taken = self.others + sum(mind.taken for mind in alive)
        return (DeviceReading(CARD, "a card", self.capacity, self.capacity - taken),)
