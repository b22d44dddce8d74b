"""The gateway with a real vLLM, against the same engine asked straight."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import psutil

from bench import llm, stage
from bench.engine import Body
from bench.processes import BenchError, cpu_s
from bench.stage import Effort
from bench.table import Row, show
from xandrouting.provision.vllm import FOLDER, Missing, VllmInstall, find_vllm

MODELS = Path(".cache/vllm-models")
CONVERT = Path("scripts/convert_starter.py")
KEY_VARIABLE = "VLLM_API_KEY"
WAITER = "xandrouting_vllm.py"

STREAMS = (1, 8)
TOKENS = 64  # of an answer whose speed counts
FIRSTS = 24  # answers of one token in each turn
AT_LEAST = 0.97
# Two pairs: what drifts weighs the same on both.
TURNS = ("gateway", "direct", "direct", "gateway")
USAGE = re.compile(rb'"completion_tokens": ?(\d+)')

Taken = TypeVar("Taken")

STARTS = 3
REST_S = 2.0  # a spare that used no CPU for so long has imported everything
SPARE_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Way:
    """Where a request goes: to the gateway, or with the engine's key to the engine."""

    port: int
    key: str = ""


@dataclass(frozen=True)
class Answer:
    """When its first event and its end came, by the monotonic clock."""

    asked: float
    first: float
    ended: float


@dataclass(frozen=True)
class Talk:
    """Answers that were generated side by side, and the gateway's CPU time meanwhile."""

    tokens: int
    took_s: float  # from the first request to the last one's end
    busy_s: float


def install() -> VllmInstall:
    """Return the vLLM that the gateway will find too."""
    found = find_vllm(os.environ, beside=[Path(FOLDER)])
    if isinstance(found, Missing):
        raise BenchError(f"{found.reason}: run `{found.command}`")
    return found


@contextlib.contextmanager
def gateway(*arguments: str) -> Iterator[stage.Contender]:
    """Run the gateway with the starter model as safetensors, and no engine yet."""
    source, python = llm.starter(), install().python
    folder = MODELS / source.parent.name
    if not folder.exists():
        if python is None:
            raise BenchError("VLLM_BIN is a script of its own, which cannot convert the model")
        subprocess.run([python, CONVERT, source, folder], check=True)
    with llm.gateway(*arguments, models=MODELS) as contender:
        yield contender


def load(gateway: stage.Contender) -> Way:
    """Load the model anew; return the way to its engine."""
    llm.unload(gateway)
    llm.call(gateway.port, "POST", "/v1/models/load", {"model": llm.model_of(gateway)})
    process = psutil.Process(llm.loaded(gateway)["pid"])
    sockets = process.net_connections("tcp")
    [port] = [s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN]
    return Way(port, process.environ()[KEY_VARIABLE])


def speed(effort: Effort) -> list[Row]:
    with gateway("--spares", "none") as contender, ThreadPoolExecutor(max(STREAMS)) as clients:
        ways = {"gateway": Way(contender.port), "direct": load(contender)}
        model = llm.model_of(contender)

        def talk(way: Way, streams: int) -> Talk:
            busy_s = cpu_s(contender.pid)
            answers = _ask(clients, way, model, streams, TOKENS)
            took_s = max(a.ended for a in answers) - min(a.asked for a in answers)
            return Talk(streams * TOKENS, took_s, cpu_s(contender.pid) - busy_s)

        def first(way: Way, streams: int) -> float:
            volleys = [_ask(clients, way, model, streams, 1) for _ in range(FIRSTS // streams)]
            waits = [answer.first - answer.asked for volley in volleys for answer in volley]
            return statistics.median(waits) * 1000

        rows = []
        for streams in STREAMS:
            noun = f"{streams} stream" if streams == 1 else f"{streams} streams"
            talks = _in_turn(ways, streams, talk, effort.rounds)
            rates = {
                name: [each.tokens / each.took_s for each in seen] for name, seen in talks.items()
            }
            row = _row(f"vLLM, tokens/s, {noun}", rates, "/s", AT_LEAST, at_least=True)
            rows.append(replace(row, note=f"{row.note}; {_cpu(talks)}"))
            firsts = _in_turn(ways, streams, first, effort.rounds)
            rows.append(_row(f"vLLM, time to first token, {noun}", firsts, "ms", 1 / AT_LEAST))
        return rows


def _cpu(talks: Mapping[str, Sequence[Talk]]) -> str:
    """Tell what the gateway uses whoever is asked, and what it uses more when it is asked."""
    through, direct = (_sum(talks[name]) for name in ("gateway", "direct"))
    rest = direct.busy_s / direct.took_s
    more_us = (through.busy_s - rest * through.took_s) / through.tokens * 1e6
    return (
        f"the gateway used {show(more_us, 'µs')} of CPU per token, and {show(rest * 100, '%')} of "
        "a core whoever was asked"
    )


def _sum(talks: Sequence[Talk]) -> Talk:
    return Talk(
        sum(talk.tokens for talk in talks),
        sum(talk.took_s for talk in talks),
        sum(talk.busy_s for talk in talks),
    )


def _ask(
    clients: ThreadPoolExecutor, way: Way, model: str, streams: int, tokens: int
) -> list[Answer]:
    """Ask for so many answers at once, each of another prompt; wait for their ends."""
    numbers = range(streams)
    return list(clients.map(lambda number: _answer(way, _chat(model, number, tokens)), numbers))


def _chat(model: str, number: int, tokens: int) -> Body:
    """Return a request whose answer has exactly so many tokens, the same ones each time."""
    prompt = f"Tell the story of ship number {number} and of the sea."
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _answer(way: Way, body: Body) -> Answer:
    asked = time.monotonic()
    with llm.asked(way.port, body, key=way.key) as connection:
        seen = llm.read_events(connection, 1)
        first = time.monotonic()
        while not seen.endswith(b"0\r\n\r\n"):
            data = connection.recv(1 << 16)
            if not data:
                raise BenchError(f"the stream ended early: {seen[-300:]!r}")
            seen += data
        ended = time.monotonic()
    tokens = [int(count) for count in USAGE.findall(seen)]
    if tokens[-1:] != [body["max_tokens"]]:
        raise BenchError(f"not {body['max_tokens']} tokens: {seen[-300:]!r}")
    return Answer(asked, first, ended)


def _in_turn(
    ways: Mapping[str, Way], streams: int, take: Callable[[Way, int], Taken], rounds: int
) -> dict[str, list[Taken]]:
    """Measure each way in turn, after once that does not count."""
    taken: dict[str, list[Taken]] = {name: [] for name in ways}
    for way in ways.values():
        take(way, streams)
    for _ in range(rounds):
        for name in TURNS:
            taken[name].append(take(ways[name], streams))
    return taken


def _row(
    what: str,
    taken: Mapping[str, Sequence[float]],
    unit: str,
    limit: float,
    *,
    at_least: bool = False,
) -> Row:
    """Return the median of the pairs' ratios: each is of two that ran one after the other."""
    pairs = list(zip(taken["gateway"], taken["direct"], strict=True))
    ratios = [through / direct for through, direct in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    cells = {name: show(statistics.median(seen), unit) for name, seen in taken.items()}
    return Row(
        what,
        middle,
        "x",
        limit,
        at_least=at_least,
        **cells,
        note=f"{len(ratios)} pairs in turn, the middle half of their ratios {low:.3f} "
        f"to {high:.3f}",
    )


def start(_: Effort) -> list[Row]:
    """Take what a load takes, in a process that begins with it and in one that waited."""
    took: dict[str, list[float]] = {"none": [], "vllm": []}
    for spares, seconds in took.items():
        with gateway("--spares", spares) as contender:
            for _start in range(STARTS):
                llm.unload(contender)
                if spares == "vllm":
                    _until_spare_rests(contender)
                load(contender)
                seconds.append(llm.loaded(contender)["load_seconds"])
    cold_s, warm_s = (statistics.median(seconds) for seconds in took.values())
    note = "`load_seconds`, {} starts of {:.1f} to {:.1f} s, the files in memory, nothing compiled"
    return [
        Row(
            "vLLM, start to ready",
            cold_s,
            "s",
            gateway=show(cold_s, "s"),
            note=note.format(STARTS, min(took["none"]), max(took["none"])),
        ),
        Row(
            "vLLM, start to ready, `spares=vllm`",
            warm_s,
            "s",
            gateway=show(warm_s, "s"),
            note=note.format(STARTS, min(took["vllm"]), max(took["vllm"])),
        ),
    ]


def _until_spare_rests(gateway: stage.Contender) -> None:
    """Wait until a process has imported vLLM and waits for its order."""
    now = time.monotonic()
    rested, deadline, used = now, now + SPARE_TIMEOUT_S, 0.0
    while now < deadline:
        time.sleep(0.05)
        now, used_now = time.monotonic(), _spare_cpu_s(gateway)
        if used_now == 0.0 or used_now > used:
            rested, used = now, used_now
        elif now - rested > REST_S:
            return
    raise BenchError("no vLLM came to wait for its order")


def _spare_cpu_s(gateway: stage.Contender) -> float:
    """Return the CPU seconds of the spares; 0: there is none."""
    family = psutil.Process(gateway.pid).children(recursive=True)
    return sum(cpu_s(process.pid) for process in family if WAITER in "".join(process.cmdline()))
