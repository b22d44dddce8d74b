"""How a download is shown, in each of its states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from xandrouting.downloads.jobs import Failure, Job, JobState, Order, RemoteFile
from xandrouting.downloads.running import View
from xandrouting.http.download_items import item_of

S = JobState
MIB = 1 << 20
FILES = tuple(RemoteFile(name, 4 * MIB, sha256="0" * 64) for name in ("whole", "half", "nothing"))
ORDER = Order("o/n", "http://hub", "o/n", "c" * 40, "n", FILES, "Q4_0")
DONE = {"whole": 4 * MIB, "half": 2 * MIB, "nothing": 0}


def view(state: JobState, *, waiting: str | None = None, **fields: Any) -> View:
    job = Job("dl_1", ORDER, state, created_at=0.0, **{"done": DONE, **fields})
    return View(job, bytes_per_s=None, eta_s=None, spent_s=0.0, waiting=waiting)


@pytest.mark.parametrize(
    ("state", "half", "nothing"),
    [
        (S.DOWNLOADING, "downloading", "pending"),
        (S.VERIFYING, "downloading", "pending"),
        (S.PENDING, "pending", "pending"),
        (S.PAUSED, "paused", "paused"),
        (S.CANCELLED, "cancelled", "cancelled"),
        (S.FAILED, "failed", "failed"),
        (S.COMPLETED, "completed", "completed"),
    ],
)
def test_a_file_comes_only_while_its_download_moves(
    state: JobState, half: str, nothing: str
) -> None:
    failure = Failure("refused", "It failed.") if state is S.FAILED else None
    files = item_of(view(state, failure=failure)).files
    assert [file.status for file in files] == ["completed", half, nothing]


def test_without_its_files_all_else_is_the_same() -> None:
    moving = view(S.DOWNLOADING)
    whole, short = item_of(moving), item_of(moving, with_files=False)
    assert short == whole.model_copy(update={"files": []})
    assert (short.file_count, short.files_downloaded) == (3, 1)


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (view(S.PENDING), "o/n waits for its turn."),
        (view(S.DOWNLOADING), "6.0 MiB of 12.0 MiB of o/n."),
        (
            replace(view(S.DOWNLOADING), bytes_per_s=0.0),
            "6.0 MiB of 12.0 MiB of o/n; nothing comes at the moment.",
        ),
        (
            view(S.DOWNLOADING, waiting="it answers 500"),
            "6.0 MiB of 12.0 MiB; trying again: it answers 500",
        ),
        (view(S.VERIFYING), "Every byte of o/n is here; its hashes are checked."),
        (view(S.PAUSED), "Paused at 6.0 MiB of 12.0 MiB. Resume it to go on."),
        (view(S.PAUSED, failure=Failure("disk_full", "It is full.")), "It is full."),
        (view(S.CANCELLED), "Cancelled at 6.0 MiB of 12.0 MiB."),
        (view(S.CANCELLED, note="Its bytes are elsewhere."), "Its bytes are elsewhere."),
        (view(S.FAILED, failure=Failure("gone", "It is gone.")), "It is gone."),
        (view(S.COMPLETED), "o/n is complete in /models/n."),
        (view(S.COMPLETED, note="Complete, and no model."), "Complete, and no model."),
    ],
)
def test_the_message(shown: View, message: str) -> None:
    assert item_of(shown).message == message
