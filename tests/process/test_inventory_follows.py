"""The inventory beside a real disk that changes: what is heard of, how soon, and what is not."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.fakes.gguf_writer import write_gguf
from tests.fakes.safetensors_writer import write_folder
from tests.waiting import async_wait_for
from xandrouting.inventory import inventory as module
from xandrouting.inventory import watch
from xandrouting.inventory.inventory import Changes, Inventory
from xandrouting.inventory.roots import Root

SOON_S = 2.0  # what the issue asks for


class World:
    """An inventory that follows a folder, and what it told."""

    def __init__(self, root: Path, *further: Root) -> None:
        self.root = root
        self.told: list[Changes] = []
        self.inventory = Inventory((Root(root), *further), on_change=self.told.append)

    @property
    def ids(self) -> list[str]:
        return [model.id for model in self.inventory.snapshot.models]

    async def settles(self) -> None:
        await async_wait_for(lambda: self.inventory.follows)

    async def sees(self, *ids: str) -> None:
        """Wait until these are all there is, and hear that it was soon."""
        began = time.monotonic()
        await async_wait_for(lambda: self.ids == sorted(ids), 10)
        assert time.monotonic() - began < SOON_S


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    root = tmp_path / "models"
    write_gguf(root / "a" / "a.gguf")
    world = World(root)
    async with world.inventory:
        await world.settles()
        world.told.clear()
        yield world


async def test_a_file_comes_changes_and_goes(world: World) -> None:
    file = write_gguf(world.root / "a" / "b.gguf")
    await world.sees("/models/a/a.gguf", "/models/a/b.gguf")
    assert world.told == [Changes(("/models/a/b.gguf",), (), ())]
    await world.settles()
    write_gguf(file, metadata={"general.name": "changed"})
    await async_wait_for(lambda: len(world.told) == 2)
    assert world.told[-1] == Changes((), (), ("/models/a/b.gguf",))
    file.unlink()
    await world.sees("/models/a/a.gguf")
    assert world.told[-1] == Changes((), ("/models/a/b.gguf",), ())


async def test_a_folder_comes_with_what_is_in_it(world: World, tmp_path: Path) -> None:
    aside = tmp_path / "aside"
    write_gguf(aside / "deep" / "b.gguf")
    write_folder(aside / "smol")
    aside.rename(world.root / "org")
    await world.sees("/models/a/a.gguf", "/models/org/deep/b.gguf", "/models/org/smol")
    await world.settles()
    write_gguf(world.root / "org" / "deep" / "c.gguf")  # it is watched by now
    await async_wait_for(lambda: "/models/org/deep/c.gguf" in world.ids, SOON_S)
    shutil.rmtree(world.root / "org")
    await world.sees("/models/a/a.gguf")


async def test_a_list_rescans_what_is_cheap_and_trusts_what_is_heard_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(world.root / "a" / "b.gguf")
    assert len((await world.inventory.look()).models) == 2  # at once, heard of or not
    await world.settles()
    monkeypatch.setattr(module, "CHEAP_SCAN_S", -1.0)
    begun = world.inventory._begun
    assert len((await world.inventory.look()).models) == 2
    assert world.inventory._begun == begun


async def test_nothing_is_heard_of_a_download(world: World) -> None:
    parts = world.root / ".incoming" / "job" / ".parts"
    begun = world.inventory._begun
    parts.mkdir(parents=True)
    await async_wait_for(lambda: world.inventory._begun > begun)  # the hidden folder itself
    await world.settles()
    begun = world.inventory._begun
    with (parts / "part").open("wb") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    write_gguf(world.root / "a" / "last.gguf")
    await async_wait_for(lambda: "/models/a/last.gguf" in world.ids, SOON_S)
    assert world.inventory._begun == begun + 1


async def test_what_is_watched_is_heard_of_while_another_folder_is_gone(world: World) -> None:
    for number in range(20):
        write_gguf(world.root / f"m{number}" / "m.gguf")
    for number in range(20):
        shutil.rmtree(world.root / f"m{number}")
    write_gguf(world.root / "z.gguf")
    await world.sees("/models/a/a.gguf", "/models/z.gguf")


async def test_a_file_that_grows_is_looked_at_now_and_then(world: World) -> None:
    """As by `cp` of a large one: it is listed with its problem and then without."""
    whole = write_gguf(world.root / ".hidden" / "b.gguf").read_bytes()
    await world.settles()
    begun = world.inventory._begun
    began = time.monotonic()
    with (world.root / "a" / "b.gguf").open("wb", buffering=0) as file:
        for byte in whole:
            file.write(bytes((byte,)))
            await asyncio.sleep(0)
    spent_s = time.monotonic() - began
    await async_wait_for(
        lambda: [m.problem for m in world.inventory.snapshot.models] == [None, None], SOON_S
    )
    assert world.inventory._begun - begun <= 3 + spent_s / 0.1


async def test_a_name_that_is_no_text_ends_nothing(world: World) -> None:
    Path(os.fsdecode(os.fsencode(world.root / "a") + b"/\xff.gguf")).touch()
    await async_wait_for(lambda: not world.inventory.follows, SOON_S)
    await world.settles()
    write_gguf(world.root / "a" / "b.gguf")
    await world.sees("/models/a/a.gguf", "/models/a/b.gguf")


async def test_the_models_directory_comes_goes_and_is_replaced(tmp_path: Path) -> None:
    real, other, root = tmp_path / "real", tmp_path / "other", tmp_path / "models"
    world = World(root)
    async with world.inventory:
        assert world.ids == []
        write_gguf(real / "a.gguf")
        root.symlink_to(real)
        await world.sees("/models/a.gguf")
        write_gguf(real / "b.gguf")
        await world.sees("/models/a.gguf", "/models/b.gguf")
        write_gguf(other / "c.gguf")
        link = tmp_path / "link"
        link.symlink_to(other)
        link.rename(root)
        await world.sees("/models/c.gguf")
        root.unlink()
        await world.sees()
        other.rename(root)
        await world.sees("/models/c.gguf")


@pytest.mark.parametrize("where", ["a", ""])
async def test_a_folder_that_took_another_s_place_is_watched(world: World, where: str) -> None:
    """Its path is the same as before, and on many file systems its inode is too."""
    folder = world.root / where
    for number in range(3):
        shutil.rmtree(folder)
        write_gguf(folder / "b.gguf")
        await async_wait_for(lambda: len(world.ids) == 1 and world.ids[0].endswith("b.gguf"))
        await world.settles()
        write_gguf(folder / f"{number}.gguf")
        await async_wait_for(lambda: len(world.ids) == 2, SOON_S)
        await world.settles()


async def test_folders_that_change_places_are_watched(world: World, tmp_path: Path) -> None:
    write_gguf(tmp_path / "new" / "b.gguf")
    (world.root / "a").rename(tmp_path / "old")
    (tmp_path / "new").rename(world.root / "a")
    await world.sees("/models/a/b.gguf")
    await world.settles()
    write_gguf(world.root / "a" / "c.gguf")
    await world.sees("/models/a/b.gguf", "/models/a/c.gguf")


@pytest.mark.parametrize("where", ["a", ""])
async def test_a_file_system_comes_and_goes(world: World, where: str) -> None:
    at = world.root / where
    if os.geteuid() != 0 or _mount("-t", "tmpfs", "none", str(at)) != 0:
        pytest.skip("nothing may be mounted here")
    try:
        await world.sees()
        await world.settles()
        write_gguf(at / "b.gguf")
        await async_wait_for(lambda: len(world.ids) == 1, SOON_S)
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)
    await world.sees("/models/a/a.gguf")
    await world.settles()
    write_gguf(world.root / "a" / "c.gguf")
    await world.sees("/models/a/a.gguf", "/models/a/c.gguf")


def _mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], check=False, capture_output=True).returncode


async def test_what_cannot_be_named_is_told_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(world.root / "a" / "back\\slash.gguf")
    for _ in range(3):
        await world.inventory.refresh()
    assert caplog.text.count("file names not usable") == 1
    write_gguf(world.root / "a" / "line\nbreak.gguf")
    await world.inventory.refresh()
    assert caplog.text.count("file names not usable") == 2


async def test_a_further_root_is_followed(tmp_path: Path) -> None:
    nas = tmp_path / "nas"
    world = World(tmp_path / "models", Root(nas, "nas"))
    async with world.inventory:
        write_gguf(nas / "a.gguf")
        await world.sees("/models/nas/a.gguf")


@pytest.mark.parametrize("why", ["limit", "shared"])
async def test_what_cannot_be_watched_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    def refuse(*_: object) -> None:
        raise FileNotFoundError("OS file watch limit reached. about [...]")

    if why == "limit":
        monkeypatch.setattr(watch, "RustNotify", refuse)
    else:
        monkeypatch.setattr(watch, "shared_among", lambda _: "nfs4")
    world = World(tmp_path / "models")
    write_gguf(world.root / "a.gguf")
    async with world.inventory:
        await world.sees("/models/a.gguf")
        write_gguf(world.root / "deep" / "b.gguf")
        await world.sees("/models/a.gguf", "/models/deep/b.gguf")
        assert not world.inventory.follows
        write_gguf(world.root / "c.gguf")
        monkeypatch.setattr(module, "CHEAP_SCAN_S", -1.0)
        assert len((await world.inventory.look()).models) == 3  # a list looks for itself
    assert caplog.text.count("models folders not watched") == 1
    assert ("max_user_watches" in caplog.text) == (why == "limit")


async def test_a_models_directory_whose_name_is_no_text_is_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path / os.fsdecode(b"\xffmodels"))
    write_gguf(world.root / "a.gguf")
    async with world.inventory:
        await world.sees("/models/a.gguf")
        write_gguf(world.root / "b.gguf")
        await world.sees("/models/a.gguf", "/models/b.gguf")
    assert caplog.text.count("models folders not watched") == 1


async def test_a_first_scan_shows_what_it_has_read_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models"
    for number in range(4):
        write_gguf(root / f"{number}.gguf")
    for no in (1, 2):
        metadata = {"split.count": 2, "split.no": no - 1}
        write_gguf(root / f"split-0000{no}-of-00002.gguf", metadata=metadata)
    gate = asyncio.Event()
    slow = _slow_reads(monkeypatch, gate, asyncio.get_running_loop())
    monkeypatch.setattr(module, "LIST_WAIT_S", 0.01)
    monkeypatch.setattr("xandrouting.inventory.scan.TELL_EVERY_S", 0.0)
    world = World(root)
    async with world.inventory:
        await async_wait_for(lambda: slow() == 5)
        await async_wait_for(lambda: len(world.ids) == 4)
        shown = await world.inventory.look()
        assert len(shown.models) == 4
        assert all(model.problem is None for model in shown.models)  # no half of a split
        assert len((await world.inventory.look()).models) == 4
        gate.set()
        assert len((await world.inventory.refresh()).models) == 5
    assert sum(len(changes.added) for changes in world.told) == 5


def _slow_reads(
    monkeypatch: pytest.MonkeyPatch, gate: asyncio.Event, loop: asyncio.AbstractEventLoop
) -> Callable[[], int]:
    """Let the fifth header that is read wait for the gate; return how many were asked for."""
    from xandrouting.inventory import headers
    from xandrouting.inventory.gguf import read_gguf

    asked: list[str] = []

    def read(path: str) -> object:
        asked.append(path)
        if len(asked) == 5:
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(10)
        return read_gguf(path)

    monkeypatch.setattr(headers, "read_gguf", read)
    return lambda: len(asked)


async def test_the_end_does_not_wait_for_a_long_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models"
    for number in range(50):
        write_gguf(root / f"{number}.gguf")
    from xandrouting.inventory import headers
    from xandrouting.inventory.gguf import read_gguf

    read: list[str] = []

    def slowly(path: str) -> object:
        read.append(path)
        time.sleep(0.1)
        return read_gguf(path)

    monkeypatch.setattr(headers, "read_gguf", slowly)
    monkeypatch.setattr(module, "LIST_WAIT_S", 0.01)
    world = World(root)
    async with world.inventory:
        await async_wait_for(lambda: read)
        ended = time.monotonic()
    assert time.monotonic() - ended < 1.0
    assert len(read) < 50


async def test_a_failure_is_logged_and_lists_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(module, "scan_all", fail)
        write_gguf(world.root / "a" / "b.gguf")
        await async_wait_for(lambda: "models are no longer followed" in caplog.text)
    assert len((await world.inventory.look()).models) == 2


async def test_the_trash_is_emptied_at_the_start(tmp_path: Path) -> None:
    old = tmp_path / "models" / ".trash" / "20200101T000000Z-x"
    old.mkdir(parents=True)
    async with Inventory(tmp_path / "models"):
        await async_wait_for(lambda: not old.exists())
