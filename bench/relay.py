"""What the gateway costs between a client and an engine, with a mock for the engine."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator

import msgspec

from bench import stage
from bench.load import Job
from bench.mock import Order
from bench.processes import BenchError
from bench.stage import NGINX, Contender, Effort, Numbers
from bench.table import Row, show

STREAMS = 200
CHUNKS = 200  # of one stream
LLAMA_ROUTER = 28_000  # chunks/s of llama-server's router mode on one core like ours
PACE_MS = 20.0  # 200 streams: a chunk every 100 µs


@contextlib.contextmanager
def everyone() -> Iterator[list[Contender]]:
    """Run the mock, the gateway and, where there is one, nginx."""
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(stage.mock())
        contenders = [engine, stack.enter_context(stage.gateway_before(engine))]
        if NGINX is not None:
            contenders.append(stack.enter_context(stage.nginx_before(engine)))
        yield contenders


def loop(effort: Effort, order: Order | None = None, *, connections: int = 1) -> dict[str, Numbers]:
    """Put everyone under the same load in turn; `order` None asks for plain answers."""
    job = Job(
        do="loop",
        stream=order is not None,
        order=order or Order(),
        connections=connections,
        seconds=effort.seconds,
    )
    with everyone() as contenders:
        job = msgspec.structs.replace(job, engine_port=contenders[0].port)
        return stage.in_turn(contenders, job, effort.rounds)


def added(what: str, seen: dict[str, Numbers], key: str, limit_ms: float) -> Row:
    """Return the row of a time the gateway adds to the direct way."""
    cells = {name: show(numbers[key], "ms") for name, numbers in seen.items()}
    value = seen["gateway"][key] - seen["direct"][key]
    return Row(what, value, "ms", limit_ms, **cells)


def against_nginx(what: str, seen: dict[str, Numbers], key: str, limit: float) -> Row:
    """Return the row of a cost as a multiple of nginx's."""
    mine = seen["gateway"][key]
    nginx = seen["nginx"][key] if "nginx" in seen else None
    return Row(
        what,
        mine / nginx if nginx else None,
        "x nginx",
        limit,
        gateway=show(mine, "µs"),
        nginx=show(nginx, "µs"),
        note="" if nginx else "no nginx on this machine to compare with",
    )


def per_second(what: str, seen: dict[str, Numbers], key: str, limit: float | None) -> Row:
    """Return the row of a rate; with how busy the server was, for an idle one was not the limit."""
    cells = {name: show(numbers[key], "/s") for name, numbers in seen.items()}
    mine = seen["gateway"]
    return Row(
        what,
        mine[key],
        "/s",
        limit,
        at_least=True,
        note=f"the gateway had work for {mine['busy']:.0%} of the time; well below 100 % the "
        "generator, or another program on that core, was the limit",
        **cells,
    )


def request(effort: Effort) -> list[Row]:
    seen = loop(effort)
    return [added("added time per request, p50", seen, "request_ms", 0.35)]


def throughput(effort: Effort) -> list[Row]:
    seen = loop(effort, connections=16)
    return [
        per_second("requests/s on one core, 16 connections", seen, "requests_per_s", None),
        against_nginx("CPU per request", seen, "cpu_us_per_request", 4.5),
    ]


def first_chunk(effort: Effort) -> list[Row]:
    seen = loop(effort, Order(n=1))
    return [added("added time to first token, p50", seen, "first_ms", 0.8)]


def paced(effort: Effort) -> list[Row]:
    seen = loop(effort, Order(n=CHUNKS, every_ms=PACE_MS), connections=STREAMS)
    return [
        added("added time per chunk, p50", seen, "delay_ms", 0.15),
        against_nginx("CPU per chunk, 10,000 chunks/s", seen, "cpu_us_per_chunk", 2.5),
    ]


def chunks(effort: Effort) -> list[Row]:
    lockstep = loop(effort, Order(n=CHUNKS, lockstep=True), connections=STREAMS)
    flood = loop(effort, Order(n=CHUNKS), connections=STREAMS)
    rate = "chunks_per_s"
    return [
        against_nginx("CPU per chunk, each its own wake-up", lockstep, "cpu_us_per_chunk", 2.5),
        per_second(
            "chunks/s on one core, each its own wake-up", lockstep, rate, LLAMA_ROUTER * 1.5
        ),
        per_second("chunks/s on one core, as many as come", flood, rate, None),
    ]


def leave(effort: Effort) -> list[Row]:
    plain = Job(do="leave", order=Order(hold=True), times=effort.rounds * 4)
    streams = msgspec.structs.replace(plain, stream=True)
    return [
        _leave("the mock engine sees a client leave, stream, p50", streams),
        _leave("the mock engine sees a client leave, plain, p50", plain),
    ]


def _leave(what: str, job: Job) -> Row:
    with everyone() as contenders:
        took = {
            contender.name: _time_to_see(contender, contenders[0], job) for contender in contenders
        }
    return Row(
        what, took["gateway"], "ms", 5.0, **{name: show(ms, "ms") for name, ms in took.items()}
    )


def _time_to_see(contender: Contender, engine: Contender, job: Job) -> float:
    """Return the median time from a client's leaving until the engine knows, in milliseconds."""
    left = stage.run_job(job.to(contender.port, contender.pid))["left"]
    seen = stage.get(engine.port, "/")["left"]
    if left.keys() - seen.keys():
        missed = len(left.keys() - seen.keys())
        raise BenchError(f"the engine was not told of {missed} of {len(left)} clients that left")
    return statistics.median(seen[number] - left[number] for number in left) / 1e6
