"""Downloads with movers that do as the test says, and the gateways that use them in turn."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import msgspec

from tests.fakes.carriers import FakeCarriers
from tests.waiting import async_wait_for
from xandrouting.core.errors import GatewayError
from xandrouting.downloads.downloads import Downloads, Wanted
from xandrouting.downloads.hub import Repository
from xandrouting.downloads.jobs import Job, JobState, RemoteFile
from xandrouting.downloads.movers import Arrived, Wiring
from xandrouting.downloads.place import Place
from xandrouting.downloads.running import View
from xandrouting.downloads.store import JobStore

COMMIT = "c" * 40


def remote(path: str, size: int = 100) -> RemoteFile:
    return RemoteFile(path, size, sha256=hashlib.sha256(f"{path}{size}".encode()).hexdigest())


class FakeHub:
    endpoint = "http://hub.example"

    def __init__(self) -> None:
        self.repos: dict[str, list[RemoteFile]] = {}
        self.commit = COMMIT
        self.error: GatewayError | None = None
        self.asked: list[tuple[str, str | None]] = []

    async def look(self, repo_id: str, revision: str | None) -> Repository:
        self.asked.append((repo_id, revision))
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return Repository(repo_id, self.commit, tuple(self.repos[repo_id]))


class World:
    """One models directory and one data directory, and the gateways that use them in turn."""

    def __init__(self, root: Path, stack: AsyncExitStack) -> None:
        self.models = root / "models"
        self.data = root / "data"
        self.hub = FakeHub()
        for name in "abc":
            self.hub.repos[f"org/{name}"] = [remote(f"{name}-Q4_0.gguf"), remote("README.md")]
        self.carriers = FakeCarriers()
        self.news: list[View] = []
        self.moving: list[bool] = []
        self.loaded: list[tuple[str, Any]] = []
        self._stack = stack

    async def start(self, max_downloads: int = 2) -> Downloads:
        async def arrive(job: Job) -> Arrived:
            return Arrived(f"/models/{job.order.destination}/{job.order.files[0].path}")

        async def load(model: str, options: Any) -> str | None:
            self.loaded.append((model, options))
            return None

        wiring = Wiring(self.carriers, arrive, load, self.news.append, self.moving.append)
        store = JobStore.open(self.data / "downloads.db")
        made = Downloads(self.hub, Place(self.models), store, wiring, max_downloads=max_downloads)
        return await self._stack.enter_async_context(made)

    def stored(self) -> list[Job]:
        with closing(sqlite3.connect(self.data / "downloads.db")) as connection:
            rows = connection.execute("SELECT job FROM jobs ORDER BY created_at").fetchall()
        return [msgspec.json.decode(text, type=Job) for [text] in rows]

    def states(self, job_id: str) -> list[JobState]:
        """What was told of a job, one after the other."""
        told = [view.job.state for view in self.news if view.job.id == job_id]
        return [state for n, state in enumerate(told) if n == 0 or state is not told[n - 1]]


async def submit(downloads: Downloads, name: str = "a", **fields: Any) -> str:
    return (await downloads.submit(Wanted(f"org/{name}", **fields))).job.id


async def reach(downloads: Downloads, job_id: str, state: JobState) -> View:
    await async_wait_for(lambda: downloads.view(job_id).job.state is state)
    return downloads.view(job_id)
