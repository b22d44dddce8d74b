"""What the gateway says a model will take, against what it takes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from bench import llm
from bench.engine import chat, time_to_first
from bench.processes import BenchError, memory_bytes
from bench.stage import Contender, Effort
from bench.table import Row, show

SENTENCE = "The sea is wide and deep. "
SENTENCE_TOKENS = 7
PROMPT_TOKENS = 3000
ROOM_TOKENS = 100  # for the chat template and the answer
LOOK_EVERY_S = 0.05
NOTICE_S = 30.0  # how long the gateway may take to measure what its engine has come to take
LEARNT = 0.99  # it does not note a rise of 1 %
MIB = 1 << 20


class Setup(NamedTuple):
    """What the model is loaded with."""

    n_ctx: int
    n_parallel: int
    cache: str

    def __str__(self) -> str:
        return f"{self.n_ctx:,} tokens x {self.n_parallel}, {self.cache}"


SETUPS = (
    Setup(512, 1, "f16"),
    Setup(2048, 1, "f16"),
    Setup(8192, 1, "f16"),
    Setup(2048, 4, "f16"),
    Setup(4096, 2, "f16"),
    Setup(8192, 8, "f16"),
    Setup(8192, 2, "q8_0"),
)
LIMITS = {"estimated": 15.0, "learned": 5.0}  # per cent, of a first and of a second load


def estimates(_: Effort) -> list[Row]:
    with llm.copies("model") as models, llm.gateway(models=models) as gateway:
        return [
            _row(gateway, setup, source, limit)
            for setup in SETUPS
            for source, limit in LIMITS.items()
        ]


def _row(gateway: Contender, setup: Setup, source: str, limit: float) -> Row:
    """Load the model, let it read a long prompt, and compare."""
    engine = llm.load(
        gateway,
        n_ctx=setup.n_ctx,
        n_parallel=setup.n_parallel,
        cache_type_k=setup.cache,
        cache_type_v=setup.cache,
    )
    said = llm.loaded(gateway)["decision"]["estimate"]
    if said["source"] != source:
        raise BenchError(f"the estimate for {setup} is {said['source']}, not {source}")
    took = _most_taken(gateway, engine, _prompt(setup))
    off = (said["total_bytes"] / took - 1) * 100
    return Row(
        f"memory {source}, {setup}",
        abs(off),
        "%",
        limit,
        gateway=show(said["total_bytes"] / MIB, "MiB"),
        direct=show(took / MIB, "MiB"),
        note=f"{off:+.2f} % of the engine's highest PSS, a long prompt included",
    )


def _prompt(setup: Setup) -> str:
    tokens = min(PROMPT_TOKENS, setup.n_ctx - ROOM_TOKENS)
    return SENTENCE * (tokens // SENTENCE_TOKENS)


def _most_taken(gateway: Contender, engine: llm.Engine, prompt: str) -> int:
    """Return the highest PSS from a load to the end of an answer, as we and the gateway see it."""
    seen = [memory_bytes(engine.pid)]
    answered = threading.Event()

    def look() -> None:
        while not answered.wait(LOOK_EVERY_S):
            seen.append(memory_bytes(engine.pid))

    with ThreadPoolExecutor(1) as looker:
        looking = looker.submit(look)
        try:
            time_to_first(gateway.port, chat(llm.model_of(gateway), prompt))
        finally:
            answered.set()
        looking.result()
    return max(*seen, _measured(gateway, memory_bytes(engine.pid)))


def _measured(gateway: Contender, taken: int) -> int:
    """Wait until the gateway has measured what the engine takes now; return its figure."""
    deadline = time.monotonic() + NOTICE_S
    while True:
        measured = llm.loaded(gateway)["memory"]["measured_bytes"] or 0
        if measured >= taken * LEARNT:
            return measured
        if time.monotonic() > deadline:
            raise BenchError(f"the gateway measured {measured} bytes where {taken} are taken")
        time.sleep(LOOK_EVERY_S)
