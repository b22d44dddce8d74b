"""What is said of a download that has ended, and that a restart does not take it away."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.carriers import FakeCarriers
from tests.waiting import async_wait_for
from xandrouting.downloads.downloads import Downloads, Wanted
from xandrouting.downloads.hub import Repository
from xandrouting.downloads.jobs import Job, JobState, RemoteFile
from xandrouting.downloads.movers import Arrived, Wiring
from xandrouting.downloads.place import Place
from xandrouting.downloads.running import View
from xandrouting.downloads.store import JobStore
from xandrouting.http.download_items import item_of

S = JobState
WEIGHTS = "a-Q4_0.gguf"
NO_MODEL = "Complete in /models/a. None of its files is a model by itself."
NOT_LOADED = "Complete, but /models/a was not loaded: there is no room."


class OneRepository:
    """A hub that has one file of 1 MiB in every repository."""

    endpoint = "http://hub.example"

    async def look(self, repo_id: str, revision: str | None) -> Repository:
        sha256 = hashlib.sha256(repo_id.encode()).hexdigest()
        return Repository(repo_id, "c" * 40, (RemoteFile(WEIGHTS, 1 << 20, sha256=sha256),))


class World:
    """One models directory and one data directory, and the gateways that use them in turn."""

    def __init__(self, root: Path, stack: AsyncExitStack) -> None:
        self.root = root
        self.carriers = FakeCarriers()
        self.arrived = Arrived("/models/a")
        self.refusal: str | None = None  # of a load
        self.news: list[View] = []
        self._stack = stack

    async def start(self) -> Downloads:
        async def arrive(_: Job) -> Arrived:
            return self.arrived

        async def load(_: str, __: Mapping[str, Any]) -> str | None:
            return self.refusal

        wiring = Wiring(self.carriers, arrive, load, self.news.append)
        store = JobStore.open(self.root / "downloads.db")
        place = Place(self.root / "models")
        made = Downloads(OneRepository(), place, store, wiring, max_downloads=1)
        return await self._stack.enter_async_context(made)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(tmp_path, stack)


async def submit(downloads: Downloads, **fields: Any) -> str:
    return (await downloads.submit(Wanted("org/a", **fields))).job.id


async def reach(downloads: Downloads, job_id: str, state: JobState) -> View:
    await async_wait_for(lambda: downloads.view(job_id).job.state is state)
    return downloads.view(job_id)


def message(downloads: Downloads, job_id: str) -> str:
    return item_of(downloads.view(job_id)).message


async def completed(world: World, downloads: Downloads, **fields: Any) -> str:
    job_id = await submit(downloads, **fields)
    (await world.carriers.next(0)).finish()
    await reach(downloads, job_id, S.COMPLETED)
    return job_id


async def test_why_there_is_no_model_outlives_a_restart(world: World) -> None:
    world.arrived = Arrived(None, NO_MODEL)
    downloads = await world.start()
    job_id = await completed(world, downloads)
    assert message(downloads, job_id) == NO_MODEL
    assert world.news[-1].job.note == NO_MODEL
    await downloads.aclose()
    assert message(await world.start(), job_id) == NO_MODEL


async def test_why_it_was_not_loaded_outlives_a_restart(world: World) -> None:
    world.refusal = NOT_LOADED
    downloads = await world.start()
    job_id = await completed(world, downloads, load={})
    await async_wait_for(lambda: message(downloads, job_id) == NOT_LOADED)
    await downloads.aclose()
    downloads = await world.start()
    assert message(downloads, job_id) == NOT_LOADED
    world.refusal = None
    assert await submit(downloads, load={}) == job_id  # and now it is loaded
    await downloads.aclose()
    assert message(await world.start(), job_id) == "org/a is complete in /models/a."


async def test_a_job_of_an_older_version_says_nothing(world: World) -> None:
    downloads = await world.start()
    job_id = await completed(world, downloads)
    await downloads.aclose()
    with closing(sqlite3.connect(world.root / "downloads.db", isolation_level=None)) as rows:
        [text] = rows.execute("SELECT job FROM jobs").fetchone()
        job = json.loads(text)
        assert job.pop("note") is None
        rows.execute("UPDATE jobs SET job = ?", (json.dumps(job),))
    downloads = await world.start()
    assert downloads.view(job_id).job.note is None
    assert message(downloads, job_id) == "org/a is complete in /models/a."


async def test_who_got_the_bytes_of_a_cancelled_one(world: World) -> None:
    downloads = await world.start()
    first = await submit(downloads)
    (await world.carriers.next(0)).bring({WEIGHTS: 1 << 19})
    await downloads.cancel(first)
    assert message(downloads, first).startswith("Cancelled at ")
    second = await submit(downloads)
    said = f"Cancelled. Its bytes went to the download {second}."
    assert message(downloads, first) == said
    assert [view.job.note for view in world.news if view.job.id == first][-1] == said
    assert downloads.view(first).job.done_bytes == 0
    await downloads.cancel(first, purge=True)  # there is nothing left to delete
    assert message(downloads, first) == said
    assert downloads.view(second).job.done_bytes == 1 << 19
    await downloads.aclose()
    assert message(await world.start(), first) == said


async def test_who_got_the_bytes_of_a_failed_one(world: World) -> None:
    downloads = await world.start()
    first = await submit(downloads)
    carrier = await world.carriers.next(0)
    carrier.bring({WEIGHTS: 1 << 19})
    carrier.fail("refused", "The hub gave up.")
    await reach(downloads, first, S.FAILED)
    assert message(downloads, first) == "The hub gave up."
    second = await submit(downloads)
    item = item_of(downloads.view(first))
    assert item.message == f"Failed. Its bytes went to the download {second}."
    assert item.error == "The hub gave up."
    await downloads.cancel(second)
    await downloads.resume(first)
    assert "Its bytes went" not in message(downloads, first)  # it moves by itself again


async def test_one_that_had_no_bytes_gave_none_away(world: World) -> None:
    downloads = await world.start()
    first = await submit(downloads)
    await downloads.cancel(first)
    before = message(downloads, first)
    await submit(downloads)
    assert message(downloads, first) == before


@pytest.mark.parametrize("late", [False, True])
async def test_bytes_that_were_deleted(world: World, late: bool) -> None:
    downloads = await world.start()
    first = await submit(downloads)
    (await world.carriers.next(0)).bring({WEIGHTS: 1 << 19})
    if late:
        await downloads.cancel(first)
    await downloads.cancel(first, purge=True)
    assert message(downloads, first) == "Cancelled. Its bytes are deleted."
