"""Downloads that end before they are complete: cancelled, or with a gateway that is killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from tests.fakes.hub import Hub, Slow, Stall

from bench import llm, stage
from bench.downloads import CALL, SIZE_BYTES, begin, memory_folder, wait_until_complete
from bench.processes import BenchError, Process, running
from bench.stage import Effort
from bench.table import Row, show

REPO, FILE = "bench/ends", "ends-Q4_0.gguf"
KILLS = 5
DOWNLOADS = 3  # with so many kills each
SLOW_BYTES_PER_S = 1e6
STALLS_AFTER_BYTES = 50_000_000
PACED_BYTES_PER_S = 100e6
LOOK_EVERY_S = 0.002


def cancel(effort: Effort) -> list[Row]:
    ways: dict[str, Callable[[Hub], None]] = {
        "flowing": lambda _: None,
        "slow, 1 MB/s": lambda hub: hub.fault(FILE, Slow(SLOW_BYTES_PER_S), times=None),
        "stalled": lambda hub: hub.fault(FILE, Stall(STALLS_AFTER_BYTES), times=None),
    }
    with _hub() as hub, memory_folder() as models, _served_by(hub, models) as gateway:
        return [_cancel_row(gateway, hub, name, way, effort) for name, way in ways.items()]


def _cancel_row(
    gateway: stage.Contender, hub: Hub, name: str, way: Callable[[Hub], None], effort: Effort
) -> Row:
    took = []
    way(hub)
    for number in range(effort.rounds):
        before = hub.served_bytes(FILE)
        job_id = begin(gateway.port, REPO, f"cancel-{number}")
        least = STALLS_AFTER_BYTES if name == "stalled" else 1_000_000
        _until(lambda: hub.served_bytes(FILE) - before >= least)  # noqa: B023 - called at once
        began = time.monotonic()
        answer = llm.call(gateway.port, "DELETE", f"{CALL}/{job_id}?purge=true")
        took.append(time.monotonic() - began)
        if answer["status"] != "cancelled" or _movers(gateway.pid):
            raise BenchError(f"the cancelled download goes on: {answer}")
        served = hub.served_bytes(FILE)
        time.sleep(0.2)
        if hub.served_bytes(FILE) > served + (8 << 20):
            raise BenchError("bytes come after a cancellation")
    hub.heal()
    return Row(
        f"cancelling a download, {name}",
        statistics.median(took) * 1000,
        "ms",
        2000,
        note=f"at most {show(max(took) * 1000, 'ms')}; answered when no mover was there any more",
    )


def killed(effort: Effort) -> list[Row]:
    with _hub() as hub:
        rows = [_killed_row(hub, who, "at full speed", effort) for who in ("gateway", "mover")]
        hub.fault(FILE, Slow(PACED_BYTES_PER_S), times=None)
        return [
            *rows,
            *(_killed_row(hub, who, "at 100 MB/s", effort) for who in ("gateway", "mover")),
        ]


def _killed_row(hub: Hub, who: str, pace: str, effort: Effort) -> Row:
    way = _with_gateways_killed if who == "gateway" else _with_movers_killed
    shares = []
    for seed in range(min(effort.rounds, DOWNLOADS)):
        rng = random.Random(seed)
        moments = sorted(rng.uniform(0.02, 0.98) * SIZE_BYTES for _ in range(KILLS))
        before = hub.served_bytes(FILE)
        with memory_folder() as models:
            way(hub, models, [before + moment for moment in moments])
            _check(hub, models / "killed" / FILE)
        shares.append(100 * ((hub.served_bytes(FILE) - before) / SIZE_BYTES - 1))
    return Row(
        f"fetched twice after {KILLS} kill -9 of the {who} in 1 GB, {pace}",
        statistics.median(shares),
        "%",
        2,
        note=f"{len(shares)} downloads, at most {show(max(shares), '%')}; every hash was right",
    )


def _with_gateways_killed(hub: Hub, models: Path, moments: Sequence[float]) -> None:
    """Download once, and kill the gateway whenever the hub has sent so much."""
    with tempfile.TemporaryDirectory(prefix="bench-") as data:
        job_id = None
        for moment in moments:
            with _gateway(models, data, hub) as (process, port):
                job_id = job_id or begin(port, REPO, "killed")
                _until_served(hub, moment)
                os.kill(process.pid, signal.SIGKILL)
        assert job_id is not None
        with _gateway(models, data, hub) as (_, port):
            wait_until_complete(port, job_id)


def _with_movers_killed(hub: Hub, models: Path, moments: Sequence[float]) -> None:
    """Download once, and kill what moves the bytes whenever the hub has sent so much."""
    with _served_by(hub, models) as gateway:
        job_id = begin(gateway.port, REPO, "killed")
        killed = -1
        for moment in moments:
            _until_served(hub, moment)
            _until(lambda: _movers(gateway.pid) not in ([], [killed]))  # noqa: B023 - called at once
            [killed] = _movers(gateway.pid)
            os.kill(killed, signal.SIGKILL)
        wait_until_complete(gateway.port, job_id)


def _check(hub: Hub, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != hub.repos[REPO].revisions["main"].files[FILE].blob.sha256:
        raise BenchError("the file's hash is wrong")


@contextlib.contextmanager
def _gateway(models: Path, data: str, hub: Hub) -> Iterator[tuple[Process, int]]:
    argv = [*stage.GATEWAY, "serve", "--port", "0", "--data-dir", data]
    argv += ["--models-dir", str(models), "--hf-endpoint", hub.url]
    with running(argv) as process:
        port = urlsplit(process.wait_for("ready ")).port
        assert port is not None
        yield process, port


def _served_by(hub: Hub, models: Path) -> contextlib.AbstractContextManager[stage.Contender]:
    return stage.gateway("--models-dir", str(models), "--hf-endpoint", hub.url)


@contextlib.contextmanager
def _hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add_repo(REPO, {FILE: ("random", SIZE_BYTES, 1)})
        yield hub


def _movers(pid: int) -> list[int]:
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if any(word.endswith("mover.py") for word in child.cmdline()):
                found.append(child.pid)
    return found


def _until_served(hub: Hub, moment: float) -> None:
    _until(lambda: hub.served_bytes(FILE) >= moment)


def _until(true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise BenchError("the download did not come so far")
        time.sleep(LOOK_EVERY_S)
