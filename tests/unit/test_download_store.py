"""Jobs on disk: whole again after a restart, one for each destination."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from xandrouting.core.errors import DestinationOccupied
from xandrouting.downloads import store
from xandrouting.downloads.jobs import Failure, Job, JobState, Order, RemoteFile
from xandrouting.downloads.store import JobStore

FILES = (RemoteFile("a.gguf", 1 << 40, sha256="0" * 64), RemoteFile("ü/b", 0, blob_id="1" * 40))
ORDER = Order("o/n:Q4_0", "https://hub", "o/n", "c" * 40, "n", FILES, "Q4_0", {"n_ctx": 4096})
JOB = Job(
    "dl_1",
    ORDER,
    JobState.PAUSED,
    created_at=1.5,
    started_at=2.5,
    spent_s=3.25,
    done={"a.gguf": 5},
    failure=Failure("disk_full", "The disk is full."),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "downloads.db"


def saved(path: Path) -> list[Job]:
    with closing(JobStore.open(path)) as opened:
        return opened.load()


def save(path: Path, *jobs: Job) -> None:
    with closing(JobStore.open(path)) as opened:
        for job in jobs:
            opened.save(job)


def execute(path: Path, sql: str, *values: object) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(sql, values)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_jobs_survive(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = replace(JOB, id="dl_2", order=replace(ORDER, destination="m", load=None), failure=None)
    save(path, JOB, bare)
    assert saved(path) == [JOB, bare]
    assert warnings(caplog) == []


def test_a_job_is_what_it_was_last(path: Path) -> None:
    save(path, JOB, replace(JOB, state=JobState.COMPLETED, model="/models/n/a.gguf"))
    [job] = saved(path)
    assert (job.state, job.model) == (JobState.COMPLETED, "/models/n/a.gguf")


def test_the_oldest_is_first(path: Path) -> None:
    jobs = [
        replace(JOB, id=f"dl_{at}", created_at=at, order=replace(ORDER, destination=f"{at}"))
        for at in (3.0, 1.0, 2.0)
    ]
    save(path, *jobs)
    assert [job.created_at for job in saved(path)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("state", [s for s in JobState if s not in store.ENDED])
def test_two_jobs_never_have_one_destination(path: Path, state: JobState) -> None:
    other = replace(JOB, id="dl_2", state=state)
    with closing(JobStore.open(path)) as opened:
        opened.save(JOB)
        with pytest.raises(DestinationOccupied):
            opened.save(other)
        assert opened.load() == [JOB]
        opened.save(replace(JOB, state=JobState.FAILED))
        opened.save(other)
        assert len(opened.load()) == 2


def test_the_oldest_of_those_that_ended_are_forgotten(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = [replace(JOB, id=f"dl_{n}", state=JobState.FAILED, created_at=n) for n in range(2, 7)]
    save(path, JOB, *ended)
    monkeypatch.setattr(store, "MAX_ENDED", 2)
    assert [job.id for job in saved(path)] == ["dl_1", "dl_5", "dl_6"]


def test_forgotten(path: Path) -> None:
    with closing(JobStore.open(path)) as opened:
        opened.save(JOB)
        opened.forget(JOB.id)
        assert opened.load() == []


def test_only_this_user_may_read_it(path: Path) -> None:
    save(path, JOB)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


@pytest.mark.parametrize("text", ["{", "[]", '{"id":"x"}', "[" * 100_000])
def test_a_row_of_another_version_is_left_out(
    path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    other = replace(JOB, id="dl_2", order=replace(ORDER, destination="m"))
    save(path, JOB, other)
    execute(path, "UPDATE jobs SET job = ? WHERE id = 'dl_1'", text)
    assert saved(path) == [other]
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("how", ["head", "middle", "version", "columns"])
def test_a_file_that_is_none_of_ours_is_moved_aside(
    path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    save(path, JOB)
    if how == "head":
        path.write_bytes(b"not a database " * 1000)
    elif how == "middle":
        path.write_bytes(path.read_bytes()[:4096] + b"\xa5" * 8192)
    elif how == "version":
        execute(path, "PRAGMA user_version = 99")
    else:
        execute(path, "ALTER TABLE jobs ADD COLUMN colour TEXT")
    assert saved(path) == []
    save(path, JOB)
    assert saved(path) == [JOB]
    assert path.with_name("downloads.db.damaged").exists()
    assert len(warnings(caplog)) == 1


def test_it_goes_on_in_memory_where_there_can_be_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with closing(JobStore.open(tmp_path / "file" / "downloads.db")) as opened:
        opened.save(JOB)
        opened.forget(JOB.id)
        assert opened.load() == []
    assert len(warnings(caplog)) == 1


def test_writes_that_fail_warn_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(JobStore.open(path)) as opened:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            opened.save(JOB)
            opened.save(JOB)
            opened.forget(JOB.id)
        assert len(warnings(caplog)) == 1
        opened.save(JOB)
        assert opened.load() == [JOB]


def test_closed_it_keeps_nothing(path: Path) -> None:
    opened = JobStore.open(path)
    opened.close()
    opened.close()
    opened.save(JOB)
    opened.forget(JOB.id)
    assert opened.load() == []


@contextmanager
def nothing_can_be_written(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def test_what_could_not_be_written_is_written_later(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cancelled = replace(JOB, state=JobState.CANCELLED)
    again = replace(JOB, id="dl_2", state=JobState.DOWNLOADING, created_at=2.0)
    with closing(JobStore.open(path)) as opened:
        opened.save(JOB)
        with nothing_can_be_written(path):
            opened.save(replace(JOB, state=JobState.PENDING))
            opened.save(cancelled)
            opened.save(again)  # into the folder of what is cancelled
            assert opened.load() == [JOB]
        opened.save(again)
        assert opened.load() == [cancelled, again]
        with nothing_can_be_written(path):
            opened.save(replace(again, state=JobState.PAUSED))
    assert [job.state for job in saved(path)] == [JobState.CANCELLED, JobState.PAUSED]
    assert len(warnings(caplog)) == 1


MINE = replace(JOB, state=JobState.DOWNLOADING)
THEIRS = replace(MINE, id="dl_2", created_at=2.0, order=replace(ORDER, destination="m"))


def test_two_gateways_leave_each_other_s_jobs_alone(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(path, MINE)
    with closing(JobStore.open(path)) as first:
        assert first.load() == [MINE]
        assert first.is_alone
        with closing(JobStore.open(path)) as second:
            assert second.load() == []
            assert not second.is_alone
            [warning] = warnings(caplog)
            assert "another gateway" in warning
            assert second.save(THEIRS)
            with pytest.raises(DestinationOccupied):
                second.save(replace(THEIRS, id="dl_3", order=ORDER))
            for one in (first, second):
                assert one.unfinished() == {"dl_1": "n", "dl_2": "m"}
    assert saved(path) == [MINE, THEIRS]


def test_a_gateway_goes_on_with_its_own_when_it_comes_back(path: Path) -> None:
    first, second = JobStore.open(path), JobStore.open(path)
    first.save(MINE)
    second.save(THEIRS)
    first.close()
    with closing(JobStore.open(path)) as first:
        assert first.load() == [MINE]
        assert not first.is_alone
        second.close()
        with closing(JobStore.open(path)) as second:
            assert second.load() == [THEIRS]
    assert saved(path) == [MINE, THEIRS]


def test_jobs_of_who_is_gone_are_the_first_one_s(path: Path) -> None:
    first, second = JobStore.open(path), JobStore.open(path)
    second.save(THEIRS)
    first.close()
    second.close()
    with closing(JobStore.open(path)) as first:
        assert first.load() == [THEIRS]
        with closing(JobStore.open(path)) as other:  # the second's seat is not free now
            assert other.load() == []
            other.save(MINE)
        assert first.unfinished() == {"dl_1": "n", "dl_2": "m"}


def test_without_locks_there_is_one_gateway(path: Path) -> None:
    save(path, MINE)
    path.with_suffix(".lock").unlink()
    path.with_suffix(".lock").mkdir()
    with closing(JobStore.open(path)) as first, closing(JobStore.open(path)) as second:
        assert first.load() == second.load() == [MINE]


def test_jobs_of_the_version_before(path: Path) -> None:
    save(path, MINE)
    execute(path, "ALTER TABLE jobs DROP COLUMN seat")
    execute(path, "PRAGMA user_version = 1")
    assert saved(path) == [MINE]
    save(path, replace(MINE, state=JobState.PAUSED), THEIRS)
    assert [job.state for job in saved(path)] == [JobState.PAUSED, JobState.DOWNLOADING]


def test_whether_the_disk_took_it_is_said(path: Path) -> None:
    with closing(JobStore.open(path)) as opened:
        with nothing_can_be_written(path):
            assert not opened.save(JOB)
        assert opened.save(JOB)
        opened.close()
        assert opened.save(JOB)  # nothing is kept, and nothing of it is wrong
        assert opened.unfinished() == {}
