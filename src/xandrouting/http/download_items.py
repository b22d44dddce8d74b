"""Downloads as answers and events show them."""

from __future__ import annotations

from typing import Final

from xandrouting.core.sizes import in_words
from xandrouting.downloads.jobs import Job, JobState, RemoteFile
from xandrouting.downloads.running import View
from xandrouting.http import lists
from xandrouting.http.decisions import gib
from xandrouting.http.download_schemas import DownloadFile, DownloadItem
from xandrouting.inventory.model_file import VIRTUAL_ROOT

_MOVING: Final = frozenset((JobState.DOWNLOADING, JobState.VERIFYING))


def item_of(view: View, *, with_files: bool = True) -> DownloadItem:
    """Describe a download; without its files, of which there may be thousands, it takes less."""
    job, order = view.job, view.job.order
    failure = job.failure
    started, ended = lists.iso(job.started_at), lists.iso(job.ended_at)
    total, done = order.total_bytes, job.done_bytes
    completed = job.state is JobState.COMPLETED
    return DownloadItem(
        job_id=job.id,
        jobId=job.id,
        status=job.state,
        url=order.url,
        repo_id=order.repo_id,
        revision=order.commit,
        quantization=order.quantization,
        destination=f"{VIRTUAL_ROOT}/{order.destination}",
        model=job.model,
        files=[_file(job, file) for file in order.files] if with_files else [],
        file_count=len(order.files),
        files_downloaded=sum(_is_whole(job, file) for file in order.files),
        downloaded_bytes=done,
        downloadedSize=done,
        total_bytes=total,
        totalSize=total,
        total_gb=gib(total),
        progress=1.0 if completed else (round(done / total, 4) if total else None),
        speed=None if view.bytes_per_s is None else round(view.bytes_per_s, 1),
        eta_seconds=None if view.eta_s is None else round(view.eta_s, 1),
        message=_message(view),
        error=None if failure is None else failure.message,
        error_code=None if failure is None else failure.code,
        created_at=lists.iso(job.created_at) or "",
        started_at=started,
        startedAt=started,
        completed_at=ended,
        completedAt=ended,
        duration_seconds=round(view.spent_s, 3),
    )


def _is_whole(job: Job, file: RemoteFile) -> bool:
    return job.state is JobState.COMPLETED or 0 < file.size <= job.done.get(file.path, 0)


def _file(job: Job, file: RemoteFile) -> DownloadFile:
    done = min(job.done.get(file.path, 0), file.size)
    if _is_whole(job, file):
        status = "completed"
    elif job.state in _MOVING:
        status = "downloading" if done else "pending"
    else:
        status = str(job.state)
    return DownloadFile(path=file.path, size=file.size, downloaded_bytes=done, status=status)


def _message(view: View) -> str:
    job, order = view.job, view.job.order
    if job.note is not None:
        return job.note
    if job.failure is not None:
        return job.failure.message
    so_far = f"{in_words(job.done_bytes)} of {in_words(order.total_bytes)}"
    match job.state:
        case JobState.PENDING:
            return f"{order.repo_id} waits for its turn."
        case JobState.DOWNLOADING if view.waiting is not None:
            return f"{so_far}; trying again: {view.waiting}"
        case JobState.DOWNLOADING if view.bytes_per_s == 0:
            return f"{so_far} of {order.repo_id}; nothing comes at the moment."
        case JobState.DOWNLOADING:
            return f"{so_far} of {order.repo_id}."
        case JobState.VERIFYING:
            return f"Every byte of {order.repo_id} is here; its hashes are checked."
        case JobState.PAUSED:
            return f"Paused at {so_far}. Resume it to go on."
        case JobState.CANCELLED:
            return f"Cancelled at {so_far}."
        case JobState.COMPLETED | JobState.FAILED:
            return f"{order.repo_id} is complete in {VIRTUAL_ROOT}/{order.destination}."
