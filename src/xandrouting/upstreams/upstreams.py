"""Every upstream: what is known of it, whether a request may try it, and Ollama's memory.

What is shown is what the watchers saw last: nobody waits for an upstream to see a list.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Container, Mapping
from typing import Final, Self, TypeVar

from xandrouting.core.errors import (
    EngineError,
    GatewayError,
    LoadingTimeout,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from xandrouting.engines.upstream import OLLAMA
from xandrouting.net.client import ConnectError, UpstreamError
from xandrouting.upstreams import ollama
from xandrouting.upstreams.line import ANSWER_S, Line
from xandrouting.upstreams.openai import Unusable
from xandrouting.upstreams.values import Address, RunningModel, UpstreamState

AGAIN_S: Final = 0.2  # from a failed connection to the one more that is tried
UNLOAD_POLL_S: Final = 0.1
UNLOAD_WAIT_S: Final = 30.0  # a busy model ends what it does first

T = TypeVar("T")


class Upstreams:
    """All upstreams by name. Use as an async context; leaving it ends the watching."""

    def __init__(self, addresses: Mapping[str, Address]) -> None:
        self._addresses = addresses
        self._lines: dict[str, Line] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._lines = {name: Line(name, address) for name, address in self._addresses.items()}
        self._tasks = [
            asyncio.create_task(line.watch(), name=f"upstream {line.name}")
            for line in self._lines.values()
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the watching and close what is open."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []
        for line in self._lines.values():
            line.client.close()

    # Lists.

    def states(self) -> list[UpstreamState]:
        """Return every upstream as it was last seen."""
        return [line.state for line in self._lines.values()]

    def named(self, model: str, backend: str | None = None) -> tuple[UpstreamState, str] | None:
        """Return the upstream that a request's `model` and `backend` mean, and its model's name.

        None: they mean none.
        """
        split = split_name(model, backend, self._lines)
        return None if split is None else (self._lines[split[0]].state, split[1])

    # Requests.

    async def reach(self, name: str, send: Callable[[], Awaitable[T]]) -> T:
        """Return what `send` does, which is tried once more if no connection could be made.

        Nothing else is tried again: the upstream may have acted on what it has read.

        Raises:
            UpstreamUnreachable: no connection could be made now, or a moment ago.
            GatewayError: what `send` raised.
        """
        line = self._lines[name]
        try:
            return await _reach(line, send)
        finally:
            line.used()

    # Ollama's memory.

    async def load(self, model: str, *, ttl_s: float | None, wait_s: float) -> RunningModel | None:
        """Have Ollama load a model and keep it for `ttl_s`; 0: for ever, None: as it is set there.

        Return what it says of it then; None: it is gone already.

        Raises:
            GatewayError: no such model, it refuses, or it takes longer than `wait_s`.
        """
        line = self._lines[OLLAMA]
        keep_alive_s = -1 if ttl_s == 0 else ttl_s
        try:
            await _reach(
                line,
                lambda: _told(ollama.set_keep_alive(line.client, model, keep_alive_s), wait_s),
            )
        except UpstreamTimeout:
            raise LoadingTimeout(
                f"The upstream ollama did not load '{model}' within {wait_s:g} s. It may go on "
                "loading: ask again.",
                retry_after_s=ANSWER_S,
            ) from None
        found = await self._running(line, model)
        await line.look()
        return found

    async def unload(self, model: str) -> tuple[RunningModel, bool] | None:
        """Have Ollama unload a model; return what ran, and whether it is gone.

        It is not if it is busy for longer than is waited. None: it did not run.

        Raises:
            GatewayError: it is not there, or refuses.
        """
        line = self._lines[OLLAMA]
        before = await self._running(line, model)
        if before is None:
            return None
        await _reach(
            line, lambda: _told(ollama.set_keep_alive(line.client, before.id, 0), ANSWER_S)
        )
        gone = await self._gone(line, model)
        await line.look()
        return before, gone

    async def _gone(self, line: Line, model: str) -> bool:
        try:
            async with asyncio.timeout(UNLOAD_WAIT_S):
                while await self._running(line, model) is not None:  # noqa: ASYNC110 - it tells nobody
                    await asyncio.sleep(UNLOAD_POLL_S)
        except TimeoutError:
            return False
        return True

    async def _running(self, line: Line, model: str) -> RunningModel | None:
        every = await _reach(line, lambda: _told(ollama.running(line.client), ANSWER_S))
        return next((one for one in every if ollama.is_same(one.id, model)), None)


async def _reach(line: Line, send: Callable[[], Awaitable[T]]) -> T:
    loop = asyncio.get_running_loop()
    open_s = line.circuit.open_s(loop.time())
    if open_s:
        raise unreachable(line.name, line.circuit.reason or "", open_s)
    try:
        try:
            answer = await send()
        except UpstreamUnreachable:
            await asyncio.sleep(AGAIN_S)
            answer = await send()
    except UpstreamUnreachable as error:
        now = loop.time()
        cause = error.__cause__
        reason = str(cause) if isinstance(cause, ConnectError) else error.message
        line.circuit.failed(reason, now)
        raise unreachable(line.name, reason, line.circuit.open_s(now)) from error
    except GatewayError:
        line.reached()
        raise
    line.reached()
    return answer


def split_name(
    model: str, backend: str | None, upstreams: Container[str]
) -> tuple[str, str] | None:
    """Return the upstream and its model that a request's `model` and `backend` mean.

    None: they mean none. With the backend `ollama` its name may be left out; what begins with a
    slash is a file's path.
    """
    if backend == OLLAMA and not model.startswith((f"{OLLAMA}/", "/")):
        model = f"{OLLAMA}/{model}"
    name, _, rest = model.partition("/")
    return (name, rest) if rest and name in upstreams else None


def unreachable(name: str, reason: str, retry_after_s: float) -> UpstreamUnreachable:
    """Return the error of a request that did not get through."""
    return UpstreamUnreachable(
        f"The upstream {name} cannot be reached: {reason}. Check that it runs and that its "
        "address in the server's settings is right, then ask again.",
        retry_after_s=retry_after_s,
    )


async def _told(asked: Awaitable[T], limit_s: float) -> T:
    """Await a call of Ollama's own; its failures become the gateway's errors."""
    try:
        async with asyncio.timeout(limit_s):
            return await asked
    except ConnectError as error:
        raise UpstreamUnreachable(str(error)) from error
    except TimeoutError:
        raise UpstreamTimeout(
            f"The upstream {OLLAMA} did not answer within {limit_s:g} s. Ask again."
        ) from None
    except (UpstreamError, Unusable) as error:
        raise EngineError(f"The upstream {OLLAMA} failed: {error}. Ask again.") from error
