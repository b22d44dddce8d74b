"""What it costs that another model is loaded, and that the right one is."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import llm, stage
from bench.engine import PROMPT, chat, time_to_first
from bench.processes import BenchError
from bench.stage import Effort
from bench.table import Row, show

N_CTX = 2048
WITHOUT_READ_AHEAD = (sys.executable, "-m", "bench.without_read_ahead")
DRAIN_TOKENS = 40  # of the answer that a load waits for: about a second
HITS = 40  # in each round, of each way


def switch(effort: Effort) -> list[Row]:
    through: list[float] = []
    stop: list[float] = []
    start: list[float] = []
    first: list[float] = []
    unwarmed: list[float] = []
    with llm.copies("a", "b") as models, llm.gateway("--max-loaded", "1", models=models) as gateway:
        names = [model["id"] for model in llm.call(gateway.port, "GET", "/v1/models")["data"]]
        likes = [llm.load(gateway, model=name, n_ctx=N_CTX) for name in names]
        for _ in range(effort.rounds):
            for name, leaves, comes in zip(names, reversed(likes), likes, strict=True):
                body = chat(name) | {"n_ctx": N_CTX}
                through.append(time_to_first(gateway.port, body))
                with llm.bare(leaves) as engine:
                    time_to_first(engine.port, body, key=engine.key)
                    began = time.monotonic()
                stop.append(time.monotonic() - began)
                began = time.monotonic()
                with llm.bare(comes, warmup=True) as engine:
                    start.append(time.monotonic() - began)
                    first.append(time_to_first(engine.port, body, key=engine.key))
                began = time.monotonic()
                with llm.bare(comes):
                    unwarmed.append(time.monotonic() - began)
    own = [sum(parts) for parts in zip(stop, start, first, strict=True)]
    through_ms, own_ms, stop_ms, start_ms, first_ms, unwarmed_ms = (
        statistics.median(seen) * 1000 for seen in (through, own, stop, start, first, unwarmed)
    )
    return [
        Row(
            "switch A, B, A where one fits, to the engine's own stop, start and first token",
            through_ms / own_ms,
            "x",
            0.85,
            gateway=show(through_ms, "ms"),
            direct=show(own_ms, "ms"),
            note=f"from the request to its first token, {len(through)} switches; the bare engine "
            f"stops in {show(stop_ms, 'ms')}, a fresh process starts in {show(start_ms, 'ms')} "
            f"({show(unwarmed_ms, 'ms')} without llama.cpp's warm-up, which the gateway leaves out "
            f"on a CPU), and its first token comes after {show(first_ms, 'ms')}",
        )
    ]


def parked(effort: Effort) -> list[Row]:
    cold: list[float] = []
    warm: list[float] = []
    with llm.gateway() as gateway:
        model = llm.model_of(gateway)
        for number in range(effort.rounds):
            llm.load(gateway, n_ctx=N_CTX)
            # A beginning of its own, so that nothing is known of it.
            body = chat(model, f"{number}: " + "The sea is wide and deep. " * 208, tokens=1)
            body |= {"n_ctx": N_CTX, "cache_prompt": True}
            cold.append(time_to_first(gateway.port, body))
            llm.call(gateway.port, "POST", "/v1/models/unload-all")
            llm.call(gateway.port, "POST", "/v1/models/load", {"model": model, "n_ctx": N_CTX})
            warm.append(time_to_first(gateway.port, body))
    cold_ms, warm_ms = (statistics.median(seen) * 1000 for seen in (cold, warm))
    return [
        Row(
            "a conversation of 1,500 tokens after an unload and a load, how much sooner",
            cold_ms / warm_ms,
            "x",
            10,
            at_least=True,
            gateway=show(warm_ms, "ms"),
            direct=show(cold_ms, "ms"),
            note="time to first token on an engine that is ready, with the conversation read back "
            f"and with all of it to be read; {effort.rounds} of each in turn",
        )
    ]


def wake(effort: Effort) -> list[Row]:
    woken: list[float] = []
    started: list[float] = []
    with llm.gateway("--soft-idle-s", "0.5") as gateway:
        body = chat(llm.model_of(gateway)) | {"n_ctx": N_CTX}
        for _ in range(effort.rounds):
            llm.unload(gateway)
            _until_spare(gateway)
            started.append(time_to_first(gateway.port, body))
            _until(lambda: llm.loaded(gateway)["state"] == "sleeping")
            woken.append(time_to_first(gateway.port, body))
    woken_ms, started_ms = (statistics.median(seen) * 1000 for seen in (woken, started))
    return [
        Row(
            "waking from soft idle, to a warm start",
            woken_ms / started_ms,
            "x",
            1.2,
            gateway=show(woken_ms, "ms"),
            direct=show(started_ms, "ms"),
            note="from the request to its first token, both through the gateway; the warm start "
            f"takes a spare; {effort.rounds} of each in turn",
        )
    ]


def read_ahead(effort: Effort) -> list[Row]:
    """Load a model whose file is not in the page cache, while another one's answer ends."""
    rows = []
    for busy in (True, False):
        took: dict[str, list[float]] = {"with": [], "without": [], "warm": []}
        for _ in range(effort.rounds):
            took["with"].append(_load_cold(stage.GATEWAY, busy=busy))
            took["without"].append(_load_cold(WITHOUT_READ_AHEAD, busy=busy))
            took["warm"].append(_load_cold(WITHOUT_READ_AHEAD, busy=busy, drop=False))
        ms = {name: statistics.median(seen) * 1000 for name, seen in took.items()}
        disk_ms = ms["without"] - ms["warm"]
        rows.append(
            Row(
                f"load from a cold page cache, {'in the way of a' if busy else 'beside no'} busy "
                "engine: saved by reading ahead",
                (1 - ms["with"] / ms["without"]) * 100,
                "%",
                20 if busy else None,
                at_least=True,
                gateway=show(ms["with"], "ms"),
                direct=show(ms["without"], "ms"),
                note=f"`load_seconds`, {effort.rounds} loads each in turn; with the file in memory "
                f"it is {show(ms['warm'], 'ms')}: the disk costs {show(disk_ms, 'ms')}, of which "
                f"{show((ms['without'] - ms['with']) / disk_ms * 100, '%')} are saved",
            )
        )
    return rows


def _load_cold(program: Sequence[str], *, busy: bool, drop: bool = True) -> float:
    """Return the seconds of one load of a model of which, if dropped, nothing is in memory."""
    options = ("--max-loaded", "1", "--min-residency-s", "0", "--fair-wait-s", "0.01")
    with (
        llm.copies("a", "b") as models,
        llm.gateway(*options, models=models, program=program) as gateway,
    ):
        _until_spare(gateway)
        a, b = (model["id"] for model in llm.call(gateway.port, "GET", "/v1/models")["data"])
        time_to_first(gateway.port, chat(a))
        if drop:
            _drop_from_memory(models / "b.gguf")
        _until_spare(gateway)
        if not busy:
            llm.call(gateway.port, "POST", "/v1/models/load", {"model": b})
        else:
            with llm.asked(gateway.port, chat(a, tokens=DRAIN_TOKENS)) as stream:
                llm.read_events(stream, 1)
                llm.call(gateway.port, "POST", "/v1/models/load", {"model": b})
        return llm.loaded(gateway)["load_seconds"]


def _drop_from_memory(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _until_spare(gateway: stage.Contender) -> None:
    _until(lambda: llm.call(gateway.port, "GET", "/v1/system")["spares"]["count"] == 1)


def _until(fact: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not fact():
        if time.monotonic() > deadline:
            raise BenchError("what was waited for did not come")
        time.sleep(0.02)


def hit(effort: Effort) -> list[Row]:
    took: dict[str, list[float]] = {"gateway": [], "direct": []}
    with llm.gateway() as gateway:
        behind = llm.load(gateway, n_parallel=1, n_ctx=N_CTX)
        # The prompt is the same, so the engine keeps what it read and is soon at its answer.
        body = chat(llm.model_of(gateway), PROMPT, tokens=1) | {"cache_prompt": True}
        ways = {"gateway": (gateway.port, ""), "direct": (behind.port, behind.key)}
        time_to_first(gateway.port, body)
        for _ in range(effort.rounds * HITS):
            for name, (port, key) in ways.items():
                took[name].append(time_to_first(port, body, key=key))
    ms = {name: statistics.median(seen) * 1000 for name, seen in took.items()}
    cells = {name: show(each, "ms") for name, each in ms.items()}
    return [
        Row(
            "a hit on a loaded model, added time to first token, p50",
            ms["gateway"] - ms["direct"],
            "ms",
            **cells,
            note=f"{len(took['direct'])} requests each way in turn to one engine, a new "
            "connection each; the engine works on every core, the gateway's too, so this is "
            "more than the data plane's own rows say",
        )
    ]
