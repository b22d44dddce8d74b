"""The mover against a hub on loopback: what it brings, what it keeps, how it publishes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.hub import Hub, Slow, Stall
from tests.fakes.movers import (
    MANIFEST,
    REPO,
    assert_published,
    mover,
    order_for,
    part_sizes,
    run_mover,
)
from tests.waiting import wait_for
from xandrouting.downloads.mover_files import Order, take_over

MIB = 1 << 20
BIG = "big-Q4_0.gguf"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def test_brings_every_file_with_folders_duplicates_and_empty_ones(hub: Hub, tmp_path: Path) -> None:
    shared = ("random", 3 * MIB, 2)
    files = {
        BIG: ("random", 5 * MIB + 7, 1),
        "config.json": b"{}",
        "empty.txt": b"",
        "sub/deep/a b#c?.safetensors": shared,
        "sub/same.safetensors": shared,
        "zero.bin": b"",
    }
    hub.add_repo(REPO, files)
    order = order_for(hub, tmp_path)
    said = run_mover(order)
    assert said.process.returncode == 0
    assert said.events[-1] == {"event": "done"}
    assert said.done == {file["path"]: file["size"] for file in order["files"]}
    assert_published(hub, order)
    assert hub.served_bytes() == 8 * MIB + 7 + 2  # each content once
    assert hub.served_bytes() == said.fetched


def test_big_files_come_in_windows_by_ranges(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, {BIG: ("random", 5 * MIB, 1)})
    order = order_for(hub, tmp_path, window_bytes=2 * MIB)
    run_mover(order)
    assert_published(hub, order)
    assert [asked.range for asked in hub.requests(BIG, "cdn")] == [
        "bytes=0-2097151",
        "bytes=2097152-4194303",
        "bytes=4194304-5242879",
    ]


def test_several_files_at_once_but_no_more_than_asked(hub: Hub, tmp_path: Path) -> None:
    names = [f"m-{index:05}-of-00006.gguf" for index in range(1, 7)]
    hub.add_repo(REPO, {name: ("random", MIB, index) for index, name in enumerate(names)})
    stalls = [Stall(1000) for _ in names]
    for name, stall in zip(names, stalls, strict=True):
        hub.fault(name, stall)
    order = order_for(hub, tmp_path, parallel=4)
    with mover(order) as said:
        wait_for(lambda: len(hub.requests(host="cdn")) >= 4)
        said.until_bytes(4 * 1000)
        assert len(hub.requests(host="cdn")) == 4
        hub.heal()
        assert said.wait() == 0
    assert_published(hub, order)


def test_without_hashes_the_sizes_have_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, {BIG: ("random", MIB, 1), "config.json": b"{}"})
    order = order_for(hub, tmp_path)
    for file in order["files"]:
        file |= {"sha256": None, "blob_id": None}
    run_mover(order)
    assert_published(hub, order)


def test_token_is_told_to_the_hub_alone(hub: Hub, tmp_path: Path) -> None:
    files = {BIG: ("random", MIB, 1), "config.json": b"{}"}
    hub.add_repo(REPO, files, gated=True, token="hf_secret")
    order = order_for(hub, tmp_path)
    with mover(order, token="hf_secret") as said:
        command = Path(f"/proc/{said.process.pid}/cmdline").read_bytes()
        assert said.wait() == 0
    assert_published(hub, order)
    assert hub.authorizations("hub") == {"Bearer hf_secret"}
    assert hub.authorizations("cdn") == set()
    assert b"hf_secret" not in command
    assert "hf_secret" not in json.dumps(said.events)


def test_token_is_told_to_no_host_that_is_not_named(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, {BIG: ("random", MIB, 1)})
    run_mover(order_for(hub, tmp_path, token_hosts=["huggingface.co:443"]), token="hf_secret")
    assert hub.authorizations("hub") == hub.authorizations("cdn") == set()


def test_progress_is_told_as_bytes_come(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, {BIG: ("random", MIB, 1)})
    hub.fault(BIG, Slow(2 * MIB))
    said = run_mover(order_for(hub, tmp_path, report_s=0.05))
    sizes = [event["done"][BIG] for event in said.named("progress")]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) >= 4  # half a second's worth
    assert sizes[0] == 0
    assert sizes[-1] == MIB
    assert len(said.named("verifying")) == 1


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/../../evil", "a//b", ".xandrouting.json"]
)
def test_names_that_leave_the_folder_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.add_repo(REPO, {BIG: ("random", MIB, 1)})
    order = order_for(hub, tmp_path / "models")
    order["files"][0]["path"] = name
    said = run_mover(order)
    assert said.process.returncode == 3
    assert said.failure is not None
    assert said.failure["code"] == "unwritable"
    assert list(tmp_path.rglob("*")) == []
    assert hub.requests() == []


# Stopping


@pytest.mark.parametrize("how", ["sigterm", "eof"])
@pytest.mark.parametrize("state", ["flowing", "slow", "stalled", "waiting"])
def test_stops_within_100_ms_and_keeps_every_byte(
    hub: Hub, tmp_path: Path, state: str, how: str
) -> None:
    hub.add_repo(REPO, {BIG: ("random", 64 * MIB, 1)})
    match state:
        case "flowing":
            hub.fault(BIG, Slow(100 * MIB))  # so that it is not over too soon
        case "waiting":
            hub.fault(BIG, Slow(MIB))
        case "slow":
            hub.fault(BIG, Slow(20_000))
        case "stalled":
            hub.fault(BIG, Stall(3000))
    order = order_for(hub, tmp_path)
    with mover(order) as said:
        said.until_bytes(1500)
        if state == "waiting":
            hub.down()
            wait_for(lambda: len(said.named("waiting")) >= 2)
        began = time.monotonic()
        if how == "sigterm":
            said.process.send_signal(signal.SIGTERM)
        else:
            assert said.process.stdin is not None
            said.process.stdin.close()
        status = said.process.wait()  # with a timeout it would look 20 times a second only
        took_s = time.monotonic() - began
        assert status == 0
        print(f"{state} {how}: gone after {1000 * took_s:.0f} ms")
        assert took_s < 0.1
        said.wait()
    assert said.failure is None
    assert not said.named("done")
    assert said.done == part_sizes(order)  # its last word is the truth
    assert said.stderr == b""
    if state == "slow":
        # What the hub has sent is on the disk but for what was under way.
        assert hub.served_bytes(BIG) - said.done[BIG] < 2000
    assert not Path(order["target"]).exists()

    hub.up()
    hub.heal()
    again = run_mover(order)
    assert again.process.returncode == 0
    assert again.fetched == 64 * MIB - said.done[BIG]
    assert_published(hub, order)


def test_killed_five_times_it_fetches_hardly_a_byte_twice(hub: Hub, tmp_path: Path) -> None:
    size = 256 * MIB
    hub.add_repo(REPO, {BIG: ("random", size, 1), "other-Q4_0.gguf": ("random", size // 4, 2)})
    hub.fault(BIG, Slow(40 * MIB), times=None)
    hub.fault("other-Q4_0.gguf", Slow(10 * MIB), times=None)
    order = order_for(hub, tmp_path)
    dice = random.Random(6)
    for _ in range(5):
        with mover(order) as said:
            before = wait_for(lambda: said.named("progress") and sum(said.done.values()) + 1)
            said.until_bytes(before + dice.randrange(10 * MIB, 50 * MIB))
            said.process.kill()
            said.wait()
        assert not Path(order["target"]).exists()
    hub.heal()
    said = run_mover(order)
    assert said.process.returncode == 0
    total = size + size // 4
    twice = hub.served_bytes() - total
    print(f"fetched twice: {twice} bytes, {100 * twice / total:.2f} %")
    assert 0 <= twice <= 0.02 * total
    assert_published(hub, order)


def test_a_second_mover_waits_for_the_first_to_end(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, {BIG: ("random", 8 * MIB, 1)})
    hub.fault(BIG, Stall(MIB))
    order = order_for(hub, tmp_path)
    with mover(order) as first:
        first.until_bytes(MIB)
        with mover(order) as second:
            wait_for(lambda: second.named("waiting"))
            assert "earlier process" in second.named("waiting")[0]["why"]
            assert second.named("progress") == []  # it does not know what is there
            assert len(hub.requests(BIG, "cdn")) == 1
            first.process.kill()
            assert second.wait() == 0
    assert second.fetched <= 7 * MIB
    assert_published(hub, order)


def test_stopped_while_it_waits_for_another_it_does_not_say_that_nothing_is_there(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add_repo(REPO, {BIG: ("random", 8 * MIB, 1)})
    hub.fault(BIG, Stall(MIB))
    order = order_for(hub, tmp_path)
    with mover(order) as first:
        first.until_bytes(MIB)
        with mover(order) as second:
            wait_for(lambda: second.named("waiting"))
            second.process.send_signal(signal.SIGTERM)
            assert second.wait() == 0
    assert second.named("progress") == []


def test_stopped_at_any_moment_of_its_start_it_says_nothing_wrong(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, {f"{n}.gguf": ("random", 1000, n) for n in range(8)})
    for n in range(8):
        hub.fault(f"{n}.gguf", Stall(500), times=None)
    order = order_for(hub, tmp_path)
    dice = random.Random(8)
    for _ in range(20):
        with mover(order) as said:
            wait_for(lambda: said.named("progress"), 20)
            deadline = time.monotonic() + dice.random() * 0.005
            while time.monotonic() < deadline:
                pass
            said.process.send_signal(signal.SIGTERM)
            assert said.wait() == 0
        assert said.stderr == b""


# Going on from what is there


def test_whole_part_is_hashed_again_before_it_counts(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add_repo(REPO, {BIG: ("random", 4 * MIB, 1)})
    order = order_for(hub, tmp_path)
    blob = repo.revisions["main"].files[BIG].blob
    part = Path(order["parts"]) / blob.sha256
    part.parent.mkdir(parents=True)
    part.write_bytes(blob.read(0, 4 * MIB))
    said = run_mover(order)
    assert said.events[-1] == {"event": "done"}
    assert len(said.named("verifying")) == 1
    assert hub.requests() == []
    assert_published(hub, order)


@pytest.mark.parametrize("size", [1, MIB + 5, 4 * MIB, 5 * MIB])
def test_damaged_part_is_thrown_away_and_fetched_anew(hub: Hub, tmp_path: Path, size: int) -> None:
    hub.add_repo(REPO, {BIG: ("random", 4 * MIB, 1)})
    order = order_for(hub, tmp_path)
    part = Path(order["parts"]) / order["files"][0]["sha256"]
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\1" * size)
    said = run_mover(order)
    assert said.process.returncode == 0
    assert_published(hub, order)


def test_files_staged_by_a_run_that_was_killed_are_taken_up(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add_repo(REPO, {BIG: ("random", MIB, 1), "sub/c.json": b"{}"})
    order = order_for(hub, tmp_path)
    stage = Path(order["stage"])
    (stage / "sub").mkdir(parents=True)
    blob = repo.revisions["main"].files[BIG].blob
    (stage / BIG).write_bytes(blob.read(0, MIB))
    (stage / "stranger.bin").write_bytes(b"of another order")
    run_mover(order)
    assert hub.served_bytes(BIG) == 0
    assert_published(hub, order)


def test_order_that_is_published_already_is_done_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, {BIG: ("random", MIB, 1)})
    order = order_for(hub, tmp_path)
    run_mover(order)
    asked = len(hub.requests())
    for merge in (False, True):
        said = run_mover(order | {"merge": merge})
        assert said.events[-1] == {"event": "done"}
        assert said.done == {BIG: MIB}
    assert len(hub.requests()) == asked
    assert_published(hub, order)


# Publishing


def test_target_is_never_there_by_half(hub: Hub, tmp_path: Path) -> None:
    """Killed at any moment around the end, it leaves no target or the whole one."""
    names = [f"m-{index:05}-of-00040.gguf" for index in range(1, 41)]
    hub.add_repo(REPO, {name: ("random", 1000 + i, i) for i, name in enumerate(names)})
    order = order_for(hub, tmp_path)
    target = Path(order["target"])
    dice = random.Random(7)
    outcomes = set()
    for _ in range(25):
        with mover(order) as said:
            wait_for(lambda: said.named("verifying") or said.process.poll() is not None, 30)
            deadline = time.monotonic() + dice.random() * 0.01
            while time.monotonic() < deadline:
                pass
            said.process.kill()
        outcomes.add(target.exists())
        if target.exists():
            assert names_in(target) == sorted([*names, MANIFEST])
            shutil.rmtree(target)
    run_mover(order)
    assert_published(hub, order)
    print(f"seen after a kill: target there {sorted(outcomes)}")


def test_folder_that_was_filled_meanwhile_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, {BIG: ("random", MIB, 1)})
    order = order_for(hub, tmp_path)
    target = Path(order["target"])
    target.mkdir()
    (target / "other.gguf").write_bytes(b"mine")
    said = run_mover(order)
    assert said.process.returncode == 3
    assert said.failure is not None
    assert said.failure["code"] == "unwritable"
    assert names_in(target) == ["other.gguf"]
    # The bytes are kept: with `merge` it ends without the hub.
    hub.down()
    assert run_mover(order | {"merge": True}).process.returncode == 0
    assert names_in(target) == [MANIFEST, BIG, "other.gguf"]


def test_empty_folder_is_no_hindrance(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, {BIG: ("random", MIB, 1)})
    order = order_for(hub, tmp_path)
    Path(order["target"]).mkdir()
    run_mover(order)
    assert_published(hub, order)


def test_merge_replaces_what_is_damaged_and_keeps_what_is_right(hub: Hub, tmp_path: Path) -> None:
    files = {BIG: ("random", MIB, 1), "sub/c.json": b"{}", "old.gguf": ("random", MIB, 3)}
    repo = hub.add_repo(REPO, files)
    order = order_for(hub, tmp_path, merge=True, replace=[BIG])
    target = Path(order["target"])
    (target / "sub").mkdir(parents=True)
    (target / "other.gguf").write_bytes(b"mine")
    (target / "old.gguf").write_bytes(repo.revisions["main"].files["old.gguf"].blob.read(0, MIB))
    (target / BIG).write_bytes(b"\0" * MIB)
    (target / MANIFEST).write_text('{"earlier": true}')
    inode = (target / "old.gguf").stat().st_ino
    assert run_mover(order).process.returncode == 0
    assert (target / "other.gguf").read_bytes() == b"mine"
    assert (target / "old.gguf").stat().st_ino == inode
    assert hub.served_bytes("old.gguf") == 0
    digest = hashlib.sha256((target / BIG).read_bytes()).hexdigest()
    assert digest == order["files"][0]["sha256"]
    assert (target / "sub/c.json").read_bytes() == b"{}"
    assert json.loads((target / MANIFEST).read_text()) == order["manifest"]
    assert not Path(order["parts"]).parent.exists()


def test_what_may_be_right_counts_before_its_hash_is_known(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, {BIG: ("random", MIB, 1), "config.json": b"{}"})
    told = order_for(hub, tmp_path, merge=True)
    target = Path(told["target"])
    target.mkdir()
    (target / BIG).write_bytes(b"\1" * MIB)
    (target / "config.json").write_bytes(b"longer")
    order = Order(told)
    os.close(take_over(order))
    assert {file.path: file.on_disk for file in order.files} == {BIG: MIB, "config.json": 0}


def test_merge_replaces_nothing_of_somebody_else_s(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, {BIG: ("random", MIB, 1), "config.json": b"{}"})
    order = order_for(hub, tmp_path, merge=True)
    target = Path(order["target"])
    target.mkdir()
    (target / "config.json").write_bytes(b"mine")
    said = run_mover(order)
    assert said.failure is not None
    assert said.failure["code"] == "destination_occupied"
    assert "another 'config.json'" in said.failure["message"]
    assert names_in(target) == ["config.json"]
    assert (target / "config.json").read_bytes() == b"mine"
    (target / "config.json").unlink()
    assert run_mover(order).process.returncode == 0
    assert_published(hub, order)


def test_merge_replaces_nothing_that_came_while_it_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, {BIG: ("random", MIB, 1), "config.json": b"{}"})
    order = order_for(hub, tmp_path, merge=True)
    target = Path(order["target"])
    target.mkdir()
    hub.fault(BIG, Stall(MIB // 2))
    with mover(order) as said:
        said.until_bytes(MIB // 2)
        (target / BIG).write_bytes(b"mine")
        hub.heal()
        assert said.wait() == 3
    assert said.failure is not None
    assert said.failure["code"] == "destination_occupied"
    assert names_in(target) == [BIG]
    assert (target / BIG).read_bytes() == b"mine"
    # Every byte is kept: it ends without the hub.
    (target / BIG).unlink()
    hub.down()
    assert run_mover(order).process.returncode == 0
    assert_published(hub, order)


def test_merge_moves_the_weights_last(hub: Hub, tmp_path: Path) -> None:
    files = {"a/m-Q4_0.gguf": b"m", "b/mmproj-F16.gguf": b"eyes", "z/tokenizer.json": b"{}"}
    hub.add_repo(REPO, files)
    order = order_for(hub, tmp_path, merge=True)
    target = Path(order["target"])
    target.mkdir()
    (target / "a").touch()  # no folder: there it ends
    assert run_mover(order).process.returncode == 3
    assert names_in(target / "b") == ["mmproj-F16.gguf"]
    assert names_in(target / "z") == ["tokenizer.json"]
    (target / "a").unlink()
    assert run_mover(order).process.returncode == 0
    assert_published(hub, order)


def test_merge_follows_no_link_out_of_the_folder(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, {"sub/m.gguf": ("random", MIB, 1)})
    order = order_for(hub, tmp_path / "models", merge=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    target = Path(order["target"])
    target.mkdir(parents=True)
    (target / "sub").symlink_to(outside)
    said = run_mover(order)
    assert said.failure is not None
    assert said.failure["code"] == "unwritable"
    assert names_in(outside) == []
    assert not (target / MANIFEST).exists()


def test_merge_that_was_killed_goes_on_without_fetching(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add_repo(REPO, {BIG: ("random", MIB, 1), "b-Q4_0.gguf": ("random", MIB, 2)})
    order = order_for(hub, tmp_path, merge=True)
    target, stage = Path(order["target"]), Path(order["stage"])
    target.mkdir()
    (target / "other.gguf").write_bytes(b"mine")
    stage.mkdir(parents=True)
    contents = {path: f.blob.read(0, MIB) for path, f in repo.revisions["main"].files.items()}
    (target / BIG).write_bytes(contents[BIG])
    (stage / "b-Q4_0.gguf").write_bytes(contents["b-Q4_0.gguf"])
    (stage / MANIFEST).write_text("{}")
    assert run_mover(order).process.returncode == 0
    assert hub.requests() == []
    assert names_in(target) == [MANIFEST, "b-Q4_0.gguf", BIG, "other.gguf"]
