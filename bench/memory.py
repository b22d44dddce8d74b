"""What the gateway keeps in memory: at rest, for idle streams, for a client that reads nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from bench import stage
from bench.load import Job
from bench.mock import Order
from bench.processes import memory_bytes, raise_file_limit
from bench.stage import NGINX, Contender, Effort
from bench.table import Row, show

IDLE_STREAMS = 2000
STALLED_STREAMS = 8
STALL_CHUNK_BYTES = 8192
STALL_CHUNKS = 8192  # 64 MiB for each stream
OPEN_S = 2.0
SETTLE_S = 0.5
ROUNDS = 3
KIB, MIB, MB = 1 << 10, 1 << 20, 10**6

Proxy = Callable[[Contender], AbstractContextManager[Contender]]


def rest(_: Effort) -> list[Row]:
    kinds: dict[str, list[int]] = {"Pss": [], "Rss": []}
    for _round in range(ROUNDS):
        with stage.mock() as engine, stage.gateway_before(engine) as gateway:
            time.sleep(SETTLE_S)
            for kind, seen in kinds.items():
                seen.append(memory_bytes(gateway.pid, kind))
    pss, rss = (statistics.median(seen) / MB for seen in kinds.values())
    note = f"PSS; its RSS, pages shared with other programs counted in full, is {show(rss, 'MB')}"
    return [Row("memory at rest, no engine", pss, "MB", 60, gateway=show(pss, "MB"), note=note)]


def idle(_: Effort) -> list[Row]:
    streams = min(IDLE_STREAMS, raise_file_limit() // 2 - 100)
    job = Job(do="hold", stream=True, order=Order(hold=True), connections=streams)
    gateway = statistics.median(seen.memory_bytes for seen in _rounds(stage.gateway_before, job))
    nginx = None
    if NGINX is not None:
        nginx = _open_before_fresh(stage.nginx_before, job).memory_bytes / KIB
    cells = {"gateway": show(gateway / KIB, "KiB"), "nginx": show(nginx, "KiB")}
    return [Row(f"memory per idle stream, {streams:,} open", gateway / KIB, "KiB", 25, **cells)]


def stall(_: Effort) -> list[Row]:
    order = Order(n=STALL_CHUNKS, pad_bytes=STALL_CHUNK_BYTES)
    job = Job(do="stall", stream=True, order=order, connections=STALLED_STREAMS)
    seen = _rounds(stage.gateway_before, job)
    worst = max(each.memory_bytes for each in seen) / MIB
    written = statistics.median(each.written_bytes for each in seen) / MIB
    whole = STALL_CHUNK_BYTES * STALL_CHUNKS / MIB
    what = f"memory for each of {STALLED_STREAMS} clients that read nothing"
    note = (
        f"worst of {ROUNDS} rounds; of the {whole:.0f} MiB that were for one client the engine "
        f"got rid of {written:.1f}, mostly into the sockets on the way"
    )
    return [Row(what, worst, "MiB", 1, gateway=show(worst, "MiB"), note=note)]


class Seen(NamedTuple):
    """What one open stream led to; bytes."""

    memory_bytes: float  # by which the server grew, at most
    written_bytes: float  # that the engine could write


def _rounds(proxy: Proxy, job: Job) -> list[Seen]:
    return [_open_before_fresh(proxy, job) for _ in range(ROUNDS)]


def _open_before_fresh(proxy: Proxy, job: Job) -> Seen:
    """Open all streams of the job to a server that has just started and seen a few requests."""
    with stage.mock() as engine, proxy(engine) as server:
        stage.run_job(Job(do="loop", stream=True, seconds=0.1).to(server.port, server.pid))
        time.sleep(SETTLE_S)
        before = highest = memory_bytes(server.pid)
        written = stage.get(engine.port, "/")["written_bytes"]
        with stage.opened(job.to(server.port, server.pid)):
            until = time.monotonic() + OPEN_S
            while time.monotonic() < until:
                time.sleep(0.1)
                highest = max(highest, memory_bytes(server.pid))
            written = stage.get(engine.port, "/")["written_bytes"] - written
    return Seen((highest - before) / job.connections, written / job.connections)
