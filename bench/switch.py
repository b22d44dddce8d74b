"""What it costs that another model is loaded, and that the right one is."""

from __future__ import annotations

import statistics
import time

from bench import llm
from bench.engine import PROMPT, chat, time_to_first
from bench.stage import Effort
from bench.table import Row, show

N_CTX = 2048
HITS = 40  # in each round, of each way


def switch(effort: Effort) -> list[Row]:
    through: list[float] = []
    stop: list[float] = []
    start: list[float] = []
    first: list[float] = []
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
                with llm.bare(comes) as engine:
                    start.append(time.monotonic() - began)
                    first.append(time_to_first(engine.port, body, key=engine.key))
    own = [sum(parts) for parts in zip(stop, start, first, strict=True)]
    through_ms, own_ms, stop_ms, start_ms, first_ms = (
        statistics.median(seen) * 1000 for seen in (through, own, stop, start, first)
    )
    return [
        Row(
            "switch A, B, A where one fits, to the engine's own stop, start and first token",
            through_ms / own_ms,
            "x",
            1.3,
            gateway=show(through_ms, "ms"),
            direct=show(own_ms, "ms"),
            note=f"from the request to its first token, {len(through)} switches; the bare engine "
            f"stops in {show(stop_ms, 'ms')}, starts in {show(start_ms, 'ms')}, and its first "
            f"token comes after {show(first_ms, 'ms')}",
        )
    ]


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
