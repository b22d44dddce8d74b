"""The courier: one mover's process from its start to its end, whoever ends it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from tests.fakes.hub import Corrupt, Hub, Slow, Stall
from tests.fakes.movers import REPO, assert_published, order_for, part_sizes
from tests.fakes.processes import freeze, is_gone
from tests.waiting import async_wait_for, wait_for
from xandrouting.downloads.courier import Courier, Ending, Event, Outcome

MIB = 1 << 20
BIG = "big-Q4_0.gguf"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add_repo(REPO, {BIG: ("random", 8 * MIB, 1), "config.json": b"{}"})
        yield hub


class Ears:
    """Hears a courier's events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def bytes(self) -> int:
        done = [event["done"] for event in self.events if event["event"] == "progress"]
        return sum(done[-1].values()) if done else 0


def mover_of(courier: Courier) -> psutil.Process:
    assert courier.pid is not None
    return psutil.Process(courier.pid)


async def begun(courier: Courier, ears: Ears, size: int) -> asyncio.Task[Outcome]:
    """Run it until so many bytes are on the disk."""
    task = asyncio.create_task(courier.run(ears))
    await async_wait_for(lambda: ears.bytes() >= size, 20)
    return task


async def test_brings_an_order_and_hears_of_it(hub: Hub, tmp_path: Path) -> None:
    order, ears = order_for(hub, tmp_path), Ears()
    courier = Courier(order)
    assert await courier.run(ears) == Outcome(Ending.DONE)
    assert_published(hub, order)
    assert {event["event"] for event in ears.events} == {"progress", "verifying"}
    assert ears.bytes() == 8 * MIB + 2


def test_runs_on_the_gateways_loop_too(hub: Hub, tmp_path: Path) -> None:
    order = order_for(hub, tmp_path)

    async def main() -> None:
        assert await Courier(order).run(Ears()) == Outcome(Ending.DONE)
        hub.fault(BIG, Stall(1000))
        courier, ears = Courier(order_for(hub, tmp_path / "b")), Ears()
        task = await begun(courier, ears, 1000)
        await courier.stop()
        assert await task == Outcome(Ending.STOPPED)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    assert_published(hub, order)


async def test_hands_on_why_it_failed(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, Corrupt(1), times=None)
    outcome = await Courier(order_for(hub, tmp_path)).run(Ears())
    assert outcome.ending is Ending.FAILED
    assert outcome.failure is not None
    assert outcome.failure.code == "corrupt"
    assert BIG in outcome.failure.message


@pytest.mark.parametrize("state", ["flowing", "slow", "stalled"])
async def test_stop_is_quick_and_keeps_every_byte(hub: Hub, tmp_path: Path, state: str) -> None:
    faults = {"flowing": Slow(10 * MIB), "slow": Slow(20_000), "stalled": Stall(3000)}
    hub.fault(BIG, faults[state])
    order, ears = order_for(hub, tmp_path), Ears()
    courier = Courier(order)
    task = await begun(courier, ears, 1500)
    process, began = mover_of(courier), time.monotonic()
    await courier.stop()
    assert time.monotonic() - began < 0.2
    assert is_gone(process)
    assert await task == Outcome(Ending.STOPPED)
    assert ears.bytes() == sum(part_sizes(order).values())

    hub.heal()
    again = Ears()
    assert await Courier(order).run(again) == Outcome(Ending.DONE)
    assert again.events[-1]["fetched"] == 8 * MIB + 2 - ears.bytes()
    assert_published(hub, order)


async def test_stop_before_or_during_the_start(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, Stall(1000), times=None)
    order = order_for(hub, tmp_path)
    early = Courier(order)
    await early.stop()
    assert await early.run(Ears()) == Outcome(Ending.STOPPED)
    assert early.pid is None

    hasty = Courier(order)
    task = asyncio.create_task(hasty.run(Ears()))
    await asyncio.sleep(0)  # its process is being made
    await hasty.stop()
    assert hasty.pid is not None
    assert not psutil.pid_exists(hasty.pid)
    assert await task == Outcome(Ending.STOPPED)
    assert not Path(order["target"]).exists()


async def test_stop_after_the_end_is_nothing(hub: Hub, tmp_path: Path) -> None:
    courier = Courier(order_for(hub, tmp_path))
    assert await courier.run(Ears()) == Outcome(Ending.DONE)
    await courier.stop()
    await courier.stop()


async def test_mover_that_hangs_is_killed(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, Stall(1000))
    courier, ears = Courier(order_for(hub, tmp_path)), Ears()
    task = await begun(courier, ears, 1000)
    process = mover_of(courier)
    freeze(process)
    began = time.monotonic()
    await courier.stop()
    assert 0.9 < time.monotonic() - began < 1.9
    assert is_gone(process)
    assert await task == Outcome(Ending.STOPPED)


async def test_mover_that_was_killed_is_lost_and_the_next_goes_on(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fault(BIG, Stall(3 * MIB))
    order, ears = order_for(hub, tmp_path), Ears()
    courier = Courier(order)
    task = await begun(courier, ears, 3 * MIB)
    mover_of(courier).kill()
    outcome = await task
    assert outcome.ending is Ending.LOST
    assert outcome.failure is not None
    assert outcome.failure.code == "mover_lost"
    assert "status=-9" in caplog.text
    again = Ears()
    assert await Courier(order).run(again) == Outcome(Ending.DONE)
    assert again.events[-1]["fetched"] <= 5 * MIB
    assert_published(hub, order)


async def test_cancelled_it_leaves_no_process(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, Stall(1000))
    order, ears = order_for(hub, tmp_path), Ears()
    courier = Courier(order)
    task = await begun(courier, ears, 1000)
    process = mover_of(courier)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_gone(process)
    assert sum(part_sizes(order).values()) >= 1000


async def test_what_a_listener_raises_ends_the_mover(hub: Hub, tmp_path: Path) -> None:
    hub.fault(BIG, Stall(1000))
    courier = Courier(order_for(hub, tmp_path))

    def refuse(_: Event) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        await courier.run(refuse)
    assert courier.pid is not None
    assert not psutil.pid_exists(courier.pid)


async def test_a_bug_of_the_mover_goes_to_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = await Courier({"files": []}).run(Ears())
    assert outcome.ending is Ending.LOST
    assert "KeyError" in caplog.text


async def test_many_files_fit_through_the_pipes(hub: Hub, tmp_path: Path) -> None:
    order, ears = order_for(hub, tmp_path), Ears()
    wanted = order["files"][1]
    order["files"] = [{**wanted, "path": f"{'x' * 150}/{n:05}.json"} for n in range(1500)]
    order["manifest"] = {}
    assert await Courier(order).run(ears) == Outcome(Ending.DONE)
    assert ears.bytes() == 2 * 1500
    assert len(hub.requests()) == 1


async def test_mover_knows_the_token_and_little_else(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.tokens.add("hf_secret")
    proxies = {f"{scheme}_proxy" for scheme in ("http", "https", "all", "no")}
    proxies |= {name.upper() for name in proxies}
    for name in ("XANDROUTING_API_KEY", *proxies, "FTP_PROXY", "PYTHONPATH", "HF_HOME"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    hub.fault(BIG, Stall(1000), times=None)
    order, ears = order_for(hub, tmp_path), Ears()
    courier = Courier(order, "hf_secret")
    task = await begun(courier, ears, 1000)
    environ, argv = mover_of(courier).environ(), mover_of(courier).cmdline()
    assert mover_of(courier).nice() >= 10
    assert mover_of(courier).ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
    await courier.stop()
    await task
    assert environ["HF_TOKEN"] == "hf_secret"
    allowed = {"HF_TOKEN", "PATH", "LANG", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"}
    assert proxies <= set(environ) <= allowed | proxies
    assert not any("hf_secret" in argument for argument in argv)
    assert hub.authorizations("hub") == {"Bearer hf_secret"}
    assert hub.authorizations("cdn") == set()

    nobody = Courier(order)
    task = await begun(nobody, Ears(), 0)
    await async_wait_for(lambda: nobody.pid is not None)
    assert "HF_TOKEN" not in mover_of(nobody).environ()
    await nobody.stop()
    await task


_GATEWAY = """
import asyncio, json, sys
from xandrouting.downloads.courier import Courier
order = json.loads(sys.stdin.readline())
courier = Courier(order)
def hear(event):
    print(courier.pid, sum(event.get("done", {}).values()), flush=True)
asyncio.run(courier.run(hear))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_mover_dies_with_the_gateway(hub: Hub, tmp_path: Path, number: int) -> None:
    hub.fault(BIG, Stall(3000))
    order: dict[str, Any] = order_for(hub, tmp_path)
    gateway = subprocess.Popen(
        [sys.executable, "-c", _GATEWAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with gateway:
        assert gateway.stdin is not None
        assert gateway.stdout is not None
        gateway.stdin.write(json.dumps(order).encode() + b"\n")
        gateway.stdin.flush()
        pid = 0
        for line in gateway.stdout:
            pid, size = map(int, line.split())
            if size >= 3000:
                break
        process = psutil.Process(pid)
        began = time.monotonic()
        os.kill(gateway.pid, number)
        wait_for(lambda: is_gone(process))
        print(f"gone after {1000 * (time.monotonic() - began):.0f} ms")
        assert time.monotonic() - began < 0.5
    assert part_sizes(order)[BIG] >= 3000 - 2
