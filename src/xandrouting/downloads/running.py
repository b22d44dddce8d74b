"""One job while it is known: what is true of it, how fast it goes, and its way to the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Protocol
from urllib.parse import quote, urlsplit

from xandrouting.downloads.courier import Outcome
from xandrouting.downloads.jobs import ENDED, LIVE, Failure, Job, JobState, Order, RemoteFile
from xandrouting.downloads.pace import Pace

PARALLEL: Final = 4  # files at once
WINDOW_BYTES: Final = 512 << 20  # of one request: some servers refuse more
STALL_S: Final = 20.0  # a connection that brings nothing for so long is given up
REPORT_S: Final = 0.3
NEWS_S: Final = 0.25  # between two news of a job that only moves


class Carrier(Protocol):
    """One mover's process."""

    async def run(self, on_event: Callable[[Mapping[str, Any]], None]) -> Outcome:
        """Have the order carried out and return how that ended."""

    async def stop(self) -> None:
        """End it; every byte stays. It may not run yet."""


@dataclass(slots=True)
class Running:
    """A job and what only this process knows of it.

    `wish` is what it shall become as soon as its mover has ended. `waiting` says why nothing
    moves at the moment.
    """

    job: Job
    wish: JobState | None = None
    task: asyncio.Task[None] | None = None
    carrier: Carrier | None = None
    pace: Pace | None = None
    fetched: int = 0  # by this run's mover
    waiting: str | None = None
    told_at: float = 0.0  # of the last news, monotonic
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # whoever holds it wishes
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # it does not move by itself

    def __post_init__(self) -> None:
        self._settle()

    def become(
        self, state: JobState, failure: Failure | None = None, note: str | None = None
    ) -> None:
        """Have the job in another state from now on."""
        now, before = time.time(), self.job
        job = replace(before.become(state), failure=failure, note=note)
        moving = state in (JobState.DOWNLOADING, JobState.VERIFYING)
        if moving and before.state is JobState.PENDING:
            job = replace(job, started_at=before.started_at or now, moving_since=now)
        self.job = replace(job, ended_at=now if state in ENDED else None)
        self._settle()
        if not moving:
            self.pace, self.waiting = None, None
            self.pauses_clock()

    def _settle(self) -> None:
        if self.job.state in LIVE:
            self.settled.clear()
        else:
            self.settled.set()

    def pauses_clock(self) -> None:
        """Count the time up to now; the job goes on in another process."""
        since = self.job.moving_since
        if since is not None:
            spent_s = self.job.spent_s + max(0.0, time.time() - since)
            self.job = replace(self.job, spent_s=spent_s, moving_since=None)

    def hears(self, event: Mapping[str, Any], now: float) -> int:
        """Take what the mover says; return how many bytes of it are new over the wire."""
        match event.get("event"):
            case "progress":
                return self._moved(event["done"], event["fetched"], now)
            case "verifying" if self.job.state is JobState.DOWNLOADING:
                self.become(JobState.VERIFYING)
            case "waiting":
                self.waiting = str(event.get("why", ""))
        return 0

    def _moved(self, done: Mapping[str, int], fetched: int, now: float) -> int:
        new, self.fetched = fetched - self.fetched, fetched
        self.job = replace(self.job, done={**self.job.done, **done})
        if self.pace is not None:
            self.pace.moved(fetched, now)
        if new > 0:
            self.waiting = None
            if self.job.state is JobState.VERIFYING:  # something was wrong: it comes again
                self.become(JobState.DOWNLOADING)
        return max(0, new)

    def view(self) -> View:
        """Return what there is to show."""
        job = self.job
        moves = job.state is JobState.DOWNLOADING and self.pace is not None
        pace = self.pace if moves else None
        left = job.order.total_bytes - job.done_bytes
        spent_s = job.spent_s
        if job.moving_since is not None:
            spent_s += max(0.0, time.time() - job.moving_since)
        return View(
            job=job,
            bytes_per_s=None if pace is None else pace.bytes_per_s,
            eta_s=None if pace is None else pace.eta_s(left),
            spent_s=spent_s,
            waiting=self.waiting,
        )


@dataclass(frozen=True, slots=True)
class View:
    """A job at one moment, and how fast it goes. None: nobody can say."""

    job: Job
    bytes_per_s: float | None
    eta_s: float | None
    spent_s: float
    waiting: str | None


def order_of(
    order: Order, files: tuple[RemoteFile, ...], place: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the mover's order: these files of a job, and where they go."""
    package = None if order.package is None else asdict(order.package)
    return {
        "files": [
            {
                "path": file.path,
                "url": file_url(order, file.path),
                "size": file.size,
                "sha256": file.sha256,
                "blob_id": file.blob_id,
                "package": package,
            }
            for file in files
        ],
        **place,
        "token_hosts": [authority(order.endpoint)],
        "parallel": PARALLEL,
        "window_bytes": WINDOW_BYTES,
        "stall_s": STALL_S,
        "report_s": REPORT_S,
    }


def file_url(order: Order, path: str) -> str:
    """Return where the hub has a file of the order's commit."""
    return f"{order.endpoint}/{order.repo_id}/resolve/{order.commit}/{quote(path)}"


def authority(endpoint: str) -> str:
    """Return `host:port` of a hub."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
