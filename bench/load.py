"""The load generator: one job per process, so that none leaves anything behind.

`python -m bench.load JOB` (see `Job`) prints one line with the result. The mock engine
answers, straight or through a proxy.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from typing import Any

import msgspec
import uvloop

from bench.mock import MARK, STAMP_DIGITS, STEPS, Order
from bench.processes import cpu_s, raise_file_limit

WARM_UP_S = 0.4
BODY_BYTES = 2048
LEAVE_AFTER_S = 0.03

LAST_CHUNK = b"0\r\n\r\n"


class Job(msgspec.Struct, frozen=True):
    """What to do.

    `loop`: each connection sends its next request when the last one is answered.
    `hold`: open the streams, wait for the first chunk of each, keep them until stdin ends.
    `stall`: open the streams, read nothing, keep them until stdin ends.
    `leave`: one request at a time, whose client leaves without an answer.
    """

    do: str
    port: int = 0
    pid: int = 0  # whose CPU time is measured
    engine_port: int = 0  # the mock's own, for the side channel of streams in lockstep
    stream: bool = False
    order: Order = Order()
    connections: int = 1
    seconds: float = 1.0  # of a loop
    times: int = 20  # of leaving

    def to(self, port: int, pid: int) -> Job:
        """Return the same job for this server."""
        return msgspec.structs.replace(self, port=port, pid=pid)


def request_for(job: Job, order: Order) -> bytes:
    """Return a whole request of about `BODY_BYTES`, with the gateway's routing fields in it."""
    fields: dict[str, Any] = {
        "model": "mock/m",
        "backend": "auto",
        "device": "auto",
        "n_ctx": 8192,
        "ttl": 300,
        "stream": job.stream,
        "temperature": 0.7,
        "max_tokens": 256,
        "bench": msgspec.to_builtins(order),
        "messages": [{"role": "system", "content": "You are a helpful assistant."}],
    }
    words = "Hello world, this is some prompt text \u00e9\n"
    missing = BODY_BYTES - len(json.dumps(fields))
    fields["messages"].append({"role": "user", "content": words * (missing // len(words))})
    body = json.dumps(fields).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nuser-agent: bench\r\n"
        b"accept: */*\r\nauthorization: Bearer sk-1234\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b"
    ) % (job.port, len(body), body)


class Tally:
    """What was seen since the last `reset`; times in nanoseconds."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.requests: list[int] = []  # how long each took
        self.first: list[int] = []  # from a request to its first chunk
        self.delays: list[int] = []  # from the making of a chunk to its coming
        self.chunks = 0


class Stepper(asyncio.Protocol):
    """Tells the mock which streams got their chunk: once for all that came in one turn."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._came: list[bytes] = []

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        transport.write(STEPS)

    def came(self, stream: bytes) -> None:
        if not self._came:
            self._loop.call_soon(self._flush)
        self._came.append(stream)

    def _flush(self) -> None:
        self._transport.write(b"".join(self._came))
        self._came.clear()


class Client(asyncio.Protocol):
    """One connection with its requests; `began` is set at the first chunk of the first answer."""

    def __init__(self, job: Job, order: Order, tally: Tally, stepper: Stepper | None) -> None:
        self._request = request_for(job, order)
        self._stream = order.id.to_bytes(4, sys.byteorder) if order.lockstep else b""
        self._tally = tally
        self._stepper = stepper
        self._tail = b""
        self._to_come = -1  # bytes of the answer; -1: its headers are not here, -2: chunked
        self._has_chunk = False
        loop = asyncio.get_running_loop()
        self.began: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()
        self.leaving = False
        self.repeats = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def ask(self) -> None:
        self._to_come = -1
        self._has_chunk = False
        self._sent_at = time.monotonic_ns()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if self._to_come == -1:
            data = self._head(self._tail + data)
            if self._to_come == -1:
                return
        if self._to_come == -2:
            self._chunks(data, now)
            self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
            if self._tail != LAST_CHUNK:
                return
        else:
            self._to_come -= len(data)
            if self._to_come:
                return
        self._tail = b""
        self._tally.requests.append(now - self._sent_at)
        if self.repeats:
            self.ask()

    def _head(self, data: bytes) -> bytes:
        """Read the headers if they are whole; return what follows them."""
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            self._tail = data
            return b""
        self._tail = b""
        head = data[:end].lower()
        if not head.startswith(b"http/1.1 200 "):
            self._fail(data[:300].decode(errors="replace"))
            return b""
        at = head.find(b"content-length:")
        self._to_come = int(head[at + 15 : head.index(b"\r", at)]) if at >= 0 else -2
        return data[end:]

    def _chunks(self, data: bytes, now: int) -> None:
        at = data.find(MARK)
        if at < 0:
            return
        self._tally.chunks += data.count(MARK)
        stamp = data[at + 1 : at + 1 + STAMP_DIGITS]
        if len(stamp) == STAMP_DIGITS:
            self._tally.delays.append(now - int(stamp))
        if self._stepper is not None:
            self._stepper.came(self._stream)
        if not self._has_chunk:
            self._has_chunk = True
            self._tally.first.append(now - self._sent_at)
            if not self.began.done():
                self.began.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.leaving:
            self._fail(f"the connection was closed: {exc}")

    def _fail(self, message: str) -> None:
        if not self.lost.done():
            self.lost.set_result(message)


class Load:
    """Runs a job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tally = Tally()
        self._loop = asyncio.get_running_loop()

    async def run(self) -> dict[str, Any]:
        job = self._job
        if job.do == "leave":
            return await self._leave()
        stepper = None
        if job.order.lockstep:
            _, stepper = await self._loop.create_connection(Stepper, "127.0.0.1", job.engine_port)
            await asyncio.sleep(0.1)  # what is written next must not come with its first word
        clients = [await self._connect(number, stepper) for number in range(job.connections)]
        lost = [client.lost for client in clients]
        work = {"loop": self._closed_loop, "hold": self._hold, "stall": self._stall}[job.do]
        working = self._loop.create_task(work(clients))
        await asyncio.wait({working, *lost}, return_when=asyncio.FIRST_COMPLETED)
        failures = [future.result() for future in lost if future.done()]
        if failures:
            raise SystemExit(f"{len(failures)} connections failed: {failures[0]}")
        return working.result()

    async def _connect(self, number: int, stepper: Stepper | None = None) -> Client:
        order = msgspec.structs.replace(self._job.order, id=number)
        _, client = await self._loop.create_connection(
            lambda: Client(self._job, order, self._tally, stepper), "127.0.0.1", self._job.port
        )
        return client

    async def _closed_loop(self, clients: list[Client]) -> dict[str, Any]:
        for client in clients:
            client.repeats = True
            client.ask()
        await asyncio.sleep(WARM_UP_S)
        self._tally.reset()
        began, busy_s = time.monotonic(), cpu_s(self._job.pid)
        await asyncio.sleep(self._job.seconds)
        seconds, busy_s = time.monotonic() - began, cpu_s(self._job.pid) - busy_s
        tally = self._tally
        return {
            "requests_per_s": len(tally.requests) / seconds,
            "chunks_per_s": tally.chunks / seconds,
            "busy": busy_s / seconds,
            "cpu_us_per_request": _share(busy_s, len(tally.requests)),
            "cpu_us_per_chunk": _share(busy_s, tally.chunks),
            "request_ms": _median_ms(tally.requests),
            "first_ms": _median_ms(tally.first),
            "delay_ms": _median_ms(tally.delays),
        }

    async def _hold(self, clients: list[Client]) -> dict[str, Any]:
        for client in clients:
            client.ask()
        await asyncio.wait({client.began for client in clients})
        return await self._until_told()

    async def _stall(self, clients: list[Client]) -> dict[str, Any]:
        for client in clients:
            client.transport.pause_reading()
            client.ask()
        return await self._until_told()

    async def _until_told(self) -> dict[str, Any]:
        print("open", flush=True)
        await self._loop.run_in_executor(None, sys.stdin.read)
        return {}

    async def _leave(self) -> dict[str, Any]:
        """Return for each request's id when its client left."""
        left = {}
        for number in range(self._job.times):
            order_id = time.monotonic_ns()
            client = await self._connect(order_id)
            client.ask()
            if self._job.stream:
                await client.began
            await asyncio.sleep(LEAVE_AFTER_S + number / 1000)
            client.leaving = True
            left[order_id] = time.monotonic_ns()
            client.transport.close()
            await asyncio.sleep(LEAVE_AFTER_S)
        return {"left": left}


def _share(busy_s: float, count: int) -> float | None:
    return busy_s * 1e6 / count if count else None


def _median_ms(times_ns: list[int]) -> float | None:
    return statistics.median(times_ns) / 1e6 if times_ns else None


async def main(job: Job) -> dict[str, Any]:
    return await Load(job).run()


if __name__ == "__main__":
    raise_file_limit()
    gc.disable()  # no pause of its own in what it measures
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(main(msgspec.json.decode(sys.argv[1], type=Job)))), flush=True)
