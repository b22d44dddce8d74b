"""An event loop on a clock that jumps: tests of hours take milliseconds.

It is for tests with no sockets, threads or subprocesses: nothing outside the loop can wake it.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

P = ParamSpec("P")


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of sleeping until the next timer, move the clock to it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("every task is blocked and no timer is set")
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop whose time begins at 0.0 and passes only while every task waits for it."""

    def __init__(self) -> None:
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on a VirtualTimeLoop; pytest sees a plain function.

    A deadlock fails at once. So does a task the test leaves behind, and an exception that
    nobody retrieved or that a callback let through.
    """

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(_with_nothing_left(test(*args, **kwargs)))

    return run


async def _with_nothing_left(test: Coroutine[Any, Any, None]) -> None:
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    await test
    left = sorted(
        task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()
    )
    if left:
        raise RuntimeError(f"the test left tasks behind: {', '.join(left)}")
    if unhandled:
        raise RuntimeError(unhandled[0]["message"]) from unhandled[0].get("exception")
