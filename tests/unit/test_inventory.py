"""The inventory between its scans: who shares one, and the last look before a load."""

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.gguf_writer import write_gguf
from xandrouting.core.errors import InvalidModelFile, ModelNotFound
from xandrouting.inventory import inventory as module
from xandrouting.inventory.inventory import Inventory
from xandrouting.inventory.model_file import Snapshot
from xandrouting.inventory.scan import HeaderCache, Scan


class SteppedScan:
    """Stands in for `scan_all`: each call waits, in its thread, to be let go."""

    def __init__(self) -> None:
        self.begun = 0
        self._go = threading.Semaphore(0)

    def __call__(self, roots: object, cache: HeaderCache, **_: object) -> Scan:
        self.begun += 1
        number = self.begun
        assert self._go.acquire(timeout=5)
        return Scan(Snapshot(escaping=frozenset({str(number)})), frozenset())

    def finish_one(self) -> None:
        self._go.release()

    async def reaches(self, begun: int) -> None:
        async with asyncio.timeout(5):
            while self.begun < begun:  # another thread moves it
                await asyncio.sleep(0)


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> SteppedScan:
    fake = SteppedScan()
    monkeypatch.setattr(module, "scan_all", fake)
    return fake


def number_of(snapshot: Snapshot) -> int:
    [number] = snapshot.escaping
    return int(number)


async def begin(call: Callable[[], object]) -> "asyncio.Task[Snapshot]":
    task = asyncio.ensure_future(call())
    await asyncio.sleep(0)
    return task


async def test_refresh_finds_models(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path)
    assert inventory.snapshot == Snapshot()
    write_gguf(tmp_path / "tiny.gguf")
    found = await inventory.refresh()
    assert [model.id for model in found.models] == ["/models/tiny.gguf"]
    assert inventory.snapshot is found


async def test_a_missing_directory_is_empty_and_may_come_later(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path / "models")
    assert await inventory.refresh() == Snapshot()
    write_gguf(tmp_path / "models" / "tiny.gguf")
    assert len((await inventory.refresh()).models) == 1


async def test_a_rescan_that_finds_nothing_new_keeps_the_snapshot(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path)
    write_gguf(tmp_path / "tiny.gguf")
    first = await inventory.refresh()
    assert await inventory.refresh() is first


async def test_who_comes_during_a_scan_shares_the_next_one(
    tmp_path: Path, stepped: SteppedScan
) -> None:
    inventory = Inventory(tmp_path)
    first = await begin(inventory.refresh)
    await stepped.reaches(1)
    late = [await begin(inventory.refresh) for _ in range(3)]
    stepped.finish_one()
    assert number_of(await first) == 1
    await stepped.reaches(2)
    assert number_of(inventory.snapshot) == 1
    later = await begin(inventory.refresh)
    stepped.finish_one()
    assert [number_of(snapshot) for snapshot in await asyncio.gather(*late)] == [2, 2, 2]
    stepped.finish_one()
    assert number_of(await later) == 3
    assert stepped.begun == 3


async def test_who_waits_for_a_cancelled_scan_scans_itself(
    tmp_path: Path, stepped: SteppedScan
) -> None:
    inventory = Inventory(tmp_path)
    first = await begin(inventory.refresh)
    await stepped.reaches(1)
    second = await begin(inventory.refresh)
    first.cancel()
    stepped.finish_one()
    stepped.finish_one()
    assert number_of(await second) == 2
    assert first.cancelled()


async def test_verify_returns_the_model_as_it_is_now(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path)
    write_gguf(tmp_path / "tiny.gguf")
    [model] = (await inventory.refresh()).models
    assert await inventory.verify(model) == model


async def test_verify_of_a_model_that_is_gone(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path)
    file = write_gguf(tmp_path / "tiny.gguf")
    [model] = (await inventory.refresh()).models
    file.unlink()
    with pytest.raises(ModelNotFound) as caught:
        await inventory.verify(model)
    assert caught.value.message == (
        "The files of '/models/tiny.gguf' are no longer there. "
        "GET /v1/models/inventory lists what is."
    )
    assert caught.value.detail == str(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tiny.gguf", b"", "cannot be loaded: empty file. Download it again, or delete it."),
        (
            "tiny.gguf",
            b"version https://git-lfs.github.com/spec/v1\n",
            (
                "cannot be loaded: a git-lfs pointer, not the model. "
                "Fetch it with `git lfs pull`, or download it again."
            ),
        ),
        (
            "tiny-00001-of-00002.gguf",
            b"",
            (
                "cannot be loaded: 1 of 2 parts missing: 2. "
                "Download the missing parts into the same folder."
            ),
        ),
    ],
)
async def test_verify_names_the_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    inventory = Inventory(tmp_path)
    (tmp_path / name).write_bytes(content)
    [model] = (await inventory.refresh()).models
    with pytest.raises(InvalidModelFile) as caught:
        await inventory.verify(model)
    assert caught.value.message == f"'/models/{name}' {message}"
    assert str(tmp_path) not in caught.value.message


async def test_verify_of_an_adapter(tmp_path: Path) -> None:
    inventory = Inventory(tmp_path)
    write_gguf(tmp_path / "lora.gguf", metadata={"general.type": "adapter"})
    [model] = (await inventory.refresh()).models
    with pytest.raises(InvalidModelFile, match="Ask for the model it belongs to"):
        await inventory.verify(model)


async def test_verify_of_a_file_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory = Inventory(tmp_path)
    write_gguf(tmp_path / "tiny.gguf")
    [model] = (await inventory.refresh()).models

    def refuse(*args: object) -> int:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    os.utime(tmp_path / "tiny.gguf", ns=(1, 1))  # what has not changed is not read again
    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(InvalidModelFile) as caught:
        await inventory.verify(model)
    assert caught.value.message == (
        "'/models/tiny.gguf' cannot be loaded: unreadable: Permission denied. "
        "Let the user that the server runs as read the file."
    )
