"""Downloads: from a wish to a folder of files that are all there and all right."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from xandrouting.core.errors import (
    DestinationOccupied,
    DownloadNotFound,
    DownloadOver,
    GatewayError,
    InvalidRequest,
    ShuttingDown,
)
from xandrouting.downloads import select, urls
from xandrouting.downloads.hub import Repository
from xandrouting.downloads.jobs import ENDED, LIVE, Job, JobState, Order
from xandrouting.downloads.leftovers import NO_LEFTOVERS, Leftovers
from xandrouting.downloads.movers import Movers, Wiring
from xandrouting.downloads.names import check_destination, check_listing
from xandrouting.downloads.packaged import AnyHub
from xandrouting.downloads.place import KEPT_S, Found, Place
from xandrouting.downloads.running import Running, View
from xandrouting.downloads.select import Chosen, Variant, Wish
from xandrouting.downloads.store import MAX_ENDED, JobStore, taken
from xandrouting.downloads.urls import Asked

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asks for. `load` are the options of a load that shall follow; None: none."""

    url: str
    destination: str | None = None
    quantization: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    revision: str | None = None
    load: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """A repository that can be had, what of it a download would fetch, and its choices.

    `chosen` is None where a download would be refused; `refusal` says why.
    """

    repository: Repository
    chosen: Chosen | None
    refusal: GatewayError | None
    variants: tuple[Variant, ...]


class Downloads:
    """All downloads of one models directory. Use as an async context.

    Leaving it stops the movers and changes nothing of the jobs: they go on at the next start.
    """

    def __init__(
        self, hub: AnyHub, place: Place, store: JobStore, wiring: Wiring, *, max_downloads: int
    ) -> None:
        self._hub = hub
        self._place = place
        self._store = store
        self._known: dict[str, Running] = {}  # in the order of their beginning
        self._admission = asyncio.Lock()  # whoever holds it decides who may have what
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="downloads-store")
        self._movers = Movers(place, wiring, self._save, max_downloads=max_downloads)
        self._closed = False

    async def __aenter__(self) -> Self:
        """Go on with what was moving when the process before this one ended."""
        try:
            await asyncio.to_thread(self._place.check_usable)
        except GatewayError as error:
            log.warning("downloads will be refused: %s", error.message)
        jobs = await self._in_writer(self._store.load)
        if self._store.is_alone:  # else others have folders that we know nothing of
            kept = {job.id for job in jobs if _keeps_bytes(job)}
            await asyncio.to_thread(self._place.drop_forgotten, kept)
        for job in jobs:
            running = Running(replace(job, moving_since=None))
            self._known[job.id] = running
            if job.state in ENDED:
                continue
            done = await asyncio.to_thread(self._place.on_disk, job.id, job.order)
            running.job = replace(running.job, done=done)
            wish = await asyncio.to_thread(self._place.noted, job.id)
            if wish is not None and wish is not job.state:
                running.become(wish)
                await self._save(running.job)
            elif job.state in LIVE:
                running.become(JobState.PENDING)
                log.info("download goes on job=%s repo=%s", job.id, job.order.repo_id)
                self._movers.enqueue(running)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop the movers. What moved is remembered as moving."""
        if self._closed:
            return
        self._closed = True
        await self._movers.aclose()
        for running in list(self._known.values()):
            async with running.turn:  # a wish that came before this is seen through
                pass
        async with self._admission:
            await self._in_writer(self._store.close)
        self._writer.shutdown()

    # What is known.

    @property
    def fetched_bytes(self) -> int:
        """What came over the wire since the start."""
        return self._movers.fetched_bytes

    def views(self) -> list[View]:
        """Return every download, the newest first."""
        return [running.view() for running in reversed(self._known.values())]

    def view(self, job_id: str) -> View:
        """Return one.

        Raises:
            DownloadNotFound: there is none.
        """
        return self._running(job_id).view()

    async def until_settled(self, job_id: str) -> View:
        """Wait until a download has ended or is paused, and return it.

        Raises:
            DownloadNotFound: there is none.
        """
        running = self._running(job_id)
        await running.settled.wait()
        return running.view()

    def counts(self) -> Mapping[JobState, int]:
        """Return how many there are in each state."""
        return Counter(running.job.state for running in self._known.values())

    def destinations(self) -> frozenset[str]:
        """Return the folders that downloads write to, or will when they are resumed."""
        return frozenset(
            running.job.order.destination
            for running in self._known.values()
            if running.job.state not in ENDED
        )

    # What is asked.

    async def verify(self, wanted: Wanted) -> Verified:
        """Look at a repository as a download would, and fetch nothing.

        Raises:
            GatewayError: it cannot be had, or what is asked for cannot be a repository.
        """
        asked, repository = await self._look(wanted)
        return await asyncio.to_thread(_verified, repository, _wish(asked, wanted))

    async def submit(self, wanted: Wanted) -> View:
        """Begin a download, or return the one that does the same already.

        Raises:
            GatewayError: it cannot be had, does not fit the disk, or its folder is taken.
        """
        self._check_open()
        if wanted.destination is not None:
            check_destination(wanted.destination)
        asked, repository = await self._look(wanted)
        wish = _wish(asked, wanted)
        # In a thread, as all that goes through a listing: some have 50,000 files.
        chosen = await asyncio.to_thread(select.choose, repository.repo_id, repository.files, wish)
        name = repository.repo_id.rpartition("/")[2].lower()
        order = Order(
            url=wanted.url.strip(),
            endpoint=self._hub.endpoint,
            repo_id=repository.repo_id,
            commit=repository.commit,
            destination=check_destination(wanted.destination or name),
            files=chosen.files,
            quantization=chosen.quantization,
            load=wanted.load,
            package=repository.package,
        )
        while True:
            async with self._admission:
                self._check_open()  # the hub may have taken its time
                twin = self._twin(order)
                if twin is None or twin.job.state in ENDED:
                    return await self._admit(order, twin)
                if order.load is not None:
                    twin.job = replace(twin.job, order=replace(twin.job.order, load=order.load))
                    await self._save(twin.job)
            if twin.job.state is not JobState.PAUSED:
                return twin.view()
            try:
                return await self.resume(twin.job.id)
            except DownloadOver:
                pass  # it was cancelled just now: look again

    async def pause(self, job_id: str) -> View:
        """Stop a download for as long as nobody resumes it; returns when it has stopped.

        Raises:
            DownloadNotFound: there is none.
            DownloadOver: it has ended.
        """
        self._check_open()
        running = self._running(job_id)
        async with running.turn:
            if running.job.state is not JobState.PAUSED:
                await self._movers.end(running, JobState.PAUSED)
        return running.view()

    async def cancel(self, job_id: str, *, purge: bool = False) -> View:
        """End a download; returns when it has stopped. Its bytes stay, unless `purge`.

        `purge` deletes the bytes of one that was cancelled or failed before, too.

        Raises:
            DownloadNotFound: there is none.
            DownloadOver: it has ended.
        """
        self._check_open()
        running = self._running(job_id)
        async with running.turn:
            over = running.job.state in (JobState.CANCELLED, JobState.FAILED)
            if not (purge and over):
                await self._movers.end(running, JobState.CANCELLED)
            if purge:
                await asyncio.to_thread(self._place.drop_job, job_id)
                deleted = f"{running.job.state.capitalize()}. Its bytes are deleted."
                note = running.job.note or deleted  # another download may have got them
                running.job = replace(running.job, done={}, note=note)
                await self._save(running.job)
                self._movers.tell(running)
        return running.view()

    async def resume(self, job_id: str) -> View:
        """Go on with a download that was paused or has failed, from the bytes on disk.

        Raises:
            DownloadNotFound: there is none.
            DownloadOver: it is completed or was cancelled.
            InsufficientDisk: there is still no room for the rest of it.
            DestinationOccupied: another one has its folder meanwhile.
        """
        self._check_open()
        running = self._running(job_id)
        async with running.turn, self._admission:
            job = running.job
            if job.state in LIVE:
                return running.view()
            if job.state in (JobState.COMPLETED, JobState.CANCELLED):
                again = " Ask for it again: POST /v1/models/download takes what is on disk."
                raise DownloadOver(
                    f"The download of {job.order.repo_id} is {job.state}."
                    + again * (job.state is JobState.CANCELLED)
                )
            await self._check_alone(job.order, running)
            await asyncio.to_thread(self._check_disk, job.id, job.order, Found())
            running.become(JobState.PENDING)
            await self._save(running.job)
            self._movers.enqueue(running)
        return running.view()

    # How it is decided.

    async def _look(self, wanted: Wanted) -> tuple[Asked, Repository]:
        asked = urls.parse(wanted.url, self._hub.endpoint)
        revision = asked.revision
        if wanted.revision is not None:
            revision = urls.check_revision(wanted.revision)
            if asked.revision not in (None, revision):
                raise InvalidRequest(
                    f"The url is of revision {asked.revision!r}, `revision` is {revision!r}: say "
                    "one of them.",
                    param="revision",
                )
        repository = await self._hub.look(asked.repo_id, revision)
        await asyncio.to_thread(check_listing, repository.repo_id, repository.files)
        return asked, repository

    def _twin(self, order: Order) -> Running | None:
        """Return the latest job that puts the same files into the same folder."""
        same = [one for one in self._known.values() if one.job.order.is_as(order)]
        moving = [one for one in same if one.job.state not in ENDED] or same
        return moving[-1] if moving else None

    async def _check_alone(self, order: Order, me: Running | None = None) -> Collection[str]:
        """Check that nobody has the order's folder; return what other gateways download."""
        for other in self._known.values():
            if other is me or other.job.state in ENDED:
                continue
            if other.job.order.destination == order.destination:
                raise DestinationOccupied(
                    f"The download {other.job.id} of {other.job.order.repo_id} has the folder "
                    f"{order.destination!r}. Wait for it, cancel it, or choose another "
                    "`destination`.",
                    param="destination",
                    details={"job_id": other.job.id},
                )
        unfinished = await self._in_writer(self._store.unfinished)
        others = {job_id: to for job_id, to in unfinished.items() if job_id not in self._known}
        if order.destination in others.values():
            raise taken(order)
        return others.keys()

    async def _admit(self, order: Order, before: Running | None) -> View:
        """Take a new order; `before` is an ended job of the same."""
        others = await self._check_alone(order)
        found = await asyncio.to_thread(self._place.look, order)
        complete = not found.lacks(order)
        if complete and before is not None and before.job.state is JobState.COMPLETED:
            await self._movers.load(before, order.load)
            return before.view()
        job = Job(f"dl_{secrets.token_hex(8)}", order, JobState.PENDING, time.time())
        running = Running(job)
        if complete:
            running.job = replace(job, done={file.path: file.size for file in order.files})
        else:
            mine = {one.job.id for one in self._known.values() if one.job.state not in ENDED}
            spared = mine.union(others)
            done, givers = await asyncio.to_thread(self._open, job.id, order, found, spared)
            running.job = replace(job, done=done)
            for giver in givers & self._known.keys():
                await self._hand_over(self._known[giver], job.id)
        await self._save(running.job)
        self._known[job.id] = running
        await self._forget_old()
        log.info(
            "download asked job=%s repo=%s commit=%s files=%d bytes=%d",
            *(job.id, order.repo_id, order.commit, len(order.files), order.total_bytes),
        )
        if complete:
            await self._movers.complete(running)
        else:
            self._movers.enqueue(running)
        return running.view()

    async def _hand_over(self, before: Running, job_id: str) -> None:
        """Remember that bytes of an ended job are another's now."""
        there = await asyncio.to_thread(self._place.on_disk, before.job.id, before.job.order)
        done = {path: size for path, size in there.items() if size}
        what = "Some of its" if done else "Its"
        note = f"{before.job.state.capitalize()}. {what} bytes went to the download {job_id}."
        before.job = replace(before.job, done=done, note=note)
        await self._save(before.job)
        self._movers.tell(before)

    async def _forget_old(self) -> None:
        ended = [one for one in self._known.values() if one.job.state in ENDED]
        for old in ended[: max(0, len(ended) - MAX_ENDED)]:
            del self._known[old.job.id]
            await self._in_writer(functools.partial(self._store.forget, old.job.id))

    def _open(
        self, job_id: str, order: Order, found: Found, spared: Collection[str]
    ) -> tuple[dict[str, int], set[str]]:
        """Make the job's folder; return what is in it and whose that was. In a thread.

        It gets the bytes that jobs left of the same files, but for the jobs that are `spared`.

        Raises:
            InsufficientDisk: the rest does not fit the disk.
            ModelsDirUnusable: it cannot be written.
        """
        with self._place.leftovers(order, found, spared) as left:
            self._check_disk(job_id, order, found, left)
            givers = self._place.open_job(job_id, left)
        return self._place.on_disk(job_id, order), givers

    def _check_disk(
        self, job_id: str, order: Order, found: Found, left: Leftovers = NO_LEFTOVERS
    ) -> None:
        there = self._place.on_disk(job_id, order, left)
        need = sum(file.size - there[file.path] for file in found.lacks(order))
        # Not what the mover tells: files that were there before it counts once it has hashed them.
        promised = sum(
            job.order.total_bytes - sum(self._place.on_disk(job.id, job.order).values())
            for job in (running.job for running in list(self._known.values()))
            if job.state in LIVE
        )
        self._place.room_for(need, promised_bytes=promised, repo_id=order.repo_id)

    def _check_open(self) -> None:
        if self._closed:
            raise ShuttingDown("The server is shutting down. Downloads go on at its next start.")

    def _running(self, job_id: str) -> Running:
        running = self._known.get(job_id)
        if running is None:
            raise DownloadNotFound(
                "There is no such download. GET /v1/models/download lists all that are known."
            )
        return running

    async def _save(self, job: Job) -> None:
        await self._in_writer(functools.partial(self._keep, job))

    def _keep(self, job: Job) -> None:
        """Save a job; a wish that its disk does not take is kept beside the job's bytes."""
        wish = job.state in (JobState.PAUSED, JobState.CANCELLED)
        saved = self._store.save(job)
        self._place.note(job.id, job.state if wish and not saved else None)

    async def _in_writer(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, call)


def _verified(repository: Repository, wish: Wish) -> Verified:
    found = tuple(select.distinct(select.variants(repository.files)))
    try:
        chosen = select.choose(repository.repo_id, repository.files, wish)
    except GatewayError as refusal:
        return Verified(repository, None, refusal, found)
    return Verified(repository, chosen, None, found)


def _wish(asked: Asked, wanted: Wanted) -> Wish:
    """Join what the url says and what stands beside it.

    Raises:
        InvalidRequest: they contradict each other.
    """
    said = (asked.quantization or "").lower(), (wanted.quantization or "").lower()
    if all(said) and said[0] != said[1]:
        raise InvalidRequest(
            f"The url asks for {said[0]!r}, `quantization` for {said[1][:100]!r}: say one of them.",
            param="quantization",
        )
    return Wish(
        quantization=wanted.quantization or asked.quantization,
        include=wanted.include,
        exclude=wanted.exclude,
        file=asked.file,
        folder=asked.folder,
    )


def _keeps_bytes(job: Job) -> bool:
    """Whether what is on disk of a job shall stay there."""
    if job.state is JobState.COMPLETED:
        return False
    return job.ended_at is None or time.time() - job.ended_at < KEPT_S
