"""The server as a process: its socket, its loop, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Coroutine, Generator, MutableMapping
from dataclasses import dataclass
from typing import Any

import uvicorn
import uvloop

from xandrouting.app import Asgi, Gateway
from xandrouting.backends import look
from xandrouting.core.model import Backend
from xandrouting.engines.llamacpp import LIST_DEVICES
from xandrouting.http.inference import Scope
from xandrouting.http.protocol import Protocol
from xandrouting.launch.devices import cuda_devices
from xandrouting.launch.local import LocalLauncher
from xandrouting.launch.nvml import open_gpus, visible_cards
from xandrouting.launch.sweep import sweep
from xandrouting.launch.turns import come_in_batches
from xandrouting.settings import Settings
from xandrouting.telemetry.logs import LogBook

log = logging.getLogger(__name__)

HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM)
MIN_FILES = 4096  # open files: each request holds two sockets


class _Server(uvicorn.Server):
    """uvicorn, with its signal handling left to `serve`."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound socket and what to call it."""

    socket: socket.socket
    url: str


def listen(host: str, port: int) -> Listener:
    """Bind the server's socket.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.create_server(address[:2], family=family, backlog=4096)
    shown = f"[{host}]" if family is socket.AF_INET6 else host
    return Listener(bound, f"http://{shown}:{bound.getsockname()[1]}")


async def serve(settings: Settings, listener: Listener, on_ready: Callable[[Gateway], None]) -> int:
    """Serve until a signal; return the exit status.

    The first signal refuses new work, lets running requests end, ends the engines and
    returns 0. A second one ends the process at once; the guards end the engines.

    Raises:
        CannotStart: the settings ask for more than this machine has.
    """
    logs = LogBook()
    with logs.heard():
        return await _serve(settings, listener, on_ready, logs)


async def _serve(
    settings: Settings, listener: Listener, on_ready: Callable[[Gateway], None], logs: LogBook
) -> int:
    ended = await asyncio.to_thread(sweep, settings.data_dir / "run")
    if ended:
        log.warning("engines of a killed server ended count=%d", ended)
    cards = visible_cards(os.environ)
    node = LocalLauncher(settings.data_dir / "run", open_gpus(visible=cards), logs.hear)
    survey = await node.survey()
    engines = look(
        survey.devices,
        llamacpp_cards=await cuda_devices(LIST_DEVICES),
        cards=cards or (),
        data_dir=settings.data_dir,
        drain_s=settings.shutdown_grace_s,
        fast_start=settings.vllm_fast_start,
        sleeps=settings.soft_idle_s is not None,
        vllm_spare=Backend.VLLM in settings.spares,
    )
    async with Gateway(settings, engines, node, survey, logs) as gateway:
        server = _Server(
            uvicorn.Config(
                gateway.asgi,
                http=Protocol,
                loop="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=5,
                backlog=4096,
            )
        )
        asked = _on_signals()
        serving = asyncio.create_task(server.serve(sockets=[listener.socket]))
        stopping = asyncio.create_task(asked.wait())
        await server.accepting.wait()
        await warm_up(gateway.asgi)
        await _unless(stopping, gateway.fetch_starter())
        if not stopping.done():
            on_ready(gateway)
            await gateway.preload()
        gc.freeze()  # what is here now stays: later collections need not look at it
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        log.info("server stopping grace_s=%.0f", settings.shutdown_grace_s)
        # Together: while a mover ends, nothing new is let in either.
        await asyncio.gather(
            gateway.pool.drain(settings.shutdown_grace_s),
            gateway.downloads.aclose(),
            gateway.preloads.aclose(),
        )
        gateway.close_streams()
        server.should_exit = True
        await serving
        stopping.cancel()
    return 0


async def _unless(stopping: asyncio.Task[bool], work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, or leave it where it is as soon as the server is to stop."""
    task = asyncio.create_task(work)
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    elif not task.cancelled():
        task.result()


async def warm_up(app: Asgi) -> None:
    """Ask for the health once: FastAPI builds its routes at the first request, for 0.3 s."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/health",
        "raw_path": b"/health",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_: MutableMapping[str, Any]) -> None:
        pass

    await app(scope, receive, send)


def _on_signals() -> asyncio.Event:
    """Return an event that the first signal sets; a second one ends the process."""
    asked = asyncio.Event()

    def on_signal(number: int) -> None:
        if asked.is_set():
            logging.shutdown()
            os._exit(128 + number)
        asked.set()

    for number in HANDLED_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return asked


def raise_file_limit() -> None:
    """Let the process open as many files as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < MIN_FILES:
        log.warning("few open files are allowed limit=%d wanted=%d", soft, MIN_FILES)


def run(settings: Settings, on_ready: Callable[[Gateway], None], listener: Listener) -> int:
    """Run the server on a loop of its own until it ends; return the exit status."""
    raise_file_limit()
    come_in_batches(on=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(settings, listener, on_ready))
