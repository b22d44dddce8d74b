"""Downloads over restarts, deaths and full disks: nothing is lost."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.carriers import FakeCarrier
from tests.unit.downloading import COMMIT, World, reach, remote, submit
from xandrouting.core.errors import (
    DestinationOccupied,
    DownloadOver,
    InsufficientDisk,
    ShuttingDown,
)
from xandrouting.downloads import downloads as downloads_module
from xandrouting.downloads import movers
from xandrouting.downloads.downloads import Downloads, Wanted
from xandrouting.downloads.jobs import JobState
from xandrouting.downloads.movers import MAX_DEATHS
from xandrouting.downloads.place import Place

S = JobState


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(movers, "DEATH_WAIT_S", 0.001)
    async with AsyncExitStack() as stack:
        yield World(tmp_path, stack)


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


async def cancelled(world: World, downloads: Downloads, size: int) -> str:
    """Leave so many bytes of `org/a` behind."""
    job_id = await submit(downloads)
    (await world.carriers.next(0)).bring({"a-Q4_0.gguf": size})
    await downloads.cancel(job_id)
    return job_id


@pytest.mark.parametrize("changed", ["commit", "destination", "repository"])
async def test_bytes_serve_every_download_of_the_same_content(world: World, changed: str) -> None:
    downloads = await world.start()
    first = await cancelled(world, downloads, 40)
    world.hub.repos["org/b"] = world.hub.repos["org/a"]
    world.hub.commit = "d" * 40 if changed == "commit" else COMMIT
    second = await submit(
        downloads,
        "b" if changed == "repository" else "a",
        destination="other" if changed == "destination" else None,
    )
    assert downloads.view(second).job.done_bytes == 40
    before = downloads.view(first).job
    assert (before.state, before.done_bytes) == (S.CANCELLED, 0)
    assert before.note is not None
    assert second in before.note
    assert before in world.stored()


async def test_bytes_of_what_is_paused_stay_its_own(world: World) -> None:
    downloads = await world.start()
    first = await submit(downloads)
    (await world.carriers.next(0)).bring({"a-Q4_0.gguf": 40})
    await downloads.pause(first)
    second = await submit(downloads, destination="other")
    assert downloads.view(second).job.done_bytes == 0
    assert downloads.view(first).job.done_bytes == 40


async def test_some_of_a_failed_one_s_bytes_are_taken(world: World) -> None:
    downloads = await world.start()
    world.hub.repos["org/a"] = [
        remote("a-Q8_0-00001-of-00002.gguf"),
        remote("a-Q8_0-00002-of-00002.gguf"),
    ]
    first = await submit(downloads)
    carrier = await world.carriers.next(0)
    carrier.bring(dict.fromkeys(carrier.paths, 50))
    carrier.fail("refused")
    await reach(downloads, first, S.FAILED)
    world.hub.repos["org/b"] = [
        *world.hub.repos["org/a"][:1],
        remote("a-Q8_0-00002-of-00002.gguf", 7),
    ]
    second = await submit(downloads, "b")
    assert downloads.view(second).job.done_bytes == 50
    failed = downloads.view(first).job
    assert failed.done == {"a-Q8_0-00002-of-00002.gguf": 50}
    assert failed.note is not None
    assert failed.note.startswith("Failed. Some of its bytes went")
    assert (await downloads.resume(first)).job.state is S.PENDING


async def test_bytes_outlive_a_store_that_is_lost(world: World) -> None:
    downloads = await world.start()
    await submit(downloads)
    (await world.carriers.next(0)).bring({"a-Q4_0.gguf": 40})
    await downloads.aclose()
    (world.data / "downloads.db").write_bytes(b"no database")
    downloads = await world.start()
    assert downloads.views() == []
    assert (await downloads.submit(Wanted("org/a"))).job.done_bytes == 40


async def test_a_refusal_takes_no_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = await world.start()
    first = await cancelled(world, downloads, 40)

    def full(_: Place, need_bytes: int, **__: object) -> None:
        assert need_bytes == 60
        raise InsufficientDisk("Make room.")

    with monkeypatch.context() as patch:
        patch.setattr(Place, "room_for", full)
        with pytest.raises(InsufficientDisk):
            await submit(downloads)
    assert downloads.view(first).job.done_bytes == 40
    assert (await downloads.submit(Wanted("org/a"))).job.done_bytes == 40


async def test_a_second_gateway_leaves_the_first_one_s_jobs_alone(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    first = await world.start()
    job_id = await submit(first)
    (await world.carriers.next(0)).bring({"a-Q4_0.gguf": 40})
    second = await world.start()
    assert second.views() == []
    assert caplog.text.count("another gateway") == 1
    with pytest.raises(DestinationOccupied, match="another gateway"):
        await submit(second)
    own = await submit(second, destination="other")
    assert second.view(own).job.done_bytes == 0  # the first's are in use
    (await world.carriers.next(1)).bring({"a-Q4_0.gguf": 10})
    await first.aclose()
    first = await world.start()
    assert [view.job.id for view in first.views()] == [job_id]
    (await world.carriers.next(2)).finish()
    await reach(first, job_id, S.COMPLETED)
    world.carriers.all[1].finish()
    await reach(second, own, S.COMPLETED)
    assert {job.id: job.state for job in world.stored()} == {
        job_id: S.COMPLETED,
        own: S.COMPLETED,
    }


@pytest.mark.parametrize("state", [S.PAUSED, S.CANCELLED])
async def test_a_wish_that_the_store_could_not_keep(world: World, state: JobState) -> None:
    downloads = await world.start()
    job_id = await submit(downloads)
    (await world.carriers.next(0)).bring({"a-Q4_0.gguf": 40})
    wish = downloads.pause if state is S.PAUSED else downloads.cancel
    with closing(sqlite3.connect(world.data / "downloads.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        await wish(job_id)
        await downloads.aclose()
    assert [job.state for job in world.stored()] == [S.DOWNLOADING]
    downloads = await world.start()
    assert downloads.view(job_id).job.state is state
    assert [job.state for job in world.stored()] == [state]
    if state is S.PAUSED:
        await downloads.resume(job_id)
        await downloads.aclose()
        downloads = await world.start()
        assert downloads.view(job_id).job.state is not S.PAUSED


async def test_a_resume_does_not_take_another_gateway_s_folder(world: World) -> None:
    first, second = await world.start(), await world.start()
    failed = await submit(first)
    (await world.carriers.next(0)).fail("refused")
    await reach(first, failed, S.FAILED)
    other = await submit(second, "b", destination="a")
    with pytest.raises(DestinationOccupied, match="another gateway"):
        await first.resume(failed)
    assert first.view(failed).job.state is S.FAILED
    await second.cancel(other)
    assert (await first.resume(failed)).job.state is S.PENDING


async def test_files_put_there_by_hand_are_promised_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def room_for(_: Place, need_bytes: int, *, promised_bytes: int, repo_id: str) -> None:
        asked.append((need_bytes, promised_bytes))

    monkeypatch.setattr(Place, "room_for", room_for)
    (world.models / "a").mkdir(parents=True)
    (world.models / "a" / "a-Q4_0.gguf").write_bytes(bytes(100))
    downloads = await world.start()
    assert (await downloads.submit(Wanted("org/a"))).job.done_bytes == 100
    carrier = await world.carriers.next(0)
    assert (carrier.paths, carrier.order["merge"]) == (["a-Q4_0.gguf"], True)
    carrier.say("progress", done={"a-Q4_0.gguf": 0}, fetched=0)  # it is not hashed yet
    await submit(downloads, "b")
    assert asked == [(0, 0), (100, 0)]
