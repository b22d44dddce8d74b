"""The mover steps back: niceness that counts, and no work for a result that nobody wants."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.hub import Hub, Stall
from tests.fakes.movers import REPO, order_for, run_mover
from tests.waiting import async_wait_for
from xandrouting.downloads.courier import Courier, Ending

BIG = "big-Q4_0.gguf"
GROUPS = Path("/proc/sys/kernel/sched_autogroup_enabled")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add_repo(REPO, {BIG: ("random", 1 << 20, 1)})
        yield hub


def groups_by_sessions() -> bool:
    return GROUPS.exists() and GROUPS.read_text().strip() == "1"


@pytest.mark.skipif(not groups_by_sessions(), reason="this kernel does not group by sessions")
async def test_its_whole_session_is_nice_and_ours_is_not(hub: Hub, tmp_path: Path) -> None:
    ours = Path("/proc/self/autogroup").read_text()
    hub.fault(BIG, Stall(1000), times=None)
    courier = Courier(order_for(hub, tmp_path))
    task = asyncio.create_task(courier.run(lambda _: None))
    await async_wait_for(lambda: hub.requests(BIG, "cdn"), 20)
    assert courier.pid is not None
    assert os.getpriority(os.PRIO_PROCESS, courier.pid) == 10
    assert Path(f"/proc/{courier.pid}/autogroup").read_text().endswith("nice 10\n")
    await courier.stop()
    assert (await task).ending is Ending.STOPPED
    assert Path("/proc/self/autogroup").read_text() == ours


def test_what_cannot_be_completed_is_not_read_to_its_end(hub: Hub, tmp_path: Path) -> None:
    order = order_for(hub, tmp_path)
    [file] = order["files"]
    file |= {"size": 1 << 40, "url": f"{hub.url}/{REPO}/resolve/main/gone.gguf"}
    parts = Path(order["parts"])
    parts.mkdir(parents=True)
    with (parts / file["sha256"]).open("wb") as part:
        part.truncate(200 << 30)  # zeros that take no room and a minute or two to hash
    began = time.monotonic()
    said = run_mover(order)
    assert said.failure is not None
    assert said.failure["code"] == "gone"
    assert time.monotonic() - began < 10
