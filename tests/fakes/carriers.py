"""Movers without a process: a test says what each does, and publishes as a mover does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xandrouting.downloads.courier import Ending, Outcome
from xandrouting.downloads.jobs import Failure

Event = Mapping[str, Any]


class FakeCarrier:
    """One run; it does nothing until a test has it go on, or it is stopped."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        self.order = order
        self.running = asyncio.Event()
        self.stopped = False
        self._ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._on_event: Callable[[Event], None] = lambda _: None

    async def run(self, on_event: Callable[[Event], None]) -> Outcome:
        if self.stopped:
            return Outcome(Ending.STOPPED)
        self._on_event = on_event
        self.running.set()
        return await self._ended

    async def stop(self) -> None:
        self.stopped = True
        self.end(Outcome(Ending.STOPPED))

    @property
    def paths(self) -> list[str]:
        return [file["path"] for file in self.order["files"]]

    def say(self, event: str, **facts: Any) -> None:
        self._on_event({"event": event, **facts})

    def bring(self, done: Mapping[str, int], fetched: int | None = None) -> None:
        """Write bytes into the parts, and tell of them."""
        for file in self.order["files"]:
            if file["path"] in done:
                part = Path(self.order["parts"], file["sha256"])
                part.write_bytes(b"x" * done[file["path"]])
        self.say("progress", done=done, fetched=sum(done.values()) if fetched is None else fetched)

    def publish(self) -> None:
        target = Path(self.order["target"])
        for file in self.order["files"]:
            path = target / file["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * file["size"])
        target.mkdir(parents=True, exist_ok=True)
        (target / ".xandrouting.json").write_text(json.dumps(self.order["manifest"]))

    def finish(self) -> None:
        self.publish()
        self.end(Outcome(Ending.DONE))

    def fail(self, code: str, message: str = "It failed.") -> None:
        self.end(Outcome(Ending.FAILED, Failure(code, message)))

    def die(self) -> None:
        self.end(Outcome(Ending.LOST, Failure("mover_lost", "It was killed.")))

    def end(self, outcome: Outcome) -> None:
        if not self._ended.done():
            self._ended.set_result(outcome)


@dataclass
class FakeCarriers:
    """Every run there was, in order."""

    all: list[FakeCarrier] = field(default_factory=list)
    _made: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, order: Mapping[str, Any]) -> FakeCarrier:
        carrier = FakeCarrier(order)
        self.all.append(carrier)
        self._made.set()
        return carrier

    async def next(self, number: int | None = None) -> FakeCarrier:
        """Wait for the run of this number, from 0; None: for the next one."""
        number = len(self.all) if number is None else number
        async with asyncio.timeout(5):
            while len(self.all) <= number:
                self._made.clear()
                await self._made.wait()
            await self.all[number].running.wait()
        return self.all[number]
