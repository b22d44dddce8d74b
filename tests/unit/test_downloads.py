"""Downloads, with movers that do as the test says: turns, wishes, restarts, and what is refused."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.carriers import FakeCarrier, FakeCarriers
from tests.waiting import async_wait_for
from xandrouting.core.errors import (
    AmbiguousDownload,
    DestinationOccupied,
    DownloadNotFound,
    DownloadOver,
    GatewayError,
    HubUnreachable,
    InsufficientDisk,
    InvalidDestination,
    InvalidRequest,
    ShuttingDown,
    UnsafeRepository,
)
from xandrouting.downloads import downloads as downloads_module
from xandrouting.downloads import movers
from xandrouting.downloads.downloads import Downloads, Wanted
from xandrouting.downloads.hub import Repository
from xandrouting.downloads.jobs import Job, JobState, RemoteFile
from xandrouting.downloads.movers import MAX_DEATHS, Arrived, Wiring
from xandrouting.downloads.place import Place
from xandrouting.downloads.running import View
from xandrouting.downloads.store import JobStore

S = JobState
COMMIT = "c" * 40


def remote(path: str, size: int = 100) -> RemoteFile:
    return RemoteFile(path, size, sha256=hashlib.sha256(f"{path}{size}".encode()).hexdigest())


class FakeHub:
    endpoint = "http://hub.example"

    def __init__(self) -> None:
        self.repos: dict[str, list[RemoteFile]] = {}
        self.error: GatewayError | None = None
        self.asked: list[tuple[str, str | None]] = []

    async def look(self, repo_id: str, revision: str | None) -> Repository:
        self.asked.append((repo_id, revision))
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return Repository(repo_id, COMMIT, tuple(self.repos[repo_id]))


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
        self.loaded: list[tuple[str, Any]] = []
        self._stack = stack

    async def start(self, max_downloads: int = 2) -> Downloads:
        async def arrive(job: Job) -> Arrived:
            return Arrived(f"/models/{job.order.destination}/{job.order.files[0].path}")

        async def load(model: str, options: Any) -> str | None:
            self.loaded.append((model, options))
            return None

        wiring = Wiring(self.carriers, arrive, load, self.news.append)
        store = JobStore.open(self.data / "downloads.db")
        made = Downloads(self.hub, Place(self.models), store, wiring, max_downloads=max_downloads)
        return await self._stack.enter_async_context(made)

    def stored(self) -> list[Job]:
        with closing(JobStore.open(self.data / "downloads.db")) as store:
            return store.load()

    def states(self, job_id: str) -> list[JobState]:
        """What was told of a job, one after the other."""
        told = [view.job.state for view in self.news if view.job.id == job_id]
        return [state for n, state in enumerate(told) if n == 0 or state is not told[n - 1]]


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(movers, "DEATH_WAIT_S", 0.001)
    async with AsyncExitStack() as stack:
        yield World(tmp_path, stack)


async def submit(downloads: Downloads, name: str = "a", **fields: Any) -> str:
    return (await downloads.submit(Wanted(f"org/{name}", **fields))).job.id


async def reach(downloads: Downloads, job_id: str, state: JobState) -> View:
    await async_wait_for(lambda: downloads.view(job_id).job.state is state)
    return downloads.view(job_id)


async def test_from_a_wish_to_a_model(world: World) -> None:
    downloads = await world.start()
    view = await downloads.submit(Wanted("org/a", load={"n_ctx": 2048}))
    assert (view.job.state, view.job.done) == (S.PENDING, {"a-Q4_0.gguf": 0})
    job_id = view.job.id
    carrier = await world.carriers.next(0)
    assert carrier.paths == ["a-Q4_0.gguf"]
    assert carrier.order["files"][0]["url"] == (
        f"http://hub.example/org/a/resolve/{COMMIT}/a-Q4_0.gguf"
    )
    assert carrier.order["token_hosts"] == ["hub.example:80"]
    assert carrier.order["merge"] is False
    carrier.bring({"a-Q4_0.gguf": 40})
    assert downloads.view(job_id).job.done_bytes == 40
    carrier.say("verifying")
    assert downloads.view(job_id).job.state is S.VERIFYING
    carrier.finish()
    view = await reach(downloads, job_id, S.COMPLETED)
    assert (view.job.model, view.job.done_bytes) == ("/models/a/a-Q4_0.gguf", 100)
    assert view.job.ended_at is not None
    assert world.states(job_id) == [S.PENDING, S.DOWNLOADING, S.VERIFYING, S.COMPLETED]
    await async_wait_for(lambda: world.loaded == [("/models/a/a-Q4_0.gguf", {"n_ctx": 2048})])
    assert downloads.fetched_bytes == 40
    assert list((world.models / ".incoming").iterdir()) == []
    assert [job.state for job in world.stored()] == [S.COMPLETED]


async def test_progress_is_told_four_times_a_second_at_most(world: World) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    carrier = await world.carriers.next(0)
    before = len(world.news)
    for done in range(50):
        carrier.bring({"a-Q4_0.gguf": done})
    assert len(world.news) <= before + 1
    assert downloads.view(job_id).job.done_bytes == 49


async def test_who_waits_is_said_to(world: World) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    carrier = await world.carriers.next(0)
    carrier.say("waiting", seconds=3, why="it answers 500")
    assert downloads.view(job_id).waiting == "it answers 500"
    carrier.bring({"a-Q4_0.gguf": 10})
    assert downloads.view(job_id).waiting is None


async def test_bytes_that_were_wrong_come_again(world: World) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    carrier = await world.carriers.next(0)
    carrier.bring({"a-Q4_0.gguf": 100})
    carrier.say("verifying")
    carrier.say("progress", done={"a-Q4_0.gguf": 20}, fetched=120)
    view = downloads.view(job_id)
    assert (view.job.state, view.job.done_bytes) == (S.DOWNLOADING, 20)
    assert downloads.fetched_bytes == 120


async def test_at_most_so_many_move_and_the_first_is_first(world: World) -> None:
    downloads = await world.start(max_downloads=1)
    first, second, third = [await submit(downloads, name) for name in "abc"]
    carrier = await world.carriers.next(0)
    assert [downloads.view(one).job.state for one in (first, second, third)] == [
        *(S.DOWNLOADING, S.PENDING, S.PENDING)
    ]
    assert downloads.counts() == {S.DOWNLOADING: 1, S.PENDING: 2}
    carrier.finish()
    carrier = await world.carriers.next(1)
    assert carrier.paths == ["b-Q4_0.gguf"]
    await downloads.pause(third)
    await downloads.resume(third)
    await downloads.cancel(second)
    carrier = await world.carriers.next(2)
    assert carrier.paths == ["c-Q4_0.gguf"]
    assert [view.job.id for view in downloads.views()] == [third, second, first]


async def test_the_same_again_is_the_same_job(world: World) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    assert await submit(downloads) == job_id
    assert await submit(downloads, quantization="Q4_0", load={}) == job_id
    carrier = await world.carriers.next(0)
    carrier.finish()
    await reach(downloads, job_id, S.COMPLETED)
    await async_wait_for(lambda: len(world.loaded) == 1)
    assert await submit(downloads, load={"ttl": 5}) == job_id
    assert world.loaded[1] == ("/models/a/a-Q4_0.gguf", {"ttl": 5})
    assert len(world.carriers.all) == 1


async def test_many_at_once_ask_for_the_same(world: World) -> None:
    downloads = await world.start()
    assert len(set(await asyncio.gather(*(submit(downloads) for _ in range(20))))) == 1
    await world.carriers.next(0)
    assert len(downloads.views()) == 1


async def test_what_is_complete_already_is_completed_at_once(world: World) -> None:
    downloads = await world.start()
    await submit(downloads)
    (await world.carriers.next(0)).finish()
    await reach(downloads, downloads.views()[0].job.id, S.COMPLETED)
    await downloads.aclose()
    (world.data / "downloads.db").unlink()
    downloads = await world.start()
    view = await downloads.submit(Wanted("org/a"))
    assert (view.job.state, view.job.model) == (S.COMPLETED, "/models/a/a-Q4_0.gguf")
    assert len(world.carriers.all) == 1


async def test_what_was_deleted_is_fetched_again(world: World) -> None:
    downloads = await world.start()
    first = await submit(downloads)
    (await world.carriers.next(0)).finish()
    await reach(downloads, first, S.COMPLETED)
    (world.models / "a" / "a-Q4_0.gguf").unlink()
    second = await submit(downloads)
    assert second != first
    carrier = await world.carriers.next(1)
    assert (carrier.paths, carrier.order["merge"]) == (["a-Q4_0.gguf"], True)


async def test_another_quantization_goes_beside_the_first(world: World) -> None:
    downloads = await world.start()
    world.hub.repos["org/a"] += [remote("a-Q8_0.gguf")]
    first = await submit(downloads, quantization="Q4_0")
    with pytest.raises(DestinationOccupied, match=first):
        await submit(downloads, quantization="Q8_0")
    assert await submit(downloads, quantization="Q8_0", destination="other") != first
    (await world.carriers.next(0)).finish()
    await reach(downloads, first, S.COMPLETED)
    await submit(downloads, quantization="Q8_0")
    carrier = await world.carriers.next(2)
    assert (carrier.paths, carrier.order["merge"]) == (["a-Q8_0.gguf"], True)
    manifest = carrier.order["manifest"]
    assert [file["path"] for file in manifest["files"]] == ["a-Q4_0.gguf", "a-Q8_0.gguf"]


async def test_pause_and_resume(world: World) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    carrier = await world.carriers.next(0)
    carrier.bring({"a-Q4_0.gguf": 40})
    view = await downloads.pause(job_id)
    assert (view.job.state, view.bytes_per_s, carrier.stopped) == (S.PAUSED, None, True)
    assert (await downloads.pause(job_id)).job.state is S.PAUSED
    assert downloads.destinations() == {"a"}
    with pytest.raises(DestinationOccupied):
        await submit(downloads, "b", destination="a")
    view = await downloads.resume(job_id)
    assert view.job.done_bytes == 40
    assert (await downloads.resume(job_id)).job.id == job_id
    (await world.carriers.next(1)).finish()
    await reach(downloads, job_id, S.COMPLETED)
    for wish in (downloads.pause, downloads.resume, downloads.cancel):
        with pytest.raises(DownloadOver, match="completed"):
            await wish(job_id)


async def test_asking_again_resumes_what_was_paused(world: World) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    await downloads.pause(job_id)
    assert await submit(downloads) == job_id
    await reach(downloads, job_id, S.DOWNLOADING)


async def test_cancel_keeps_bytes_for_the_same_again(world: World) -> None:
    downloads = await world.start()
    first = await submit(downloads)
    (await world.carriers.next(0)).bring({"a-Q4_0.gguf": 40})
    view = await downloads.cancel(first)
    assert (view.job.state, view.job.done_bytes) == (S.CANCELLED, 40)
    for wish in (downloads.pause, downloads.resume, downloads.cancel):
        with pytest.raises(DownloadOver, match="cancelled"):
            await wish(first)
    view = await downloads.submit(Wanted("org/a"))
    assert view.job.id != first
    assert view.job.done_bytes == 40
    assert downloads.view(first).job.state is S.CANCELLED


@pytest.mark.parametrize("late", [False, True])
async def test_purge_deletes_the_bytes(world: World, late: bool) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    (await world.carriers.next(0)).bring({"a-Q4_0.gguf": 40})
    if late:
        await downloads.cancel(job_id)
    view = await downloads.cancel(job_id, purge=True)
    assert (view.job.state, view.job.done_bytes) == (S.CANCELLED, 0)
    assert list((world.models / ".incoming").iterdir()) == []
    assert (await downloads.submit(Wanted("org/a"))).job.done_bytes == 0


async def test_wishes_that_cross(world: World) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    await world.carriers.next(0)
    paused, resumed, cancelled = await asyncio.gather(
        downloads.pause(job_id), downloads.resume(job_id), downloads.cancel(job_id)
    )
    assert cancelled.job.state is S.CANCELLED
    assert downloads.view(job_id).job.state is S.CANCELLED
    assert {paused.job.id, resumed.job.id} == {job_id}


async def test_cancel_before_its_turn(world: World) -> None:
    downloads = await world.start(max_downloads=1)
    await submit(downloads)
    second = await submit(downloads, "b")
    assert (await downloads.cancel(second)).job.state is S.CANCELLED
    (await world.carriers.next(0)).finish()
    third = await submit(downloads, "c")
    await reach(downloads, third, S.DOWNLOADING)
    assert len(world.carriers.all) == 2


async def test_cancel_right_after_asking(world: World) -> None:
    downloads = await world.start()
    for name in "abc":
        job_id = await submit(downloads, name)
        assert (await downloads.cancel(job_id)).job.state is S.CANCELLED
    assert downloads.counts() == {S.CANCELLED: 3}


async def test_a_failure_is_told_and_can_be_tried_again(world: World) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    carrier = await world.carriers.next(0)
    carrier.bring({"a-Q4_0.gguf": 40})
    carrier.fail("refused", "The hub gave up.")
    view = await reach(downloads, job_id, S.FAILED)
    assert view.job.failure is not None
    assert (view.job.failure.code, view.job.failure.message) == ("refused", "The hub gave up.")
    with pytest.raises(DownloadOver, match="failed"):
        await downloads.cancel(job_id)
    view = await downloads.resume(job_id)
    assert (view.job.state, view.job.failure, view.job.ended_at) == (S.PENDING, None, None)
    (await world.carriers.next(1)).finish()
    await reach(downloads, job_id, S.COMPLETED)


async def test_a_full_disk_pauses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    (await world.carriers.next(0)).fail("disk_full", "The disk is full.")
    view = await reach(downloads, job_id, S.PAUSED)
    assert view.job.failure is not None
    assert view.job.failure.code == "disk_full"

    def full(*_: object, **__: object) -> None:
        raise InsufficientDisk("Make room.")

    with monkeypatch.context() as patch:
        patch.setattr(Place, "room_for", full)
        with pytest.raises(InsufficientDisk):
            await downloads.resume(job_id)
    assert downloads.view(job_id).job.state is S.PAUSED
    assert (await downloads.resume(job_id)).job.failure is None


async def test_the_disk_is_reckoned_with_the_other_downloads(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def room_for(_: Place, need_bytes: int, *, promised_bytes: int, repo_id: str) -> None:
        asked.append((need_bytes, promised_bytes))

    monkeypatch.setattr(Place, "room_for", room_for)
    downloads = await world.start()
    first = await submit(downloads, "a")
    (await world.carriers.next(0)).bring({"a-Q4_0.gguf": 30})
    await submit(downloads, "b")
    await downloads.cancel(first)
    await submit(downloads, "c")
    await submit(downloads, "a")
    assert asked == [(100, 0), (100, 70), (100, 100), (70, 200)]


async def test_a_mover_that_is_killed_is_followed_by_the_next(world: World) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    for number in range(MAX_DEATHS + 2):
        carrier = await world.carriers.next(number)
        carrier.bring({"a-Q4_0.gguf": 10 * (number + 1)})
        carrier.die()
    assert downloads.view(job_id).job.state is S.DOWNLOADING
    (await world.carriers.next(MAX_DEATHS + 2)).finish()
    await reach(downloads, job_id, S.COMPLETED)


async def test_a_mover_that_always_dies_is_a_failure(world: World) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    for number in range(MAX_DEATHS):
        (await world.carriers.next(number)).die()
    view = await reach(downloads, job_id, S.FAILED)
    assert view.job.failure is not None
    assert view.job.failure.code == "mover_lost"
    assert len(world.carriers.all) == MAX_DEATHS


async def test_no_mover_can_be_started(world: World) -> None:
    def broken(order: Any) -> FakeCarrier:
        raise OSError("no more processes")

    world.carriers = broken  # type: ignore[assignment]
    downloads = await world.start()
    job_id = await submit(downloads)
    view = await reach(downloads, job_id, S.FAILED)
    assert view.job.failure is not None
    assert view.job.failure.code == "mover_lost"


async def test_a_bug_is_logged_and_ends_that_job_alone(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(order: Any) -> FakeCarrier:
        raise KeyError("bug")

    world.carriers = broken  # type: ignore[assignment]
    downloads = await world.start()
    view = await reach(downloads, await submit(downloads), S.FAILED)
    assert view.job.failure is not None
    assert view.job.failure.code == "internal_error"
    assert "Traceback" in caplog.text
    await submit(downloads, "b")


async def test_somebody_else_took_the_folder_meanwhile(world: World) -> None:
    downloads = await world.start(max_downloads=1)
    await submit(downloads, "a")
    second = await submit(downloads, "b")
    (world.models / "b").write_text("a file")
    (await world.carriers.next(0)).finish()
    view = await reach(downloads, second, S.FAILED)
    assert view.job.failure is not None
    assert view.job.failure.code == "destination_occupied"


async def test_a_restart_goes_on_where_it_was(world: World) -> None:
    downloads = await world.start(max_downloads=1)
    moving, paused, waiting = [await submit(downloads, name) for name in "abc"]
    (await world.carriers.next(0)).bring({"a-Q4_0.gguf": 40})
    await downloads.pause(paused)
    async with asyncio.timeout(1):
        await downloads.aclose()
    assert {job.id: job.state for job in world.stored()} == {
        moving: S.DOWNLOADING,
        paused: S.PAUSED,
        waiting: S.PENDING,
    }
    for refused in (downloads.submit(Wanted("org/a")), downloads.pause(moving)):
        with pytest.raises(ShuttingDown):
            await refused
    downloads = await world.start()
    view = downloads.view(moving)
    assert view.job.done_bytes == 40
    for number in (1, 2):
        (await world.carriers.next(number)).finish()
    await reach(downloads, moving, S.COMPLETED)
    await reach(downloads, waiting, S.COMPLETED)
    assert downloads.view(paused).job.state is S.PAUSED
    assert len(world.carriers.all) == 3


async def test_cancelled_and_failed_stay_so_over_a_restart(world: World) -> None:
    downloads = await world.start()
    cancelled, failed = await submit(downloads, "a"), await submit(downloads, "b")
    await world.carriers.next(1)
    for carrier in world.carriers.all:
        carrier.bring({carrier.paths[0]: 10})
    await downloads.cancel(cancelled)
    [carrier] = [one for one in world.carriers.all if not one.stopped]
    carrier.fail("refused")
    await reach(downloads, failed, S.FAILED)
    await downloads.aclose()
    downloads = await world.start()
    assert downloads.view(cancelled).job.state is S.CANCELLED
    assert downloads.view(failed).job.state is S.FAILED
    assert len(world.carriers.all) == 2
    assert (await downloads.resume(failed)).job.done_bytes == 10
    assert (await downloads.submit(Wanted("org/a"))).job.done_bytes == 10


async def test_a_job_that_was_published_as_the_gateway_died(world: World) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    carrier = await world.carriers.next(0)
    carrier.publish()
    await downloads.aclose()
    downloads = await world.start()
    carrier = await world.carriers.next(1)
    assert carrier.paths == []
    carrier.finish()
    await reach(downloads, job_id, S.COMPLETED)


async def test_the_time_that_counts_is_the_time_it_moves(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("xandrouting.downloads.running.time.time", lambda: now)
    downloads = await world.start()
    job_id = await submit(downloads)
    await world.carriers.next(0)
    now += 5
    assert downloads.view(job_id).spent_s == 5
    await downloads.pause(job_id)
    now += 100
    assert downloads.view(job_id).spent_s == 5
    await downloads.resume(job_id)
    await world.carriers.next(1)
    now += 2
    await downloads.aclose()
    now += 100
    downloads = await world.start()
    carrier = await world.carriers.next(2)
    now += 1
    carrier.finish()
    assert (await reach(downloads, job_id, S.COMPLETED)).spent_s == 8


async def test_the_oldest_that_ended_are_forgotten(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads_module, "MAX_ENDED", 1)
    downloads = await world.start()
    for name in "abc":
        await downloads.cancel(await submit(downloads, name))
    names = [view.job.order.repo_id for view in downloads.views()]
    assert names == ["org/c", "org/b"]


Ask = Callable[[Downloads], Any]


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        (Wanted("http://evil/?huggingface.co/a/b"), InvalidRequest),
        (Wanted("org/a", destination="../x"), InvalidDestination),
        (Wanted("org/a", destination=""), InvalidDestination),
        (Wanted("org/a:Q4_0", quantization="Q8_0"), InvalidRequest),
        (Wanted("org/a", revision="a b"), InvalidRequest),
        (Wanted("https://hf.co/org/a/tree/v1", revision="v2"), InvalidRequest),
        (Wanted("org/two", quantization="Q4_0"), AmbiguousDownload),
        (Wanted("org/evil"), UnsafeRepository),
    ],
)
async def test_what_is_refused_leaves_nothing(
    world: World, wanted: Wanted, error: type[GatewayError]
) -> None:
    world.hub.repos["org/two"] = [remote("a/x-Q4_0.gguf"), remote("b/y-Q4_0.gguf")]
    world.hub.repos["org/evil"] = [remote("a-Q4_0.gguf"), remote("../../evil")]
    downloads = await world.start()
    with pytest.raises(error):
        await downloads.submit(wanted)
    assert downloads.views() == []
    assert not world.models.exists()


async def test_the_hub_s_refusal_is_the_answer(world: World) -> None:
    downloads = await world.start()
    world.hub.error = HubUnreachable("down")
    for call in (downloads.submit, downloads.verify):
        with pytest.raises(HubUnreachable):
            await call(Wanted("org/a"))


async def test_a_revision_is_asked_for(world: World) -> None:
    downloads = await world.start()
    await downloads.submit(Wanted("https://hf.co/org/a/tree/v1"))
    await downloads.submit(Wanted("org/a", revision="v2"))
    await downloads.submit(Wanted("https://hf.co/org/a/tree/v3", revision="v3"))
    assert world.hub.asked == [("org/a", "v1"), ("org/a", "v2"), ("org/a", "v3")]


async def test_unknown_jobs(world: World) -> None:
    downloads = await world.start()
    with pytest.raises(DownloadNotFound):
        downloads.view("dl_x")
    for wish in (downloads.pause, downloads.resume, downloads.cancel):
        with pytest.raises(DownloadNotFound):
            await wish("dl_x")


async def test_verify_tells_and_fetches_nothing(world: World) -> None:
    world.hub.repos["org/a"] += [remote("a-Q8_0.gguf", 200)]
    downloads = await world.start()
    told = await downloads.verify(Wanted("org/a"))
    assert [one.name for one in told.variants] == ["Q4_0", "Q8_0"]
    assert told.chosen is not None
    assert told.chosen.quantization == "Q4_0"
    told = await downloads.verify(Wanted("org/a", quantization="Q2_K"))
    assert told.chosen is None
    assert told.refusal is not None
    assert told.refusal.code == "no_such_quantization"
    assert downloads.views() == []
    assert world.carriers.all == []
