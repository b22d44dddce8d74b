"""What goes wrong at a hub, on the way and on the disk, and what the mover makes of it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.hub import (
    Corrupt,
    Cut,
    Html,
    Hub,
    IgnoreRange,
    NeedsRange,
    Refuse,
    Slow,
    Stall,
    WrongLength,
)
from tests.fakes.hub_content import random_bytes
from tests.fakes.movers import (
    REPO,
    Mover,
    assert_published,
    mover,
    order_for,
    part_sizes,
    run_mover,
    waits,
)
from tests.fetching import small_filesystem
from tests.waiting import wait_for

MIB = 1 << 20
SIZE = 4 * MIB
BIG = "big-Q4_0.gguf"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add_repo(REPO, {BIG: ("random", SIZE, 1), "config.json": b"{}"})
        yield hub


def assert_failed(said: Mover, code: str, *words: str) -> None:
    assert said.process.returncode == (4 if code == "disk_full" else 3)
    assert said.failure is not None
    assert said.failure["code"] == code
    for word in words:
        assert word in said.failure["message"]
    assert "/" not in said.failure["message"].replace(REPO, "")
    assert not said.named("done")


# The way there


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "fin"])
def test_connection_that_breaks_often_costs_no_byte(hub: Hub, tmp_path: Path, reset: bool) -> None:
    hub.fault(BIG, Cut(600_000, reset=reset), times=6)
    order = order_for(hub, tmp_path)
    said = run_mover(order)
    assert_published(hub, order)
    assert waits(said) == [0.5] * 6  # each brought bytes, so none counts
    assert said.fetched == SIZE + 2


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "fin"])
def test_connection_that_breaks_before_a_byte_is_tried_again_later(
    hub: Hub, tmp_path: Path, reset: bool
) -> None:
    hub.fault(BIG, Cut(0, reset=reset), times=2)
    order = order_for(hub, tmp_path)
    said = run_mover(order)
    assert_published(hub, order)
    assert waits(said) == [0.5, 1.0]


def test_stall_is_left_behind(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, Stall(1_000_000))
    order = order_for(hub, tmp_path, stall_s=0.4)
    said = run_mover(order)
    assert_published(hub, order)
    assert "no byte came for 0.4 s" in said.named("waiting")[0]["why"]
    assert said.fetched == SIZE + 2


def test_slow_is_no_stall(hub: Hub, tmp_path: Path) -> None:
    hub.fault("config.json", Slow(2))
    order = order_for(hub, tmp_path, stall_s=0.9)
    said = run_mover(order)
    assert_published(hub, order)
    assert not said.named("waiting")


def test_ignored_range_is_used_from_the_first_byte(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, IgnoreRange())
    order = order_for(hub, tmp_path, window_bytes=MIB)
    said = run_mover(order)
    assert_published(hub, order)
    assert said.fetched == SIZE + 2
    assert len(hub.requests(BIG, "cdn")) == 1


def test_ignored_range_never_corrupts(hub: Hub, tmp_path: Path) -> None:
    """The server cuts, then always begins anew: what is there already is read and dropped."""
    hub.fault(BIG, Cut(MIB))
    hub.fault(BIG, IgnoreRange(), times=None)
    hub.fault(BIG, Cut(3 * MIB))
    order = order_for(hub, tmp_path)
    said = run_mover(order)
    assert_published(hub, order)
    assert said.named("done")


def test_ignored_range_that_never_gets_further_ends(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, IgnoreRange(), times=None)
    hub.fault(BIG, Cut(MIB), times=None)
    order = order_for(hub, tmp_path)
    with mover(order) as said:
        wait_for(lambda: len(said.named("waiting")) >= 4, 10)
        assert waits(said)[:4] == [0.5, 1.0, 2.0, 4.0]  # only the first try brought something
        hub.heal()
        assert said.wait() == 0
    assert_published(hub, order)


def test_server_that_needs_a_range_gets_one(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, NeedsRange(), times=None)
    order = order_for(hub, tmp_path)
    assert run_mover(order).named("done")
    assert_published(hub, order)


def test_hub_that_goes_away_and_comes_back(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, Slow(10 * MIB))
    order = order_for(hub, tmp_path)
    with mover(order) as said:
        said.until_bytes(MIB)
        hub.down()
        wait_for(lambda: len(said.named("waiting")) >= 3, 10)
        hub.up()
        assert said.wait() == 0
    assert_published(hub, order)
    assert said.fetched == SIZE + 2


# What the hub answers


@pytest.mark.parametrize("status", [500, 502, 503, 408])
def test_trouble_of_the_hub_passes(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.fault(BIG, Refuse(status), times=2)
    order = order_for(hub, tmp_path)
    said = run_mover(order)
    assert_published(hub, order)
    assert waits(said) == [0.5, 1.0]
    assert str(status) in said.named("waiting")[0]["why"]


def test_retry_after_is_kept(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, Refuse(429, retry_after_s=0.2), times=2)
    hub.fault(BIG, Refuse(429, host="cdn", retry_after_s=0.3))
    order = order_for(hub, tmp_path)
    began = time.monotonic()
    said = run_mover(order)
    assert time.monotonic() - began >= 0.7
    assert waits(said) == [0.2, 0.2, 0.3]
    assert_published(hub, order)


def test_retry_after_an_hour_is_a_minute(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, Refuse(429, retry_after_s=3600))
    with mover(order_for(hub, tmp_path)) as said:
        wait_for(lambda: said.named("waiting"))
        said.process.send_signal(signal.SIGTERM)
        assert said.wait() == 0
    assert waits(said) == [60.0]


def test_too_many_refusals_in_a_row_are_one(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, Refuse(503, retry_after_s=0.01), times=None)
    order = order_for(hub, tmp_path)
    said = run_mover(order)
    assert_failed(said, "refused", BIG, "503")
    assert len(hub.requests(BIG, "hub")) == 8
    hub.heal()
    assert run_mover(order).named("done")
    assert_published(hub, order)


def test_expired_address_is_resolved_again(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, Refuse(403, host="cdn"))
    order = order_for(hub, tmp_path)
    said = run_mover(order)
    assert waits(said) == []
    assert len(hub.requests(BIG, "hub")) == 2
    assert_published(hub, order)


def test_addresses_that_live_shorter_than_the_download(hub: Hub, tmp_path: Path) -> None:
    hub.signatures.ttl_s = 0.3
    hub.fault(BIG, Slow(5 * MIB), times=None)
    order = order_for(hub, tmp_path, window_bytes=MIB)
    said = run_mover(order)
    assert said.fetched == SIZE + 2
    assert_published(hub, order)


def test_address_that_is_refused_however_fresh_ends_it(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, Refuse(403, host="cdn"), times=None)
    said = run_mover(order_for(hub, tmp_path))
    assert_failed(said, "forbidden", BIG, "403")
    assert len(hub.requests(BIG, "cdn")) == 3


def test_gated_repository_is_forbidden_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/gated", {BIG: ("random", MIB, 1)}, gated=True)
    said = run_mover(order_for(hub, tmp_path, "org/gated"))
    assert_failed(said, "forbidden", BIG, "401")
    assert len(hub.requests(BIG)) == 1


def test_file_that_is_not_there_any_more(hub: Hub, tmp_path: Path) -> None:
    order = order_for(hub, tmp_path)
    hub.fault(BIG, Refuse(404, code="EntryNotFound"), times=None)
    said = run_mover(order)
    assert_failed(said, "gone", BIG)
    assert len(hub.requests(BIG)) == 1


@pytest.mark.parametrize("by", [10, -10])
def test_file_of_another_size_than_listed(hub: Hub, tmp_path: Path, by: int) -> None:
    hub.fault(BIG, WrongLength(by), times=None)
    said = run_mover(order_for(hub, tmp_path))
    assert_failed(said, "wrong_size", BIG, str(SIZE), str(SIZE + by))


def test_file_that_became_shorter_than_what_is_there(hub: Hub, tmp_path: Path) -> None:
    order = order_for(hub, tmp_path)
    big = next(file for file in order["files"] if file["path"] == BIG)
    big["size"] = SIZE + 10
    part = Path(order["parts"]) / big["sha256"]
    part.parent.mkdir(parents=True)
    part.write_bytes(random_bytes(SIZE, 1) + b"12345")
    assert_failed(run_mover(order), "wrong_size", BIG)


def test_web_page_instead_of_a_file_is_not_taken_for_one(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, Html())
    hub.fault("config.json", Html())
    order = order_for(hub, tmp_path)
    said = run_mover(order)
    assert_published(hub, order)
    assert "web page" in said.named("waiting")[0]["why"]


@pytest.mark.parametrize("path", [BIG, "config.json"])
def test_corrupt_body_is_fetched_once_more(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.fault(path, Corrupt(1))
    order = order_for(hub, tmp_path)
    said = run_mover(order)
    size = SIZE if path == BIG else 2
    assert said.fetched == SIZE + 2 + size
    assert_published(hub, order)


@pytest.mark.parametrize("path", [BIG, "config.json"])
def test_corrupt_body_again_is_thrown_away(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.fault(path, Corrupt(1), times=None)
    order = order_for(hub, tmp_path)
    said = run_mover(order)
    assert_failed(said, "corrupt", path)
    assert part_sizes(order)[path] == 0
    assert said.done[path] == 0
    assert not Path(order["target"]).exists()
    hub.heal()
    assert run_mover(order).named("done")
    assert_published(hub, order)


def test_all_faults_at_once(hub: Hub, tmp_path: Path) -> None:
    for at in range(3):
        hub.fault(BIG, Cut(500_000 + at, reset=bool(at % 2)))
    hub.fault(BIG, IgnoreRange(), times=2)
    hub.fault(BIG, Refuse(500), times=1)
    hub.fault(BIG, Refuse(403, host="cdn"), times=1)
    hub.fault(BIG, Refuse(429, retry_after_s=0.1), times=1)
    hub.fault(BIG, Html(), times=1)
    hub.fault(BIG, Corrupt(SIZE - 1), times=1)
    order = order_for(hub, tmp_path, window_bytes=MIB, stall_s=0.5)
    assert run_mover(order).named("done")
    assert_published(hub, order)


# The disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 3 MiB."""
    with small_filesystem(tmp_path / "small", "3m") as folder:
        yield folder


def test_full_disk_keeps_every_byte_and_goes_on_when_there_is_room(
    hub: Hub, small_disk: Path
) -> None:
    order = order_for(hub, small_disk)
    said = run_mover(order)
    assert_failed(said, "disk_full", BIG, "Make room")
    assert said.done == part_sizes(order)
    assert said.done[BIG] > 2 * MIB
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    again = run_mover(order)
    assert again.named("done")
    assert again.fetched + said.done[BIG] + said.done["config.json"] == SIZE + 2
    assert_published(hub, order)


def test_file_larger_than_the_system_allows_is_a_full_disk(hub: Hub, tmp_path: Path) -> None:
    order = order_for(hub, tmp_path)
    limited = ["prlimit", f"--fsize={2 * MIB}"]
    if shutil.which(limited[0]) is None:
        pytest.skip("prlimit is not installed")
    with mover(order, prefix=limited) as said:
        assert said.wait() == 4
    assert_failed(said, "disk_full", BIG)
    assert part_sizes(order)[BIG] == 2 * MIB
    assert run_mover(order).named("done")
    assert_published(hub, order)


def test_folder_that_cannot_be_written(hub: Hub, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_failed(run_mover(order_for(hub, small_disk)), "unwritable", "Read-only")


def test_folder_in_whose_place_is_a_file(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / ".incoming").write_bytes(b"")
    assert_failed(run_mover(order_for(hub, tmp_path)), "unwritable")
    assert hub.requests() == []


def test_part_that_is_a_link_is_not_followed(hub: Hub, tmp_path: Path) -> None:
    order = order_for(hub, tmp_path / "models")
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    parts = Path(order["parts"])
    parts.mkdir(parents=True)
    (parts / order["files"][0]["sha256"]).symlink_to(outside)
    said = run_mover(order)
    assert said.failure is not None
    assert said.failure["code"] == "unwritable"
    assert outside.read_bytes() == b"precious"
