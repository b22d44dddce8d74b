"""Downloads, with movers that do as the test says: turns, wishes, and what is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.unit.downloading import COMMIT, World, reach, remote, submit
from tests.waiting import async_wait_for
from xandrouting.core.errors import (
    AmbiguousDownload,
    DestinationOccupied,
    DownloadNotFound,
    DownloadOver,
    GatewayError,
    HubUnreachable,
    InvalidDestination,
    InvalidRequest,
    ShuttingDown,
    UnsafeRepository,
)
from xandrouting.downloads import movers, select
from xandrouting.downloads.downloads import Wanted
from xandrouting.downloads.hub import Repository
from xandrouting.downloads.jobs import JobState
from xandrouting.downloads.place import Place
from xandrouting.downloads.running import View
from xandrouting.downloads.select import Chosen, choose

S = JobState


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(movers, "DEATH_WAIT_S", 0.001)
    async with AsyncExitStack() as stack:
        yield World(tmp_path, stack)


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


async def test_it_is_told_whether_any_moves(world: World) -> None:
    downloads = await world.start(max_downloads=2)
    first, second, _ = [await submit(downloads, name) for name in "abc"]
    await downloads.cancel(first)
    await downloads.cancel(second)
    assert world.moving == [True]
    (await world.carriers.next(2)).finish()
    await async_wait_for(lambda: world.moving == [True, False])
    await downloads.aclose()
    assert world.moving == [True, False]


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


async def test_asking_again_for_what_is_cancelled_that_moment(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = await world.start()
    first = await submit(downloads)
    await downloads.pause(first)
    resume = downloads.resume

    async def too_late(job_id: str) -> View:
        await downloads.cancel(job_id)
        return await resume(job_id)

    monkeypatch.setattr(downloads, "resume", too_late)
    second = await submit(downloads)
    assert second != first
    await reach(downloads, second, S.DOWNLOADING)


async def test_a_long_listing_holds_up_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = await world.start()
    begun, goes_on = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> Chosen:
        begun.set()
        assert goes_on.wait(5), "the loop stood still"
        return choose(*arguments)

    monkeypatch.setattr(select, "choose", slowly)
    for ask in (downloads.submit, downloads.verify):
        begun.clear()
        goes_on.clear()
        asked = asyncio.create_task(ask(Wanted("org/a")))
        await asyncio.to_thread(begun.wait, 5)
        goes_on.set()
        await asked


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


# The end.


async def test_an_order_whose_hub_answers_after_the_end_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = await world.start()
    asked, answered = asyncio.Event(), asyncio.Event()
    look = world.hub.look

    async def slowly(repo_id: str, revision: str | None) -> Repository:
        asked.set()
        await answered.wait()
        return await look(repo_id, revision)

    monkeypatch.setattr(world.hub, "look", slowly)
    wished = asyncio.create_task(downloads.submit(Wanted("org/a")))
    await asked.wait()
    await downloads.aclose()
    answered.set()
    with pytest.raises(ShuttingDown):
        await wished
    assert world.stored() == []


async def test_an_order_that_is_being_taken_at_the_end_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = await world.start()
    looked, goes_on = threading.Event(), threading.Event()
    look = Place.look

    def slowly(self: Place, *arguments: Any, **options: Any) -> Any:
        looked.set()
        goes_on.wait(5)
        return look(self, *arguments, **options)

    monkeypatch.setattr(Place, "look", slowly)
    wished = asyncio.create_task(downloads.submit(Wanted("org/a")))
    await asyncio.to_thread(looked.wait, 5)
    closes = asyncio.create_task(downloads.aclose())
    await asyncio.sleep(0)
    goes_on.set()
    view = await wished
    await closes
    assert view.job.state is S.PENDING
    assert [(job.id, job.state) for job in world.stored()] == [(view.job.id, S.PENDING)]
    assert world.carriers.all == []
