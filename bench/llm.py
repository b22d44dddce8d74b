"""The real model's engine: the one the gateway started, and the same one bare."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from bench import stage
from bench.processes import BenchError, cpu_s, running
from xandrouting.engines.llamacpp import KEY_VARIABLE, READY_LINE, RUNNER, Order

MODELS = Path(".cache/models")
CHAT = "/v1/chat/completions"

WATCH_EVERY_S = 0.005
REST_S = 0.15  # an engine that used no CPU for so long does not generate


@dataclass(frozen=True)
class Engine:
    """A running llama.cpp, asked straight."""

    order: Order
    env: Mapping[str, str]
    port: int
    pid: int

    @property
    def key(self) -> str:
        return self.env[KEY_VARIABLE]

    def busy(self) -> bool:
        """Whether one of its slots works, by its own word."""
        slots = call(self.port, "GET", "/slots", key=self.key)
        return any(slot["is_processing"] for slot in slots)

    def free_at(self, timeout_s: float = 60.0) -> float:
        """Wait until no slot works; return when that began, by the monotonic clock.

        `/slots` is asked only once the process has rested: each answer llama.cpp gives wakes
        those that wait for theirs, and it looks for clients that left when none woke for a
        second. Asking on and on would keep it from ever looking.
        """
        worked = time.monotonic()
        used, deadline = cpu_s(self.pid), worked + timeout_s
        while time.monotonic() < deadline:
            time.sleep(WATCH_EVERY_S)
            now, used_now = time.monotonic(), cpu_s(self.pid)
            if used_now > used:
                worked, used = now, used_now
            elif now - worked > REST_S:
                if not self.busy():
                    return worked
                worked = now
        raise BenchError("the engine never became free")


def starter() -> Path:
    """Return the starter model's file."""
    found = next(MODELS.rglob("*.gguf"), None)
    if found is None:
        raise BenchError(f"no model in {MODELS}: run `make bench`, or scripts/fetch_starter.py")
    return found


@contextlib.contextmanager
def copies(*names: str) -> Iterator[Path]:
    """Make a models directory with copies of the starter model, whose pages nobody else maps."""
    with tempfile.TemporaryDirectory(prefix="bench-models-") as folder:
        for name in names:
            shutil.copyfile(starter(), Path(folder, f"{name}.gguf"))
        yield Path(folder)


@contextlib.contextmanager
def gateway(
    *arguments: str, models: Path = MODELS, program: Sequence[str] = stage.GATEWAY
) -> Iterator[stage.Contender]:
    """Run the gateway with the starter model, and no engine yet. Engines run on every core."""
    starter()
    arguments = ("--models-dir", str(models), "--default-ttl", "0", *arguments)
    with stage.gateway(*arguments, program=program) as contender:
        yield contender


def model_of(gateway: stage.Contender) -> str:
    return call(gateway.port, "GET", "/v1/models")["data"][0]["id"]


def load(gateway: stage.Contender, **options: int | str) -> Engine:
    """Load the model anew with these options; return its engine, to be asked straight."""
    unload(gateway)
    body = {"model": model_of(gateway), **options}
    call(gateway.port, "POST", "/v1/models/load", body)
    return engine_of(loaded(gateway))


def engine_of(item: Mapping[str, Any]) -> Engine:
    """Return the engine that `/v1/models/loaded` shows so."""
    process = psutil.Process(item["pid"])
    [file] = {m.path for m in process.memory_maps() if m.path.endswith(".gguf")}
    sockets = process.net_connections("tcp")
    [port] = [s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN]
    order = Order(
        model=file,
        alias=item["path"],
        n_ctx_total=item["n_ctx"] * item["n_parallel"],
        n_parallel=item["n_parallel"],
        n_gpu_layers=item["n_gpu_layers"],
        cache_type_k=item["cache_type_k"],
        cache_type_v=item["cache_type_v"],
    )
    return Engine(order, process.environ(), port, process.pid)


def loaded(gateway: stage.Contender) -> dict[str, Any]:
    """Return what the gateway tells of its only engine."""
    (item,) = call(gateway.port, "GET", "/v1/models/loaded")["models"]
    return item


def unload(gateway: stage.Contender) -> None:
    call(gateway.port, "POST", "/v1/models/unload-all", {"force": True})


@contextlib.contextmanager
def bare(like: Engine, *, warmup: bool = False) -> Iterator[Engine]:
    """Run the same engine with nothing around it; begins once it is ready.

    With `warmup` it runs once before that, as llama.cpp does by itself.
    """
    port = stage.free_port()
    order = replace(like.order, port=str(port), warmup=warmup)
    with running(RUNNER, env=like.env) as process:
        process.tell(order.line())
        process.wait_for(READY_LINE)
        yield Engine(order, like.env, port, process.pid)


def call(
    port: int, method: str, path: str, body: Mapping[str, Any] | None = None, *, key: str = ""
) -> Any:
    """Return the JSON answer of a whole request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120.0)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, _headers(key))
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise BenchError(f"{method} {path}: {answer.status} {text[:300]!r}")
    return json.loads(text)


@contextlib.contextmanager
def asked(port: int, body: Mapping[str, Any], *, key: str = "") -> Iterator[socket.socket]:
    """Send a chat request; the client leaves at the end of the block, whatever came."""
    data = json.dumps(body).encode()
    head = [f"POST {CHAT} HTTP/1.1", f"host: 127.0.0.1:{port}", f"content-length: {len(data)}"]
    head += [f"{name}: {value}" for name, value in _headers(key).items()]
    with socket.create_connection(("127.0.0.1", port), timeout=120.0) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode() + data)
        yield connection


def read_events(connection: socket.socket, count: int) -> bytes:
    """Read on until so many events have begun; return what was read."""
    seen = b""
    while seen.count(b"data: ") < count:
        data = connection.recv(1 << 16)
        if not data:
            raise BenchError(f"the stream ended early: {seen[-300:]!r}")
        seen += data
    return seen


def read_to_end(connection: socket.socket, tail: bytes) -> None:
    """Read the rest of an answer; `tail`: what was read of it last."""
    while not tail.endswith(b"0\r\n\r\n"):
        data = connection.recv(1 << 16)
        if not data:
            raise BenchError(f"the stream ended early: {tail!r}")
        tail = (tail + data)[-300:]


def _headers(key: str) -> dict[str, str]:
    headers = {"content-type": "application/json"}
    return headers | {"authorization": f"Bearer {key}"} if key else headers
