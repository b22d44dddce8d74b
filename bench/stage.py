"""Who is measured: the mock engine itself, the gateway in front of it, nginx in front of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from bench.load import Job
from bench.processes import LOAD_CORE, SERVER_CORE, BenchError, Process, running

Numbers = Mapping[str, float]

GATEWAY = (str(Path(sys.executable).with_name("xandrouting")),)
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")

_NGINX_CONFIG = """
daemon off; master_process off; worker_rlimit_nofile 16384;
pid {folder}/pid; error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 1000000000; client_body_buffer_size 64k;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream mock {{ server 127.0.0.1:{mock}; keepalive 512; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://mock; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 600s;
    }}
  }}
}}
"""


@dataclass(frozen=True)
class Effort:
    """How long to measure: so many rounds, each of so many seconds where it goes by time."""

    seconds: float
    rounds: int


@dataclass(frozen=True)
class Contender:
    """A server that answers for the mock, or the mock."""

    name: str
    port: int
    pid: int


@contextlib.contextmanager
def mock() -> Iterator[Contender]:
    with running([sys.executable, "-m", "bench.mock"], core=LOAD_CORE) as process:
        yield Contender("direct", int(process.wait_for("ready ")), process.pid)


@contextlib.contextmanager
def gateway(
    *arguments: str, core: int | None = None, program: Sequence[str] = GATEWAY
) -> Iterator[Contender]:
    """Run the gateway as its users do, with a data directory of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        argv = [*program, "serve", "--port", "0", "--data-dir", folder]
        argv += ["--shutdown-grace-s", "0.5", *arguments]
        with running(argv, core=core) as process:
            url = urlsplit(process.wait_for("ready "))
            assert url.port is not None
            yield Contender("gateway", url.port, process.pid)


@contextlib.contextmanager
def gateway_before(engine: Contender) -> Iterator[Contender]:
    """Run the gateway with the mock as its only upstream, and no models."""
    with tempfile.TemporaryDirectory(prefix="bench-") as empty:
        upstream = f"mock=http://127.0.0.1:{engine.port}"
        with gateway("--models-dir", empty, "--upstreams", upstream, core=SERVER_CORE) as contender:
            yield contender


@contextlib.contextmanager
def nginx_before(engine: Contender) -> Iterator[Contender]:
    """Run nginx as one process, relaying as unbuffered as the gateway does."""
    assert NGINX is not None
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        config = Path(folder, "nginx.conf")
        config.write_text(_NGINX_CONFIG.format(folder=folder, mock=engine.port, port=port))
        with running([NGINX, "-p", folder, "-c", str(config)], core=SERVER_CORE) as process:
            wait_until_listening(port)
            yield Contender("nginx", port, process.pid)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return bound.getsockname()[1]


def wait_until_listening(port: int, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise BenchError(f"nobody listens on port {port}") from None
            time.sleep(0.02)
        else:
            return


def run_job(job: Job) -> dict[str, Any]:
    """Run one job of the load generator; return its result."""
    with _generator(job) as process:
        return json.loads(process.line(job.seconds + 60.0))


@contextlib.contextmanager
def opened(job: Job) -> Iterator[None]:
    """Keep the streams of a `hold` or `stall` job open for the length of the block."""
    with _generator(job) as process:
        process.wait_for("open")
        yield
        process.close_stdin()
        process.line()


@contextlib.contextmanager
def _generator(job: Job) -> Iterator[Process]:
    argv = [sys.executable, "-m", "bench.load", msgspec.json.encode(job).decode()]
    with running(argv, core=LOAD_CORE) as process:
        yield process


def in_turn(contenders: Sequence[Contender], job: Job, rounds: int) -> dict[str, Numbers]:
    """Give each contender the job in turn, so many times; return the medians by its name."""
    results: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            mine = job.to(contender.port, contender.pid)
            results[contender.name].append(run_job(mine))
    return {name: medians(taken) for name, taken in results.items()}


def medians(results: Sequence[Mapping[str, float | None]]) -> Numbers:
    """Return the median of each number, over the results that have it."""
    known = {key: [r[key] for r in results if r[key] is not None] for key in results[0]}
    return {key: statistics.median(values) for key, values in known.items() if values}


def get(port: int, path: str) -> Any:
    """Return the JSON answer of a GET."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30.0) as answer:
        return json.load(answer)
