"""The gateway with a real model, against the same engine bare."""

from __future__ import annotations

import contextlib
import http.client
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench import llm
from bench.stage import Effort
from bench.table import Row, show

PROMPT = "Write one sentence about the sea."
LONG_PROMPT = "The sea is wide and deep. " * 80  # takes a second or more to read
LONG = 400  # tokens; nobody waits for the last one
LEAVE_AFTER_S = 0.4
LOADS = 3
STREAMS = 8
TALK_TOKENS = 60  # of each of them
LOOK_EVERY_S = 0.02
LOOKED_AT = ("/health", "/v1/models/loaded")

Body = dict[str, Any]
Looks = dict[str, list[float]]
Wait = Callable[[socket.socket], None]  # until the client leaves


def chat(model: str, prompt: str = PROMPT, *, tokens: int = 16, stream: bool = True) -> Body:
    """Return a request whose prompt is read anew each time, and whose answer is full length."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "stream": stream,
        "cache_prompt": False,
        "ignore_eos": True,
    }


def cold_start(effort: Effort) -> list[Row]:
    through, start, warm, first = [], [], [], []
    with llm.gateway() as gateway:
        like = llm.load(gateway)
        body = chat(llm.model_of(gateway))
        for _ in range(effort.rounds):
            llm.unload(gateway)
            through.append(time_to_first(gateway.port, body))
            llm.unload(gateway)
            began = time.monotonic()
            with llm.bare(like) as engine:
                start.append(time.monotonic() - began)
                first.append(time_to_first(engine.port, body, key=engine.key))
                warm.append(time_to_first(engine.port, body, key=engine.key))
    cold_ms, start_ms, warm_ms, first_ms = (
        statistics.median(seen) * 1000 for seen in (through, start, warm, first)
    )
    return [
        Row(
            "cold start, added to the engine's own start and its first byte",
            cold_ms - start_ms - warm_ms,
            "ms",
            100,
            gateway=show(cold_ms, "ms"),
            direct=show(start_ms + warm_ms, "ms"),
            note=f"the bare engine starts in {show(start_ms, 'ms')}; its first byte comes after "
            f"{show(first_ms, 'ms')} when it is new, {show(warm_ms, 'ms')} when it is warm",
        )
    ]


def time_to_first(port: int, body: Body, *, key: str = "") -> float:
    """Return the seconds from a request to the first event, after reading the whole answer."""
    began = time.monotonic()
    with llm.asked(port, body, key=key) as connection:
        seen = llm.read_events(connection, 1)
        took = time.monotonic() - began
        llm.read_to_end(connection, seen)
    return took


def looks(_: Effort) -> list[Row]:
    with llm.gateway() as gateway:
        body = chat(llm.model_of(gateway))
        loading: Looks = {path: [] for path in LOOKED_AT}
        for _load in range(LOADS):
            llm.unload(gateway)
            with looking(gateway.port, loading):
                time_to_first(gateway.port, body)
        llm.load(gateway, n_parallel=STREAMS, n_ctx=512)
        talk = chat(body["model"], tokens=TALK_TOKENS)
        generating: Looks = {path: [] for path in LOOKED_AT}
        with ThreadPoolExecutor(STREAMS) as clients:
            streams = [clients.submit(time_to_first, gateway.port, talk) for _ in range(STREAMS)]
            with looking(gateway.port, generating):
                for stream in streams:
                    stream.result()
    return [
        *_look_rows("while an engine loads", loading),
        *_look_rows(f"while {STREAMS} streams generate", generating),
    ]


@contextlib.contextmanager
def looking(port: int, looks: Looks) -> Iterator[None]:
    """Ask for each path again and again during the block; note how many seconds each took."""
    enough = threading.Event()

    def look(path: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30.0)
        while not enough.wait(LOOK_EVERY_S):
            began = time.monotonic()
            connection.request("GET", path)
            connection.getresponse().read()
            looks[path].append(time.monotonic() - began)
        connection.close()

    with ThreadPoolExecutor(len(looks)) as lookers:
        running = [lookers.submit(look, path) for path in looks]
        try:
            yield
        finally:
            enough.set()
    for each in running:
        each.result()


def _look_rows(when: str, looks: Looks) -> Iterator[Row]:
    for path, took_s in looks.items():
        median_ms = statistics.median(took_s) * 1000
        note = f"at most {show(max(took_s) * 1000, 'ms')} in {len(took_s)} looks"
        yield Row(
            f"{path} {when}, p50", median_ms, "ms", 50, gateway=show(median_ms, "ms"), note=note
        )


def leave(effort: Effort) -> list[Row]:
    with llm.gateway() as gateway:
        model = llm.model_of(gateway)
        behind = llm.load(gateway)
        with llm.bare(behind) as bare:
            ways = {"gateway": (gateway.port, "", behind), "direct": (bare.port, bare.key, bare)}

            def row(what: str, body: Body, wait: Wait) -> Row:
                took: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(effort.rounds):
                    for name, (port, key, engine) in ways.items():
                        with llm.asked(port, body, key=key) as connection:
                            wait(connection)
                            left = time.monotonic()
                        took[name].append(engine.free_at() - left)
                ms = {name: statistics.median(seen) * 1000 for name, seen in took.items()}
                cells = {name: show(each, "ms") for name, each in ms.items()}
                what = f"slot free after a client left, {what}"
                return Row(what, ms["gateway"] - ms["direct"], "ms", 100, **cells)

            return [
                row("mid-stream", chat(model, tokens=LONG), _five_events),
                row("in a long prefill", chat(model, LONG_PROMPT, tokens=LONG), _moment),
                row("plain answer", chat(model, tokens=LONG, stream=False), _moment),
            ]


def _five_events(connection: socket.socket) -> None:
    llm.read_events(connection, 5)


def _moment(_: socket.socket) -> None:
    time.sleep(LEAVE_AFTER_S)
