"""Chat streams of the real model while a download runs at full speed."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from bench import llm
from bench.downloads import SIZE_BYTES, begin, hub_program, memory_folder, wait_until_complete
from bench.engine import chat
from bench.processes import BenchError
from bench.stage import Contender, Effort
from bench.table import Row, show

STREAMS = 2
TOKENS = 200  # of each of them in a round

Doing = Callable[[], AbstractContextManager[None]]


def manners(effort: Effort) -> list[Row]:
    """Time each token's coming after the last one of its stream, with and without downloads."""
    with hub_program() as hub, memory_folder() as models:
        shutil.copyfile(llm.starter(), models / "starter.gguf")
        with llm.gateway("--hf-endpoint", hub["url"], models=models) as gateway:
            llm.load(gateway, n_parallel=STREAMS, n_ctx=512)
            moved: list[float] = []
            ways: dict[str, Doing] = {
                "without": contextlib.nullcontext,
                "download": partial(_downloading, gateway, hub, models, moved),
                "curl": partial(_curl, hub, models),
            }
            gaps: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(effort.rounds):
                for name, way in ways.items():
                    with way():
                        gaps[name] += _talk(gateway)
    p50, p99 = ({name: _part(seen, share) for name, seen in gaps.items()} for share in (0.5, 0.99))
    added = p99["download"] / p99["without"]
    return [
        Row(
            f"time per token of {STREAMS} streams while 1 GB downloads run, p99, to without",
            added,
            "x",
            2,
            gateway=show(p99["download"], "ms"),
            direct=show(p99["without"], "ms"),
            note=f"p50 {show(p50['download'], 'ms')}, without {show(p50['without'], 'ms')}; "
            f"with curl instead p99 {show(p99['curl'], 'ms')}, p50 {show(p50['curl'], 'ms')}; "
            f"{len(gaps['download']):,} tokens each; meanwhile 1 GB took "
            f"{show(sum(moved) / len(moved), 's')}",
        )
    ]


def _talk(gateway: Contender) -> list[float]:
    """Have all streams answer at once; return how many milliseconds each token took."""
    body = chat(llm.model_of(gateway), tokens=TOKENS)
    with ThreadPoolExecutor(STREAMS) as clients:
        streams = [clients.submit(_gaps, gateway.port, body) for _ in range(STREAMS)]
        return [gap for stream in streams for gap in stream.result()]


def _gaps(port: int, body: Mapping[str, Any]) -> list[float]:
    gaps: list[float] = []
    with llm.asked(port, body) as connection:
        tail = llm.read_events(connection, 1)
        last = time.monotonic()
        while not tail.endswith(b"0\r\n\r\n"):
            data = connection.recv(1 << 16)
            now = time.monotonic()
            if not data:
                raise BenchError("the stream ended early")
            events = data.count(b'"delta"')
            if events:
                gaps += [1000 * (now - last)] + [0.0] * (events - 1)
                last = now
            tail = (tail + data)[-300:]
    return gaps


@contextlib.contextmanager
def _downloading(
    gateway: Contender, hub: Mapping[str, Any], models: Path, moved: list[float]
) -> Iterator[None]:
    """Download the same gigabyte again and again during the block."""

    def once() -> None:
        began = time.monotonic()
        wait_until_complete(gateway.port, begin(gateway.port, hub["repo_id"], "other"))
        moved.append(time.monotonic() - began)
        shutil.rmtree(models / "other")

    with _again_and_again(once):
        yield


@contextlib.contextmanager
def _curl(hub: Mapping[str, Any], models: Path) -> Iterator[None]:
    def once() -> None:
        there = models / ".by-curl"
        subprocess.run(["curl", "-sfLo", str(there), hub["file_url"]], check=True)
        if there.stat().st_size != SIZE_BYTES:
            raise BenchError("curl brought something else")
        there.unlink()

    with _again_and_again(once):
        yield


@contextlib.contextmanager
def _again_and_again(once: Callable[[], None]) -> Iterator[None]:
    enough = threading.Event()

    def work() -> None:
        while not enough.is_set():
            once()

    with ThreadPoolExecutor(1) as worker:
        working = worker.submit(work)
        try:
            yield
        finally:
            enough.set()
    working.result()


def _part(seen: list[float], share: float) -> float:
    return sorted(seen)[int(share * (len(seen) - 1))]
